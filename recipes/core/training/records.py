"""What a run records while it trains: metrics.jsonl and a short log line."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.runtime.errors import RecipeError
from core.runtime.files import replaced

METRICS = "metrics.jsonl"

Record = dict[str, Any]

# On the log line; all else is in metrics.jsonl, which the line would otherwise drown in.
LOG_LINE = {
    "loss": "loss", "eval_loss": "eval_loss", "train_loss": "mean loss", "task/loss": "task", "buffer/loss": "buffer",
    "rewards/margins": "reward margin", "eval_rewards/margins": "reward margin", "accuracy_helpful": "helpful",
    "accuracy_target": "target", "eval_accuracy_helpful": "helpful", "eval_accuracy_target": "target",
    "mean_token_accuracy": "token accuracy", "grad_norm": "grad_norm", "learning_rate": "lr",
    "pairs_per_second": "pairs/s", "tokens_per_second": "tokens/s", "tokens_saved": "tokens saved", "mfu": "mfu",
    "peak_memory_gib": "peak GiB", "train_runtime": "seconds", "eval_runtime": "seconds",
}  # fmt: skip


class LogLine(ProgressCallback):
    """transformers' progress bar with a log line that fits a terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = [f"{name} {logs[key]:.4g}" for key, name in LOG_LINE.items() if key in logs]
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown))


class MetricsFile(TrainerCallback):
    """
    Writes every logged record (training, evaluation and summary) as a line of `output_dir/metrics.jsonl`.

    Each line has `step` and `epoch` first. Numbers that JSON has no sign for are the strings "nan", "inf" and
    "-inf"; `read_metrics` turns them back. The file belongs to one run: a fresh start empties it, and a resumed
    run begins with exactly the records that its checkpoint holds, so that it reads as if the run had never stopped.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            # Trainer would evaluate "on start" once more, in the middle of the curve.
            args.eval_on_start = False
        if state.is_world_process_zero:
            path = Path(args.output_dir) / METRICS
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as file:
                file.write("".join(map(_line, state.log_history)).encode())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / METRICS, "a", encoding="utf-8") as file:  # closed, and so flushed
                file.write(_line(state.log_history[-1]))


def _line(record: Record) -> str:
    # Sorted, since a checkpoint sorts its records too: a resumed file is the same to the byte.
    ordered = {"step": record["step"], "epoch": record.get("epoch")} | dict(sorted(record.items()))
    return json.dumps({key: _encode(value) for key, value in ordered.items()}, allow_nan=False) + "\n"


def _encode(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(output_dir: str | os.PathLike) -> list[Record]:
    """
    The records of a run, in the order of logging. A last line without its end, the mark of a killed run, is left out.

    Raises:
        RecipeError: the file isn't there, or a line is not a record.
    """
    path = Path(output_dir) / METRICS
    if not path.is_file():
        raise RecipeError(f"{path} is not there: give the output folder of a training run")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            record["step"] += 0
        except (ValueError, TypeError, KeyError):
            raise RecipeError(f"{path}, line {number}: not a record of a logged step") from None
        records.append({key: float(v) if v in ("nan", "inf", "-inf") else v for key, v in record.items()})
    return records


def series(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in the order of steps; the last record of a step counts."""
    values = {record["step"]: record[key] for record in records if key in record}
    return sorted(values), [values[step] for step in sorted(values)]


def evaluations(records: Iterable[Record]) -> list[Record]:
    """The evaluation records, one a step (the last), in the order of steps."""
    by_step = {record["step"]: record for record in records if "eval_loss" in record}
    return [by_step[step] for step in sorted(by_step)]
