"""Words of messages: nested keys, values on a line, what others wrote made printable, and the nearest known word."""

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

# Unicode's general categories: control, format, surrogate, line separator, paragraph separator.
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = {"\u200c", "\u200d"}

# Access tokens of the Hub and of the usual services, and passwords in addresses.
SECRETS = re.compile(
    r"\b(hf_|api_org_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{12,}|(://[^\s/:@]*:)[^\s/@]+(?=@)"
)
SECRET_NAMES = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET)$")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping under dotted keys; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def show(value: Any) -> str:
    """A value as an error message shows it, on one line."""
    return shorten(json.dumps(value, ensure_ascii=False))


def shorten(text: str) -> str:
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


def without_secrets(text: str) -> str:
    """A text without access tokens, passwords in addresses, and what variables such as WANDB_API_KEY hold."""
    for name, value in os.environ.items():
        if len(value) >= 12 and SECRET_NAMES.search(name.upper()) and not value.startswith("/"):
            text = text.replace(value, "…")
    return SECRETS.sub(lambda found: f"{found[1] or found[2]}…", text)


def masked(value: Any) -> Any:
    """Plain nested values (a recipe) with `without_secrets` over every text in them, keys included."""
    if isinstance(value, Mapping):
        return {masked(key): masked(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [masked(below) for below in value]
    return without_secrets(value) if isinstance(value, str) else value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the nearest of the known words, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
