"""Pairs of rows that hold one answer each: those of one prompt, the better with the worse."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from core.config.schema import Columns
from core.data.columns import BadRow, Found, Row
from core.runtime.errors import RecipeError

ROW = "row of the list"  # the column that `unfolded` adds: the row's number in the source
ALONE = "no partner: no other answer to its prompt is better or worse"
BETWEEN = "neither the best nor the worst answer to its prompt"
UNKNOWN = "its label is not known"


class Pairing(NamedTuple):
    """Positions of rows, and why the others are in no pair."""

    chosen: np.ndarray  # Shape: (pairs,)
    rejected: np.ndarray  # Shape: (pairs,)
    left_out: list[tuple[int, str]]  # a row and the reason
    faults: list[tuple[int, str]]  # the same of rows that can't be read


def as_pair(columns: Columns) -> Columns:
    """The mapping under which a row of a chosen answer and one of a rejected answer are read together."""
    return dataclasses.replace(
        columns, chosen=columns.response, rejected=columns.response, score_chosen=columns.score,
        score_rejected=columns.score, chosen_safe=columns.response_safe, rejected_safe=columns.response_safe,
    )  # fmt: skip


def unfolded(rows: Dataset, name: str, where: str) -> Dataset:
    """A row for each item of a column of lists, under the same name, beside the other columns and `ROW`."""
    if name not in rows.features or not pa.types.is_list(rows.features.arrow_schema.field(name).type):
        raise RecipeError(
            f"{where}: columns.unfold names {name!r}, which is no column of lists; the columns are "
            f"{', '.join(rows.column_names)}"
        )

    def unfold(table: pa.Table, numbers: list[int]) -> pa.Table:
        lists = table[name].combine_chunks()
        parents = pc.list_parent_indices(lists)
        rest = table.drop_columns(name).take(parents)
        return rest.append_column(name, pc.list_flatten(lists)).append_column(ROW, pa.array(numbers).take(parents))

    items = rows.with_format("arrow").map(unfold, batched=True, with_indices=True, remove_columns=rows.column_names)
    if not len(items):
        raise RecipeError(f"{where}: every list of columns.unfold, {name!r}, is empty")
    return items.with_format(None)


def pair_rows(rows: Dataset, columns: Columns, found: dict[str, Found]) -> Pairing:
    """
    Pairs of the rows that share a prompt (after `unfolded`, a row of the source). By label each wanted answer goes
    with an unwanted one, in the order of the rows; by score or rank the best with the worst, the first of equals.
    """
    grade_name = columns.label or columns.score or columns.rank
    prompt = columns.prompt if isinstance(columns.prompt, list) else [columns.prompt]
    key_names = [name for name in (*prompt, columns.system) if name is not None]
    needed = {found[name].path[0] for name in (*key_names, grade_name)} | {ROW} & set(rows.column_names)
    groups: dict[Any, list[tuple[int, float]]] = {}
    left_out, faults = [], []
    for number, values in enumerate(rows.select_columns(sorted(needed))):
        row = Row(values, columns, found)
        try:
            grade = _grade(row, columns)
            key = values[ROW] if ROW in values else _key([row.value(name) for name in key_names])
        except BadRow as bad:
            faults.append((number, str(bad)))
            continue
        if grade is None:
            left_out.append((number, UNKNOWN))
        else:
            groups.setdefault(key, []).append((number, grade))
    chosen, rejected = [], []
    for group in groups.values():
        best, worst = max(grade for _, grade in group), min(grade for _, grade in group)
        pairs = [] if best == worst else list(zip(_of(best, group), _of(worst, group), strict=False))
        if columns.label is None:
            pairs = pairs[:1]
        used = {number for pair in pairs for number in pair}
        reason = BETWEEN if pairs and columns.label is None else ALONE
        left_out += [(number, reason) for number, _ in group if number not in used]
        chosen += [better for better, _ in pairs]
        rejected += [worse for _, worse in pairs]
    return Pairing(np.array(chosen, dtype=int), np.array(rejected, dtype=int), left_out, faults)


def _grade(row: Row, columns: Columns) -> float | None:
    """The higher, the better; None where a label is not known."""
    if columns.label is not None:
        return row.code(columns.label, "safe")
    return row.score(columns.score) if columns.score is not None else -row.score(columns.rank)


def _key(values: list) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _of(grade: float, group: list[tuple[int, float]]) -> list[int]:
    return [number for number, other in group if other == grade]
