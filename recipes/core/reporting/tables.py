"""The tables of a run: counts, margins and evaluations as header and rows, on the terminal and in the card."""

import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from core.runtime.ranks import rank
from core.runtime.text import printable
from core.training.metrics import GROUPS
from core.training.records import Record, evaluations

Rows = list[list[str]]
ROLES = ("task", "buffer")
ACCURACIES = ("accuracy_helpful", "accuracy_target", "rewards/accuracies")  # of the order of a pair's two answers
EVALUATION_COLUMNS = {
    "Loss": ("loss", 4),
    "Reward margin": ("rewards/margins", 3),
    "Helpful accuracy": ("accuracy_helpful", 3),
    "Target accuracy": ("accuracy_target", 3),
}


def number(value: float | int | None, decimals: int = 4) -> str:
    """A fixed number of decimals (one from 100 on), whole numbers with thousands set apart, "–" for nothing."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    decimals = 1 if abs(value) >= 100 else decimals
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no "-0.0000"


def group_name(group: str) -> str:
    """A group of `metrics.GROUPS` in prose: "" is all, `safe_unsafe` is safe/unsafe."""
    return group.replace("_", "/") or "all"


def groups_apart(keys: Container[str], prefix: str = "") -> list[str]:
    """
    The groups of `metrics.GROUPS` that a record tells apart: all pairs, the pair classes if there are two or more, the
    roles if there are both. An only class, or an only role, would say again what all pairs say.

    Args:
        keys: of a record, or of all records of a run.
        prefix: "" for training, "eval_" for evaluation.
    """
    present = [group for group in GROUPS if f"{prefix}{group}/loss" in keys]
    roles = [group for group in present if group in ROLES]
    classes = [group for group in present if group not in ROLES]
    return ["", *(group for kind in (classes, roles) if len(kind) > 1 for group in kind)]


def comparable(records: list[Record], reference_free: bool) -> list[Record]:
    """
    The records without the accuracies of a policy that still is its reference: Δ is 0 for every pair there, which is
    neither order, and 0 would read as the wrong one. That is the evaluation at step 0 and the log of step 1 alone.
    """
    if reference_free:
        return records
    return [
        {key: value for key, value in record.items() if not key.endswith(ACCURACIES)}
        if record["step"] == 0 or (record["step"] == 1 and "loss" in record)
        else record
        for record in records
    ]


def before_and_after(records: list[Record]) -> tuple[Record, Record]:
    """The evaluation at step 0 and the last one of a run; empty where there is none."""
    evaluated = evaluations(records)
    before = evaluated[0] if evaluated and evaluated[0]["step"] == 0 else {}
    return before, evaluated[-1] if evaluated else {}


def evaluation_table(before: Record, after: Record) -> tuple[list[str], Rows]:
    """
    Loss, reward margin and both accuracies of all pairs, of each pair class and of each role, as header and rows.
    Every row is of means; where there are both roles, the sum that is trained on is a row of its own.

    Args:
        before, after: evaluation records (keys with the prefix `eval_`); `before` may be empty.
    """
    groups = groups_apart(after, "eval_")
    rows = []
    for group in groups:
        prefix = f"eval_{group}/" if group else "eval_"
        cells = [
            _change(before.get(prefix + metric), after.get(prefix + metric), decimals)
            for metric, decimals in EVALUATION_COLUMNS.values()
        ]
        if not group and "buffer" in groups:
            rows.append(["task + λ·buffer", cells[0], "–", "–", "–"])
            cells[0] = "–"
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


def off_table(counts: dict[str, Any]) -> tuple[list[str], Rows]:
    """What rules of the hygiene that are off would have dropped, and of which pair classes, as header and rows."""
    rows = [
        [
            entry["rule"] + (f" {entry['at']:g}" if entry["at"] else ""),
            number(entry["rows"]),
            ", ".join(f"{name} {count:,}" for name, count in entry["by_class"].items()),
        ]
        for entry in counts.get("off", ())
        if entry["rows"]
    ]
    return ["Rule", "Would drop", "Of them"], rows


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
    Cells may hold what others wrote: they are made `printable`.
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
        table.add_column(printable(name), justify="right" if is_numeric(row[index] for row in rows) else "left")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(f"\n{printable(title)}", style="bold")
    if terminal:
        console.print(table)
    else:
        with console.capture() as capture:
            console.print(table)
        # rich adds an empty line above and below
        print(*(line for line in capture.get().splitlines() if line.strip()), sep="\n", file=file)
