"""Stock `trl.DPOTrainer` and this project's trainer in turn, on the same rows in the same micro-batches."""

import ctypes
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import DPOTrainer

from benchmark.generated import LENGTHS, Workload, labelled_rows, token_bound, train_tokenizer
from core.config.schema import Hygiene, Quotas, Replay, Score, Selection
from core.data.preferences import FEATURES
from core.data.tokens import token_lengths, tokenize_rows
from core.modeling.parameters import select_parameters
from core.modeling.precision import hold, precision_of
from core.modeling.prefix import unsupported_reason
from core.modeling.reference import ReferenceCache
from core.objective.presets import Margin
from core.runtime.errors import RecipeError
from core.selection.buffer import select_rows
from core.training.trainer import ShiftedMarginTrainer

LIBC = ctypes.CDLL(None)


STEP, REFERENCE = "training step, ms/pair", "reference pass, ms/pair"
PEAK, OPTIMIZER = "peak memory, GiB", "optimizer, GiB"
GIB = 2**30


@dataclass
class Figures:
    """What one run of one trainer took. Seconds are of each update but the first, which warms up."""

    step_seconds: list[float]
    losses: list[float]  # of each micro-batch, the first update's too
    costs: dict[str, float]  # STEP, REFERENCE, OPTIMIZER


@dataclass
class Comparison:
    """
    Runs of stock TRL ("stock"), this project ("shared"), and this project with all weights trained where the workload
    trains some, else `down_proj` ("other").
    """

    workload: Workload
    sharing: bool = False  # pairs share their prompts
    order: list[int] = field(default_factory=list)  # row indices in the order of training
    runs: dict[str, list[Figures]] = field(default_factory=lambda: {"shared": [], "stock": [], "other": []})
    # Of a run of its own, above what the process held before the model was there.
    peaks: dict[str, float] = field(default_factory=dict)

    def table(self, left: str, right: str) -> dict[str, tuple[float, float, float]]:
        """
        Each cost of two contenders, as medians over the rounds, and how many times the right one's the left one's is:
        the median over the rounds, whose runs train on the same rows.
        """
        rows = {}
        for name in (STEP, REFERENCE, OPTIMIZER):
            one, other = ([run.costs[name] for run in self.runs[side]] for side in (left, right))
            rows[name] = median(one), median(other), median(x / y for x, y in zip(one, other, strict=True))
        return rows | {PEAK: (self.peaks[left], self.peaks[right], self.peaks[left] / self.peaks[right])}

    def loss_gap(self) -> float:
        """The largest difference between the two trainers' losses of a micro-batch."""
        pairs = zip(self.runs["stock"], self.runs["shared"], strict=True)
        return max(float(np.abs(np.subtract(stock.losses, shared.losses)).max()) for stock, shared in pairs)

    def token_bounds(self) -> dict[str, float]:
        """What the number of tokens alone would gain, of what is timed and of all rows; empty without sharing."""
        if not self.sharing:
            return {}
        work, batch = self.workload, self.workload.args.per_device_train_batch_size
        drawn, per_update = token_lengths(work.rows), work.rows_per_update
        return {
            STEP: token_bound(drawn[self.order[per_update : work.updates * per_update]], batch),
            REFERENCE: token_bound(drawn, batch),
            "all rows": token_bound(work.source_lengths, batch),
        }


def measure_memory(comparison: Comparison) -> None:
    """Run each contender once, for its peak memory; their times are taken later, by `time_rounds`."""
    allocate("returned")
    for name, run in contenders(comparison).items():
        with PeakMemory() as memory:
            run()
        comparison.peaks[name] = memory.peak_bytes / GIB


def time_rounds(comparison: Comparison, rounds: int) -> None:
    """
    Run the contenders in turn, `rounds` times, each from the same weights and with an empty reference cache, in
    memory that this process has already. Who begins changes from round to round.

    Raises:
        RecipeError: the losses of the two trainers differ, so their times say nothing.
    """
    allocate("kept")
    if not torch.cuda.is_available():
        torch.ones(int(max(comparison.peaks.values()) * GIB), dtype=torch.uint8)
    runs = contenders(comparison)
    for index in range(rounds):
        for name in list(runs)[:: 1 if index % 2 == 0 else -1]:
            comparison.runs[name].append(runs[name]())
            gc.collect()  # a trainer holds itself in a circle
    allocate("default")
    workload, gap = comparison.workload, comparison.loss_gap()
    if not gap <= (1e-3 if workload.precision == "float32" else 0.1):
        raise RecipeError(
            f"{workload.title}: the losses of the two trainers differ by up to {gap:.2g}, so their times can't be "
            "compared; look whether the chat template or an added token differs between them"
        )


def contenders(comparison: Comparison) -> dict[str, Callable[[], Figures]]:
    """What runs in turn, by the name of its list; this project's is the first, since stock TRL takes its order."""
    trained = comparison.workload.trained
    return {
        "shared": lambda: run_shared(comparison, trained),
        "stock": lambda: run_stock(comparison),
        "other": lambda: run_shared(comparison, None if trained else ["down_proj"]),
    }


def prepare(model: PreTrainedModel, workload: Workload, trained: list[str] | None) -> None:
    """Choose what is trained, and hold it in the same precision for both sides (`precision.precision_of`)."""
    select_parameters(model, trained)
    hold(model, precision_of(model.dtype, workload.args.mixed_precision, deepspeed=False))


def run_stock(comparison: Comparison) -> Figures:
    """Stock TRL over the rows, in the order that this project's trainer has them in."""
    workload = comparison.workload
    with tempfile.TemporaryDirectory() as folder:
        model = workload.build_model()
        prepare(model, workload, workload.trained)
        trainer = StockTrainer(
            order=comparison.order,
            model=model,
            args=workload.settings(folder),
            train_dataset=workload.conversations(),
            processing_class=workload.tokenizer,
        )
        trainer.train()
    return trainer.took()


def run_shared(comparison: Comparison, trained: list[str] | None) -> Figures:
    """This project's trainer with these weights trained and an empty reference cache."""
    workload = comparison.workload
    with tempfile.TemporaryDirectory() as folder:
        model = workload.build_model()
        prepare(model, workload, trained)
        comparison.sharing = unsupported_reason(model, workload.args.max_length) is None
        trainer = SharedTrainer(
            model=model,
            args=workload.settings(folder),
            train_dataset=workload.rows,
            margin=Margin(),
            replay=Replay(),
            prefix_sharing=comparison.sharing,
            reference_cache=ReferenceCache(folder, "bench"),
            processing_class=workload.tokenizer,
        )
        comparison.order = list(trainer._get_train_sampler())
        trainer.train()
    return trainer.took()


class Measured:
    """Mixin left of a DPOTrainer: times of the reference pass and of each update, and the losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reference_seconds, self.losses, self.clock = 0.0, [], StepClock()
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.clock)

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        start = _now()
        dataset = super()._precompute_ref_logps(*args)
        self.reference_seconds = _now() - start
        return dataset

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def took(self) -> Figures:
        """Of an update on average: what most take says little where a few long rows cost most of the time."""
        seconds, args = self.clock.seconds[1:], self.args
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        costs = {
            STEP: 1000 * mean(seconds) / (args.per_device_train_batch_size * args.gradient_accumulation_steps),
            REFERENCE: 1000 * self.reference_seconds / len(self.train_dataset),
            OPTIMIZER: sum(value.nbytes for value in state if isinstance(value, torch.Tensor)) / GIB,
        }
        return Figures(seconds, torch.stack(self.losses).tolist(), costs)


class StockTrainer(Measured, DPOTrainer):
    """Stock TRL in a given order of rows; nothing else is changed."""

    def __init__(self, order: list[int], **kwargs: Any) -> None:
        self.order = order
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> list[int]:
        return self.order


class SharedTrainer(Measured, ShiftedMarginTrainer):
    """This project's trainer."""


class StepClock(TrainerCallback):
    """Seconds from the end of one update to the end of the next, its data included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(_now() - self.mark)
        self.mark = _now()


def _now() -> float:
    """Seconds, all work on the GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """
    Context that measures the most bytes which its block holds at once, above what was held before: of the GPU's
    memory as torch counts it, or else resident ones of this process (Linux).
    """

    peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if hasattr(LIBC, "malloc_trim"):
                LIBC.malloc_trim(0)  # what earlier blocks have freed would be filled again, uncounted
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is held now
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
        self.peak_bytes = held - self.before


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def allocate(how: str) -> None:
    """
    What becomes of freed memory from here on (glibc; elsewhere memory is what the C library makes of it).

    Args:
        how: "returned" to the system at once, so that a peak is of what is in use; "kept", so that work is timed
            without page faults, which would count against stock TRL with its larger micro-batches; or "default".
    """
    if hasattr(LIBC, "mallopt"):
        trim, mmap, mmap_max, arena_max = -1, -3, -4, -8  # parameters of mallopt(3)
        settings = {
            "returned": {arena_max: 1, mmap_max: 65536, mmap: 128 * 1024, trim: 128 * 1024},
            "kept": {mmap_max: 0, trim: -1},
            "default": {mmap_max: 65536, mmap: 32 * 2**20, trim: 64 * 2**20},  # what glibc's own adjustment ends at
        }
        for parameter, value in settings[how].items():
            LIBC.mallopt(parameter, value)


ALL_STAGES = Selection(
    hygiene=Hygiene(empty="drop"),  # every rule on
    labels="safe_first",
    score=Score("score_gap", keep=0.9),
    quotas=Quotas("pair_class", {"unsafe/unsafe": 0.5}),
)


def time_selection(count: int, seed: int = 0) -> dict[str, float]:
    """
    Select among `count` generated rows of UltraFeedback's lengths, of which one in twenty breaks a rule on purpose.
    They are tokenised before, untimed.

    Returns:
        rows, kept, seconds, and gib, the peak above the imports.
    """
    lengths = LENGTHS["UltraFeedback"]
    with tempfile.TemporaryDirectory() as folder:
        source = {"count": count, "lengths": lengths, "seed": seed}
        rows = Dataset.from_generator(labelled_rows, features=FEATURES, cache_dir=folder, gen_kwargs=source)
        answers = rows.select(range(min(count, 500)))
        tokenizer = train_tokenizer([*answers["chosen"], *answers["rejected"]])
        eval_prompts = [row["prompt"] for row in labelled_rows(1000, lengths, seed + 1)]
        tokenized = tokenize_rows(rows, tokenizer, 1024, num_proc=os.cpu_count())
        with PeakMemory() as memory:
            start = time.perf_counter()
            kept, _ = select_rows(tokenized, ALL_STAGES, seed=seed, max_length=1024, eval_prompts=eval_prompts)
            seconds = time.perf_counter() - start
    return {"rows": count, "kept": len(kept), "seconds": seconds, "gib": memory.peak_bytes / GIB}
