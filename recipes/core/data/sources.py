"""The rows of a source as its files hold them, loaded with Hugging Face's datasets; every failure is a clear line."""

import glob
import gzip
import itertools
import json
import logging
import math
import re
import zlib
from functools import cache
from glob import has_magic
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetBuilder, Features, Value
from datasets.data_files import DataFilesDict, DataFilesList, sanitize_patterns
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub import constants

from core.config.entries import BUILDERS, files_of, place
from core.config.schema import DatasetEntry
from core.data.caches import by_content, prepared, state_of
from core.runtime import loading
from core.runtime.errors import RecipeError
from core.runtime.network import hub_is_reachable
from core.runtime.text import did_you_mean

SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk and DatasetDict.save_to_disk leave

NESTED = 50  # levels of JSON; Arrow reads 64, and recursion ends or crashes other readers
AS_UTF8 = "save it as UTF-8, e.g. iconv -f latin1 -t utf-8"

# They print what a failure raises as well; here every failure is one line, which also names the file's line.
for kind in BUILDERS.values():
    logging.getLogger(f"datasets.packaged_modules.{kind}.{kind}").setLevel(logging.CRITICAL)


def load_rows(entry: DatasetEntry) -> Dataset:
    """
    The rows of one entry, memory-mapped from the cache of datasets.

    Raises:
        RecipeError: a file, dataset, configuration or split that isn't there, a file that can't be read, or no rows.
    """
    path, where = Path(entry.path).expanduser(), place(entry)
    if any((path / name).is_file() for name in SAVED):
        return _saved(path, entry.split, where)
    try:
        builder, split = _builder(path, entry, where)
        if not Path(builder.cache_dir).exists():
            _refuse_deep(builder.config.data_files or {}, where)
        rows = prepared(builder, split, where)
    except (DatasetGenerationError, pa.ArrowTypeError, EOFError, zlib.error, RecursionError) as error:
        fault = _first_fault(path, files_of(entry)) or _told(error.__cause__ or error)
        raise RecipeError(f"{where}: {fault}") from error
    except ConnectionError as error:
        raise RecipeError(
            f"{where}: neither a local file or folder nor in the cache, and the Hub can't be reached; correct `path`, "
            "or fetch it once with network access"
        ) from error
    except StopIteration as error:  # what an empty file ends in
        raise RecipeError(f"{where}: no rows") from error
    except RecipeError:
        raise
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


def _told(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text; {AS_UTF8}"
    if "loss of data" in _one_line(error):  # pandas.errors.ParserWarning
        return "rows have more fields than the header; quote the texts that hold the delimiter"
    return f"unreadable: {_one_line(error)}"


def _builder(path: Path, entry: DatasetEntry, where: str) -> tuple[DatasetBuilder, str]:
    """What reads an entry (a file, a folder, files of a kind, a dataset on the Hub), and the split to ask it for."""
    target, name, split = entry.path, entry.name, entry.split
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if path.is_file() or suffix in BUILDERS and not path.is_dir():
        if not path.is_file():
            raise RecipeError(f"{where}: no such file; correct `path`{_near(path)}")
        if suffix not in BUILDERS:
            raise RecipeError(f"{where}: unknown kind of file; `path` reads {', '.join(BUILDERS)}, also with .gz")
        for key in ("data_files", "revision"):
            if getattr(entry, key) is not None:
                raise RecipeError(f"{where}: `path` is a file, so `{key}` has no meaning here; remove it")
        # A file stands for the configuration and split that the entry names, so that a recipe for the Hub's copy of a
        # source reads a local one by its path alone. It is given as found: datasets would take its name for a pattern.
        files = DataFilesDict({_base(split): DataFilesList([str(path.resolve())], [])})
        target = BUILDERS[suffix]
    elif path.is_dir():
        target = str(path.resolve())  # datasets names the folder, which it can't for "."
        if has_magic(target):
            raise RecipeError(f"{where}: datasets takes [, ? and * in a folder's path for a pattern; rename it")
        name, split, files = _folder_holds(target, entry, where)
    elif entry.path in BUILDERS.values():
        files = DataFilesDict.from_patterns(sanitize_patterns(_exact(Path(), files_of(entry)) or {}))
    else:
        if entry.path.startswith((".", "/", "~")) or entry.path.count("/") > 1:
            raise RecipeError(f"{where}: no such file or folder; correct `path`{_near(path)}")
        _leave_the_hub_if_unreachable()
        options = {"data_files": entry.data_files, "revision": entry.revision}
        return loading.row_builder(target, name=name, **options), split
    options = {"data_files": by_content(files), "revision": entry.revision}
    return loading.row_builder(target, name=name, **options, **_csv_options(files, where)), split


def _base(split: str) -> str:
    """The name in a split such as `train[:10%]`."""
    return re.split(r"\W", split)[0]


def _exact(folder: Path, names: list[str]) -> list[str]:
    """`data_files`, which are patterns; but the name of a file that is there is that file."""
    return [glob.escape(name) if has_magic(name) and (folder / name).is_file() else name for name in names]


def _csv_options(files: DataFilesDict, where: str) -> dict:
    """
    How to read files of CSV: each column as text, for an answer of digits is an answer, and one that reads "None" or
    "N/A" too; and by the delimiter that cuts the header into most columns.
    """
    paths = [Path(name) for names in files.values() for name in names]
    if not paths or any(Path(path.name.removesuffix(".gz")).suffix != ".csv" or not path.is_file() for path in paths):
        return {}
    try:
        headers = {mark: pd.read_csv(paths[0], sep=mark, nrows=0, index_col=False).columns for mark in ",;\t|"}
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: {paths[0].name} is not UTF-8 text; {AS_UTF8}") from error
    mark = max(headers, key=lambda mark: len(headers[mark]))
    features = Features(dict.fromkeys(headers[mark], Value("string")))
    return {"sep": mark, "features": features, "keep_default_na": False, "index_col": False}


def _folder_holds(folder: str, entry: DatasetEntry, where: str) -> tuple[str | None, str, DataFilesDict]:
    """
    The configuration, split and files of a folder that stand for what the entry names. A folder whose files name none
    has a single one of each, which datasets calls default and train: as with a file, they are the ones that are meant.
    """
    name = None if loading.row_configurations(folder) == ["default"] else entry.name
    patterns = _exact(Path(folder), files_of(entry)) or None
    files = loading.row_builder(folder, name=name, data_files=patterns).config.data_files
    wanted = _base(entry.split)
    if wanted in files:
        return name, entry.split, files
    if list(files) == ["train"] and not any("train" in Path(file).name for file in files["train"]):
        return name, entry.split.replace(wanted, "train", 1), files
    raise _no_split(wanted, [*map(str, files)], where)


def _refuse_deep(files: DataFilesDict, where: str) -> None:
    """Refuse JSON that is nested too deep for the readers of datasets, before they crash on it."""
    for path in (Path(name) for names in files.values() for name in names):
        if not path.is_file() or BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix) != "json":
            continue
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.count(b"[") + line.count(b"{") > NESTED and _depth(line) > NESTED:
                    raise RecipeError(
                        f"{where}: line {number} of {path.name} is nested more than {NESTED} levels deep; flatten it"
                    )


def _depth(line: bytes) -> int:
    brackets = re.sub(rb"[^\[\]{}]+", b"", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line))
    return max(itertools.accumulate((1 if bracket in b"[{" else -1 for bracket in brackets), initial=0))


def _saved(path: Path, split: str, where: str) -> Dataset:
    """Rows that `save_to_disk` has written: one set, or several by the names of their splits."""
    try:
        saved = loading.saved_rows(path)
    except (OSError, ValueError, KeyError, TypeError) as error:  # what damaged Arrow and JSON files end in
        raise RecipeError(
            f"{where}: what save_to_disk left cannot be read ({_one_line(error)}); save it again"
        ) from error
    if not isinstance(saved, Dataset):
        if split not in saved:
            raise _no_split(split, [*map(str, saved)], where)
        saved = saved[split]
    # It bears the name that it was saved under, whatever the files hold now.
    saved._fingerprint = Hasher.hash(
        [saved._fingerprint, [state_of(Path(file["filename"])) for file in saved.cache_files]]
    )
    return saved


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
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            is_array = file.read(1) == b"["
            file.seek(0)
            if is_array:
                _refuse_halves(json.loads(file.read().decode()))
                return None
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                    _refuse_halves(row)
                except json.JSONDecodeError as error:
                    return f"line {number} is not JSON ({error.msg} at column {error.colno}); mend or remove it"
                except UnicodeEncodeError as error:
                    return f"line {number} holds half a surrogate pair ({_half(error)}), which is no text; mend it"
                except UnicodeDecodeError as error:
                    return f"line {number} is not UTF-8 text (byte 0x{error.object[error.start]:02x}); {AS_UTF8}"
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
    except UnicodeEncodeError as error:
        return f"it holds half a surrogate pair ({_half(error)}), which is no text; mend it"
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte 0x{error.object[error.start]:02x}); {AS_UTF8}"
    except (OSError, EOFError, zlib.error) as error:
        return f"can't be read ({_one_line(error)}); fetch the file again"
    return None


def _refuse_halves(value: object) -> None:
    """Raise UnicodeEncodeError where a text or key holds half a surrogate pair, as "\\ud800" in JSON."""
    json.dumps(value, ensure_ascii=False).encode()


def _half(error: UnicodeEncodeError) -> str:
    return f"\\u{ord(error.object[error.start]):04x}"


def not_text(rows: Dataset) -> str:
    """What to tell of rows whose text could not be decoded: the first column and row of which that is true."""
    for name in rows.column_names:
        row = 0
        for chunk in rows.with_format("arrow").data.column(name).chunks:
            for at in range(len(chunk)):
                try:
                    chunk.slice(at, 1).validate(full=True)
                except pa.ArrowInvalid:
                    return f"`{name}` is not UTF-8 text in row {row + at} (rows count from 0); {AS_UTF8}"
            row += len(chunk)
    return f"text that is not UTF-8; {AS_UTF8}"


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
