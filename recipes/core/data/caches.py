"""What datasets keeps on disk of rows: found again by what the files hold, and built anew where it is damaged."""

import hashlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import xxhash
from datasets import Dataset, DatasetBuilder
from datasets.data_files import DataFilesDict, DataFilesList

HASHED = 2**28  # bytes of a file that are read for its key; of a larger one its inode and times tell


def by_content(files: DataFilesDict) -> DataFilesDict:
    """
    The same files under keys of what they hold. datasets goes by size and time, and so takes a file that was edited
    with both kept for the one it knows.
    """
    return DataFilesDict(
        {
            split: DataFilesList(
                list(names),
                [
                    state_of(Path(name)) if Path(name).is_file() else known
                    for name, known in zip(names, names.origin_metadata or [()] * len(names), strict=True)
                ],
            )
            for split, names in files.items()
        }
    )


def state_of(path: Path) -> tuple[str, ...]:
    """What tells a file from every other state of it."""
    facts = path.stat()
    if facts.st_size > HASHED:
        return tuple(map(str, (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)))
    with path.open("rb") as file:
        return (hashlib.file_digest(file, xxhash.xxh3_128).hexdigest(),)


def prepared(builder: DatasetBuilder, split: str, where: str) -> Dataset:
    """The rows of a split from the cache, which is made or, where it can't be read, made again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # that fields beyond the header's are lost
        builder.download_and_prepare()
    try:
        rows = builder.as_dataset(split=split)
        if split in builder.info.splits and len(rows) < builder.info.splits[split].num_examples:
            raise pa.ArrowInvalid(f"{len(rows)} of {builder.info.splits[split].num_examples} rows are left")
        return rows
    except (pa.ArrowInvalid, OSError) as error:
        _warn(where, builder.cache_dir, error)
        builder.download_and_prepare(download_mode="reuse_cache_if_exists")
        return builder.as_dataset(split=split)


def mapped(rows: Dataset, function: Callable[..., Any], where: str, **options: Any) -> Dataset:
    """`rows.map(function, **options)`, which keeps the number of rows, likewise."""
    try:
        result = rows.map(function, **options)
        if len(result) == len(rows):
            return result
        fault: Exception = pa.ArrowInvalid(f"{len(result)} of {len(rows)} rows are left")
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, e.g. a full disk
            raise
        fault = error
    places = {Path(file["filename"]).parent for file in rows.cache_files} or {"of datasets"}
    _warn(where, ", ".join(map(str, places)), fault)
    return rows.map(function, load_from_cache_file=False, **options)


def _warn(where: str, place: str, error: Exception) -> None:
    logging.getLogger(__name__).warning("%s: the cache %s is damaged (%s) and is made again", where, place, error)
