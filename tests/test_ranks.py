"""Ranks decide together, disagree aloud, and do not wait for one that is gone. Every test starts real processes."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from core.runtime import ranks, watch
from core.runtime.errors import PEER_LOST, RecipeError, exits_cleanly
from processes import free_port, run_ranks, take_place


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
    said = run_ranks(2, joined, decide, str(tmp_path), how)
    if how == "fail":  # with the file of its traceback
        said = [line.partition("; nobody foresaw this")[0] for line in said]
    assert said == [expected, expected]
    assert os.listdir(tmp_path) == ["ran on 0"]


def in_turn(rank: int, folder: str, faulty: int | None):
    """Look which others have been here, then leave a trace."""

    def work() -> list[str]:
        if rank == faulty:
            raise RecipeError("row 3: no answer")
        time.sleep(0.2)
        found = sorted(os.listdir(folder))
        Path(folder, str(rank)).touch()
        return found

    os.environ["LOCAL_RANK"] = str(rank % 2)  # two nodes of two
    return ranks.caches_in_turn(work)


def test_caches_are_made_once_a_node_and_then_read(tmp_path):
    """Ranks 0 and 1 are one node, 2 and 3 another: 0 is first, then 2, then both others."""
    found = run_ranks(4, joined, in_turn, str(tmp_path), None)
    assert found[0] == [] and found[2] == ["0"]
    assert all({"0", "2"} <= set(seen) for seen in (found[1], found[3]))


def test_what_one_rank_cannot_read_stops_all(tmp_path):
    assert run_ranks(2, joined, in_turn, str(tmp_path), 0) == ["refused: row 3: no answer"] * 2
    assert os.listdir(tmp_path) == [], "the others did not begin"


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


def look(rank: int, folders: list[str]):
    return ranks.check_shared_folder(folders[rank])


def test_nodes_that_do_not_share_the_output_folder(tmp_path):
    """Another folder under the same name, as on two nodes without a common disk."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    assert run_ranks(2, joined, look, [str(here), str(here)]) == [None, None]
    refused = run_ranks(2, joined, look, [str(here), str(there)])
    assert f"{socket.gethostname()} cannot see what the first node writes into {here}" in refused[0]
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


def start_with_fault(rank: int, faults: list[str | None]):
    with pytest.raises(RecipeError) as refused:
        ranks.join_processes(timeout=20, fault=faults[rank])
    return str(refused.value), refused.value.everywhere


def test_a_fault_of_one_rank_is_told_to_all_before_they_wait_for_it():
    """Rank 1 has another recipe, which is wrong; and both have the same wrong one."""
    begun = time.monotonic()
    told = run_ranks(2, start_with_fault, [None, "my.yaml line 3: bta: unknown key"])
    where = f"rank 1 on {socket.gethostname()} cannot start: my.yaml line 3: bta: unknown key"
    assert told == [(where, True)] * 2
    assert run_ranks(2, start_with_fault, ["bta: unknown key"] * 2) == [("bta: unknown key", True)] * 2
    assert time.monotonic() - begun < 15


def test_a_rank_that_never_starts_is_named(monkeypatch):
    """Ranks 0 and 2 of 3 are there."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    store = ranks.dist.HashStore()
    store.set("2", "there")
    with pytest.raises(
        RecipeError, match="rank 0 of 3 on .*: rank 1 did not start within 1 s; the output of its node"
    ):
        ranks._call_roll(store, timedelta(seconds=1), None)


def test_start_seconds_bound_the_start_and_not_the_collectives():
    def alone(rank: int):
        os.environ |= {"WORLD_SIZE": "2", "START_SECONDS": "2"}
        begun = time.monotonic()
        with pytest.raises(RecipeError, match="rank 0 of 2 on .* could not join the others"):
            ranks.join_processes(timeout=600)
        return time.monotonic() - begun

    assert run_ranks(1, alone)[0] < 15


def sizes(rank: int):
    os.environ["LOCAL_WORLD_SIZE"] = str(rank + 1)
    return joined(rank, lambda rank: None)


def test_nodes_of_other_sizes():
    with pytest.raises(
        AssertionError, match=f"not have the same number of processes: {socket.gethostname()} 1, .* 2;"
    ):
        run_ranks(2, sizes)


def test_an_address_that_does_not_resolve():
    def lost(rank: int):
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid"}
        with pytest.raises(RecipeError, match="could not join the others at no-such-host.invalid"):
            ranks.join_processes(timeout=3)

    run_ranks(1, lost)


def under_watch(rank: int, port: int) -> watch.Watch:
    """Of two ranks this one, with a quick beat."""
    take_place(rank, 2, port)
    watch.BEAT_SECONDS, watch.BROKEN_SECONDS = 0.2, 1.0
    ranks.join_processes(timeout=60)
    return watch.Watch(lost_after=2.0)


@contextlib.contextmanager
def two_forks(work, *arguments):
    context, port = multiprocessing.get_context("fork"), free_port()
    both = [context.Process(target=work, args=(rank, port, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.join()


def watched(rank: int, port: int, victim: int, how: str) -> None:
    """Two ranks under a watch; the victim freezes, dies or ends in order."""

    @exits_cleanly
    def main() -> None:
        beats = under_watch(rank, port)
        time.sleep(1)
        if rank == victim and how == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == victim and how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "end":
            beats.stop()
            time.sleep(rank)  # rank 0 is gone before rank 1
            os._exit(0)
        ranks.dist.barrier()  # waits for the victim until the timeout

    main()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["freeze", "die", "end"])
def test_a_rank_that_is_gone_ends_the_other(how, victim, capfd):
    """Rank 0 holds the store, which goes with it."""
    with two_forks(watched, victim, how) as both:
        survivor = both[1 - victim]
        survivor.join(20)
        assert survivor.exitcode is not None, "still waiting"
    assert survivor.exitcode == (0 if how == "end" else PEER_LOST)
    said = capfd.readouterr().err
    name = f"rank {victim} on {socket.gethostname()}"
    seconds = "2 s" if how == "freeze" else "1 s"
    silent = f"stops: {name} was not heard of for {seconds}: ended, frozen, or cut off"
    ended = f"stops: {name} has ended; its own output says why"
    assert {"freeze": silent in said, "die": (ended if victim == 0 else silent) in said, "end": not said}[how], said


def suspended(rank: int, port: int, watching, woken: Path) -> None:
    """Work on for longer than a peer may be silent after waking, then end in order."""
    beats = under_watch(rank, port)
    watching.wait(60)
    while not woken.exists():
        time.sleep(0.1)
    time.sleep(3)
    beats.stop()
    os._exit(0)


def test_a_job_that_is_suspended_goes_on_when_it_is_woken(tmp_path, capfd):
    """All ranks stand still for longer than one may be silent, and are woken one after the other."""
    watching, woken = multiprocessing.get_context("fork").Barrier(3), tmp_path / "woken"
    with two_forks(suspended, watching, woken) as both:
        watching.wait(60)
        time.sleep(0.5)
        for process in both:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)
        for process in both:
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.5)
        woken.touch()
        for process in both:
            process.join(20)
        assert [process.exitcode for process in both] == [0, 0], capfd.readouterr().err


def beside_strangers(rank: int, port: int) -> None:
    """What listens here is the store alone; a port scanner's connections and bytes end nothing."""
    beats = under_watch(rank, port)
    ours = {link.laddr.port for link in psutil.Process().net_connections() if link.status == psutil.CONN_LISTEN}
    assert port in ours if rank == 0 else port not in ours
    for own in ours:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", own)) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\x1b[31m\r\n\r\n")
    time.sleep(3)
    beats.stop()
    os._exit(0)


def test_a_stranger_on_the_network_ends_no_run(capfd):
    with two_forks(beside_strangers) as both:
        for process in both:
            process.join(20)
        said = capfd.readouterr().err
        assert [process.exitcode for process in both] == [0, 0], said
        assert "\x1b[31m" not in said


def test_flatten():
    tree = {"a": 1, "b": {"c": {"d": [1, {"e": 2}]}, "f": {}}}
    assert json.loads(json.dumps(ranks.flatten(tree))) == {"a": 1, "b.c.d": [1, {"e": 2}]}
