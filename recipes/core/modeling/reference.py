"""Reference log-probabilities of rows, computed once: what no cache has is shared out to the ranks and kept."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers.integrations.deepspeed import propagate_args_to_deepspeed
from trl import DPOConfig, ModelConfig
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from core.modeling.policy import load_policy, share_prefixes
from core.modeling.prefix import (
    HEAD_OUTPUTS,
    PaddedCollator,
    PrefixSharedCollator,
    causal_lm_of,
    collator_for,
    enable_prefix_sharing,
    pair_logps,
)
from core.modeling.quantised import is_quantised
from core.modeling.reference_cache import ReferenceCache, open_cache, sequence_keys
from core.runtime.errors import RecipeError

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

logger = logging.getLogger(__name__)

# The reference forward of a list of rows: chosen and rejected log-probabilities, shapes (B,) and (B,).
Forward = Callable[[list[dict[str, Any]]], tuple[torch.Tensor, torch.Tensor]]


def reference_logps(
    model: nn.Module,
    accelerator: Accelerator,
    rows: Dataset,
    cache: ReferenceCache,
    collator: PaddedCollator | PrefixSharedCollator,
    *,
    batch_size: int,
    description: str = "Reference log-probabilities",
) -> tuple[np.ndarray, np.ndarray]:
    """
    Token-summed log-probabilities of every row's answers under a model that is not trained yet: with LoRA, under the
    base model. With DeepSpeed it takes an engine of its own, which is gone afterwards; where all rows are cached,
    none is made.

    Args:
        model: the policy, ready for `pair_logps` over the collator's batches, and not yet prepared for training.
        accelerator: the process group; its autocast is the forward's.
        rows: the same on every rank, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        cache: of this model (`open_cache`).
        collator: how pairs are laid out.
        batch_size: pairs in the first micro-batch; later, shorter ones hold as many as give no more tokens.
        description: of the progress bar.

    Returns:
        Chosen and rejected log-probabilities in nats, float64, shapes (rows,) and (rows,).

    Raises:
        RecipeError: the model gives a row NaN or infinity.
    """
    padded = isinstance(collator, PaddedCollator)
    with contextlib.closing(Scorer(model, accelerator, collator)) as scorer:
        return cached_logps(rows, cache, scorer, accelerator, batch_size, padded=padded, description=description)


def reference_gaps(
    rows: Dataset,
    settings: ModelConfig,
    args: DPOConfig,
    *,
    trained: list[str] | None = None,
    prefix_sharing: bool,
    cache_folder: str | None,
    pad_token_id: int,
    per_token: bool = False,
) -> np.ndarray:
    """
    The signal `reference_gap` of a selection: log π_ref(y_w) − log π_ref(y_l) of tokenised rows in nats; `per_token`
    divides each by its answer's tokens first (`reference_gap_per_token`).

    The pass fills the reference cache, so the run that follows computes none of these rows again.

    Args:
        rows: see `reference_logps`. N of them.
        settings: of the model that is to be trained.
        args: precision, DeepSpeed, batch sizes and length limit of that run.
        trained: the recipe's `trainable_parameters`, which are held in another dtype.
        prefix_sharing, cache_folder: the recipe's `prefix_sharing` and `reference_cache`.
        pad_token_id: where pairs are padded.

    Returns:
        Shape: (N,), float64.
    """
    model = load_policy(settings, trained, args)
    sharing = share_prefixes(prefix_sharing, model, args.max_length)
    add_fused_lm_head(causal_lm_of(model), outputs=HEAD_OUTPUTS)
    if sharing:
        enable_prefix_sharing(model)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, deepspeed_plugin=args.deepspeed_plugin)
    if args.deepspeed_plugin is None:
        if not is_quantised(causal_lm_of(model)):  # which is there
            model.to(accelerator.device)
    else:
        propagate_args_to_deepspeed(accelerator, args)
    chosen, rejected = reference_logps(
        model,
        accelerator,
        rows,
        open_cache(cache_folder, settings, args, model),
        collator_for(model, sharing, pad_token_id),
        batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
        description="Reference log-probabilities (selection)",
    )
    # The run's trainer comes after: no model is to stay beside its own, and DeepSpeed takes one Accelerator at a time.
    del model, accelerator
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    AcceleratorState._reset_state()
    if per_token:
        chosen, rejected = (
            logps / np.maximum([len(ids) for ids in rows[f"{answer}_ids"]], 1)
            for logps, answer in ((chosen, "chosen"), (rejected, "rejected"))
        )
    return chosen - rejected


@contextlib.contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """
    Let the policy's forward be the reference's: without gradients, and with LoRA the base model's alone. A policy that
    goes on with an adapter is its own reference, before the first update.
    """
    fresh = isinstance(model, PeftModel) and not getattr(model, "is_its_own_reference", False)
    with torch.no_grad(), model.disable_adapter() if fresh else contextlib.nullcontext():
        yield


class Scorer:
    """A `Forward` of `model`, under DeepSpeed through an engine that its first call makes and `close` ends."""

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, collator: PaddedCollator | PrefixSharedCollator
    ) -> None:
        self.model, self.accelerator, self.collator = model, accelerator, collator
        self.engine: Any = None

    def __call__(self, examples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.engine is None and self.accelerator.state.deepspeed_plugin is not None:
            # Before training DeepSpeed's parameters are on the CPU, or sharded.
            self.engine = prepare_deepspeed(self.model, self.accelerator)
        tokens = [{name: example[name] for name in TOKEN_COLUMNS} for example in examples]
        batch = send_to_device(self.collator(tokens), self.accelerator.device)
        with as_reference(self.model), self.accelerator.autocast():
            outputs = pair_logps(self.engine or self.model, batch, statistics=False)
        return outputs.chosen_logps, outputs.rejected_logps

    def close(self) -> None:
        """Take ZeRO-3's hooks off again: beside those of training they fail if they have seen but one forward."""
        engine, self.engine = self.engine, None
        if engine is None:
            return
        engine.empty_partition_cache()
        engine.destroy()
        for module in engine.module.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):  # they call this engine, and the next one would keep them
                module.__dict__.pop(name, None)


def cached_logps(
    dataset: Dataset,
    cache: ReferenceCache,
    compute: Forward,
    accelerator: Accelerator,
    batch_size: int,
    *,
    padded: bool = False,
    description: str = "Reference log-probabilities",
    flush_seconds: float = 60.0,
) -> tuple[np.ndarray, np.ndarray]:
    """
    What `compute` gives for every row, from the cache where it is there.

    What is missing is computed longest first, so that a lack of memory shows at once, and each micro-batch is dealt to
    the ranks in turn. Each rank writes what it computed to its own disk and reads what is there; what any rank has is
    then shared with all, so nodes need no common disk. No random number is drawn.

    Args:
        compute: every rank calls it equally often, as ZeRO-3 needs; when all rows are cached, never.
        padded: each answer repeats its prompt and is padded to the micro-batch's longest; else prompts are shared.
        flush_seconds: at most this much work is lost in a kill.

    The rest, the result and the errors: see `reference_logps`.
    """
    keys, lengths = sequence_keys(dataset)
    # Equal sequences get one number, in order of first appearance.
    numbers: dict[bytes, int] = {}
    sequences = [[numbers.setdefault(key, len(numbers)) for key in pair] for pair in keys]
    sequences = np.array(sequences, dtype=np.int64).reshape(-1, 2)
    distinct = list(numbers)
    _, first = np.unique(sequences, return_index=True)

    logps = cache.lookup(distinct)
    logps = _max_over_ranks(np.where(np.isnan(logps), -np.inf, logps), accelerator)
    missing = np.isneginf(logps)
    rows = np.unique(first[missing] // 2)  # where each missing sequence appears first
    logger.info("%s: %d of %d pairs are cached", description, len(dataset) - len(rows), len(dataset))

    done = np.zeros(len(distinct), dtype=bool)  # computed here, and not yet on the disk
    flush = partial(_flush, cache, distinct, logps, done)
    batches = _micro_batches(rows, lengths, batch_size, padded)
    rank, world_size, flushed = accelerator.process_index, accelerator.num_processes, time.monotonic()
    bar = tqdm(total=len(rows), desc=description, unit="pair", disable=rank > 0 or not len(rows))
    try:
        for start in range(0, len(batches), world_size):
            # Beyond the last micro-batch a rank repeats it, only to keep in step with the others.
            batch = batches[min(start + rank, len(batches) - 1)]
            with torch.no_grad():
                computed = torch.stack(compute([dataset[int(row)] for row in batch]), dim=1).double().cpu().numpy()
            new = missing[sequences[batch]]
            logps[sequences[batch][new]] = np.where(np.isfinite(computed), computed, np.inf)[new]
            done[sequences[batch][new]] = True
            bar.update(sum(len(batch) for batch in batches[start : start + world_size]))
            if time.monotonic() - flushed > flush_seconds:
                flush()
                flushed = time.monotonic()
    finally:
        flush()
        bar.close()
    logps = _max_over_ranks(logps, accelerator)
    chosen, rejected = logps[sequences].T.copy()
    broken = np.flatnonzero(~np.isfinite(chosen + rejected))
    if len(broken):
        row = int(broken[0])
        name = f"row {row}" + (f" ({dataset[row]['row_id']})" if "row_id" in dataset.column_names else "")
        raise RecipeError(
            f"the reference model gives {len(broken):,} of {len(dataset):,} rows no finite log-probability, the first "
            f"is {name}: check its weights for NaN, and whether its dtype holds them"
        )
    return chosen, rejected


def _flush(cache: ReferenceCache, keys: list[bytes], logps: np.ndarray, done: np.ndarray) -> None:
    """Put on the disk what is done and finite, and mark it as no longer to do."""
    keep = np.flatnonzero(done & np.isfinite(logps))
    cache.append([keys[i] for i in keep], logps[keep])
    done[:] = False


def _micro_batches(rows: np.ndarray, lengths: np.ndarray, batch_size: int, padded: bool) -> list[np.ndarray]:
    """Split the rows, longest first, into micro-batches of no more tokens than the longest `batch_size` pairs have."""
    k, n, m = lengths[rows].T
    tokens = k + np.maximum(n, m) if padded else k + n + m  # of an answer's row, of which each pair has two; of a pair
    order = np.argsort(-tokens, kind="stable")
    rows, tokens = rows[order], tokens[order]
    budget = tokens[:1].sum() * batch_size if padded else tokens[:batch_size].sum()
    start, used, cuts = 0, 0, []
    for position, length in enumerate(tokens):
        used = tokens[start] * (position - start + 1) if padded else used + length
        if used > budget:
            cuts.append(position)
            start, used = position, length
    return np.split(rows, cuts) if len(rows) else []


def _max_over_ranks(values: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """The greatest of all ranks' values, bit for bit, so that −∞ marks what a rank lacks and +∞ what is broken."""
    if accelerator.num_processes == 1:
        return values
    tensor = torch.from_numpy(values).to(accelerator.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu().numpy()
