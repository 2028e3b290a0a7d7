"""Keys of a recipe that carry what `--help` and KEYS.md say of them."""

import dataclasses
from typing import Any


def key(default: Any, description: str, example: str | None = None) -> Any:
    """
    A field of a dataclass. pydantic takes its metadata as that of a `pydantic.Field`.

    Args:
        default: a value; `list`, `dict` or a section, made anew each time; `...` for a key that must be given.
        description: what the key does, in a line.
        example: a value as it stands in YAML; None for a section, whose keys have their own.
    """
    metadata = {"description": description, "examples": [] if example is None else [example]}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
