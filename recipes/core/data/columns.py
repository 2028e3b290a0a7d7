"""
What the columns of a source hold: checked against the recipe's mapping before any row is mapped, then read row by row.
A value that is of no use is raised as `BadRow`, so that a row's first fault is the one that is told.
"""

import math
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from core.config.schema import Columns, Messages
from core.data.codings import Code, code_of, is_missing, number, sort_of, word
from core.runtime.errors import RecipeError
from core.runtime.text import did_you_mean

TEXT, MESSAGE, MESSAGES = "text", "a message", "a list of messages"
NUMBER, BOOLEAN, FLAGS, NULL = "a number", "a boolean", "a struct of booleans", "nothing but null"
# Of Python's types.
KINDS = {
    str: TEXT, bool: BOOLEAN, int: NUMBER, float: NUMBER, Decimal: NUMBER, dict: MESSAGE, list: MESSAGES,
    bytes: "binary data", date: "a date", datetime: "a time",
}  # fmt: skip
# What the column may hold that a key of `columns` names.
ALLOWED = {
    **dict.fromkeys(["prompt", "chosen", "rejected", "responses", "response"], (TEXT, MESSAGE, MESSAGES)),
    "system": (TEXT,),
    "conversation": (MESSAGES, TEXT),
    **dict.fromkeys(["better", "safer", "preference", "extra"], (NUMBER, BOOLEAN, TEXT)),
    **dict.fromkeys(["chosen_safe", "rejected_safe", "safe", "response_safe", "label"], (BOOLEAN, NUMBER, TEXT)),
    **dict.fromkeys(["chosen_severity", "rejected_severity", "severity"], (NUMBER, BOOLEAN, TEXT)),
    **dict.fromkeys(["score_chosen", "score_rejected", "scores", "score", "rank"], (NUMBER, BOOLEAN, TEXT)),
    "category": (TEXT, FLAGS),
    "row_id": (TEXT, NUMBER),
}
# Columns that say what the model is to see beside prompt and answers: read by a key, left out on purpose, or refused.
SEEN_BESIDE = ("system", "tools", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios")


class Found(NamedTuple):
    """A column that a mapping names."""

    path: list[str]  # its name, or the names on the way into a struct
    kind: str  # what its first value is, and every other has to be
    codes: dict[str, Code | None]  # what its values mean, by what is asked of them (`codings.sort_of`)


def check_columns(rows: Dataset, columns: Columns, where: str) -> dict[str, Found]:
    """
    The columns that a mapping names, by the name.

    Raises:
        RecipeError: a column that isn't there, or that holds what its key has no use for; answers of two layouts, or
            answers of plain text that no prompt goes with; markers of `columns.turns` that can't be told apart.
    """
    if columns.turns:
        markers = [marker.strip() for marker in vars(columns.turns).values() if marker is not None]
        if "" in markers or len(set(markers)) < len(markers):
            raise RecipeError(f"{where}: columns.turns needs a marker of its own for each role, more than white space")
    found = {}
    for key, wanted in ALLOWED.items():
        value = getattr(columns, key)
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):  # and no constant
                several_texts = key == "prompt" and isinstance(value, list)
                column = _find(rows, key, name, (TEXT,) if several_texts else wanted, columns, where)
                sort, codes = sort_of(key), found[name].codes if name in found else {}
                if sort is not None:
                    codes[sort] = code_of(rows, key, name, column.path, columns, where)
                found[name] = column._replace(codes=codes)
    for name in columns.values:
        if name not in found or not found[name].codes:
            coded = [name for name, column in found.items() if column.codes]
            raise RecipeError(
                f"{where}: columns.values names {name!r}, which no key of `columns` reads as a code"
                + (did_you_mean(name, coded) or "; remove it")
            )
    if columns.conversation is None and columns.response is None:
        _check_answers(columns, found, where)
    _check_beside(rows, columns, found, where)
    return found


def _check_beside(rows: Dataset, columns: Columns, found: dict[str, Found], where: str) -> None:
    read = [column.path for column in found.values()]
    folders = {tuple(path[:-1]) for path in read} | {()}  # the rows themselves, and structs that a column lies in
    fields = [
        (*folder, name)
        for folder in folders
        for name in set(SEEN_BESIDE) & set(value_at(rows.features, list(folder)))
        if not any(path[: len(folder) + 1] == [*folder, name] for path in read)
    ]
    for path in sorted(fields):
        name = ".".join(path)
        if name in columns.leave_out:
            continue
        filled = sum(
            not is_empty(value_at(value, list(path[1:])))
            for table in rows.select_columns(path[0]).with_format("arrow").iter(batch_size=10_000)
            for value in table[path[0]].to_pylist()
        )
        if filled:
            way = "name it by columns.system, or " if name == "system" else "prompts and answers are text alone; "
            raise RecipeError(
                f"{where}: {filled:,} rows have something in the column {name!r}, which no key of `columns` reads: "
                f"{way}leave it out on purpose with columns.leave_out: [{name}]"
            )


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, or no item or field that says something; JSON in a text counts as itself."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None or isinstance(value, (str, list)) and value in ("", "[]", "{}", "null", [])


def _find(rows: Dataset, key: str, name: str, wanted: tuple[str, ...], columns: Columns, where: str) -> Found:
    path = [name] if name in rows.features else name.split(".")
    if value_at(rows.features, path) is None:
        structs = {struct: fields for struct, fields in rows.features.items() if isinstance(fields, dict)}
        names = [*rows.features, *(f"{struct}.{field}" for struct, fields in structs.items() for field in fields)]
        raise RecipeError(
            f"{where}: columns.{key} names {name!r}, which is none of the columns {', '.join(rows.column_names)}"
            + (did_you_mean(name, names) or "; name one of these")
        )
    kind = _kind(_first_value(rows, path), columns.messages)
    as_asked = ""
    if columns.turns and TEXT in wanted and MESSAGES in wanted:
        wanted, as_asked = (TEXT,), " as columns.turns asks"
    if kind not in (*wanted, NULL):
        way = "; write it as text in the source" if TEXT in wanted and kind in KINDS.values() and not as_asked else ""
        raise RecipeError(
            f"{where}: columns.{key} names {name!r}, which holds {kind}, not {' or '.join(wanted)}{as_asked}{way}"
        )
    return Found(path, kind, {})


def _check_answers(columns: Columns, found: dict[str, Found], where: str) -> None:
    first, second = columns.responses or (columns.chosen, columns.rejected)
    kind, other = found[first].kind, found[second].kind
    if kind != other and NULL not in (kind, other):
        raise RecipeError(f"{where}: {first!r} holds {kind} and {second!r} {other}; both need one layout")
    if kind in (TEXT, MESSAGE) and columns.prompt is None and columns.turns is None:
        raise RecipeError(
            f"{where}: {first!r} holds {kind}, so the prompt is elsewhere; set columns.prompt, or columns.turns if it "
            "is a transcript"
        )


def value_at(fields: object, path: list[str]) -> object:
    """What lies at the end of a path into nested dicts; None where there is nothing, or null on the way."""
    for step in path:
        fields = fields.get(step) if isinstance(fields, dict) else None
    return fields


def _first_value(rows: Dataset, path: list[str]) -> object:
    """The first value of a column that isn't null; None where all are."""
    for batch in rows.select_columns(path[:1]).iter(batch_size=1000):
        for top in batch[path[0]]:
            value = value_at(top, path[1:])
            if value is not None:
                return value
    return None


def _kind(value: object, messages: Messages) -> str:
    """What a column holds whose first value is this."""
    if value is None:
        return NULL
    is_list = isinstance(value, list)
    items = [item for item in value if item is not None] if is_list else [value]
    if items and all(isinstance(item, dict) for item in items):
        keys = list(dict.fromkeys(key for item in items for key in item))
        if {messages.role, messages.content} <= set(keys):
            return MESSAGES if is_list else MESSAGE
        if not is_list and _are_flags(value):
            return FLAGS
        kind = "a list of structs" if is_list else "a struct"
        return f"{kind} of {', '.join(keys)} (columns.messages says how messages are written)"
    if is_list and items:
        return f"a list of {type(items[0]).__name__}"
    return KINDS.get(type(value), f"a {type(value).__name__}")


def _are_flags(fields: dict) -> bool:
    return all(flag is None or isinstance(flag, bool) for flag in fields.values())


class BadRow(Exception):
    """What is wrong with a row, in the words of the message that names it."""


class Row:
    """A row of a source, read by the names of its columns. Every method raises BadRow where a value is of no use."""

    def __init__(self, values: dict, columns: Columns, found: dict[str, Found], other: "Row | None" = None) -> None:
        self.values, self.columns, self.found = values, columns, found
        self.other = other or self  # the row that holds the rejected answer, where each answer has one

    def value(self, name: str) -> object:
        """The value of a column; null as None."""
        path, kind, _ = self.found[name]
        value = value_at(self.values, path)
        if value is not None and KINDS[type(value)] != (MESSAGE if kind == FLAGS else kind):
            raise BadRow(
                f"rows of mixed layouts: `{name}` holds {KINDS[type(value)]} where the first row holds {kind} "
                "(give each layout a file and an entry of its own)"
            )
        return value

    def row_id(self, number: int) -> str:
        """What the id column says, or the row's number in its source."""
        name = self.columns.row_id
        if name is None:
            return str(number)
        value = self.value(name)
        if value is None:
            raise BadRow(f"`{name}` is null")
        # A column of whole numbers and nulls may have become one of floats: Arrow writes 3.0 as 3.
        return pa.scalar(value).cast(pa.string()).as_py() if isinstance(value, float) else str(value)

    def code(self, name: str, sort: str) -> Any:
        """What a value means that is read as a code; None where nothing is known."""
        path, _, codes = self.found[name]
        value = value_at(self.values, path)
        if is_missing(value):
            return None
        if codes[sort] is not None:
            return codes[sort][word(value)]
        if KINDS[type(value)] not in (NUMBER, TEXT):
            raise BadRow(f"`{name}` holds {KINDS[type(value)]} where the first row holds {NUMBER}")
        if isinstance(value, str) and (value := number(value)) is None:
            raise BadRow(f"`{name}` holds text that is not a number")
        return value

    def score(self, name: str) -> float:
        """A finite number. A null is a fault: JSON has no NaN, and some readers make it null."""
        value = self.code(name, "number")
        if value is None or not math.isfinite(value):
            raise BadRow(f"`{name}` is not a finite number")
        return float(value)

    def choice(self, name: str) -> int | str:
        """Which of two answers a column names, 0 or 1, or `schema.TIE`."""
        value = self.code(name, "better")
        if value is None:
            raise BadRow(f"`{name}` is neither 0 nor 1")
        return value

    def category(self) -> str | None:
        """The texts and the names of the true flags, joined by commas; None where there are none."""
        names = self.columns.category
        names = [names] if isinstance(names, str) else names or []
        texts, flags = [], {}
        for name in names:
            value = self.value(name)
            if self.found[name].kind == FLAGS:
                if not _are_flags(value or {}):
                    raise BadRow(f"`{name}` holds more than booleans")
                flags |= {flag: flags.get(flag) or is_true for flag, is_true in (value or {}).items()}
            elif value is not None:
                texts.append(value)
        texts += [flag for flag, is_true in flags.items() if is_true]
        return ", ".join(texts) if texts else None
