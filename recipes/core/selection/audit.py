"""The audit of a selection: what became of every row, its digest and files; and the decisions kept for next time."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from core.objective.presets import PAIR_CLASSES
from core.runtime.files import replaced
from core.selection.hygiene import Facts
from core.selection.scanning import release, slices

STAGES = ("rows", "hygiene", "labels", "score", "quotas")
Decisions = tuple[np.ndarray, np.ndarray, dict]  # Audit's codes, relabelled and summary


@dataclass
class Audit:
    """What the selection did with every row. `summary` is selection.json; a line per row is written by `save`."""

    rows: Dataset  # as they came in
    codes: np.ndarray  # (rows,) uint8: 0 kept, else a place in `reasons`, counted from 1
    relabelled: np.ndarray  # (rows,) bool
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
        after each stage; by_class, by_source, by_role: `before` (of the rows that could be read) and `after`.
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
            file.writelines(block.encode() for block in self._lines())

    def _lines(self) -> Iterable[str]:
        """The lines in blocks; what follows the row id takes few values, so each is formatted once."""

        quoted = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would build one for every row

        def tail(source: str, code: int, relabelled: bool, reason: tuple[str, str] | None = None) -> str:
            stage, why = reason or (self.reasons[code - 1] if code else (None, None))
            rest = {"source": source, "kept": code == 0, "stage": stage, "reason": why, "relabelled": relabelled}
            return ", " + json.dumps(rest, ensure_ascii=False)[1:] + "\n"

        def line(row_id: str, end: str) -> str:
            return '{"row_id": ' + quoted(row_id) + end

        for row in self.bad_rows:
            yield line(row["row_id"], tail(row["source"], -1, False, ("rows", row["reason"])))
        tails: dict[tuple, str] = {}
        named = self.rows.select_columns(["row_id", "source"]).with_format("arrow")
        for bounds in slices(len(named)):
            part = named[bounds.start : bounds.stop]
            kinds = zip(
                part["source"].to_pylist(),
                self.codes[bounds.start : bounds.stop].tolist(),
                self.relabelled[bounds.start : bounds.stop].tolist(),
                strict=True,
            )
            block = []
            for row_id, kind in zip(part["row_id"].to_pylist(), kinds, strict=True):
                if kind not in tails:
                    tails[kind] = tail(*kind)
                block.append(line(row_id, tails[kind]))
            yield "".join(block)
            release(named)


def pair_class(facts: Facts) -> np.ndarray:
    chosen, rejected = facts["chosen_safe"], facts["rejected_safe"]
    kinds = 2 * (chosen == 0) + (rejected == 0)
    return np.where(np.isnan(chosen) | np.isnan(rejected), PAIR_CLASSES.index("unlabelled"), kinds)


def groups_of(column: pa.Array) -> tuple[list[str], np.ndarray]:
    """The distinct names of a column (null: "none") and each row's place among them."""
    encoded = column.fill_null("none").dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def summarise(
    facts: Facts,
    codes: np.ndarray,
    relabelled: np.ndarray,
    before: np.ndarray,
    reasons: list[tuple[str, str]],
    bad_rows: Sequence[dict],
) -> dict:
    """selection.json, but for the settings."""
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

    sources, source = groups_of(facts["source"])
    buffer = facts["buffer"].astype(np.int64)
    return {
        "digest": _digest(facts["row_id"].filter(pa.array(kept)), relabelled[kept]),
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
            "by_class": groups(PAIR_CLASSES, before, pair_class(facts)[kept]),  # `facts` bear the new labels by now
            "by_source": groups(sources, source, source[kept]),
            "by_role": groups(("task", "buffer"), buffer, buffer[kept]),
        },
    }


def _digest(row_ids: pa.Array, relabelled: np.ndarray) -> str:
    lines = pc.binary_join_element_wise(row_ids, pc.if_else(pa.array(relabelled), "1\n", "0\n"), "\t")
    ordered = lines.take(pc.sort_indices(lines))
    _, offsets, text = ordered.buffers()
    end = np.frombuffer(offsets, np.int32)[len(ordered)]
    return hashlib.sha256(memoryview(text)[:end]).hexdigest()


def read_decisions(path: Path, rows: int) -> Decisions | None:
    """What `write_decisions` wrote; None where there is nothing or it is damaged (the archive has checksums)."""
    try:
        with np.load(path) as arrays:
            codes, relabelled = arrays["codes"], arrays["relabelled"]
            summary = json.loads(arrays["summary"].tobytes())
    except Exception:  # not there, or damaged: what zipfile raises then depends on the byte that was hit
        return None
    return (codes, relabelled, summary) if len(codes) == len(relabelled) == rows else None


def write_decisions(path: Path, decided: Decisions) -> None:
    codes, relabelled, summary = decided
    path.parent.mkdir(parents=True, exist_ok=True)
    text = np.frombuffer(json.dumps(summary).encode(), np.uint8)
    with replaced(path) as file:
        np.savez(file, codes=codes, relabelled=relabelled, summary=text)
