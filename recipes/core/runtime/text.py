"""Words of messages: nested keys, values on a line, what others wrote made printable, and the nearest known word."""

import difflib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

# Unicode's general categories: control, format, surrogate, line separator, paragraph separator.
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = {"\u200c", "\u200d"}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping under dotted keys; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def show(value: Any) -> str:
    """A value as an error message shows it, on one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def printable(text: str) -> str:
    """
    What others wrote (a row, an id, a source's name) on one line, without what could steer a terminal or reverse a
    page: line breaks, control characters, invisible formats such as bidirectional marks, and lone surrogates stand as
    their escapes, e.g. `\\x1b`. The joiners of Persian, Hindi and emoji stay, and so do spaces of every width.
    """
    return "".join(
        mark.encode("unicode_escape").decode()
        if unicodedata.category(mark) in STEERING and mark not in JOINERS
        else mark
        for mark in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the nearest of the known words, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
