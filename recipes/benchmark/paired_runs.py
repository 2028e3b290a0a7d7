"""Stock `trl.DPOTrainer` and this project's trainer in turn, on the same rows in the same micro-batches."""

import copy
import gc
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmark.process_memory import PeakMemory, freed_memory_kept, freed_memory_returned
from core.config.schema import Replay
from core.data.tokens import token_lengths, with_system_message
from core.modeling.parameters import select_parameters
from core.modeling.policy import share_prefixes
from core.modeling.prefix import pair_logps
from core.modeling.reference_cache import ReferenceCache
from core.objective.presets import Margin
from core.runtime.errors import RecipeError
from core.training.trainer import ShiftedMarginTrainer

SELECTIVE = ["down_proj"]  # what the other run trains where the workload trains all
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass
class Workload:
    """What both trainers are given."""

    name: str
    model_name: str
    build_model: Callable[[], PreTrainedModel]  # the same weights at every call
    tokenizer: PreTrainedTokenizerBase
    # Tokenised pairs with margin 0, all of one role: plain DPO, whose loss stock TRL has too. The reference pass goes
    # over all of them, the updates over as many as they need.
    rows: Dataset
    updates: int
    args: DPOConfig
    system_message: str | None
    trained: list[str] | None  # patterns of trainable parameters; None: all
    source_lengths: np.ndarray  # tokens of prompt, chosen and rejected of all rows there are, shuffled. Shape: (n, 3)

    @property
    def title(self) -> str:
        return f"{self.name}, model {self.model_name}"

    @property
    def rows_per_update(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def lengths(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected. Shape: (rows, 3)."""
        return token_lengths(self.rows)


@dataclass
class Run:
    """What one run of one trainer took. Seconds are of each update but the first, which warms up."""

    step_seconds: list[float]
    losses: list[float]  # of each micro-batch, the first update's too
    reference_seconds: float
    optimizer_bytes: int
    order: list[int]  # row indices in the order of training, which may end before the last
    second_pass_forwards: int = 0  # of a reference pass over the same rows, its cache filled
    second_pass_seconds: float = 0.0


@dataclass
class Comparison:
    """Runs of stock TRL (`stock`), this project (`shared`), and this project with the other choice of weights."""

    workload: Workload
    sharing: bool
    dtype: torch.dtype  # of the weights
    stock: list[Run] = field(default_factory=list)
    shared: list[Run] = field(default_factory=list)
    other: list[Run] = field(default_factory=list)  # all weights where the workload trains some, else `down_proj`
    order: list[int] = field(default_factory=list)  # row indices in the order of training
    # By contender, above what the process held before the model was there.
    peak_bytes: dict[str, int] = field(default_factory=dict)


def measure_memory(workload: Workload) -> Comparison:
    """Run each contender once, for its peak memory; their times are taken later, by `time_rounds`."""
    model = workload.build_model()
    sharing, dtype = share_prefixes(True, model, workload.args.max_length), model.dtype
    del model  # it would count as memory that was held before
    comparison = Comparison(workload, sharing, dtype)
    with freed_memory_returned():
        for name, run in contenders(comparison).items():
            with PeakMemory() as memory:
                comparison.order = run().order
            comparison.peak_bytes[name] = memory.peak_bytes
    return comparison


def time_rounds(comparison: Comparison, rounds: int) -> None:
    """
    Run the contenders in turn, `rounds` times, each from the same weights and with an empty reference cache, in
    memory that this process has already. Who begins changes from round to round.

    Raises:
        RecipeError: the losses of the two trainers differ, so their times say nothing.
    """
    runs = contenders(comparison)
    with freed_memory_kept(0 if torch.cuda.is_available() else max(comparison.peak_bytes.values())):
        for index in range(rounds):
            for name in list(runs)[:: 1 if index % 2 == 0 else -1]:
                getattr(comparison, name).append(runs[name]())
                gc.collect()  # a trainer holds itself in a circle
    workload, gap = comparison.workload, loss_gap(comparison)
    half = workload.args.bf16 or workload.args.fp16
    if not gap <= LOSS_TOLERANCE[torch.bfloat16 if half else comparison.dtype]:
        raise RecipeError(
            f"{workload.name}: the losses of the two trainers differ by up to {gap:.2g}, so their times can't be "
            "compared; look whether the chat template or an added token differs between them"
        )


def contenders(comparison: Comparison) -> dict[str, Callable[[], Run]]:
    """What runs in turn, by the name of its list. Stock TRL takes the rows in the order of the first that ran."""
    workload, sharing = comparison.workload, comparison.sharing
    others = None if workload.trained else SELECTIVE
    return {
        "shared": lambda: run_shared(workload, workload.trained, sharing),
        "stock": lambda: run_stock(workload, comparison.order),
        "other": lambda: run_shared(workload, others, sharing),
    }


def loss_gap(comparison: Comparison) -> float:
    """The largest difference between the two trainers' losses of a micro-batch."""
    pairs = zip(comparison.stock, comparison.shared, strict=True)
    return max(float(np.abs(np.subtract(stock.losses, shared.losses)).max()) for stock, shared in pairs)


def token_bound(lengths: np.ndarray, batch_size: int) -> float:
    """
    How many times fewer tokens shared pairs have than padded ones: 2·B·max(k + max(n, m)) for each micro-batch of B
    pairs of k prompt, n chosen and m rejected tokens, against Σ (k + n + m − 1).

    Args:
        lengths: k, n and m of each row, micro-batch after micro-batch; rows that fill none are left out. Shape:
            (rows, 3).
    """
    batches = lengths[: len(lengths) // batch_size * batch_size].reshape(-1, batch_size, 3)
    k, n, m = np.moveaxis(batches, -1, 0)
    padded = 2 * batch_size * (k + np.maximum(n, m)).max(-1).sum()
    return float(padded / (k + n + m - 1).sum())


def run_stock(workload: Workload, order: list[int]) -> Run:
    """Stock TRL over rows in this order."""
    rows = workload.rows.select_columns(["prompt", "chosen", "rejected"]).to_list()
    conversations = [
        {"prompt": with_system_message(row["prompt"], workload.system_message)}
        | {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
        for row in rows
    ]
    dataset = Dataset.from_list(conversations)
    # TRL keeps reference log-probabilities under the rows' fingerprint: each run is to compute its own.
    dataset = dataset.select(range(len(dataset)), new_fingerprint=uuid.uuid4().hex)
    with tempfile.TemporaryDirectory() as folder:
        model = workload.build_model()
        select_parameters(model, workload.trained)
        trainer = StockTrainer(
            order=order,
            model=model,
            args=run_settings(workload, folder),
            train_dataset=dataset,
            processing_class=workload.tokenizer,
        )
        trainer.train()
    return trainer.run(order)


def run_shared(workload: Workload, trained: list[str] | None, sharing: bool) -> Run:
    """This project's trainer with these weights trained, and its second reference pass."""
    with tempfile.TemporaryDirectory() as folder:
        model = workload.build_model()
        select_parameters(model, trained)
        trainer = SharedTrainer(
            model=model,
            args=run_settings(workload, folder),
            train_dataset=workload.rows,
            margin=Margin(),
            replay=Replay(),
            prefix_sharing=sharing,
            reference_cache=ReferenceCache(folder, "bench"),
            processing_class=workload.tokenizer,
        )
        order = list(trainer._get_train_sampler())
        trainer.train()
        run = trainer.run(order)
        with patch("core.modeling.reference.pair_logps", wraps=pair_logps) as forward:
            trainer._precompute_ref_logps(workload.rows, "train", workload.args.per_device_train_batch_size)
    run.second_pass_forwards, run.second_pass_seconds = forward.call_count, trainer.reference_seconds
    return run


def run_settings(workload: Workload, folder: str) -> DPOConfig:
    """The recipe's settings, without all that is not training: no log, no evaluation, no checkpoint."""
    args = copy.copy(workload.args)
    args.output_dir = folder
    args.max_steps, args.num_train_epochs = workload.updates, 1
    args.precompute_ref_log_probs = True
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.logging_first_step = args.eval_on_start = False
    args.report_to, args.disable_tqdm = [], True
    return args


class Measured:
    """Mixin left of a DPOTrainer: times of the reference pass and of each update, and the losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reference_seconds, self.step_seconds, self.losses = 0.0, [], []
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(StepClock(self.step_seconds))

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        start = now()
        dataset = super()._precompute_ref_logps(*args)
        self.reference_seconds = now() - start
        return dataset

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def run(self, order: list[int]) -> Run:
        losses = torch.stack(self.losses).tolist()
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        optimizer_bytes = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
        return Run(self.step_seconds[1:], losses, self.reference_seconds, optimizer_bytes, order)


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

    def __init__(self, seconds: list[float]):
        self.seconds = seconds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now() - self.mark)
        self.mark = now()


def now() -> float:
    """Seconds, all work on the GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
