"""
Every key that a recipe may have, with its meaning, range, default and an example: what `--help` prints, and what
recipes/KEYS.md holds (`make keys` writes it).
"""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from typing import Any

import pydantic

from core.config.schema import RECIPES, Kind
from core.config.trl_keys import ACCEPTED, type_of


@dataclass(frozen=True)
class Key:
    """A key of schema.py, or one of TRL's that a recipe may use."""

    type: Any
    default: Any  # MISSING: it must be given
    description: str
    example: str  # a value as it stands in YAML; empty for a section and for keys of TRL
    owner: type | str = field(compare=False)  # the dataclass of schema.py, or the name of TRL's

    @property
    def ours(self) -> bool:
        return isinstance(self.owner, type)

    @property
    def required(self) -> bool:
        return self.default is MISSING


@functools.cache
def keys_of(kind: Kind) -> dict[str, Key]:
    """
    All keys of a recipe by their dotted names, those of TRL first. An entry of a list stands without its number:
    `datasets.columns.prompt`.
    """
    theirs = {}
    for name, key in ACCEPTED[kind].items():
        default = MISSING if name in ("model_name_or_path", "output_dir") else key.default
        theirs[name] = Key(type_of(name, key), default, _first_sentence(key.help), "", key.owner)
    return theirs | dict(_own_keys(RECIPES[kind]))


def usage(kind: Kind) -> str:
    """What `--help` prints."""
    return "\n".join(
        [
            f"usage: accelerate launch recipes/{kind}.py --config RECIPE.yaml [--key value | --key=value …]",
            "",
            "A key may be nested (--margin.preset dpo, --datasets.0.path rows.jsonl); values are YAML.",
            *listing(keys_of(kind)),
        ]
    )


def reference() -> str:
    """The text of recipes/KEYS.md."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made by `make keys` from [schema.py](core/config/schema.py) and the source of the pinned TRL; `--help` of a",
        "script prints its part. In YAML a dot is a level: `margin.preset: bfpo` is `margin: {preset: bfpo}`. On the",
        "command line it stays a dot, and a list's entries are numbered: `--datasets.0.path rows.jsonl`.",
    ]
    known = keys_of("dpo")
    for kind in typing.get_args(Kind):
        other = {name: key for name, key in keys_of(kind).items() if known.get(name) != key}
        title = "dpo.py" if kind == "dpo" else f"{kind}.py, where it differs from dpo.py"
        lines += ["", f"## {title}", *listing(known if kind == "dpo" else other)]
    return "\n".join(lines)


def listing(keys: dict[str, Key]) -> list[str]:
    """Sections with their keys, a line each, ours first. Those of eval_datasets are left out: they are datasets'."""
    sections: dict[tuple[str, type | str], list[str]] = {}
    for name, key in sorted(keys.items(), key=lambda item: not item[1].ours):
        if name.startswith("eval_datasets."):
            continue
        facts = [_words(pydantic.TypeAdapter(key.type).json_schema()), _shown(key.default)]
        facts += [f"e.g. `{key.example}`"] if key.example else []
        line = f"- `{name}`: {key.description} ({'; '.join(fact for fact in facts if fact)})"
        sections.setdefault((name.rpartition(".")[0], key.owner), []).append(line)
    lines = []
    for (above, owner), listed in sections.items():
        if isinstance(owner, type):
            title, about = above or "top level", owner.__doc__
        else:
            title, about = owner, f"Keys that {owner} reads, in its words."
        lines += ["", f"### {title}", "", " ".join(about.split()), "", *listed]
    return lines


def _own_keys(section: type, above: str = "") -> Iterable[tuple[str, Key]]:
    hints = typing.get_type_hints(section, include_extras=True)
    for entry in dataclasses.fields(section):
        name, hint = above + entry.name, hints[entry.name]
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        example = "".join(entry.metadata["examples"])
        yield name, Key(hint, default, entry.metadata["description"], example, section)
        if below := _section_of(hint):
            yield from _own_keys(below, f"{name}.")


def _section_of(hint: Any) -> type | None:
    """The dataclass in a type such as `Score | None` or `list[DatasetEntry]`."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((found for inner in typing.get_args(hint) if (found := _section_of(inner))), None)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<!e\.g)\.\s", text.replace("%%", "%"), maxsplit=1)[0].rstrip(".")


def _shown(default: Any) -> str:
    if default is MISSING:
        return "required"
    if dataclasses.is_dataclass(default):
        return ""
    return f"default {default if isinstance(default, str) else json.dumps(default)}"


def _words(schema: dict[str, Any]) -> str:
    """The range that a JSON schema allows, in words: `integer ≥ 1 or null`."""
    if "$ref" in schema or "properties" in schema:
        return "section"
    if "anyOf" in schema:
        return " or ".join(_words(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        item = _words(schema["items"])
        return f"[{item}, {item if schema.get('maxItems') == 2 else '…'}]"
    if schema["type"] == "object":
        inner = schema["additionalProperties"]
        return "mapping" if inner is True else f"mapping to {_words(inner)}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = " and ".join(f"{sign} {schema[bound]:.10g}" for bound, sign in signs.items() if bound in schema)
    name = {"boolean": "true or false"}.get(schema["type"], schema["type"])
    return f"{name} {bounds}".strip()


if __name__ == "__main__":
    print(reference())
