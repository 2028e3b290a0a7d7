"""
What this project promises of clusters and crashes, tried on the real recipes/dpo.py with a tiny model; it ends with a
table, and with a code that is not 0 if a row falls short.

    make torture                                              all of it
    python tests/torture.py --only kills --count 5 --seed 7   one row, fewer moments, others
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it counts what killed processes leave
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from nodes import ROOT, Node, await_checkpoint, nodes_of_two
from real_run import (
    ACCUMULATION,
    DROPOUT,
    EVALUATION,
    OTHER,
    REFERENCE,
    SAVE,
    TRAINING,
    Done,
    Outcome,
    Start,
    difference,
    outcome,
    prepare,
    run,
)

ZERO3 = {"processes": 2, "zero_stage": 3}
CONFIG = ROOT / "accelerate_configs" / "zero3-cpu.yaml"
AUTO = ["--resume_from_checkpoint", "auto"]
LOST_NODE_SECONDS = 60
BAD_START_SECONDS = 30
MEMORY_BOUND = 0.15


@dataclass
class Row:
    """A line of the table."""

    what: str
    promised: str
    found: str
    holds: bool


class Workspace:
    """The folder of all runs, and the runs that nothing happened to, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ["HF_HOME"] = str(folder / "caches")
        self.recipe = prepare(folder)
        self.unbroken: dict[str, tuple[Done, Outcome]] = {}

    def model(self, dropout: bool) -> list[str]:
        return ["--model_name_or_path", str(self.folder / (DROPOUT if dropout else "model"))]

    def whole(self, dropout: bool = False, **how: int) -> tuple[Done, Outcome]:
        split = "zero3" if "zero_stage" in how else how.get("processes", 1)
        name = f"unbroken-{split}-{'dropout' if dropout else 'plain'}"
        if name not in self.unbroken:
            done = self.start(name, dropout, **how)
            assert not any(done.codes), f"{name}: codes {done.codes}\n{done.output[-3000:]}"
            self.unbroken[name] = done, outcome(self.folder / name)
        return self.unbroken[name]

    def start(self, name: str, dropout: bool = False, arguments: list[str] = (), **how) -> Done:
        return run(Start(self.folder / name, [*self.model(dropout), *arguments], **how), self.recipe)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# ------------------------------------------------------------------------------------------------------ the rows


def equal(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """ZeRO-3 on two processes and one process alone: the same recipe, half the accumulation."""
    _, alone = work.whole()
    _, split = work.whole(**ZERO3)
    yield row_of_differences("ZeRO-3 on 2 CPU processes against one process", difference(split, alone), 1e-5)


def nodes(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """Two nodes through launch.sh: against one process, and what a node does when the other one is killed."""
    arguments = [str(ROOT / "recipes" / "dpo.py"), "--config", str(work.recipe)]
    name = "two nodes, ZeRO-3, through recipes/launch.sh"
    with ExitStack() as ends, nodes_of_two() as places:
        where = "network namespaces" if places[0][0] else "loopback"

        def begin(folder: str, *more: str) -> list[Node]:
            target = ["--output_dir", str(work.folder / folder)]
            caches = ["--reference_cache", str(work.folder / f"{folder}.reference")]
            both = [Node(*place, CONFIG, [*arguments, *target, *caches, *more]) for place in places]
            for node in both:
                ends.callback(node.kill)
            return both

        ended = [node.wait(180) for node in begin("two-nodes")]
        if any(code for code, _ in ended):
            yield Row(name, "trains, equal to 1e-5", f"{[code for code, _ in ended]}: {ended[0][1][-300:]}", False)
            return
        _, alone = work.whole()
        found = difference(outcome(work.folder / "two-nodes"), alone) | {"rows": 0.0}  # the rows are not told here
        yield row_of_differences(f"{name} ({where}), against one process", found, 1e-5)
        for victim in (1, 0):
            both = begin(f"node-{victim}-killed", "--max_steps", "2000", "--eval_strategy", "no")
            await_checkpoint(work.folder / f"node-{victim}-killed")
            for child in both[victim].children():
                child.send_signal(signal.SIGKILL)
            begun = time.monotonic()
            code, output = both[1 - victim].wait(120)
            seconds = time.monotonic() - begun
            say(f"node {victim} killed: the other ended after {seconds:.1f} s with code {code}")
            holds = seconds < LOST_NODE_SECONDS and code not in (0, 75)
            found = f"ended after {seconds:.1f} s with code {code}"
            yield Row(f"… node {victim} killed: the other", f"code not 0 within {LOST_NODE_SECONDS} s", found, holds)


def kills(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """One process."""
    yield from killed(work, count or 20, draw, "single process", 0.0)


def kills_zero3(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """ZeRO-3; either rank is the one that is killed."""
    yield from killed(work, count or 10, draw, "ZeRO-3 on 2 processes", 1e-6, **ZERO3)


def kills_ddp(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """DDP; either rank is the one that is killed."""
    yield from killed(work, count or 4, draw, "DDP on 2 processes", 0.0, processes=2)


def killed(work: Workspace, count: int, draw: random.Random, name: str, bound: float, **how: int) -> Iterator[Row]:
    """
    Kill −9 at `count` moments, start again with resume_from_checkpoint: auto, and compare with the unbroken run. Of
    four moments one is in the reference pass, one in an accumulation, one in a save and one anywhere; every other run
    has dropout.
    """
    good, where, worst = 0, {}, {"weights": 0.0, "losses": 0.0, "evaluation": 0.0, "rows": 0.0}
    accumulation = ACCUMULATION // how.get("processes", 1)
    moment = attempts = 0
    while moment < count and attempts < 2 * count:
        attempts += 1
        dropout = moment % 2 == 1
        deeds = work.whole(dropout, **how)[0].deeds
        kind = (REFERENCE, TRAINING, SAVE, draw.choice([EVALUATION, OTHER, SAVE, TRAINING]))[moment % 4]
        number = draw.randint(1, deeds.count(kind))
        if moment % 4 == 1:  # not before the first micro-batch of an update, which would be between two of them
            number = draw.choice([n for n in range(1, deeds.count(kind) + 1) if (n - 1) % accumulation])
        victim, delay = draw.randrange(how.get("processes", 1)), draw.uniform(0, 0.01)
        folder = f"killed-{name.split()[0].lower()}-{attempts}"
        first = work.start(folder, dropout, kill=(kind, number, delay), victim=victim, **how)
        if first.codes[victim] != -9:
            say(f"{name}: the run was over before it was killed; another moment")
            continue
        moment += 1
        phase = PHASES[first.deeds[-1:]]
        if phase == PHASES[TRAINING] and first.deeds.count(TRAINING) % accumulation == 0:
            phase = "in an update"  # in its last micro-batch, or in the optimizer
        second = work.start(folder, dropout, arguments=AUTO, **how)
        fault, found = None, {}
        if any(second.codes):
            fault = f"codes {second.codes} of the second start: {second.output[-800:]}"
        else:
            try:
                found = difference(outcome(work.folder / folder), work.whole(dropout, **how)[1])
            except AssertionError as error:
                fault = f"not the same run: {error}"
        worst = {key: max(value, found.get(key, 0.0)) for key, value in worst.items()}
        same = fault is None and all(value <= bound for value in found.values())
        good += same
        where[phase] = where.get(phase, 0) + 1
        after = f"{phase}, deed {len(first.deeds)} of about {len(deeds)}"
        say(f"{name}: kill {moment} of {count} ({after}): {'the same run' if same else fault or found}")
        if same:
            shutil.rmtree(work.folder / folder)
    phases = ", ".join(f"{number} {phase}" for phase, number in where.items())
    promise = "bit-identical weights, losses, rows" if bound == 0 else f"equal to {bound:.0e}"
    greatest = "" if bound == 0 else f"; off by at most {max(worst.values()):.1e}"
    yield Row(f"kill -9 at {count} moments, {name}", promise, f"{good} of {count} ({phases}){greatest}", good == count)


PHASES = {
    REFERENCE: "in the reference pass",
    EVALUATION: "in an evaluation",
    TRAINING: "in mid-accumulation",
    SAVE: "in a save",
    OTHER: "while other files were written",
}


def damage(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """The newest checkpoint of a run that was killed is damaged; it goes on from the one before."""
    _, whole = work.whole(dropout=True)
    good = 0
    for number, (name, spoil) in enumerate(DAMAGES.items(), start=1):
        folder = work.folder / f"damage-{number}"
        folder.mkdir()
        unbroken = work.folder / "unbroken-1-dropout"
        for path in [*unbroken.glob("checkpoint-*"), *unbroken.glob("selection.*"), unbroken / "recipe.yaml"]:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        shutil.copy(f"{unbroken}.rows-0", f"{folder}.rows-0")
        before, newest = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        spoil(newest)
        done = work.start(folder.name, dropout=True, arguments=AUTO)
        stepped = f"stepping over {newest}" in done.output and TRAINING in done.deeds
        same = not any(done.codes) and max(difference(outcome(folder), whole).values()) == 0
        good += same and stepped
        verdict = f"went on from {before.name}, the same run" if same and stepped else done.output[-800:]
        say(f"damage {number} of {len(DAMAGES)} ({name}): {verdict}")
    found = f"{good} of {len(DAMAGES)} ({', '.join(DAMAGES)}), bit-identical at the end"
    yield Row("newest checkpoint damaged", "go on from the one before", found, good == len(DAMAGES))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half_written(checkpoint: Path) -> None:
    state = (checkpoint / "trainer_state.json").read_bytes()
    (checkpoint / "trainer_state.json").write_bytes(state[: len(state) // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "missing shard": lambda folder: (folder / "optimizer.pt").unlink(),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "extra": lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(b"of another run"),
    "digest off": lambda folder: flip_a_bit(folder / "optimizer.pt"),
    "half-written state": half_written,
}


def starts(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """Starts that cannot work, each in processes of its own."""
    from bad_starts import BAD_STARTS, CAN_MOUNT, attempt, fresh_copy

    tried = [bad for bad in BAD_STARTS if CAN_MOUNT or not bad.mount][: count or None]
    good, slowest = 0, (0.0, "")
    for number, bad in enumerate(tried, start=1):
        verdict = attempt(bad, fresh_copy(work.folder, work.folder / f"start-{number}"))
        if verdict.seconds > BAD_START_SECONDS:
            verdict.faults.append(f"over {BAD_START_SECONDS} s")
        good += not verdict.faults
        slowest = max(slowest, (verdict.seconds, bad.name))
        state = "; ".join(verdict.faults) or "clear"
        say(f"bad start {number} of {len(tried)}, {bad.name}: {state}, {verdict.seconds:.1f} s: {verdict.line[:200]}")
    found = f"{good} of {len(tried)} clear, slowest {slowest[0]:.1f} s ({slowest[1]})"
    yield Row("bad starts", f"one line each, none over {BAD_START_SECONDS} s", found, good == len(tried))


def memory(work: Workspace, count: int, draw: random.Random) -> Iterator[Row]:
    """What recipes/check.py estimates for a process, against what the run takes at its peak."""
    import memory_run

    folder = work.folder / "memory"
    folder.mkdir()
    recipe = memory_run.prepare(folder)
    for launch in ("cpu", "zero3-cpu"):
        for trained, arguments in (("all weights", []), ("down_proj", ["--trainable_parameters", "[down_proj]"])):
            config = CONFIG.with_name(f"{launch}.yaml")
            estimate = memory_run.estimated(recipe, config, arguments)
            peak = memory_run.measured(recipe, config, arguments, folder / f"{launch}-{trained}")
            found = f"{estimate:.2f} GiB estimated, {peak:.2f} measured ({estimate / peak - 1:+.0%})"
            say(f"{launch}.yaml, {trained}: {found}")
            holds = abs(estimate / peak - 1) <= MEMORY_BOUND
            yield Row(f"memory of a process, {launch}.yaml, {trained}", f"within {MEMORY_BOUND:.0%}", found, holds)


ROWS = {
    "equal": equal, "nodes": nodes, "kills": kills, "kills-zero3": kills_zero3, "kills-ddp": kills_ddp,
    "damage": damage, "starts": starts, "memory": memory,
}  # fmt: skip


def row_of_differences(name: str, found: dict[str, float], bound: float) -> Row:
    parts = ", ".join(f"{key} {value:.1e}" for key, value in found.items() if key != "rows")
    return Row(name, f"equal to {bound:.0e}", parts, all(found[key] <= bound for key in found if key != "rows"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table")
    parser.add_argument("--count", type=int, default=0, help="moments to kill at, or bad starts to try (0: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which then stay")
    options = parser.parse_args()
    begun = time.monotonic()
    table: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        work = Workspace(folder.resolve())
        for name in options.only:
            say(f"row {name}")
            try:
                table += ROWS[name](work, options.count, random.Random(options.seed))
            except AssertionError as error:
                table.append(Row(name, "", f"could not be tried: {error}", False))
    from core.reporting.tables import print_table

    lines = [[row.what, row.promised, row.found, "yes" if row.holds else "NO"] for row in table]
    print_table(f"After {time.monotonic() - begun:.0f} s", ["What", "Promised", "Found", "Holds"], lines)
    sys.exit(0 if all(row.holds for row in table) else 1)


if __name__ == "__main__":
    main()
