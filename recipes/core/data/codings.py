"""
Columns that hold a code, such as 0 and 1, safe and unsafe, model_a and tie: judged over the whole column before any
row is mapped, for what a code means shows in all of its values and never in one. A code of its own is no bad row: it
is refused with the line of `columns.values` that would say what it means.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from core.config.schema import TIE, Columns
from core.runtime.errors import RecipeError
from core.runtime.text import printable

Code = dict[str, Any]  # the value that each word stands for

FIRST, SECOND = {"0": 0, "false": 0}, {"1": 1, "true": 1}
# What the words of a column mean that nothing else is said about.
PLAIN: dict[str, Code] = {
    "better": FIRST | SECOND,
    "safe": {"0": False, "false": False, "1": True, "true": True},
    "severity": {str(level): level for level in range(4)},
}
MEANS = {
    "better": "0: the first answer, 1: the second, tie: neither, null: a bad row",
    "safe": "true, false, or null: not known",
    "severity": "0 to 3, or null: not known",
    "number": "a number, or null: a bad row",
}
GUESSES: dict[str, dict[Any, set[str]]] = {  # words that speak for themselves, for the line to paste
    "better": {0: {"a", "first", "left"}, 1: {"b", "second", "right"}},
    "safe": {True: {"safe", "yes", "harmless"}, False: {"unsafe", "no", "harmful", "toxic"}},
    "severity": {0: {"none", "safe"}, 1: {"low", "minor"}, 2: {"medium", "moderate"}, 3: {"high", "severe"}},
    "number": {},
}
TIES = {"tie", "both", "equal", "same", "draw", "neither"}
KEPT_AS = {"better": int, "safe": bool, "severity": int, "number": float}
SHOWN = 12  # values of a column that a message names


def sort_of(key: str) -> str | None:
    """What a key of `columns` asks of its codes; None: it reads no code."""
    if key in ("better", "safer"):
        return "better"
    if key == "label":
        return "safe"
    for sort in ("severity", "safe"):
        if sort in key.split("_"):
            return sort
    return (
        "number"
        if key in ("preference", "score", "rank", "score_chosen", "score_rejected", "scores", "extra")
        else None
    )


def word(value: object) -> str:
    """The word of a recipe for a value: 1 and 1.0 are `1`, true is `true`; case and white space around don't count."""
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        value = int(value)
    return str(value).strip().casefold()


def is_missing(value: object) -> bool:
    """Null, NaN (pandas' null among numbers) and an empty field of a CSV file."""
    return value is None or value == "" or isinstance(value, float) and math.isnan(value)


def number(text: str) -> float | None:
    """The finite number that a text is; None if it is none. Python's own `1_000` is none."""
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def code_of(rows: Dataset, key: str, name: str, path: list[str], columns: Columns, where: str) -> Code | None:
    """
    What the words of a column mean; None: they are numbers, to be read as such.

    Args:
        key: of `columns`, that names the column.
        path: the way to it.

    Raises:
        RecipeError: values that `columns.values` says nothing about, or that the key has no use for.
    """
    sort, place = sort_of(key), f"{where}: columns.{key} names {name!r}"
    counts, labels = _count(rows, path)
    words = list(dict.fromkeys(word(value) for value, _ in counts))
    if name in columns.values:
        code = _given(columns.values[name], sort, f"{where}: columns.values.{name}")
        if unsaid := [told for told in words if told not in code]:
            said = f"columns.values.{name} does not say what {', '.join(map(_quoted, unsaid[:SHOWN]))} means"
            raise RecipeError(f"{place}, and {said} ({MEANS[sort]}); add it")
    elif sort == "number":
        numbers = [_number(value) for value, _ in counts if not isinstance(value, bool)]
        if counts and labels is None and any(found is not None for found in numbers):
            _refuse_one_side(key, {found for found in numbers if found is not None}, name, place)
            return None
        code = {}
    else:
        code = PLAIN[sort]
    # 0 and 1 beside true and false, or beside text, are of more than one hand.
    mixed = name not in columns.values and len({_family(value) for value, _ in counts}) > 1
    if mixed or not set(words) <= set(code):
        what = "which holds text, not a number" if sort == "number" else "whose values are a code of their own"
        shown = ", ".join(f"{_quoted(value)}" + (f" ({count:,})" if count else "") for value, count in counts[:SHOWN])
        more = f" and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else ""
        guess = {told: _guess(told, words, sort, columns) for told in words[:SHOWN]}
        line = json.dumps({"values": {name: guess}}, ensure_ascii=False)[1:-1]
        raise RecipeError(
            f"{place}, {what}: {printable(shown)}{more}; say in `columns` what each means ({MEANS[sort]}), e.g. "
            + printable(line).replace('"values"', "values", 1)
            + (", with a meaning for each ?" if "?" in guess.values() else "")
        )
    # A class label is stored as its number.
    return code if labels is None else {str(index): code[word(text)] for index, text in enumerate(labels)}


def _given(values: Code, sort: str, place: str) -> Code:
    """A map of `columns.values` by the words of its keys, each meaning as our own rows hold it."""
    code: Code = {}
    for written, meaning in values.items():
        is_number = isinstance(meaning, (int, float)) and not isinstance(meaning, bool)
        fits = {
            "better": meaning == TIE or is_number and meaning in (0, 1),
            "safe": isinstance(meaning, bool) or is_number and meaning in (0, 1),
            "severity": is_number and meaning in range(4),
            "number": is_number,
        }
        if not fits[sort] and meaning is not None:
            raise RecipeError(f"{place}.{written}: {_quoted(meaning)} is no meaning here ({MEANS[sort]})")
        told = word(written)
        if told in code:
            raise RecipeError(f"{place}: {written!r} is there twice, for case and white space around don't count")
        code[told] = meaning if isinstance(meaning, str | None) else KEPT_AS[sort](meaning)
    return code


def _count(rows: Dataset, path: list[str]) -> tuple[list[tuple[Any, int]], list[str] | None]:
    """A column's values with how often each is there, the missing ones aside; and the names of a class label."""
    feature: Any = rows.features
    for step in path:
        feature = feature[step]
    if isinstance(feature, ClassLabel):
        return [(label, 0) for label in feature.names], feature.names
    counts: Counter = Counter()
    for value, count in _distinct(rows, path):
        if not is_missing(value):
            told = value if isinstance(value, (bool, int, float, str, Decimal)) else json.dumps(value, default=str)
            counts[type(told), told] += count  # as keys of a dict, 1 and true would be one
    return [(value, count) for (_, value), count in counts.items()], None


def _distinct(rows: Dataset, path: list[str]) -> Iterator[tuple[Any, int]]:
    for table in rows.select_columns(path[:1]).with_format("arrow").iter(batch_size=100_000):
        column = table[path[0]]
        for step in path[1:]:
            column = pc.struct_field(column, step)
        is_json = isinstance(column.type, pa.JsonType)  # a column of mixed types, each as text
        for entry in pc.value_counts(column.cast(pa.string()) if is_json else column).to_pylist():
            value = entry["values"]
            yield (json.loads(value) if is_json and value is not None else value), entry["counts"]


def _family(value: object) -> type:
    return next((kind for kind in (bool, str) if isinstance(value, kind)), float)


def _number(value: object) -> float | None:
    return number(value) if isinstance(value, str) else float(value)


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def _refuse_one_side(key: str, numbers: set[float], name: str, place: str) -> None:
    """A preference of several values that stays on one side of 0 counts otherwise, e.g. 1 and 2."""
    if key == "preference" and len(numbers) > 1 and (min(numbers) >= 0 or max(numbers) <= 0):
        below = "below" if min(numbers) >= 0 else "above"
        example = json.dumps({name: {f"{value:g}": "?" for value in sorted(numbers)[:SHOWN]}}, ensure_ascii=False)
        raise RecipeError(
            f"{place}, which is never {below} 0, so that one answer would never be the better; where it counts "
            "otherwise, say in `columns` what each value means (below 0: the first answer, above: the second, 0: a "
            f"tie), e.g. values: {printable(example)}, with a number for each ?"
        )


def _guess(told: str, words: list[str], sort: str, columns: Columns) -> Any:
    """What a word most likely means; ? where it does not say."""
    if set(words) <= set(PLAIN.get(sort, {})):  # true beside 1
        return PLAIN[sort][told]
    parts = [part for part in re.split(r"[^a-z0-9]+", told) if part]
    if sort == "better":
        if TIES & set(parts):
            return TIE
        if told in (names := [word(name) for name in columns.responses or []]):
            return names.index(told)
        ends = {found[0] for other in words if (found := re.search(r"[0-9]+$", other))}
        if parts and ends in ({"0", "1"}, {"1", "2"}) and re.search(r"[0-9]+$", told):
            return sorted(ends).index(re.search(r"[0-9]+$", told)[0])
    means = [meaning for meaning, spoken in GUESSES[sort].items() if parts and parts[-1] in spoken]
    if sort == "safe" and means and "not" in parts[:-1]:
        means = [not means[0]]
    return means[0] if means else "?"
