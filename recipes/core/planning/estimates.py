"""What a run would take, for `check.py`: updates, tokens, memory and disk. Shown, and what does not fit collected."""

import math

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, SFTConfig

from core.config.parsing import Run
from core.data.tokens import token_lengths
from core.modeling.precision import Precision
from core.modeling.skeleton import Skeleton
from core.planning.disk import Saved, room_for, updates_in_all
from core.planning.findings import Findings
from core.planning.inspection import inspect_conversations, inspect_pairs
from core.planning.memory import PROOF, Part, Work, phases, states
from core.planning.memory_trace import FakeModel, MicroBatch, largest_micro_batch
from core.reporting.tables import print_table
from core.runtime.errors import first_line
from core.runtime.launching import Launch
from core.selection.pairs import Pairs
from core.selection.replay import ReplaySampler
from core.training.throughput import GIB


def inspect_rows(
    resolved: Run,
    launch: Launch,
    tokenizer: PreTrainedTokenizerBase | None,
    shared: bool,
    findings: Findings,
) -> tuple[int, MicroBatch | None]:
    """
    Show the rows, the batch and the steps.

    Returns:
        The updates of the whole run, and the largest micro-batch; None where no row could be tokenised.
    """
    steps, largest = 1, None
    if resolved.kind == "dpo":
        train = inspect_pairs(resolved, tokenizer, findings)
        if train is not None:
            steps, largest = inspect_batch(resolved, launch, train, shared, findings)
    else:
        count, lengths = inspect_conversations(resolved, tokenizer, findings)
        if count:
            steps, largest = inspect_sft_batch(resolved, launch, count, lengths, shared)
    return steps, largest


def show_batch(resolved: Run, launch: Launch, rows: str, updates: int) -> int:
    """The size of an update and the number of them; returns the latter. `updates`: in an epoch."""
    args = resolved.training
    batch, steps, n = args.per_device_train_batch_size, args.gradient_accumulation_steps, launch.world_size
    total = updates_in_all(args, updates)
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
    lengths = token_lengths(train.dataset) if known else np.ones((len(train.dataset), 3), int)
    sampler = findings.attempt(
        ReplaySampler,
        train.is_buffer,
        lengths.sum(axis=1),
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
    padded = 2 * (k + np.maximum(n, m))[order].max(axis=-1).sum() * order.shape[-1]
    tokens = int((k + n + m - 1)[order].sum() if shared else padded)
    saved = f", {1 - tokens / padded:.0%} fewer than padded" if shared else ""
    print(f"Tokens: {tokens:,} an epoch, {tokens // sampler.updates:,} an update on all devices{saved}")
    return total, largest_micro_batch(lengths, order, shared)


def inspect_sft_batch(
    resolved: Run, launch: Launch, count: int, lengths: np.ndarray, padding_free: bool
) -> tuple[int, MicroBatch | None]:
    """
    The same of an SFT run with `count` conversations, of whose tokens `lengths` are a sample. Which of them meet is
    TRL's to draw: the largest micro-batch is that of the longest.
    """
    args = resolved.training
    micro_batches = math.ceil(math.ceil(count / args.per_device_train_batch_size) / launch.world_size)
    updates = math.ceil(micro_batches / args.gradient_accumulation_steps)
    total = show_batch(resolved, launch, "conversations", updates)
    if not len(lengths):
        return total, None
    longest = np.sort(lengths)[-min(args.per_device_train_batch_size, count) :]
    return total, conversations(longest.tolist(), padding_free, args)


def conversations(lengths: list[int], padding_free: bool, args: SFTConfig) -> MicroBatch:
    """A micro-batch of conversations of so many tokens."""
    if padding_free:
        return MicroBatch(tuple((1, length, 0) for length in lengths), summed=args.loss_type == "nll")
    return MicroBatch(rows=len(lengths), length=max(lengths))


def worst_micro_batch(resolved: Run, shared: bool) -> MicroBatch | None:
    """Every row fills max_length."""
    rows, length = resolved.training.per_device_train_batch_size, resolved.training.max_length
    if length is None:
        return None
    if resolved.kind == "sft":
        return conversations([length] * rows, shared, resolved.training)
    if shared:
        half = length // 2
        return MicroBatch(((half, length - half, length - half),) * rows)
    return MicroBatch(rows=rows * 2, length=length)


# -------------------------------------------------------------------------------------------------- memory and disk


def inspect_memory(
    resolved: Run,
    launch: Launch,
    model: Skeleton,
    batch: MicroBatch | None,
    precision: Precision,
    limit: float | None,
    findings: Findings,
) -> None:
    """
    Print the estimate and its formula, and hold the peak against the device's memory.

    Args:
        batch: the largest micro-batch; None: unknown, and nothing is estimated.
        limit: bytes of a device; None: unknown.
    """
    if batch is None:
        return
    args = resolved.training
    live = resolved.kind == "dpo" and not (
        args.precompute_ref_log_probs or resolved.model.use_peft or resolved.recipe.margin.reference_free
    )
    adapter = bool(resolved.model.use_peft)
    work = Work(launch, precision, args.optim, live, adapter, model.quantised, model.quantised_bytes)
    try:
        traced, proof = trace(args, launch, model, batch, precision, whole=not adapter or launch.zero_stage == 3)
    except Exception as error:  # of a model that torch cannot run without values; the run itself is none the worse
        findings.note(f"memory: could not be traced: {first_line(error)}; the peak below is without activations")
        traced = proof = 0
    lasting = states(model.total, model.trained, work)
    passing = phases(model.total, model.trained, traced, proof, work)
    largest = max((part for part in passing if not part.on_host), key=lambda part: part.bytes)
    peak = sum(part.bytes for part in lasting if not part.on_host) + largest.bytes
    device = "process" if launch.use_cpu else "GPU"
    most = "rank 0" if largest.name == PROOF and launch.world_size > 1 else f"each {device}"
    share = model.trained / model.total
    print(f"\nParameters: {model.total:,}, of which {model.trained:,} are trained ({share:.1%})")
    if model.quantised:
        print(f"Quantised: {model.quantised:,} of them, {model.quantised_bytes / model.quantised:.3f} bytes each")

    def line(part: Part) -> list[str]:
        return [part.name + (" (on the host)" if part.on_host else ""), part.formula, f"{part.bytes / GIB:.2f}"]

    rows = [line(part) for part in lasting] + [["then one of", "", "–"]] + [line(part) for part in passing]
    rows.append([f"peak of {most}", "the lasting parts + the largest of the others", f"{peak / GIB:.2f}"])
    print_table(
        f"Memory of each {device} ({launch}; largest micro-batch {batch.tokens:,} tokens)",
        ["Part", "Formula", "GiB"],
        rows,
    )
    if limit is not None and peak > limit:
        findings.fault(
            f"memory: {most} needs about {peak / GIB:.1f} GiB and has {limit / GIB:.1f} GiB; take "
            "more GPUs or accelerate_configs/zero3-offload.yaml, a smaller per_device_train_batch_size or max_length, "
            "trainable_parameters, or gradient_checkpointing"
        )


def trace(
    args: DPOConfig | SFTConfig,
    launch: Launch,
    model: Skeleton,
    batch: MicroBatch,
    precision: Precision,
    whole: bool,
) -> tuple[int, int]:
    """
    Bytes of the largest micro-batch, and of the proof of what was saved, which runs a model where that is saved whole;
    the skeleton is of no use after it.
    """
    fake = FakeModel(model)
    kwargs = args.activation_checkpointing_kwargs or {"use_reentrant": False}  # what transformers puts for None
    traced = fake.trace(
        batch,
        checkpointing=kwargs if args.activation_checkpointing else None,
        gradients_kept=not launch.zero_stage,
        accumulates=args.gradient_accumulation_steps > 1,
        autocast=precision.autocast and torch.bfloat16,  # of fp16's size, which no CPU trace computes in,
    )
    return traced, fake.trace_proof(batch.longest) if whole else 0


def inspect_disk(
    resolved: Run, launch: Launch, model: Skeleton, precision: Precision, steps: int, findings: Findings
) -> None:
    """What checkpoints and weights take, against what is free."""
    saved = Saved(
        model.total,
        model.trained,
        precision.frozen.itemsize,
        launch.zero_stage,
        bool(resolved.model.use_peft),
        precision.trained.itemsize,
    )
    room = room_for(saved, resolved.training, steps)
    print(f"\nDisk: {room}")
    findings.attempt(room.check, resolved.training.output_dir)
