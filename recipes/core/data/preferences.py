"""Rows of one schema from sources of any layout: the recipe's mapping is applied, and every bad row is named."""

import ast
import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from core.config.entries import check_conversations, check_preferences, place, source_names, with_answer
from core.config.schema import Columns, DatasetEntry
from core.data.caches import mapped
from core.data.columns import Found, Row, check_columns
from core.data.mapping import map_batch, read_answer, read_conversation, read_pair
from core.data.pairing import ROW, as_pair, pair_rows, unfolded
from core.data.sources import draw_fraction, load_rows, not_text
from core.runtime.environment import code_digest
from core.runtime.errors import RecipeError

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "prompt": MESSAGES,
        "chosen": Value("string"),
        "rejected": Value("string"),
        "chosen_safe": Value("bool"),
        "rejected_safe": Value("bool"),
        "chosen_severity": Value("int64"),
        "rejected_severity": Value("int64"),
        "score_chosen": Value("float64"),
        "score_rejected": Value("float64"),
        "tie": Value("bool"),
        "category": Value("string"),
        "source": Value("string"),
        "row_id": Value("string"),
        "role": Value("string"),
    }
)

BadRows = list[dict[str, str]]  # row_id, source and reason of each row that `bad_rows: drop` left out

ROWS_NAMED = 5  # rows that a message names before it only counts
WORKER_ROWS = 10_000  # rows that are worth a process of their own
# Part of every cache key, so that rows which other code has mapped are never read back.
CODE = code_digest(
    "data/preferences", "data/mapping", "data/columns", "data/codings", "data/pairing", "config/entries"
)


def load_preferences(entries: list[DatasetEntry], seed: int, num_proc: int | None = None) -> tuple[Dataset, BadRows]:
    """
    The preference rows of all entries, one entry after the other: `FEATURES` and the entries' `extra` columns
    (float64, null in the rows of an entry that doesn't name them).

    Args:
        entries: the recipe's `datasets` or `eval_datasets`.
        seed: draws each entry's `fraction`.
        num_proc: processes that map the rows; None: one.

    Raises:
        RecipeError: an entry that can't be loaded, a mapping that doesn't fit its columns, or bad rows under
            `bad_rows: error`.
    """
    check_preferences(entries)
    extra = sorted({name for entry in entries for name in entry.columns.extra})
    features = Features({**FEATURES, **{name: Value("float64") for name in extra}})
    parts, bad = [], []
    for entry, source in zip(entries, source_names(entries), strict=True):
        rows, dropped = _map(entry, source, seed, num_proc, read_pair, features)
        parts.append(rows)
        bad += dropped
    return datasets.concatenate_datasets(parts), bad


def load_conversations(entries: list[DatasetEntry], seed: int, num_proc: int | None = None) -> Dataset:
    """
    Conversations that end in the answer to learn, in the column `messages`: an entry's `columns.conversation`, or the
    chosen, rejected or safer answer of its preference rows. An empty answer is a bad row here, since no selection
    follows; rows left out by `bad_rows: drop` are counted in a warning.

    Raises:
        RecipeError: as `load_preferences`, and as `entries.check_conversations`.
    """
    check_conversations(entries)
    parts = []
    for entry, source in zip(entries, source_names(entries), strict=True):
        read = read_conversation
        if entry.columns.conversation is None:
            entry = with_answer(entry)
            read = partial(read_answer, answer=entry.answer)
        rows, bad = _map(entry, source, seed, num_proc, read, Features({"messages": MESSAGES}))
        for reason, count in Counter(row["reason"] for row in bad).items():
            logging.getLogger(__name__).warning("%s: %d rows dropped: %s", place(entry), count, reason)
        parts.append(rows.select_columns("messages"))
    return datasets.concatenate_datasets(parts)


def oddities(rows: Dataset) -> list[str]:
    """What of loaded pairs or conversations is trained as it stands and hardly meant so: lines, with counts."""
    found = []
    if "messages" in rows.column_names:
        texts = {"messages": [talk[-1]["content"] for talk in rows["messages"]]}
    else:
        texts = {side: rows[side][:] for side in ("chosen", "rejected")}
        texts["prompt"] = [prompt[-1]["content"] for prompt in rows["prompt"]]
        table = rows.with_format("arrow")
        gaps = pc.subtract(table["score_chosen"][:], table["score_rejected"][:]).to_numpy()
        gaps = np.where(table["tie"][:].to_numpy(), 0, gaps)  # of a tie, neither is the chosen one
        if against := int((gaps < 0).sum()):
            first = ", ".join(rows["row_id"][int(row)] for row in np.flatnonzero(gaps < 0)[:ROWS_NAMED])
            scored = int((~np.isnan(gaps)).sum())
            found.append(
                f"in {against:,} of {scored:,} rows with scores the rejected answer has the higher one ({first}); "
                "labels and scores contradict each other there"
            )
    for part, held in texts.items():
        dumped = [_dumped(text) for text in held]
        messages, some = dumped.count("messages"), sum(kind is not None for kind in dumped)
        if messages or some > len(held) / 2:  # a single answer in JSON may be what was asked for
            count = messages or some
            found.append(
                f"{count:,} of {len(held):,} rows hold {'messages' if messages else 'JSON'} dumped as text in {part}, "
                "which is trained as it stands; parse it in the source, so that the column holds messages"
            )
    return found


def _dumped(text: str) -> str | None:
    """What a text dumps, as JSON or as Python writes it: `messages`, other `data`, or None where it is text."""
    text = text.strip()
    if not (text.startswith(("[", "{")) and text.endswith(("]", "}"))):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not text.startswith(("[{'", "{'", "['")):
            return None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    items = value if isinstance(value, list) else [value]
    fields = ({"role", "content"}, {"from", "value"}, {"type", "text"})
    is_talk = bool(items) and all(
        isinstance(item, dict) and any(pair <= item.keys() for pair in fields) for item in items
    )
    return "messages" if is_talk else "data"


def _map(
    entry: DatasetEntry,
    source: str,
    seed: int,
    num_proc: int | None,
    read: Callable[[Row], dict],
    features: Features,
) -> tuple[Dataset, BadRows]:
    """An entry's rows through `read`, cached on disk; bad rows are refused, or dropped and listed."""
    rows = load_rows(entry).with_format(None)
    try:
        return _map_rows(rows, entry, source, seed, num_proc, read, features)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{place(entry)}: {not_text(rows)}") from error


def _map_rows(
    rows: Dataset,
    entry: DatasetEntry,
    source: str,
    seed: int,
    num_proc: int | None,
    read: Callable[[Row], dict],
    features: Features,
) -> tuple[Dataset, BadRows]:
    where, columns = place(entry), entry.columns
    if columns.unfold is not None:
        rows = unfolded(rows, columns.unfold, where)
    if columns.response is not None:
        columns = as_pair(columns)
    found = check_columns(rows, columns, where)
    numbers, others, unpaired = np.arange(len(rows)), None, []
    if columns.response is not None:
        rows, others, numbers, unpaired = _pairs(rows, entry, columns, found, source)
    if entry.fraction is not None and entry.fraction < 1:
        drawn = draw_fraction(len(rows), entry.fraction, seed, source)
        if not len(drawn):
            raise RecipeError(f"{where}: `fraction: {entry.fraction}` of {len(rows)} rows leaves none; raise it")
        rows, numbers = rows.select(drawn), numbers[drawn]
        others = others and others.select(drawn)
    names = sorted({column.path[0] for column in found.values()})
    rows, others = rows.select_columns(names), others and others.select_columns(names)
    workers = min(num_proc or 1, max(1, len(rows) // WORKER_ROWS))
    settings = {"columns": columns, "found": found, "constants": {"source": source, "role": entry.role}}
    features = Features({**features, "row_id": Value("string"), "fault": Value("string")})
    mapped_rows = mapped(
        rows,
        map_batch,
        where,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        fn_kwargs=settings | {"read": read, "numbers": numbers, "features": features, "others": others},
        num_proc=workers if workers > 1 else None,
        # What the rows are made of decides, not how Python happens to pickle it.
        new_fingerprint=Hasher.hash(
            [rows._fingerprint, others and others._fingerprint, CODE, list(features), entry.answer, settings]
        ),
        desc=f"rows of {source}",
    )
    if columns.row_id is not None:
        _check_row_ids(mapped_rows["row_id"][:], columns.row_id, where)
    is_bad = np.array(mapped_rows.data.column("fault").is_valid())
    mapped_rows, bad = mapped_rows.remove_columns("fault"), mapped_rows.select(np.flatnonzero(is_bad))
    if not len(bad):
        return mapped_rows, unpaired
    if entry.bad_rows == "error" or len(bad) == len(mapped_rows):
        raise RecipeError(f"{where}: {_summary(bad['fault'][:], numbers[is_bad], len(mapped_rows))}")
    dropped = [{"row_id": row["row_id"], "source": source, "reason": row["fault"]} for row in bad]
    return mapped_rows.select(np.flatnonzero(~is_bad)), unpaired + dropped


def _pairs(
    rows: Dataset, entry: DatasetEntry, columns: Columns, found: dict[str, Found], source: str
) -> tuple[Dataset, Dataset, np.ndarray, BadRows]:
    """The rows of the chosen and of the rejected answers, what each pair is called, and the rows in no pair."""
    pairing = pair_rows(rows, columns, found)
    left_out = pairing.left_out + pairing.faults
    if pairing.faults and entry.bad_rows == "error":
        positions, reasons = zip(*pairing.faults, strict=True)
        raise RecipeError(f"{place(entry)}: {_summary(list(reasons), np.array(positions), len(rows))}")
    if not len(pairing.chosen):
        counts = Counter(reason for _, reason in left_out)
        raise RecipeError(
            f"{place(entry)}: no two of {len(rows):,} answers make a pair "
            f"({'; '.join(f'{reason}: {count:,}' for reason, count in counts.items())})"
        )
    called = np.arange(len(rows)).astype(str)
    if columns.unfold is not None:
        lists = np.array(rows[ROW])
        items = np.arange(len(rows)) - np.searchsorted(lists, lists)
        called = np.array([f"{row}.{item}" for row, item in zip(lists, items, strict=True)])
    numbers = np.array([f"{called[a]}+{called[b]}" for a, b in zip(pairing.chosen, pairing.rejected, strict=True)])
    dropped = [{"row_id": f"{source}:{called[row]}", "source": source, "reason": reason} for row, reason in left_out]
    return rows.select(pairing.chosen), rows.select(pairing.rejected), numbers, dropped


def _check_row_ids(ids: list[str], name: str, where: str) -> None:
    shared = [row_id for row_id, count in Counter(ids).items() if count > 1]
    if shared:
        examples = ", ".join(shared[:ROWS_NAMED])
        raise RecipeError(
            f"{where}: columns.row_id names {name!r}, but several rows share an id ({examples}); name a column of "
            "unique ids, or remove columns.row_id to number the rows"
        )


def _summary(reasons: list[str], numbers: np.ndarray, total: int) -> str:
    """One line on all bad rows: each fault with its first rows."""
    rows_of: dict[str, list[int]] = {}
    for reason, number in zip(reasons, numbers.tolist(), strict=True):
        rows_of.setdefault(reason, []).append(number)
    faults = []
    for reason, rows in rows_of.items():
        more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        faults.append(f"{reason}: row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:ROWS_NAMED]))}{more}")
    way_out = (
        "mend the source" if len(reasons) == total else "mend them, or set `bad_rows: drop` to go on without them"
    )
    return f"{len(reasons)} of {total} rows can't be used (rows count from 0): {'; '.join(faults)}; {way_out}"
