"""A recipe's keys, types and ranges, held against arguments.py and trl_keys.py; what is wrong, in plain words."""

import dataclasses
import functools
import json
import re
import typing
from typing import Any, Literal

import pydantic

from core.config.reading import Document, Keys, dotted
from core.config.schema import EvaluateRecipe, PreferenceRecipe, SFTRecipe
from core.config.trl_keys import KINDS, RENAMED
from core.runtime.errors import RecipeError
from core.runtime.text import did_you_mean, show

Kind = Literal["dpo", "sft", "evaluate"]
SECTIONS: dict[Kind, type] = {"dpo": PreferenceRecipe, "sft": SFTRecipe, "evaluate": EvaluateRecipe}
REQUIRED = ("model_name_or_path", "output_dir", "datasets")


def validate(kind: Kind, document: Document, faults: list[str] | None) -> dict[str, Any]:
    """
    The values with their types checked, sections as dataclasses; keys that may only be off are taken out. `faults` is
    that of `parsing.resolve`.
    """
    refused = KINDS[kind][1]
    problems, errors = [], []
    for key in [key for key in document.values if key in refused]:
        # What is refused may be said to be off: that is what it is.
        if document.values.pop(key) not in (None, False):
            problems.append((document.place((key,)), f"{key}: {refused[key]}"))
    checked = None
    try:
        # As JSON, since pydantic is strict about values but takes a mapping for a dataclass only from there.
        checked = _schema(kind).model_validate_json(json.dumps(document.values))
    except pydantic.ValidationError as error:
        problems += _problems(error, document, _hints(kind))
        errors = error.errors(include_url=False)
    if problems:
        lines = list(dict.fromkeys(f"{place}: {problem}" for place, problem in problems))
        if faults is None or any(item["type"] == "missing" for item in errors):
            raise RecipeError("; ".join(lines))
        faults += lines
    if checked is None:
        document.remove([_keys_of(item, document.values) for item in errors])
        return validate(kind, document, None)
    return {key: getattr(checked, key) for key in document.values}


def _hints(kind: Kind) -> dict[str, Any]:
    return KINDS[kind][0] | typing.get_type_hints(SECTIONS[kind], include_extras=True)


@functools.cache
def _schema(kind: Kind) -> type[pydantic.BaseModel]:
    required = [key for key in REQUIRED if not (kind == "evaluate" and key == "datasets")]
    return pydantic.create_model(
        "Recipe",
        __config__=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        **{key: (hint, ... if key in required else None) for key, hint in _hints(kind).items()},
    )


def _problems(error: pydantic.ValidationError, document: Document, hints: dict[str, Any]) -> list[tuple[str, str]]:
    """Pydantic's errors, one for each value, as (place, problem)."""
    found: dict[Keys, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_keys_of(item, document.values), []).append(item)
    problems = []
    for keys, items in found.items():
        if any(other[: len(keys)] == keys for other in found if other != keys):
            continue  # a union: what is wrong inside the list says more than that it is no string either
        kinds = {item["type"] for item in items}
        if kinds & {"extra_forbidden", "unexpected_keyword_argument"}:
            problem = f"unknown key{_nearest_key(keys, hints)}"
        elif "missing" in kinds:
            problem = "is missing"
        else:
            wants = " or ".join(dict.fromkeys(_wanted(item) for item in items))
            problem = f"must {wants.replace(' or be ', ' or ')}, not {show(items[0]['input'])}{_nearest_value(items)}"
        problems.append((document.place(keys), f"{dotted(keys)}: {problem}"))
    return problems


def _keys_of(item: dict[str, Any], values: Any) -> Keys:
    """The way to the faulty value, without the branches of unions that pydantic puts between."""
    keys: list[str | int] = []
    for part in item["loc"]:
        if isinstance(values, dict) and part in values or isinstance(values, list) and isinstance(part, int):
            values = values[part]
            keys.append(part)
    return (*keys, item["loc"][-1]) if item["type"] == "missing" else tuple(keys)


def _wanted(item: dict[str, Any]) -> str:
    """What pydantic asks for, as it goes on after "must"."""
    words = item["msg"].split(" after validation")[0].split(" should ")[1]
    for theirs, plain in {
        "valid integer": "integer",
        "an object": "a mapping",
        "a valid boolean": "true or false",
    }.items():
        words = words.replace(theirs, plain)
    return words.replace("a integer", "an integer").replace("valid array", "list").replace("a valid", "a")


def _nearest_value(items: list[dict[str, Any]]) -> str:
    allowed = [word for item in items for word in re.findall("'([^']+)'", item.get("ctx", {}).get("expected", ""))]
    return did_you_mean(items[0]["input"], allowed) if isinstance(items[0]["input"], str) else ""


def _nearest_key(keys: Keys, hints: dict[str, Any]) -> str:
    level, word = hints, str(keys[-1])
    for part in keys[:-1]:
        if isinstance(part, str):
            level = typing.get_type_hints(section_of(level[part]))
    if len(keys) == 1 and word in RENAMED:
        return f"; did you mean {RENAMED[word]}?"
    elsewhere = [path for path in _all_keys(hints) if path.split(".")[-1] == word.split(".")[-1]]
    if elsewhere:
        where = ", a key within a section" if "." in elsewhere[0] else ", at the top level"
        return f"; did you mean {' or '.join(elsewhere)}{where}?"
    others = [name for name in SECTIONS if word in _hints(name)]
    if others and len(keys) == 1:
        return f"; it is a key of recipes/{others[0]}.py"
    return did_you_mean(word, level) or (f"; known here: {', '.join(level)}" if len(keys) > 1 else "")


def _all_keys(hints: dict[str, Any], above: str = "") -> list[str]:
    paths = []
    for key, hint in hints.items():
        paths.append(above + key)
        if section := section_of(hint):
            paths += _all_keys(typing.get_type_hints(section), f"{above}{key}.")
    return paths


def section_of(hint: Any) -> type | None:
    """The dataclass in a type such as `Score | None` or `list[DatasetEntry]`."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for inner in typing.get_args(hint) if (found := section_of(inner))), None)
