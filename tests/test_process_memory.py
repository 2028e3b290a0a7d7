"""
Peaks of memory by hand, and what happens to memory that is freed: counted in page faults, which no clock needs. Each
case is a fresh process, whose heap no other test has filled.
"""

import os
import subprocess
import sys
from pathlib import Path

from benchmark import process_memory

START = """
import resource
import torch
from benchmark.process_memory import PeakMemory, freed_memory_kept, freed_memory_returned

MIB = 2**20

def faults_of_a_block():
    "Page faults of 64 MiB in pieces of 4 MiB, written and freed, in parts of 64 MiB."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(MIB) for _ in range(16)]
    del held
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (64 * MIB)
"""


def figures(code: str) -> list[float]:
    """What a fresh process prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(process_memory.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [float(figure) for figure in done.stdout.split()]


def test_peak_memory_of_a_block():
    """64 MiB are held and let go; 32 MiB that stay after an earlier block don't count."""
    (peak,) = figures("""
kept = torch.ones(8 * MIB)
with PeakMemory() as memory:
    held = torch.ones(16 * MIB)
    del held
print(memory.peak_bytes / MIB)
""")
    assert 60 < peak < 80


def test_only_memory_that_is_kept_costs_no_page_fault_again():
    *returned, kept, kept_again = figures("""
with freed_memory_returned():
    print(faults_of_a_block(), faults_of_a_block())
with freed_memory_kept(96 * MIB):
    print(faults_of_a_block(), faults_of_a_block())
""")
    assert min(returned) > 0.9 and max(kept, kept_again) < 0.2


def test_memory_that_is_returned_is_no_part_of_a_later_peak():
    """
    64 MiB in pieces, freed, and then 64 MiB in one are 64 MiB at most. glibc by itself would keep the pieces: it takes
    blocks from the heap that are smaller than one that was freed, and small blocks lie on top of them.
    """
    (peak,) = figures("""
torch.ones(2 * MIB)
with freed_memory_returned(), PeakMemory() as memory:
    held = [torch.ones(MIB // 4) for _ in range(64)]
    small = [torch.ones(10_000) for _ in range(4)]
    del held
    held = torch.ones(16 * MIB)
print(memory.peak_bytes / MIB)
""")
    assert 60 < peak < 80


def test_kept_memory_is_there_beforehand_and_goes_back_at_the_end():
    within, after = figures("""
import psutil
before = psutil.Process().memory_info().rss
with freed_memory_kept(128 * MIB):
    print((psutil.Process().memory_info().rss - before) / MIB)
print((psutil.Process().memory_info().rss - before) / MIB)
""")
    assert within > 120 and after < 8
