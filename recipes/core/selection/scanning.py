"""Reading every row of a large Arrow file once, by several processes, in memory that does not grow with the file."""

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.utils import tqdm

SLICE = 32_768  # rows between two releases of the file's pages: about 100 MB of text
BATCH = 2_000  # rows whose text is held as Python strings at a time

Read = Callable[[pa.RecordBatch], dict]
ReadColumns = Callable[[dict[str, list]], np.ndarray]
_work: tuple[Dataset, Read | ReadColumns] | None = None  # what a worker process was started with


def scan(rows: Dataset, read: Read, num_proc: int | None = None) -> dict:
    """
    Join what `read` makes of the rows' record batches, in the order of the rows.

    Args:
        read: of a record batch (each column one contiguous array of the mapped file), to numpy arrays, or Arrow arrays
            of strings, a value per row.
        num_proc: processes; None: this one.
    """
    rows = rows.with_format("arrow")
    spans = slices(len(rows), num_proc or 1)
    bar = partial(tqdm, total=len(spans), desc="reading rows", unit=" slices", leave=False)
    if num_proc in (None, 1):
        return _joined([_read_slice(span, rows, read) for span in bar(spans)])
    with ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(rows, read)) as pool:
        return _joined(list(bar(pool.map(_read_slice, spans))))


def read_at(rows: Dataset, places: np.ndarray, read: ReadColumns, num_proc: int | None = None) -> np.ndarray:
    """
    Join what `read` makes of the rows at `places`, in that order.

    Args:
        places: at least one row number; ascending ones are read fastest. Shape: (N,).
        read: of the columns of some rows, as lists, to a value per row.
        num_proc: processes; None: this one.
    """
    batches = [places[start : start + BATCH] for start in range(0, len(places), BATCH)]
    if num_proc in (None, 1) or len(batches) == 1:
        return np.concatenate([_read_places(batch, rows, read) for batch in batches])
    with ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(rows, read)) as pool:
        return np.concatenate(list(pool.map(_read_places, batches)))


def slices(rows: int, parts: int = 1) -> list[range]:
    """Ranges that cover the rows in order, each at most `SLICE` long, and `parts` of them if there are rows enough."""
    size = max(1, min(SLICE, -(-rows // parts)))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def release(rows: Dataset) -> None:
    """
    Let go of the pages that reading the rows has mapped: they count as this process's memory as long as the mapping
    lives, and that is as long as the dataset. They can be read again at any time. Opening the file anew would do the
    same, but costs a walk over all of its batches. Without /proc (not Linux) nothing is done.
    """
    files = {os.path.realpath(file["filename"]) for file in rows.cache_files}
    if not files or not os.path.exists("/proc/self/maps"):
        return
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as maps:
        for line in maps:
            address, _, _, _, _, *path = line.rstrip("\n").split(maxsplit=5)
            if path and path[0] in files:  # of a mapped file nothing is lost, unlike memory without a file
                start, end = (int(number, 16) for number in address.split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _start_worker(rows: Dataset, read: Read | ReadColumns) -> None:
    global _work
    _work = rows, read


def _read_slice(span: range, rows: Dataset | None = None, read: Read | None = None) -> dict:
    if rows is None:
        rows, read = _work
    starts = range(span.start, span.stop, BATCH)
    tables = (rows[start : min(start + BATCH, span.stop)] for start in starts)
    facts = _joined([read(batch) for table in tables for batch in table.to_batches()])
    release(rows)
    return facts


def _read_places(places: np.ndarray, rows: Dataset | None = None, read: ReadColumns | None = None) -> np.ndarray:
    if rows is None:
        rows, read = _work
    values = read(rows.select(places)[:])
    release(rows)
    return values


def _joined(parts: list[dict]) -> dict:
    # pop: a column's parts go as soon as they are joined.
    return {
        name: (np.concatenate if isinstance(parts[0][name], np.ndarray) else pa.concat_arrays)(
            [part.pop(name) for part in parts]
        )
        for name in list(parts[0] if parts else ())
    }
