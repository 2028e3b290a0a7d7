"""The audit of a selection: what became of every row, its digest and files."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from core.objective.presets import PAIR_CLASSES
from core.runtime.files import replaced
from core.selection.hygiene import TRIED

STAGES = ("rows", "hygiene", "labels", "score", "quotas")


@dataclass
class Audit:
    """What the selection did with every row. `summary` is selection.json; a line per row is written by `save`."""

    rows: Dataset  # as they came in
    codes: np.ndarray  # (rows,) uint8: 0 kept, else a place in `reasons`, counted from 1
    relabelled: np.ndarray  # (rows,) bool
    classes: np.ndarray  # (rows,) int64: pair classes, after relabelling
    pairs: np.ndarray  # (rows,) uint64: a digest of the prompt and its two answers, whichever is chosen
    reasons: list[tuple[str, str]]  # (stage, reason)
    bad_rows: Sequence[dict]  # rows that were refused while they were read: row_id, source, reason
    summary: dict

    @property
    def digest(self) -> str:
        """SHA-256 of a line per kept row, `row_id<TAB>0|1` (1: relabelled), in the order of their bytes."""
        return self.summary["digest"]

    @property
    def counts(self) -> dict:
        """
        rows, kept, relabelled; `stages`: stage, reason and rows dropped of each reason that dropped some; `left`: rows
        after each stage; by_class, by_source, by_role: `before` (of the rows that could be read) and `after`; `off`:
        what each rule of the hygiene that is off would have dropped of the rows that it left (`would_drop`).
        """
        return self.summary["counts"]

    def table(self) -> list[tuple[str, str, int]]:
        """(stage, reason, rows dropped), in the order of the stages; then the rows kept."""
        dropped = [(entry["stage"], entry["reason"], entry["dropped"]) for entry in self.counts["stages"]]
        return [*dropped, ("kept", "", self.counts["kept"])]

    def save(self, folder: str | os.PathLike) -> None:
        """Write selection.json and selection.jsonl (a line per row), each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / "selection.json") as file:
            file.write((json.dumps(self.summary, indent=2, ensure_ascii=False) + "\n").encode())
        with replaced(folder / "selection.jsonl") as file:
            file.writelines(line.encode() for line in self._lines())

    def _lines(self) -> Iterator[str]:
        as_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would build one for every row

        def line(row_id: str, source: str, reason: tuple[str, str] | None, relabelled: bool) -> str:
            stage, why = reason or (None, None)
            fate = {"kept": reason is None, "stage": stage, "reason": why, "relabelled": relabelled}
            return as_json({"row_id": row_id, "source": source} | fate) + "\n"

        for row in self.bad_rows:
            yield line(row["row_id"], row["source"], ("rows", row["reason"]), False)
        names = self.rows.with_format("arrow")
        ids, sources = (names[name].to_pylist() for name in ("row_id", "source"))
        reasons = [None, *self.reasons]
        for row_id, source, code, relabelled in zip(
            ids, sources, self.codes.tolist(), self.relabelled.tolist(), strict=True
        ):
            yield line(row_id, source, reasons[code], relabelled)


def groups_of(rows: Dataset, name: str) -> tuple[list[str], np.ndarray]:
    """The distinct values of a column (null: "none") in the order in which they come, and each row's place in them."""
    column = rows.with_format("arrow")[name].fill_null("none")
    groups = column.unique()
    return groups.to_pylist(), pc.index_in(column, value_set=groups).to_numpy()


def summarise(
    rows: Dataset,
    is_buffer: np.ndarray,
    codes: np.ndarray,
    relabelled: np.ndarray,
    before: np.ndarray,
    classes: np.ndarray,
    reasons: list[tuple[str, str]],
    bad_rows: Sequence[dict],
) -> dict:
    """selection.json, but for the settings. `before` and `classes` are pair classes before and after relabelling."""
    kept = codes == 0
    dropped = dict(Counter(("rows", row["reason"]) for row in bad_rows))
    dropped |= {reason: int(np.sum(codes == code)) for code, reason in enumerate(reasons, start=1)}
    left, count = {}, len(codes) + len(bad_rows)
    for stage in STAGES:
        count -= sum(rows for (of, _), rows in dropped.items() if of == stage)
        left[stage] = count

    def groups(names: Sequence[str], was: np.ndarray, now: np.ndarray) -> dict[str, dict[str, int]]:
        before, after = (np.bincount(kinds, minlength=len(names)).tolist() for kinds in (was, now))
        present = [i for i, count in enumerate(before) if count or after[i]]
        return {"before": {names[i]: before[i] for i in present}, "after": {names[i]: after[i] for i in present}}

    sources, source = groups_of(rows, "source")
    buffer = is_buffer.astype(np.int64)
    return {
        "digest": _digest(rows, kept, relabelled),
        "counts": {
            "rows": len(codes) + len(bad_rows),
            "kept": int(kept.sum()),
            "relabelled": int(relabelled.sum()),
            "stages": [
                {"stage": stage, "reason": reason, "dropped": rows}
                for (stage, reason), rows in dropped.items()
                if rows
            ],
            "left": left,
            "by_class": groups(PAIR_CLASSES, before, classes[kept]),
            "by_source": groups(sources, source, source[kept]),
            "by_role": groups(("task", "buffer"), buffer, buffer[kept]),
        },
    }


def would_drop(off: dict[str, np.ndarray], classes: np.ndarray) -> list[dict]:
    """Of each rule that is off: its name, at what it was tried (null: the rule has no number), and rows by class."""
    counted = []
    for rule, found in off.items():
        counts = np.bincount(classes[found], minlength=len(PAIR_CLASSES)).tolist()
        by_class = {name: count for name, count in zip(PAIR_CLASSES, counts, strict=True) if count}
        counted.append({"rule": rule, "at": TRIED.get(rule), "rows": int(found.sum()), "by_class": by_class})
    return counted


def _digest(rows: Dataset, kept: np.ndarray, relabelled: np.ndarray) -> str:
    ids = rows.with_format("arrow")["row_id"].to_pylist()
    lines = sorted(f"{ids[row]}\t{relabelled[row]:d}\n".encode() for row in np.flatnonzero(kept).tolist())
    return hashlib.sha256(b"".join(lines)).hexdigest()
