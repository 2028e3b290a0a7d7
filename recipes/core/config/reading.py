"""A recipe's file and the command line as one mapping, in which every key knows the line that it came from."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.runtime.errors import RecipeError
from core.runtime.text import did_you_mean, printable, shorten, show

Keys = tuple[str | int, ...]  # the way to a value: ("datasets", 0, "path")
DEEPEST, MOST_VALUES = 20, 100_000  # levels and values of a recipe; aliases may multiply the latter without end


@dataclass
class Document:
    """What the user gave: plain values, and where each stands ("my.yaml line 3", or "command line")."""

    values: dict[str, Any]
    places: dict[Keys, str]
    path: str
    overrides: list[str]  # as given: ["--margin.preset", "dpo"]

    def place(self, keys: Keys) -> str:
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]

    def refuse(self, keys: Keys, message: str) -> RecipeError:
        return RecipeError(f"{self.place(keys)}: {dotted(keys)}: {message}")

    def remove(self, faulty: Iterable[Keys]) -> None:
        """Take keys out of the values; a list's items from the end, so that the numbers of the others stay."""
        for keys in sorted(set(faulty), key=lambda keys: [str(key).rjust(8) for key in keys], reverse=True):
            level = self.values
            for key in keys[:-1]:
                level = level[key]
            del level[keys[-1]]


def read(argv: list[str]) -> Document:
    """
    Read `--config FILE [--key value …]`; a key may be nested, `--margin.preset dpo` or `--datasets.0.path x`.

    Raises:
        RecipeError: an argument without key or value, a key given twice, a file that cannot be read or is no mapping.
    """
    pairs = list(_pairs(argv))
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise RecipeError(f"command line: --{printable(key)} is given twice; keep one")
        if printable(key) != key:
            raise RecipeError(f"command line: --{shorten(printable(key))}: no key has such a name; write it anew")
    arguments = dict(pairs)
    if "config" not in arguments:
        raise RecipeError("command line: --config RECIPE.yaml is missing")
    path = arguments.pop("config")
    values, places = load(_text(Path(path)), path)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: expected `key: value` lines, found {'nothing' if values is None else show(values)}"
        )
    document = Document(values, places, path, [f"--{key}={text}" for key, text in arguments.items()])
    for key, text in arguments.items():
        _override(document, key, text)
    return document


def load(text: str, name: str) -> tuple[Any, dict[Keys, str]]:
    """
    Plain values of a YAML text, and the place of each. Read as YAML 1.2: only true and false are booleans (so
    `save_strategy: no` is what it says), 5e-7 is a number, and a date is a string.

    Raises:
        RecipeError: a syntax error, a key given twice at any level, a key that is no string, a tag, with its line.
    """
    places: dict[Keys, str] = {(): name}

    def line(node: yaml.Node) -> str:
        return f"{name} line {node.start_mark.line + 1}"

    built = itertools.count(1)

    def build(node: yaml.Node, keys: Keys) -> Any:
        if len(keys) > DEEPEST:
            problem = f"more than {DEEPEST} levels, or an alias (*name) stands within the value that it names"
            raise RecipeError(f"{line(node)}: {dotted(keys[:1])}: {problem}")
        if next(built) > MOST_VALUES:
            raise RecipeError(f"{line(node)}: more than {MOST_VALUES:,} values, with what aliases (*name) repeat")
        if isinstance(node, yaml.ScalarNode):
            if (kind := node.tag.rpartition(":")[2]) not in SCALARS:
                raise RecipeError(f"{line(node)}: {dotted(keys)}: the tag {node.tag} has no meaning in a recipe")
            try:
                node.value.encode()
                return SCALARS[kind](node.value)
            except UnicodeEncodeError:
                shown = show(printable(node.value))
                raise RecipeError(f"{line(node)}: {dotted(keys)}: {shown} is no text; write it anew") from None
            except ValueError:
                raise RecipeError(f"{line(node)}: {dotted(keys)}: {shorten(node.value)!r} is not a {kind}") from None
        if isinstance(node, yaml.SequenceNode):
            values = []
            for index, child in enumerate(node.value):
                places[(*keys, index)] = line(child)
                values.append(build(child, (*keys, index)))
            return values
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            key = build(key_node, keys)
            if not isinstance(key, str):
                raise RecipeError(f"{line(key_node)}: the key {show(key)} is not a string; put it in quotes")
            below = (*keys, key)
            if key in mapping:
                raise RecipeError(f"{line(key_node)}: {dotted(below)} is given twice, first in {places[below]}")
            places[below] = line(key_node)
            mapping[key] = build(child, below)
        return mapping

    try:
        node = yaml.compose(text, Loader=_Loader)
        return (None if node is None else build(node, ())), places
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{name}{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{name}: too many levels; no key of a recipe needs more than {DEEPEST}") from None


def dump(values: dict[str, Any]) -> str:
    """YAML that `load`, and any other YAML reader, reads back as `values`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # people copy recipes: a list that stands twice is written twice

    def represent_text(self, data: str) -> yaml.Node:
        # PyYAML writes these plain, and then reads them as line breaks.
        breaks = set("\x85\u2028\u2029\ufeff") & set(data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_text)


FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _kind, _pattern, _first in [
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?[0-9]+", list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
]:
    for _class in (_Loader, _Dumper):  # the dumper keeps those of YAML 1.1 besides: what either would read is quoted
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)

SCALARS = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}


def _pairs(argv: list[str]) -> Iterable[tuple[str, str]]:
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("--") or argument == "--":
            hint = f"--config {argument}" if argument.endswith((".yaml", ".yml")) else "--key value"
            raise RecipeError(f"command line: {argument!r} belongs to no key; write {hint}")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise RecipeError(f"command line: --{key} has no value; write --{key} value (true for a switch)")
        yield key, value


def _override(document: Document, key: str, text: str) -> None:
    keys: list[str | int] = []
    container: Any = document.values
    *above, last = key.split(".")
    for part in [*above, last]:
        if isinstance(container, list):
            if not (part.isdecimal() and len(part) < 10 and int(part) < len(container)):
                raise RecipeError(
                    f"command line: --{shorten(key)}: {dotted(keys)} has {len(container)} entries, numbered from 0; "
                    f"no {shorten(part)!r}"
                )
            part = int(part)
        elif not isinstance(container, dict):
            raise RecipeError(
                f"command line: --{shorten(key)}: {dotted(keys)} is {show(container)}, which has no keys"
            )
        keys.append(part)
        if len(keys) <= len(above):
            if isinstance(container, dict) and container.get(part) is None:
                container[part] = {}
                document.places[tuple(keys)] = "command line"
            container = container[part]
    value, places = load(text, f"command line: --{key}")
    path = tuple(keys)
    document.places = {old: place for old, place in document.places.items() if old[: len(path)] != path}
    document.places |= {path + below: "command line" for below in places}
    # An empty text is an empty string: `--system_message ""`.
    container[path[-1]] = text if value is None and text.strip().lower() not in {"null", "~"} else value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise RecipeError(f"{path}: no such recipe{near}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
