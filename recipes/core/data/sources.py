"""The rows of a source as its files hold them, loaded with Hugging Face's datasets; every failure is a clear line."""

import gzip
import json
import logging
import math
import re
import zlib
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import constants

from core.config.entries import BUILDERS, files_of, place
from core.config.schema import DatasetEntry
from core.runtime import loading
from core.runtime.errors import RecipeError
from core.runtime.network import hub_is_reachable
from core.runtime.text import did_you_mean

SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk and DatasetDict.save_to_disk leave

# It prints what a failure raises as well; here every failure is one line, which also names the file's line.
logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)


def load_rows(entry: DatasetEntry) -> Dataset:
    """
    The rows of one entry, memory-mapped from the cache of datasets.

    Raises:
        RecipeError: a file, dataset, configuration or split that isn't there, a file that can't be read, or no rows.
    """
    path, where = Path(entry.path).expanduser(), place(entry)
    if any((path / name).is_file() for name in SAVED):
        return _saved(path, entry.split, where)
    target, options = _target(path, entry, where)
    try:
        if path.is_dir():
            options["name"], options["split"] = _folder_holds(target, entry, where)
        rows = loading.rows(target, **options)
    except (DatasetGenerationError, pa.ArrowTypeError) as error:
        fault = _first_fault(path, files_of(entry)) or f"unreadable: {_one_line(error.__cause__ or error)}"
        raise RecipeError(f"{where}: {fault}") from error
    except ConnectionError as error:
        raise RecipeError(
            f"{where}: neither a local file or folder nor in the cache, and the Hub can't be reached; correct `path`, "
            "or fetch it once with network access"
        ) from error
    except StopIteration as error:  # what an empty file ends in
        raise RecipeError(f"{where}: no rows") from error
    except (DatasetsError, OSError, ValueError) as error:
        fault = _one_line(error)
        if isinstance(error, FileNotFoundError) and entry.data_files:
            fault = f"no such file; correct `data_files`{_near(path / files_of(entry)[0])}"
        elif "corresponds to no data" in fault:
            fault = f"no rows in split {entry.split!r}"
        raise RecipeError(f"{where}: {fault}") from error
    if not len(rows):
        raise RecipeError(f"{where}: no rows in split {entry.split!r}")
    return rows


def _target(path: Path, entry: DatasetEntry, where: str) -> tuple[str, dict]:
    """What `loading.rows` takes for an entry: the kind of a file, a folder or a name on the Hub; options."""
    options: dict = {"name": entry.name, "data_files": entry.data_files, "revision": entry.revision}
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if path.is_file() or suffix in BUILDERS:
        if not path.is_file():
            raise RecipeError(f"{where}: no such file; correct `path`{_near(path)}")
        if suffix not in BUILDERS:
            raise RecipeError(f"{where}: unknown kind of file; `path` reads {', '.join(BUILDERS)}, also with .gz")
        for key in ("data_files", "revision"):
            if options[key] is not None:
                raise RecipeError(f"{where}: `path` is a file, so `{key}` has no meaning here; remove it")
        # A file stands for the configuration and split that the entry names, so that a recipe for the Hub's copy of a
        # source reads a local one by its path alone.
        options = {"data_files": {re.split(r"\W", entry.split)[0]: str(path)}, "split": entry.split}
        if BUILDERS[suffix] == "csv":
            options["keep_default_na"] = False  # an answer that reads "None" or "N/A" is an answer
        return BUILDERS[suffix], options
    options["split"] = entry.split
    if path.is_dir():
        return str(path.resolve()), options  # datasets names the folder, which it can't for "."
    if entry.path not in BUILDERS.values():
        if entry.path.startswith((".", "/", "~")) or entry.path.count("/") > 1:
            raise RecipeError(f"{where}: no such file or folder; correct `path`{_near(path)}")
        _leave_the_hub_if_unreachable()
    return entry.path, options


def _folder_holds(folder: str, entry: DatasetEntry, where: str) -> tuple[str | None, str]:
    """
    The configuration and split of a folder that stand for those the entry names. A folder whose files name none has a
    single one of each, which datasets calls default and train: as with a file, they are the ones that are meant.
    """
    name = None if loading.row_configurations(folder) == ["default"] else entry.name
    files = loading.row_files(folder, name, entry.data_files)
    wanted = re.split(r"\W", entry.split)[0]
    if wanted in files:
        return name, entry.split
    if list(files) == ["train"] and not any("train" in Path(file).name for file in files["train"]):
        return name, entry.split.replace(wanted, "train", 1)
    raise _no_split(wanted, [*map(str, files)], where)


def _saved(path: Path, split: str, where: str) -> Dataset:
    """Rows that `save_to_disk` has written: one set, or several by the names of their splits."""
    saved = loading.saved_rows(path)
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise _no_split(split, [*map(str, saved)], where)
    return saved[split]


def _no_split(name: str, names: list[str], where: str) -> RecipeError:
    return RecipeError(f"{where}: no split {name!r}; set `split` to one of {', '.join(names)}")


def draw_fraction(rows: int, fraction: float, seed: int, source: str) -> np.ndarray:
    """
    Which rows of a source a fraction keeps: the same on every machine, in the source's order. Shape: (kept,).

    The raw stream of PCG64 is fixed for good, unlike the methods of numpy's Generator; the source's name is part of
    the seed, so that two sources of one size don't keep the same row numbers.
    """
    keys = np.random.PCG64([seed, zlib.crc32(source.encode())]).random_raw(rows)
    kept = math.floor(fraction * rows + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return np.sort(np.argsort(keys, kind="stable")[:kept])


@cache
def _leave_the_hub_if_unreachable() -> None:
    # Without network, datasets would ask five times and wait 23 s before it looks into its own cache.
    if not datasets.config.HF_HUB_OFFLINE and not hub_is_reachable():
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True


def _near(path: Path) -> str:
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, names)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _first_fault(path: Path, data_files: list[str]) -> str | None:
    """What is wrong with the first faulty line of the JSON files that datasets could not read; None if unknown."""
    if path.is_file():
        return _fault(path, {})
    seen: dict[str, str] = {}
    for name in data_files or ["*"]:
        for file in sorted(path.glob(name)) if path.is_dir() else [Path(name)]:
            if file.is_file() and (fault := _fault(file, seen)):
                return f"{file.name}: {fault}"
    return None


def _fault(path: Path, seen: dict[str, str]) -> str | None:
    """As `_first_fault`, of one file; `seen` is what each column has held so far."""
    if BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix) != "json":
        return None
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            is_array = file.read(1) == "["
            file.seek(0)
            if is_array:
                json.load(file)
                return None
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    return f"line {number} is not JSON ({error.msg} at column {error.colno}); mend or remove it"
                if not isinstance(row, dict):
                    return f"line {number} is {_kind(row)}, not a JSON object; mend or remove it"
                for column, value in row.items():
                    if value is not None and _kind(value) != seen.setdefault(column, _kind(value)):
                        return (
                            f"rows of mixed layouts: `{column}` is {_kind(value)} on line {number} and {seen[column]} "
                            "before it; give each layout a file and an entry of its own"
                        )
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is not JSON ({error.msg} at column {error.colno}); mend the file"
    except (OSError, EOFError, UnicodeDecodeError) as error:
        return f"can't be read ({_one_line(error)}); fetch the file again"
    return None


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
