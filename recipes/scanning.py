"""Reading every row of a large Arrow file once, by several processes, in memory that does not grow with the file."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.utils import tqdm

SLICE = 32_768  # rows a process reads before it opens the file anew: about 100 MB of text
BATCH = 2_000  # rows whose text is held as Python strings at a time

_reader: tuple[Dataset, Callable[[Dataset], dict]] | None = None  # what a worker process was started with


def _start_worker(rows: Dataset, read: Callable[[Dataset], dict]) -> None:
    global _reader
    _reader = rows, read


def _read_slice(bounds: range) -> dict:
    rows, read = _reader
    return read(reopened(rows.select(bounds)))


def reopened(rows: Dataset) -> Dataset:
    """
    The same rows over a mapping of their own. The pages of a mapped file count as this process's memory for as long
    as the mapping lives, so whoever reads a large file in slices lets go of each slice's pages with its mapping.
    """
    return pickle.loads(pickle.dumps(rows)) if rows.cache_files else rows


def slices(rows: Dataset, parts: int = 1) -> Iterator[range]:
    """Ranges that cover the rows in order, at most `SLICE` long and at least `parts` many (if there are the rows)."""
    size = max(1, min(SLICE, -(-len(rows) // parts)))
    return (range(start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def scan(rows: Dataset, read: Callable[[Dataset], dict], num_proc: int | None = None) -> dict:
    """Join what `read` makes of each slice of the rows: numpy arrays, or Arrow arrays of strings, a value per row."""
    whole = list(slices(rows, num_proc or 1))
    bar = partial(tqdm, total=len(whole), desc="reading rows", unit=" slices", leave=False)
    if num_proc in (None, 1):
        parts = [read(reopened(rows.select(bounds))) for bounds in bar(whole)]
    else:
        with ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(rows, read)) as pool:
            parts = list(bar(pool.map(_read_slice, whole)))
    return {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(parts[0][name], np.ndarray)
        else pa.chunked_array([part[name] for part in parts]).combine_chunks()
        for name in (parts[0] if parts else ())
    }


def by_batch(rows: Dataset, read: Callable[[pa.RecordBatch], dict]) -> dict:
    """`read` over record batches, so that each column is one contiguous Arrow array without a copy."""
    tables = rows.with_format("arrow").iter(BATCH)
    parts = [read(batch) for table in tables for batch in table.to_batches()]
    return {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(parts[0][name], np.ndarray)
        else pa.concat_arrays([part[name] for part in parts])
        for name in parts[0]
    }
