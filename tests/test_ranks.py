"""Ranks decide together, disagree aloud, and do not wait for one that is gone. Every test starts real processes."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

import ranks
import watch
from errors import PEER_LOST, RecipeError
from forked import run_ranks


def joined(rank: int, work, *arguments):
    """`work` inside a process group; a RecipeError comes back as its text."""
    ranks.join_processes(timeout=20)
    try:
        return work(rank, *arguments)
    except RecipeError as error:
        return f"refused: {error}"


def test_a_single_process_needs_no_group():
    ranks.join_processes()
    assert ranks.first_rank_decides(lambda: 3) == 3
    ranks.agree("recipe", {"seed": 1})
    ranks.check_world(1)


def decide(rank: int, folder: str, how: str):
    def verdict():
        Path(folder, f"ran on {rank}").touch()
        if how == "refuse":
            raise RecipeError("output_dir holds another run")
        if how == "fail":
            raise OSError("disk on fire\nand more")
        return {"checkpoint": 8}

    return ranks.first_rank_decides(verdict)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("return", {"checkpoint": 8}),
        ("refuse", "refused: output_dir holds another run"),
        ("fail", "refused: rank 0 failed: OSError: disk on fire"),
    ],
)
def test_the_first_rank_decides_for_all(how, expected, tmp_path):
    assert run_ranks(2, joined, decide, str(tmp_path), how) == [expected, expected]
    assert os.listdir(tmp_path) == ["ran on 0"]


def compare(rank: int, values: list):
    return ranks.agree("recipe", values[rank])


def test_ranks_that_agree():
    assert run_ranks(2, joined, compare, [{"b": [1, 2], "a": None}, {"a": None, "b": [1, 2]}]) == [None, None]


def test_ranks_that_differ_are_named_with_the_keys():
    """Of three ranks, 1 has another nested seed and 2 agrees with 0."""
    same = {"beta": 0.1, "selection": {"seed": 1, "labels": "safer"}}
    other = {"beta": 0.1, "selection": {"seed": 2, "labels": "safer"}, "extra": 5}
    expected = (
        f"refused: the ranks do not have the same recipe: rank 1 ({socket.gethostname()}) differ from rank 0 in "
        "extra, selection.seed; start every node alike"
    )
    assert run_ranks(3, joined, compare, [same, other, same]) == [expected] * 3


def test_ranks_that_differ_in_one_value():
    answers = run_ranks(2, joined, compare, ["digest a", "digest b"])
    assert answers[0].endswith("differ from rank 0; start every node alike")


def world(rank: int, expected: int):
    return ranks.check_world(expected)


def test_the_world_is_the_one_of_the_recipe():
    assert run_ranks(2, joined, world, 2) == [None, None]
    assert "the recipe is for num_processes: 4, but 2 started" in run_ranks(2, joined, world, 4)[1]
    with pytest.raises(RecipeError, match="num_processes: 2, but 1 started"):
        ranks.check_world(2)  # `accelerate launch --cpu` with a DeepSpeed configuration


def test_deepspeed_that_did_not_start(monkeypatch):
    with pytest.raises(RecipeError, match="is one of DeepSpeed, but the launcher did not start it"):
        ranks.check_world(None, deepspeed=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    ranks.check_world(None, deepspeed=True)
    with pytest.raises(RecipeError, match="is not one of DeepSpeed"):
        ranks.check_world(None, deepspeed=False)


def look(rank: int, folders: list[str]):
    return ranks.check_shared_folder(folders[rank])


def test_nodes_that_do_not_share_the_output_folder(tmp_path):
    """Another folder under the same name, as on two nodes without a common disk."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    assert run_ranks(2, joined, look, [str(here), str(here)]) == [None, None]
    refused = run_ranks(2, joined, look, [str(here), str(there)])
    assert f"{socket.gethostname()} cannot see what the first node writes there" in refused[0]
    assert not list(here.iterdir())


def test_a_master_that_is_not_there():
    """Rank 1 of 2 finds nobody at the address: it gives up after the timeout with where it looked."""

    def alone(rank: int):
        os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
        begun = time.monotonic()
        with pytest.raises(RecipeError, match=r"rank 1 of 2 on .* could not join the others at 127.0.0.1:\d+: "):
            ranks.join_processes(timeout=3)
        return time.monotonic() - begun

    assert run_ranks(1, alone)[0] < 15


def test_an_address_that_does_not_resolve():
    def lost(rank: int):
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid"}
        with pytest.raises(RecipeError, match="could not join the others at no-such-host.invalid"):
            ranks.join_processes(timeout=3)

    run_ranks(1, lost)


def watched(rank: int, port: int, victim: int, how: str) -> None:
    """Two ranks under a watch; the victim freezes, dies or ends in order."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update(
        {key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    watch.BEAT_SECONDS = 0.2
    ranks.join_processes(timeout=60)
    pulse = watch.Watch(lost_after=2.0)
    time.sleep(1)
    if rank == victim and how == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == victim and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "end":
        pulse.stop()
        time.sleep(rank)  # rank 0 is gone before rank 1
        os._exit(0)
    ranks.dist.barrier()  # waits for the victim until the timeout


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["freeze", "die", "end"])
def test_a_rank_that_is_gone_ends_the_other(how, victim, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=watched, args=(rank, port, victim, how)) for rank in range(2)]
    for process in both:
        process.start()
    try:
        survivor = both[1 - victim]
        survivor.join(20)
        assert survivor.exitcode is not None, "still waiting"
        if how == "end":
            assert survivor.exitcode == 0
        elif how == "freeze":
            assert survivor.exitcode == PEER_LOST
            name = "rank 0" if victim == 0 else f"rank 1 on {socket.gethostname()}"
            assert f"stops: {name} was not heard of for 2 s: frozen, or cut off" in capfd.readouterr().err
        else:
            assert survivor.exitcode != 0
    finally:
        for process in both:
            process.kill()
            process.join()


def test_flatten():
    tree = {"a": 1, "b": {"c": {"d": [1, {"e": 2}]}, "f": {}}}
    assert json.loads(json.dumps(ranks.flatten(tree))) == {"a": 1, "b.c.d": [1, {"e": 2}]}
