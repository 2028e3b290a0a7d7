"""A recipe's keys, types and ranges held against schema.py and trl_keys.py; what is wrong, in plain words."""

import functools
import json
import re
import typing
from typing import Any

import pydantic

from core.config.keys import keys_of
from core.config.reading import Document, Keys, dotted
from core.config.schema import Kind
from core.config.trl_keys import REFUSED, RENAMED
from core.runtime.errors import RecipeError
from core.runtime.text import did_you_mean, show

MOST_TOLD = 20  # faults of a recipe's keys; hundreds are another kind of file


def check_keys(kind: Kind, document: Document) -> tuple[dict[str, Any], list[str]]:
    """
    Hold every key, type and range against the schema and trl_keys.py; what is wrong is taken out of the document, and
    so are keys that may only be off.

    Returns:
        The given keys of schema.py with their sections as dataclasses; and a line for each key that is wrong.

    Raises:
        RecipeError: a required key is missing.
    """
    refused = REFUSED[kind]
    faults = []
    for key in [key for key in document.values if key in refused]:
        # What is refused may be said to be off: that is what it is.
        if document.values.pop(key) not in (None, False):
            faults.append(f"{document.place((key,))}: {key}: {refused[key]}")
    checked, errors = _validate(kind, document)
    faults += _told(errors, document, kind)
    while checked is None:
        if any(error["type"] == "missing" for error in errors):
            raise RecipeError("; ".join(faults))
        document.remove([_keys_of(error, document.values) for error in errors])
        checked, errors = _validate(kind, document)
    known = keys_of(kind)
    return {key: getattr(checked, key) for key in document.values if known[key].ours}, faults


def _validate(kind: Kind, document: Document) -> tuple[Any, list[dict[str, Any]]]:
    """The values as an object of the schema and no errors, or None and all of pydantic's errors."""
    try:
        # As JSON, since pydantic is strict about values but takes a mapping for a dataclass only from there.
        return _schema(kind).model_validate_json(json.dumps(document.values)), []
    except pydantic.ValidationError as error:
        return None, error.errors(include_url=False)


@functools.cache
def _schema(kind: Kind) -> type[pydantic.BaseModel]:
    top = {name: key for name, key in keys_of(kind).items() if "." not in name}
    return pydantic.create_model(
        "Recipe",
        __config__=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        **{name: (key.type, ... if key.required else None) for name, key in top.items()},
    )


def _told(errors: list[dict[str, Any]], document: Document, kind: Kind) -> list[str]:
    """Pydantic's errors as lines, one for each value."""
    found: dict[Keys, list[dict[str, Any]]] = {}
    for error in errors:
        found.setdefault(_keys_of(error, document.values), []).append(error)
    lines = []
    above = {keys[:level] for keys in found for level in range(1, len(keys))}
    for keys, items in found.items():
        if keys in above:
            continue  # a union: what is wrong inside the list says more than that it is no string either
        if len(lines) == MOST_TOLD:
            lines.append(f"{document.path}: and {len(found) - MOST_TOLD:,} keys more that are wrong")
            break
        kinds = {item["type"] for item in items}
        if kinds & {"extra_forbidden", "unexpected_keyword_argument"}:
            problem = f"unknown key{_nearest_key(keys, kind)}"
        elif "missing" in kinds:
            problem = "is missing"
        else:
            wants = " or ".join(dict.fromkeys(_wanted(item) for item in items))
            problem = f"must {wants.replace(' or be ', ' or ')}, not {show(items[0]['input'])}{_nearest_value(items)}"
        lines.append(f"{document.place(keys)}: {dotted(keys)}: {problem}")
    return lines


def _keys_of(error: dict[str, Any], values: Any) -> Keys:
    """The way to the faulty value, without the branches of unions that pydantic puts between."""
    keys: list[str | int] = []
    for part in error["loc"]:
        if isinstance(values, dict) and part in values or isinstance(values, list) and isinstance(part, int):
            values = values[part]
            keys.append(part)
    return (*keys, error["loc"][-1]) if error["type"] == "missing" else tuple(keys)


def _wanted(error: dict[str, Any]) -> str:
    """What pydantic asks for, as it goes on after "must"."""
    words = error["msg"].split(" after validation")[0].split(" should ")[1]
    for theirs, plain in {
        "valid integer": "integer",
        "an object": "a mapping",
        "a valid boolean": "true or false",
        "a integer": "an integer",
        "valid array": "list",
        "a valid": "a",
    }.items():
        words = words.replace(theirs, plain)
    return words


def _nearest_value(errors: list[dict[str, Any]]) -> str:
    allowed = [word for error in errors for word in re.findall("'([^']+)'", error.get("ctx", {}).get("expected", ""))]
    return did_you_mean(errors[0]["input"], allowed) if isinstance(errors[0]["input"], str) else ""


def _nearest_key(keys: Keys, kind: Kind) -> str:
    word, known = str(keys[-1]), keys_of(kind)
    if (path := dotted(keys)) in RENAMED:
        return f"; did you mean {RENAMED[path]}?"
    elsewhere = [path for path in known if path.rpartition(".")[2] == word.rpartition(".")[2]]
    if elsewhere:
        where = ", a key within a section" if "." in elsewhere[0] else ", at the top level"
        return f"; did you mean {' or '.join(elsewhere)}{where}?"
    others = [other for other in typing.get_args(Kind) if word in keys_of(other)]
    if others and len(keys) == 1:
        return f"; it is a key of recipes/{others[0]}.py"
    section = dotted(tuple(key for key in keys[:-1] if isinstance(key, str)))  # a list's items have the same keys
    level = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == section]
    return did_you_mean(word, level) or (f"; known here: {', '.join(level)}" if len(keys) > 1 else "")
