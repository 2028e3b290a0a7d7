"""What a run tells while and after it trains: metrics.jsonl, and the tables on the terminal."""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from errors import RecipeError
from pair_metrics import GROUPS
from ranks import rank

METRICS = "metrics.jsonl"

Record = dict[str, Any]
Rows = list[list[str]]


# On the log line; all else is in metrics.jsonl, which the line would otherwise drown in.
LOG_LINE = {
    "loss": "loss", "eval_loss": "eval_loss", "train_loss": "mean loss", "task/loss": "task", "buffer/loss": "buffer",
    "rewards/margins": "margin", "eval_rewards/margins": "margin", "accuracy_helpful": "helpful",
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
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(map(_line, state.log_history)), encoding="utf-8")
            os.replace(temporary, path)

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


def number(value: float | int | None, decimals: int = 4) -> str:
    """A fixed number of decimals (one from 100 on), whole numbers with thousands set apart, "–" for nothing."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    decimals = 1 if abs(value) >= 100 else decimals
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no "-0.0000"


def group_name(group: str) -> str:
    """A group of `pair_metrics.GROUPS` in prose: "" is all, `safe_unsafe` is safe/unsafe."""
    return group.replace("_", "/") or "all"


EVALUATION_COLUMNS = {
    "Loss": ("loss", 4),
    "Reward margin": ("rewards/margins", 3),
    "Helpful accuracy": ("accuracy_helpful", 3),
    "Target accuracy": ("accuracy_target", 3),
}


def evaluation_table(before: Record, after: Record) -> tuple[list[str], Rows]:
    """
    Loss, reward margin and both accuracies of all pairs, of each pair class and of each role, as header and rows.

    Args:
        before, after: evaluation records (keys with the prefix `eval_`); `before` may be empty.
    """
    rows = []
    for group in GROUPS:
        prefix = f"eval_{group}/" if group else "eval_"
        if any(prefix + metric in after for metric, _ in EVALUATION_COLUMNS.values()):
            cells = [
                _change(before.get(prefix + metric), after.get(prefix + metric), decimals)
                for metric, decimals in EVALUATION_COLUMNS.values()
            ]
            rows.append([group_name(group), *cells])
    return ["Pairs", *EVALUATION_COLUMNS], rows


def _change(before: float | None, after: float | None, decimals: int) -> str:
    return number(after, decimals) if before is None else f"{number(before, decimals)} → {number(after, decimals)}"


def margin_table(classes: Sequence[tuple[str, str, int, float, float, float]]) -> tuple[list[str], Rows]:
    """`margins.class_table` as header and rows: what each pair class is pulled to, and its loss before training."""
    header = ["Role", "Pair class", "Pairs", "Margin m", "m/β (nats)", "Loss at Δ = 0"]
    return header, [[role, name, *map(number, values)] for role, name, *values in classes]


def stage_table(counts: dict[str, Any]) -> tuple[list[str], Rows]:
    """What each stage of a selection dropped and why (`Audit.counts`, also in selection.json), as header and rows."""
    left = counts["rows"]
    rows = [["rows", "read", "–", number(left)]]
    for entry in counts["stages"]:
        left -= entry["dropped"]
        rows.append([entry["stage"], entry["reason"], number(entry["dropped"]), number(left)])
    return ["Stage", "Reason", "Dropped", "Left"], rows


def group_table(name: str, groups: dict[str, dict[str, int]]) -> tuple[list[str], Rows]:
    """Rows of each group (`by_class`, `by_source`, `by_role` of the counts) before and after, as header and rows."""
    before, after = groups["before"], groups["after"]
    return [name, "Before", "After"], [[group, number(before[group]), number(after[group])] for group in before]


def is_numeric(cells: Iterable[str]) -> bool:
    """Whether a column holds numbers (or nothing)."""
    return all(cell[:1] in "0123456789+-–" for cell in cells)


def print_table(title: str, header: Sequence[str], rows: Rows, file: TextIO | None = None) -> None:
    """
    Print a table on rank 0 alone: ruled on a terminal; elsewhere (a log, a pipe) Markdown without colours or wrapping.
    """
    if rank() != 0:
        return
    file = file or sys.stdout
    terminal = file.isatty()
    console = Console(file=file, markup=False, emoji=False, highlight=False, width=None if terminal else 400)
    if terminal:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # narrow: terminals have 80 columns
    else:
        table = Table(box=box.MARKDOWN)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if is_numeric(row[index] for row in rows) else "left")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", style="bold")
    if terminal:
        console.print(table)
    else:
        with console.capture() as capture:
            console.print(table)
        # rich adds an empty line above and below
        print(*(line for line in capture.get().splitlines() if line.strip()), sep="\n", file=file)
