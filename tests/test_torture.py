"""
What this project promises of clusters and crashes, tried on the real recipes/dpo.py with a tiny model. `make torture`
runs it and prints what was found; the suite leaves it out.

    make torture                                                 all of it
    MOMENTS=5 SEED=7 make torture ARGS="-k kills"                a part, fewer moments, others
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import memory_run
from bad_starts import BAD_STARTS, attempt, fresh_copy
from processes import CAN_MOUNT, CONFIGS, ROOT, Node, await_checkpoint, nodes_of_two
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
)  # fmt: skip
from test_checkpoints import DAMAGES

pytestmark = [pytest.mark.torture, pytest.mark.timeout(3600)]

ZERO3 = {"processes": 2, "zero_stage": 3}
AUTO = ["--resume_from_checkpoint", "auto"]
LOST_NODE_SECONDS = 60
BAD_START_SECONDS = 30
MEMORY_BOUND = 0.15
PHASES = {
    REFERENCE: "in the reference pass",
    EVALUATION: "in an evaluation",
    TRAINING: "in mid-accumulation",
    SAVE: "in a save",
    OTHER: "while other files were written",
}


class Workspace:
    """The folder of all runs, and the runs that nothing happened to, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = prepare(folder)
        self.unbroken: dict[str, tuple[Done, Outcome]] = {}

    def whole(self, dropout: bool = False, **how: int) -> tuple[Done, Outcome]:
        split = "zero3" if "zero_stage" in how else how.get("processes", 1)
        name = f"unbroken-{split}-{'dropout' if dropout else 'plain'}"
        if name not in self.unbroken:
            done = self.start(name, dropout, **how)
            assert not any(done.codes), f"{name}: codes {done.codes}\n{done.output[-3000:]}"
            self.unbroken[name] = done, outcome(self.folder / name)
        return self.unbroken[name]

    def start(self, name: str, dropout: bool = False, arguments: list[str] = (), **how) -> Done:
        model = ["--model_name_or_path", str(self.folder / (DROPOUT if dropout else "model"))]
        return run(Start(self.folder / name, [*model, *arguments], **how), self.recipe)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("torture"))


@pytest.fixture
def two_nodes(work):
    """`begin(folder, *arguments)` starts both nodes; whatever the test leaves running is killed."""
    started: list[Node] = []
    with nodes_of_two() as places:

        def begin(folder: str, *more: str) -> list[Node]:
            arguments = [str(ROOT / "recipes" / "dpo.py"), "--config", str(work.recipe), *more]
            arguments += ["--output_dir", str(work.folder / folder)]
            arguments += ["--reference_cache", str(work.folder / f"{folder}.reference")]
            both = [Node(*place, CONFIGS / "zero3-cpu.yaml", arguments) for place in places]
            started.extend(both)
            return both

        yield begin
        for node in started:
            node.kill()


def test_two_nodes_are_one_process(work, two_nodes):
    for node in two_nodes("two-nodes"):
        code, output = node.wait(180)
        assert code == 0, output
    found = difference(outcome(work.folder / "two-nodes"), work.whole()[1])  # its rows are not told
    print(f"\ntwo nodes, ZeRO-3, through recipes/launch.sh, against one process: {found}")
    assert max(found["weights"], found["losses"], found["evaluation"]) < 1e-5


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_node_ends_the_other(victim, work, two_nodes):
    folder = f"node-{victim}-killed"
    both = two_nodes(folder, "--max_steps", "2000", "--eval_strategy", "no")
    await_checkpoint(work.folder / folder)
    for child in both[victim].children():
        child.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    code, output = both[1 - victim].wait(120)
    seconds = time.monotonic() - begun
    print(f"\nnode {victim} killed: the other ended after {seconds:.1f} s with code {code}")
    assert seconds < LOST_NODE_SECONDS and code not in (0, 75), output


@pytest.mark.parametrize(
    ("moments", "bound", "how"),
    [(20, 0.0, {}), (10, 1e-6, ZERO3), (4, 0.0, {"processes": 2})],
    ids=["single process", "ZeRO-3 on two", "DDP on two"],
)
def test_kills(moments, bound, how, work, request):
    """
    Kill −9 at so many moments, start again with resume_from_checkpoint: auto, and compare with the unbroken run. Of
    four moments one is in the reference pass, one in an accumulation, one in a save and one anywhere; every other run
    has dropout; of two ranks either is killed.
    """
    draw = random.Random(int(os.environ.get("SEED", 1)))
    moments = int(os.environ.get("MOMENTS", moments))
    processes = how.get("processes", 1)
    accumulation = ACCUMULATION // processes
    moment = attempts = 0
    while moment < moments:
        attempts += 1
        assert attempts <= 2 * moments, "the runs were over before they were killed"
        dropout = moment % 2 == 1
        whole, expected = work.whole(dropout, **how)
        kind = (REFERENCE, TRAINING, SAVE, draw.choice([EVALUATION, OTHER, SAVE, TRAINING]))[moment % 4]
        number = draw.randint(1, whole.deeds.count(kind))
        if moment % 4 == 1:  # not before the first micro-batch of an update, which would be between two of them
            number = draw.choice([n for n in range(1, whole.deeds.count(kind) + 1) if (n - 1) % accumulation])
        victim, delay = draw.randrange(processes), draw.uniform(0, 0.01)
        folder = f"killed-{request.node.callspec.id.split()[0]}-{attempts}"
        first = work.start(folder, dropout, kill=(kind, number, delay), victim=victim, **how)
        if first.codes[victim] != -9:
            continue  # the run was over before
        moment += 1
        where = f"kill {moment} of {moments}, {PHASES[first.deeds[-1:]]}, deed {len(first.deeds)}"
        second = work.start(folder, dropout, arguments=AUTO, **how)
        assert not any(second.codes), f"{where}: codes {second.codes} of the second start\n{second.output[-3000:]}"
        found = difference(outcome(work.folder / folder), expected)
        print(f"\n{where}: off by at most {max(found.values()):.1e}", end="")
        assert max(found.values()) <= bound, f"{where}: {found}"
        shutil.rmtree(work.folder / folder)


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_a_damaged_checkpoint_is_stepped_over(spoil: Callable[[Path], object], work):
    """The newest checkpoint of a run that was killed is damaged; it goes on from the one before."""
    _, whole = work.whole(dropout=True)
    unbroken, folder = work.folder / "unbroken-1-dropout", work.folder / f"damage-{spoil.__name__}"
    folder.mkdir()
    for path in [*unbroken.glob("checkpoint-*"), *unbroken.glob("selection.*"), unbroken / "recipe.yaml"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    shutil.copy(f"{unbroken}.rows-0", f"{folder}.rows-0")
    _, newest = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    spoil(newest)
    done = work.start(folder.name, dropout=True, arguments=AUTO)
    assert not any(done.codes) and f"stepping over {newest}" in done.output and TRAINING in done.deeds, done.output
    assert max(difference(outcome(folder), whole).values()) == 0


@pytest.mark.parametrize("bad", BAD_STARTS, ids=lambda bad: bad.name)
def test_a_start_that_cannot_work_is_told_in_a_line(bad, work, tmp_path):
    """In processes of its own."""
    if bad.mount and not CAN_MOUNT:
        pytest.skip("needs the right to mount a small disk")
    verdict = attempt(bad, fresh_copy(work.folder, tmp_path / "start"))
    print(f"\n{bad.name}: {verdict.seconds:.1f} s: {verdict.line[:200]}", end="")
    assert not verdict.faults, f"{verdict.faults}: {verdict.line}"
    assert verdict.seconds < BAD_START_SECONDS


@pytest.mark.parametrize("launch", ["cpu", "zero3-cpu"])
@pytest.mark.parametrize("trained", ["all weights", "down_proj"])
def test_memory_is_what_was_estimated(launch, trained, tmp_path):
    """What recipes/check.py estimates for a process, against what the run takes at its peak."""
    arguments = ["--trainable_parameters", "[down_proj]"] if trained == "down_proj" else []
    recipe, config = memory_run.prepare(tmp_path), CONFIGS / f"{launch}.yaml"
    estimate = memory_run.estimated(recipe, config, arguments)
    peak = memory_run.measured(recipe, config, arguments, tmp_path / "measured")
    print(f"\n{estimate:.2f} GiB estimated, {peak:.2f} measured ({estimate / peak - 1:+.0%})")
    assert abs(estimate / peak - 1) <= MEMORY_BOUND
