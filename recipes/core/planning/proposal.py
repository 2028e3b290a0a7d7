"""What a file of rows could be read as, for `check.py --data`: columns, layouts that fit, and lines to paste."""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from datasets import Dataset

from core.config.parsing import resolve
from core.config.schema import Columns, DatasetEntry
from core.data.preferences import load_preferences
from core.data.sources import load_rows
from core.reporting.tables import print_table
from core.runtime.errors import RecipeError
from core.runtime.text import printable, shorten

LAYOUTS = Path(__file__).parents[2] / "layouts"
SAMPLE = 1000  # rows that a layout is tried on
# Words in a column's name that say what it holds, where no layout has that name.
NAMES = {
    "prompt": {"prompt", "question", "instruction", "query", "context", "input", "post"},
    "chosen": {"chosen", "preferred", "accepted", "accept", "better", "good", "winner", "positive"},
    "rejected": {"rejected", "dispreferred", "nonpreferred", "reject", "worse", "bad", "loser", "negative"},
}


class Fit(NamedTuple):
    """A mapping that reads the rows."""

    lines: str  # of YAML, below `datasets:`
    named: str  # where it is from
    columns: int  # that it reads
    pairs: int  # that the sample becomes
    dropped: int  # rows of the sample that it can't use


def propose(path: str) -> NoReturn:
    """
    Show the columns of a file or folder and the lines of YAML that would read it.

    Raises:
        RecipeError: always, as nothing is chosen for the user: what to do next, or that no layout fits.
    """
    if not Path(path).expanduser().exists():
        raise RecipeError(f"{path}: no such file or folder; correct --data")
    rows = load_rows(DatasetEntry(path=path))
    _show_columns(path, rows)
    sample = f"train[:{min(len(rows), SAMPLE)}]"
    fits, faults = _layouts_that_fit(path, rows, sample)
    if not fits:
        guess, fault = _by_words(path, rows, sample)
        fits, faults = [guess] if guess else [], faults + ([fault] if fault else [])
    if not fits:
        for fault in faults:
            print(f"\n{fault}")
        raise RecipeError(
            f"{path}: no layout of recipes/layouts reads these columns; write `columns` by recipes/KEYS.md, from a "
            "copy of recipes/layouts/own-pairs.yaml"
        )
    best, *others = sorted(fits, key=lambda fit: (-fit.columns, fit.dropped, fit.named))
    print(f"\n{best.named} would read it: {best.pairs:,} pairs of the first {min(len(rows), SAMPLE):,} rows", end="")
    print(f", {best.dropped:,} rows in none. In a recipe:\n" if best.dropped else ". In a recipe:\n")
    print(f"datasets:\n{best.lines}")
    for fit in others:
        print(f"\n{fit.named} would too, by {fit.columns} of the columns")
    raise RecipeError(
        f"{path}: the mapping above is a guess from names and values; see that it is meant so, paste it over "
        "`datasets:` in a copy of a recipe (recipes/README.md), and check that with --config"
    )


def _show_columns(path: str, rows: Dataset) -> None:
    table = [
        [printable(name), _kind(value), printable(shorten(json.dumps(value, ensure_ascii=False, default=str)))]
        for name, value in rows[0].items()
    ]
    print_table(f"{path}: {len(rows):,} rows", ["Column", "Kind", "In the first row"], table)


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "boolean", int: "number", float: "number", dict: "struct", type(None): "null"}
    if isinstance(value, list):
        return "messages" if value and isinstance(value[0], dict) else "list"
    return kinds.get(type(value), type(value).__name__)


def _layouts_that_fit(path: str, rows: Dataset, sample: str) -> tuple[list[Fit], list[str]]:
    """The layouts that read rows of the sample, and why those do not that name no other columns."""
    fits, faults = [], []
    for file in sorted(LAYOUTS.glob("*.yaml")):
        entries = _entries(file)
        names = columns_read(entries[0].columns)
        if len(entries) > 1 or not {name.split(".")[0] for name in names} <= set(rows.column_names):
            continue
        place = f"recipes/layouts/{file.name}"
        entry = dataclasses.replace(entries[0], path=path, name=None, revision=None, split=sample, bad_rows="drop")
        try:
            pairs, bad = load_preferences([entry], seed=0)
        except RecipeError as error:
            faults.append(f"not {place}: {error}")
            continue
        fits.append(Fit(_lines(file, path), place, len(names), len(pairs), len(bad)))
    return fits, faults


@cache
def _entries(file: Path) -> list[DatasetEntry]:
    return resolve("dpo", ["--config", str(file)]).recipe.datasets


def columns_read(columns: Columns) -> set[str]:
    """The names of the columns that a mapping reads."""
    keys = {field.name for field in dataclasses.fields(Columns)} - {"messages", "turns", "values", "leave_out"}
    named = [value for key in keys for value in _listed(getattr(columns, key))]
    return {name for name in named if isinstance(name, str)}


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _lines(file: Path, path: str) -> str:
    """The entry of a layout's recipe, comments and all, with another path."""
    entry = file.read_text(encoding="utf-8").split("\ndatasets:\n")[1].split("\n\n")[0]
    entry = re.sub(r"(?m)^    (name|split|revision): .*\n", "", entry)
    return re.sub(r"- path: .*", lambda _: f"- path: {json.dumps(path, ensure_ascii=False)}", entry)


def _by_words(path: str, rows: Dataset, sample: str) -> tuple[Fit | None, str | None]:
    """A pair of columns, and a prompt, by words in their names; and why it can't be read."""
    found = {}
    for key, words in NAMES.items():
        names = [name for name in rows.column_names if words & set(re.split(r"[^a-z0-9]+", name.lower()))]
        if len(names) > 1:
            return None, f"more than one column could be {key}: {', '.join(map(printable, names))}"
        if names:
            found[key] = names[0]
    if not {"chosen", "rejected"} <= found.keys():
        return None, None
    entry = DatasetEntry(path=path, split=sample, bad_rows="drop", columns=Columns(**found))
    try:
        pairs, bad = load_preferences([entry], seed=0)
    except RecipeError as error:
        return None, f"not by the words in the columns' names: {error}"
    quoted = [f"      {key}: {json.dumps(name, ensure_ascii=False)}" for key, name in found.items()]
    lines = "\n".join([f"  - path: {json.dumps(path, ensure_ascii=False)}", "    columns:", *quoted])
    return Fit(lines, "A pair of columns, by the words in their names,", len(found), len(pairs), len(bad)), None
