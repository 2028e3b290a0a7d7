"""What a run would take, for `check.py`: updates, tokens, memory and disk. Shown, and what does not fit collected."""

import math

import numpy as np
import torch
from transformers import PretrainedConfig

from core.config.parsing import Run
from core.data.tokens import token_lengths
from core.modeling.prefix import unsupported_reason
from core.planning.disk import Saved, bytes_there, check_disk, disk_needed
from core.planning.findings import Findings
from core.planning.memory import Part, Work, phases, states
from core.planning.memory_trace import FakeModel, MicroBatch, largest_micro_batch
from core.reporting.tables import print_table
from core.runtime.launching import Launch
from core.selection.pairs import Pairs
from core.selection.replay import ReplaySampler
from core.training.throughput import GIB


def show_batch(resolved: Run, launch: Launch, rows: str, updates: int) -> int:
    """The size of an update and the number of them; returns the latter. `updates`: in an epoch."""
    args = resolved.training
    batch, steps, n = args.per_device_train_batch_size, args.gradient_accumulation_steps, launch.world_size
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    warmup = math.ceil(args.warmup_steps * total) if args.warmup_steps < 1 else int(args.warmup_steps)
    size = f"{batch} per device x {steps} accumulation x {n} process{'es' if n > 1 else ''} = {batch * steps * n}"
    print(f"\nBatch: {size} {rows} per update")
    print(f"Steps: {updates:,} updates an epoch, {total:,} in all, of which {warmup:,} warm up")
    return total


def inspect_batch(
    resolved: Run, launch: Launch, train: Pairs, shared: bool, findings: Findings
) -> tuple[int, MicroBatch | None]:
    """Batch, steps and tokens of a preference run; returns the steps and the largest micro-batch (None: unknown)."""
    recipe, args = resolved.recipe, resolved.training
    known = "prompt_ids" in train.dataset.column_names
    lengths = token_lengths(train.dataset) if known else None
    sampler = findings.attempt(
        ReplaySampler,
        train.is_buffer,
        lengths.sum(axis=1) if known else np.ones(len(train.dataset)),
        task=recipe.selection.replay.task,
        buffer=recipe.selection.replay.buffer,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world_size=launch.world_size,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )
    if sampler is None:
        return 1, None
    task, buffer = (count * sampler.micro_batches for count in sampler.per_micro_batch)
    rows = f"pairs ({task} task + {buffer} buffer)" if buffer else "pairs"
    total = show_batch(resolved, launch, rows, sampler.updates)
    if not known:
        return total, None
    order, (k, n, m) = sampler.order(0), lengths.T
    pairs = k + n + m - 1
    padded = 2 * (k + np.maximum(n, m))[order].max(axis=-1).sum() * order.shape[-1]
    tokens = int(pairs[order].sum() if shared else padded)
    saved = f", {1 - tokens / padded:.0%} fewer than padded" if shared else ""
    print(f"Tokens: {tokens:,} an epoch, {tokens // sampler.updates:,} an update on all devices{saved}")
    return total, largest_micro_batch(lengths, order, shared)


def inspect_sft_batch(resolved: Run, launch: Launch, count: int, longest: int | None) -> tuple[int, MicroBatch | None]:
    """The same of an SFT run with `count` conversations, the longest of `longest` tokens; rows are padded."""
    args = resolved.training
    micro_batches = math.ceil(math.ceil(count / args.per_device_train_batch_size) / launch.world_size)
    updates = math.ceil(micro_batches / args.gradient_accumulation_steps)
    total = show_batch(resolved, launch, "conversations", updates)
    return total, longest and MicroBatch(rows=args.per_device_train_batch_size, length=longest)


def shares_prefixes(resolved: Run, model: FakeModel, findings: Findings) -> bool:
    """Whether pairs share their prompts, as `policy.share_prefixes` decides it."""
    if not resolved.recipe.prefix_sharing:
        return False
    reason = unsupported_reason(model.policy, resolved.training.max_length)
    if reason:
        findings.note(f"prefix_sharing falls back to padded pairs: {reason}")
    return reason is None


# -------------------------------------------------------------------------------------------------- memory and disk


def build_model(resolved: Run, config: PretrainedConfig, findings: Findings) -> FakeModel | None:
    """The policy without its weights."""
    model = resolved.model
    dtype = (config.dtype or torch.float32) if model.dtype == "auto" else getattr(torch, model.dtype)
    return findings.attempt(FakeModel, config, model, resolved.recipe.trainable_parameters, dtype)


def worst_micro_batch(resolved: Run, shared: bool) -> MicroBatch | None:
    """Where no row could be tokenised: every row fills max_length."""
    rows, length = resolved.training.per_device_train_batch_size, resolved.training.max_length
    if length is None:
        return None
    if shared:
        half = length // 2
        return MicroBatch(((half, length - half, length - half),) * rows)
    return MicroBatch(rows=rows * (2 if resolved.kind == "dpo" else 1), length=length)


def inspect_memory(
    resolved: Run,
    launch: Launch,
    model: FakeModel,
    batch: MicroBatch,
    half: bool,
    limit: float | None,
    findings: Findings,
) -> float:
    """
    Print the estimate and its formula; returns the peak in bytes.

    Args:
        batch: the largest micro-batch.
        half: the run has bf16 or fp16.
        limit: bytes of a device; None: unknown.
    """
    args, dtype = resolved.training, model.causal_lm.dtype
    live = resolved.kind == "dpo" and not (
        args.precompute_ref_log_probs or resolved.model.use_peft or resolved.recipe.margin.reference_free
    )
    work = Work(launch, half, dtype.itemsize, args.optim, live)
    kwargs = args.activation_checkpointing_kwargs or {"use_reentrant": False}  # what transformers puts for None
    traced = model.trace(
        batch,
        checkpointing=kwargs if args.activation_checkpointing else None,
        gradients_kept=not launch.zero_stage,
        accumulates=args.gradient_accumulation_steps > 1,
        autocast=torch.bfloat16 if half and not launch.zero_stage else None,
    )
    proof = model.trace_proof(batch.longest)
    lasting = states(model.total, model.trained, work)
    passing = phases(model.total, model.trained, traced, proof, work)
    peak = sum(part.bytes for part in lasting if not part.on_host)
    peak += max(part.bytes for part in passing if not part.on_host)
    device = "process" if launch.use_cpu else "GPU"
    share = model.trained / model.total
    print(f"\nParameters: {model.total:,}, of which {model.trained:,} are trained ({share:.1%})")

    def line(part: Part) -> list[str]:
        return [part.name + (" (on the host)" if part.on_host else ""), part.formula, f"{part.bytes / GIB:.2f}"]

    rows = [line(part) for part in lasting] + [["then one of", "", "–"]] + [line(part) for part in passing]
    rows.append(["peak", "the lasting parts + the largest of the others", f"{peak / GIB:.2f}"])
    print_table(
        f"Memory of each {device} ({launch}; largest micro-batch {batch.tokens:,} tokens)",
        ["Part", "Formula", "GiB"],
        rows,
    )
    if limit is not None and peak > limit:
        findings.fault(
            f"memory: each {device} needs about {peak / GIB:.1f} GiB and has {limit / GIB:.1f} GiB; take "
            "more GPUs or accelerate_configs/zero3-offload.yaml, a smaller per_device_train_batch_size or max_length, "
            "trainable_parameters, or gradient_checkpointing"
        )
    return peak


def inspect_disk(resolved: Run, launch: Launch, model: FakeModel, half: bool, steps: int, findings: Findings) -> None:
    """What checkpoints and weights take, against what is free."""
    width = 2 if launch.zero_stage and half else model.causal_lm.dtype.itemsize
    saved = Saved(model.total, model.trained, width, launch.zero_stage, bool(resolved.model.use_peft))
    needed, what = disk_needed(saved, resolved.training, steps)
    there = bytes_there(resolved.training, steps)
    known = f", of which {there / 1e9:.1f} GB are there" if there else ""
    print(f"\nDisk: {what}: {needed / 1e9:.1f} GB{known}")
    findings.attempt(check_disk, resolved.training.output_dir, needed, what, there)
