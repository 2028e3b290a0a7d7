"""
The real recipes/dpo.py (or sft.py) on a tiny model and rows built here, for tests that kill it. A start tells its
parent what it is doing, a byte a deed, so that the parent can kill it in the middle of a given one.
"""

import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from processes import ROOT, exit_codes, start_ranks

# What a start tells: a micro-batch of the reference pass, of an evaluation or of training begins; a file of a
# checkpoint is opened, renamed or removed; or another file of the output folder.
REFERENCE, EVALUATION, TRAINING, SAVE, OTHER = b"r", b"e", b"t", b"s", b"o"
DROPOUT = "with_dropout"  # the model whose run is another one if the random state is lost; its pairs are padded
ACCUMULATION, UPDATES, SAVE_STEPS = 4, 9, 2


@dataclass
class Start:
    """One start of a script, killed or not."""

    output_dir: Path
    arguments: list[str] = field(default_factory=list)
    script: str = "dpo"
    processes: int = 1
    zero_stage: int | None = None
    kill: tuple[bytes, int, float] | None = None  # in the n-th deed of this kind, seconds after it began
    victim: int = 0  # the rank that is killed
    signal: int = signal.SIGKILL  # what it is killed by


@dataclass
class Done:
    """What became of it: exit code of each rank (-9: killed), what rank 0 did, and its output."""

    codes: list[int]
    deeds: bytes
    output: str


def prepare(folder: Path) -> Path:
    """A model, rows and a recipe under `folder`, which uses all that a 7B run uses; returns the recipe."""
    from transformers.utils.logging import disable_progress_bar

    from conftest import build_model, build_tokenizer

    disable_progress_bar()
    for name, dropout in (("model", 0.0), (DROPOUT, 0.1)):
        build_model(attention_dropout=dropout).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    # An epoch is 64 task rows, and an update 4 + 4 pairs of 1 + 1 a micro-batch: 16 updates, of which 9 are run.
    for name, count, seed in (("task", 64, 1), ("buffer", 24, 2), ("held_out", 8, 3)):
        rows = pairs(count, seed, name)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def source(name: str) -> dict[str, Any]:
        columns = {key: key for key in ("prompt", "chosen", "rejected", "chosen_safe", "rejected_safe")}
        return {"path": str(folder / f"{name}.jsonl"), "columns": columns}

    recipe = {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "reference_cache": str(folder / "reference"),
        "datasets": [source("task"), source("buffer") | {"role": "buffer"}],
        "eval_datasets": [source("held_out")],
        "selection": {"hygiene": {"max_length_ratio": None, "eval_ngram": None}},
        "margin": {"preset": "bfpo"},
        "trainable_parameters": ["down_proj"],
        "pairs_per_update": 2 * ACCUMULATION,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "precompute_ref_batch_size": 4,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_steps": UPDATES,
        "max_length": 256,
        "bf16": False,
        "use_cpu": True,
        "disable_dropout": False,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "seed": 5,
        "disable_tqdm": True,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def pairs(count: int, seed: int, name: str) -> list[dict[str, Any]]:
    """Labelled rows of random words. The buffer's are all safe."""
    from conftest import words

    draw = random.Random(seed)
    return [
        {
            "prompt": f"{name} {index} {words(draw, 2, 8)}",
            "chosen": words(draw, 4, 12),
            "rejected": words(draw, 4, 12),
            "chosen_safe": name == "buffer" or draw.random() < 0.5,
            "rejected_safe": name == "buffer" or draw.random() < 0.5,
        }
        for index in range(count)
    ]


def run(start: Start, recipe: Path, timeout: float = 180.0) -> Done:
    """Start, kill if that is asked for, and wait for the end."""
    log = start.output_dir.with_name(start.output_dir.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    script = ROOT / "recipes" / f"{start.script}.py"
    argv = [str(script), "--config", str(recipe), "--output_dir", str(start.output_dir)]
    if start.script == "dpo":
        argv += ["--reference_cache", str(start.output_dir.with_name(start.output_dir.name + ".reference"))]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    size = log.stat().st_size if log.exists() else 0
    ranks = start_ranks(start.processes, start.zero_stage, _rank, start, argv + start.arguments, log, sender)
    sender.close()
    deeds = b""
    deadline = time.monotonic() + timeout
    kind, number, delay = start.kill or (b"", 0, 0)
    while time.monotonic() < deadline and ranks[0].is_alive():
        if not receiver.poll(0.05):
            continue
        try:
            deeds += receiver.recv_bytes()
        except EOFError:
            break
        if kind and deeds.endswith(kind) and deeds.count(kind) == number:
            time.sleep(delay)
            os.kill(ranks[start.victim].pid, start.signal)
            deadline = min(deadline, time.monotonic() + 10)
    codes = exit_codes(ranks, deadline - time.monotonic())
    return Done(codes, deeds, log.read_text()[size:])


def _rank(rank: int, start: Start, argv: list[str], log: Path, told) -> None:
    """One process of the run: instrumented from outside, the script itself as it is."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    _watch_deeds(told.send_bytes if rank == 0 else lambda deed: None, start.output_dir, rank)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _watch_deeds(tell, output_dir: Path, rank: int) -> None:
    """Have the trainer tell what it does, and write down the rows of each micro-batch."""
    from core.modeling.reference import Scorer
    from core.training.trainer import ShiftedMarginTrainer

    steps, evaluate = ShiftedMarginTrainer.training_step, ShiftedMarginTrainer.prediction_step
    score = Scorer.__call__
    seen = {"update": -1, "micro_batch": 0}

    def training_step(self, model, inputs, *args, **kwargs):
        tell(TRAINING)
        update = self.state.global_step
        seen.update(update=update, micro_batch=seen["micro_batch"] + 1 if update == seen["update"] else 0)
        with open(output_dir.with_name(f"{output_dir.name}.rows-{rank}"), "a") as file:
            file.write(json.dumps([update, seen["micro_batch"], inputs["row"].tolist()]) + "\n")
        return steps(self, model, inputs, *args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        tell(EVALUATION)
        return evaluate(self, *args, **kwargs)

    def score_rows(self, *args, **kwargs):
        tell(REFERENCE)
        return score(self, *args, **kwargs)

    ShiftedMarginTrainer.training_step, ShiftedMarginTrainer.prediction_step = training_step, prediction_step
    Scorer.__call__ = score_rows

    def audit(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "shutil.rmtree") and isinstance(args[0], str | Path):
            path = Path(args[0])
            if path == output_dir or ".saving" in path.parts or path.name.startswith("checkpoint-"):
                tell(SAVE)
            elif output_dir in path.parents:
                tell(OTHER)

    sys.addaudithook(audit)


@dataclass
class Outcome:
    """What a run has left: its weights, its records but for the times, and the rows of each micro-batch."""

    weights: dict[str, Any]
    records: list[dict[str, Any]]
    rows: dict[tuple[int, int, int], list[int]]


# Times, counts of work, and the mean loss that transformers takes over the updates of one start alone.
OF_ONE_START = ("runtime", "per_second", "mfu", "peak_memory", "tokens_saved", "total_flos", "train_loss")


def outcome(output_dir: Path) -> Outcome:
    """
    Raises:
        AssertionError: a micro-batch that was run twice, before a kill and after it, had other rows the second time.
    """
    from safetensors.torch import load_file

    rows: dict[tuple[int, int, int], list[int]] = {}
    for path in sorted(output_dir.parent.glob(f"{output_dir.name}.rows-*")):
        rank = int(path.suffix.removeprefix(".rows-"))
        for line in path.read_text().splitlines():
            try:
                update, micro_batch, numbers = json.loads(line)
            except ValueError:  # the last line before a kill
                continue
            assert rows.setdefault((rank, update, micro_batch), numbers) == numbers, f"update {update}: other rows"
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    records = [
        {key: value for key, value in record.items() if not any(word in key for word in OF_ONE_START)}
        for record in records
    ]
    (saved,) = output_dir.glob("*model.safetensors")  # of an adapter or of the whole model
    return Outcome(load_file(saved), records, rows)


def difference(one: Outcome, other: Outcome) -> dict[str, float]:
    """Largest differences: of a weight, of a number of the records (as a part of it where it is above 1), of rows."""
    assert one.weights.keys() == other.weights.keys()
    assert [record.keys() for record in one.records] == [record.keys() for record in other.records]
    weights = max((one.weights[name] - weight).abs().max().item() for name, weight in other.weights.items())
    numbers: dict[str, float] = {"losses": 0.0, "evaluation": 0.0}
    for mine, theirs in zip(one.records, other.records, strict=True):
        for key, value in theirs.items():
            if isinstance(value, int | float):
                kind = "evaluation" if key.startswith("eval_") else "losses"
                numbers[kind] = max(numbers[kind], abs(mine[key] - value) / max(1.0, abs(value)))
    return {"weights": weights, **numbers, "rows": float(one.rows != other.rows)}
