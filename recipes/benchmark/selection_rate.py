"""How fast the selection decides on generated rows with tokens, all stages on, and how much memory it takes."""

import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from benchmark.generated import LENGTHS, Lengths, generate_pairs, train_tokenizer
from core.config.schema import Hygiene, Quotas, Score, Selection
from core.data.preferences import FEATURES
from core.data.tokens import tokenize_rows
from core.selection.buffer import select_rows

WRITTEN = 10_000  # rows that are made at a time
MAX_LENGTH = 1024
EVAL_PROMPTS = 1000
ALL_STAGES = Selection(
    hygiene=Hygiene(empty="drop"),  # every rule on
    labels="safe_first",
    score=Score("score_gap", keep=0.9),
    quotas=Quotas("pair_class", {"unsafe/unsafe": 0.5}),
)


@dataclass
class SelectionRun:
    rows: int
    kept: int
    seconds: float
    peak_bytes: int  # above the imports and the tokenising


def time_selection(count: int, processes: int, seed: int = 0) -> SelectionRun:
    """
    Select among `count` generated rows of UltraFeedback's lengths; one in twenty breaks a rule on purpose. Tokenising
    comes before, in `processes` processes, and is not timed.
    """
    lengths = LENGTHS["UltraFeedback"]
    tokenizer = train_tokenizer(text for pair in generate_pairs(500, lengths, seed + 2) for text in pair)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        _write_rows(path, count, lengths, seed)
        rows = tokenize_rows(Dataset.from_file(str(path)), tokenizer, MAX_LENGTH, num_proc=processes)
        others = generate_pairs(EVAL_PROMPTS, lengths, seed + 1)
        eval_prompts = [[{"role": "user", "content": prompt}] for prompt, _, _ in others]
        with HeldMemory() as memory:
            start = time.perf_counter()
            kept, _ = select_rows(rows, ALL_STAGES, seed=seed, max_length=MAX_LENGTH, eval_prompts=eval_prompts)
            seconds = time.perf_counter() - start
        return SelectionRun(count, len(kept), seconds, memory.peak_bytes)


class HeldMemory:
    """
    Context that measures the most memory which this process holds above what it held before, five times a second
    (Linux). Pages of a mapped file are not held: the system takes them back when it needs them.
    """

    def __enter__(self) -> "HeldMemory":
        self.before, self.peak_bytes = self._held(), 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, self._held() - self.before)

    def _held(self) -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared


def _write_rows(path: Path, count: int, lengths: Lengths, seed: int) -> None:
    draw = np.random.default_rng([seed, 1])
    pairs = generate_pairs(count, lengths, seed)
    schema = FEATURES.arrow_schema
    with ArrowWriter(features=FEATURES, path=str(path)) as writer:
        for start in range(0, count, WRITTEN):
            prompts, chosen, rejected = (list(part) for part in zip(*islice(pairs, WRITTEN), strict=True))
            size = len(prompts)
            for i in range(0, size - 1, 60):  # an identical pair, a repeated one, and one labelled both ways
                rejected[i] = chosen[i]
            for i in range(20, size - 1, 60):
                prompts[i + 1], chosen[i + 1], rejected[i + 1] = prompts[i], chosen[i], rejected[i]
            for i in range(40, size - 1, 60):
                prompts[i + 1], chosen[i + 1], rejected[i + 1] = prompts[i], rejected[i], chosen[i]
            safe = draw.random((2, size)) < 0.6
            columns = {
                "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
                "chosen": chosen,
                "rejected": rejected,
                "chosen_safe": safe[0],
                "rejected_safe": safe[1],
                "chosen_severity": draw.integers(0, 4, size),
                "rejected_severity": draw.integers(0, 4, size),
                "score_chosen": draw.uniform(5, 10, size),
                "score_rejected": draw.uniform(1, 6, size),
                "tie": draw.random(size) < 0.005,
                "category": draw.choice(["violence", "fraud", "privacy"], size).tolist(),
                "source": ["generated"] * size,
                "row_id": [f"generated:{row}" for row in range(start, start + size)],
                "role": ["task"] * size,
            }
            writer.write_table(
                pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)
            )
