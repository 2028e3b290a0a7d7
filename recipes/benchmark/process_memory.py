"""This process's memory: the most that a block holds, and what glibc does with what is freed."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LIBC = ctypes.CDLL(None)
# Parameters of glibc's mallopt(3), and what its own adjustment of the thresholds ends at.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
DEFAULTS = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}


class PeakMemory:
    """
    Context that measures the most bytes which its block holds at once, above what was held before: of the GPU's
    memory as torch counts it, or else resident ones of this process (Linux).
    """

    peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            _trim()  # what earlier blocks have freed would be filled again, uncounted
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is held now
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
        self.peak_bytes = held - self.before


def share_one_heap() -> None:
    """Have every thread allocate from one heap. Call it before the first thread starts."""
    _mallopt({M_ARENA_MAX: 1})


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """
    Within it blocks of 128 KiB and more go back to the system once they are freed: a peak is of what is in use. After
    `freed_memory_kept` that holds no longer of what lands in gaps of the heap.
    """
    _mallopt({M_MMAP_THRESHOLD: 128 * 1024, M_TRIM_THRESHOLD: 128 * 1024})
    try:
        yield
    finally:
        _mallopt(DEFAULTS)


@contextlib.contextmanager
def freed_memory_kept(count: int) -> Iterator[None]:
    """
    Within it this process keeps what it frees, and has `count` bytes beforehand: work that needs no more is timed
    without page faults, whose cost is the machine's and grows with the memory that a trainer takes.
    """
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})
    try:
        torch.ones(count, dtype=torch.uint8)
        yield
    finally:
        _mallopt(DEFAULTS)
        _trim()


# Where the C library is another one, these do nothing, and memory is what it makes of it.
def _mallopt(settings: dict[int, int]) -> None:
    if hasattr(LIBC, "mallopt"):
        for parameter, value in settings.items():
            LIBC.mallopt(parameter, value)


def _trim() -> None:
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
