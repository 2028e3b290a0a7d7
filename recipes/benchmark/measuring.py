"""Stock `trl.DPOTrainer` and this project's trainer in turn, on the same rows in the same micro-batches; selection."""

import copy
import ctypes
import gc
import os
import re
import tempfile
import time
import uuid
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback
from trl import DPOTrainer

from benchmark.generated import LENGTHS, Workload, labelled_rows, train_tokenizer
from core.config.schema import Hygiene, Quotas, Replay, Score, Selection
from core.data.preferences import FEATURES
from core.data.tokens import token_lengths, tokenize_rows, with_system_message
from core.modeling.parameters import select_parameters
from core.modeling.precision import hold, precision_of
from core.modeling.prefix import unsupported_reason
from core.modeling.reference_cache import ReferenceCache
from core.objective.presets import Margin
from core.runtime.errors import RecipeError
from core.selection.buffer import select_rows
from core.training.throughput import GIB
from core.training.trainer import ShiftedMarginTrainer

SIDES = STOCK, HERE = "stock TRL", "here"
STEP, REFERENCE, PEAK = "training step, ms/pair", "reference pass, ms/pair", "peak memory, GiB"
LIBC = ctypes.CDLL(None)


def compare(work: Workload, rounds: int) -> dict[str, Any]:
    """
    Run both trainers once for their peak memory, then `rounds` times in turn for their times, always from the same
    weights and with an empty reference cache. Who begins changes from round to round.

    Returns:
        What bench.json holds: `title`; `table`, of each cost both sides, their ratio, and the ratio that the number
        of tokens alone would give (null where pairs share nothing); `loss_gap`, the largest difference between the
        losses of a micro-batch; and `rounds`, the runs themselves (`run`).

    Raises:
        RecipeError: the losses of the two trainers differ, so their times say nothing.
    """
    peaks = {}
    for side in SIDES:
        with PeakMemory() as memory:
            run(work, side)
        peaks[side] = memory.peak_bytes / GIB
    if not torch.cuda.is_available():
        torch.ones(int(max(peaks.values()) * GIB), dtype=torch.uint8)  # memory that the timed runs find there
    runs = [{side: run(work, side) for side in SIDES[:: 1 if index % 2 == 0 else -1]} for index in range(rounds)]
    losses = np.array([[both[side]["losses"] for side in SIDES] for both in runs])
    gap = float(np.abs(losses[:, 0] - losses[:, 1]).max())
    if not gap <= (1e-3 if work.precision == "float32" else 0.1):
        raise RecipeError(
            f"{work.title}: the losses of the two trainers differ by up to {gap:.2g}, so their times can't be "
            "compared; look whether the chat template or an added token differs between them"
        )
    bounds = {}
    if runs[0][HERE]["sharing"]:
        lengths, batch = token_lengths(work.rows), work.args.per_device_train_batch_size
        bounds = {STEP: token_bound(lengths[work.rows_per_update :], batch), REFERENCE: token_bound(lengths, batch)}
    pairs = {name: [[both[side][name] for side in SIDES] for both in runs] for name in (STEP, REFERENCE)}
    pairs[PEAK] = [[peaks[side] for side in SIDES]]
    table = {}
    for name, values in pairs.items():
        stock, here = map(median, zip(*values, strict=True))
        ratio = median(stock / here for stock, here in values)
        table[name] = {STOCK: stock, HERE: here, "ratio": ratio, "tokens alone": bounds.get(name)}
    return {"title": work.title, "table": table, "loss_gap": gap, "rounds": runs}


def token_bound(lengths: np.ndarray, batch_size: int) -> float:
    """
    How many times fewer tokens shared pairs have than padded ones: 2·B·max(k + max(n, m)) for each micro-batch of B
    pairs of k prompt, n chosen and m rejected tokens, against Σ (k + n + m − 1).

    Args:
        lengths: k, n and m of each row, micro-batch after micro-batch. Shape: (rows, 3).
    """
    k, n, m = np.moveaxis(lengths.reshape(-1, batch_size, 3), -1, 0)
    padded = 2 * batch_size * (k + np.maximum(n, m)).max(-1).sum()
    return float(padded / (k + n + m - 1).sum())


def run(work: Workload, side: str) -> dict[str, Any]:
    """
    Train the workload's model once with one of the trainers.

    Returns:
        STEP, the mean over all updates but the first, which warms up; REFERENCE; `seconds` of each of those updates;
        `losses` of all micro-batches; and `sharing`, whether this project's pairs share their prompts.
    """
    gc.collect()  # the trainer before holds itself in a circle
    model, args = work.build_model(), copy.copy(work.args)
    select_parameters(model, work.trained)
    hold(model, precision_of(model.dtype, args.mixed_precision, deepspeed=False))  # the same for both sides
    sharing = unsupported_reason(model, args.max_length) is None
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        same = {"model": model, "args": args, "processing_class": work.tokenizer}
        if side == STOCK:
            # By a digest of all weights TRL finds the log-probabilities of an earlier run: there are to be none.
            with patch("trl.trainer.dpo_trainer.hash_module", lambda _: uuid.uuid4().hex):
                trainer = StockTrainer(train_dataset=conversations(work), **same)
        else:
            trainer = OurTrainer(
                train_dataset=work.rows,
                margin=Margin(),
                replay=Replay(),
                prefix_sharing=sharing,
                reference_cache=ReferenceCache(folder, "bench"),
                **same,
            )
        trainer.train()
    seconds = np.diff([*trainer.starts, now()][:: args.gradient_accumulation_steps])[1:]
    return {
        STEP: 1000 * float(seconds.mean()) / work.rows_per_update,
        REFERENCE: 1000 * trainer.reference_seconds / len(work.rows),
        "seconds": seconds.tolist(),
        "losses": torch.stack(trainer.losses).tolist(),
        "sharing": sharing,
    }


def conversations(workload: Workload) -> Dataset:
    """The rows as stock TRL reads them."""
    rows = [
        {"prompt": with_system_message(row["prompt"], workload.system_message)}
        | {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
        for row in workload.rows.select_columns(["prompt", "chosen", "rejected"])
    ]
    return Dataset.from_list(rows)


class Measured:
    """Mixin left of a DPOTrainer: rows in their order; losses, starts of micro-batches, time of the reference pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.starts, self.losses = [], []
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        start = now()
        dataset = super()._precompute_ref_logps(*args)
        self.reference_seconds = now() - start
        return dataset

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.starts.append(now())
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class StockTrainer(Measured, DPOTrainer):
    """Stock TRL."""


class OurTrainer(Measured, ShiftedMarginTrainer):
    """This project's trainer."""


def now() -> float:
    """Seconds, all work on the GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """
    Context that measures the most bytes which its block holds at once, above what was held before: of the GPU's
    memory as torch counts it, or else resident ones of this process (Linux, glibc).
    """

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            return_freed(at_once=True)  # so that the peak is of what is in use
            LIBC.malloc_trim(0)  # what earlier blocks have freed would be filled again, uncounted
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is held now
            self.before = _resident("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
        self.peak_bytes = held - self.before
        return_freed(at_once=False)


def return_freed(at_once: bool) -> None:
    """
    Have glibc return freed memory to the system at once, or keep it for the next use: stock TRL's larger micro-batches
    would otherwise be timed with page faults, a quarter of their CPU seconds.
    """
    LIBC.mallopt(-1, 128 * 1024 if at_once else -1)  # M_TRIM_THRESHOLD
    LIBC.mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD, from which on memory is taken from the system
    LIBC.mallopt(-4, 65536 if at_once else 0)  # M_MMAP_MAX: how often


def _resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


ALL_STAGES = Selection(
    hygiene=Hygiene(empty="drop"),  # every rule on
    labels="safe_first",
    score=Score("score_gap", keep=0.9),
    quotas=Quotas("pair_class", {"unsafe/unsafe": 0.5}),
)


def time_selection(count: int, seed: int = 0) -> dict[str, float]:
    """
    Select among `count` generated rows of UltraFeedback's lengths, of which one in twenty breaks a rule on purpose.

    Returns:
        rows, kept, seconds, gib (the peak above what was held before), and tokenising: the seconds before that.
    """
    lengths = LENGTHS["UltraFeedback"]
    with tempfile.TemporaryDirectory() as folder:
        source = {"count": count, "lengths": lengths, "seed": seed}
        rows = Dataset.from_generator(labelled_rows, features=FEATURES, cache_dir=folder, gen_kwargs=source)
        answers = rows.select(range(min(count, 500)))
        tokenizer = train_tokenizer([*answers["chosen"], *answers["rejected"]])
        eval_prompts = [row["prompt"] for row in labelled_rows(1000, lengths, seed + 1)]
        start = time.perf_counter()
        tokenized = tokenize_rows(rows, tokenizer, 1024, num_proc=os.cpu_count())
        found = {"rows": count, "tokenising": time.perf_counter() - start}
        with PeakMemory() as memory:
            start = time.perf_counter()
            kept, _ = select_rows(tokenized, ALL_STAGES, seed=seed, max_length=1024, eval_prompts=eval_prompts)
            found |= {"seconds": time.perf_counter() - start, "kept": len(kept)}
    return found | {"gib": memory.peak_bytes / GIB}
