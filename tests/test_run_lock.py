"""One run at a time in an output folder: the second start is told who has it, and an end of any kind frees it."""

import errno
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from core.runtime import run_lock
from core.runtime.errors import RecipeError, exits_cleanly, leave
from core.runtime.output_folder import recipe_digest
from core.runtime.run_lock import LOCK, check_free, check_held, hold, release
from processes import in_fork

RECIPE = {"beta": 0.1, "output_dir": "runs/a"}


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release()


def holder(folder: Path, seconds: float = 30.0, then=lambda: None) -> int:
    """The process id of a fork that has the folder, once it has it."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            hold(folder, RECIPE)
            then()
            os.write(told, b"1")
            time.sleep(seconds)
        finally:
            os._exit(0)
    os.read(ready, 1)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def second_start(folder: Path) -> tuple[int, str, float]:
    start = time.monotonic()
    code, _, errors = in_fork(exits_cleanly(lambda: hold(folder, RECIPE)))
    return code, errors, time.monotonic() - start


@pytest.mark.parametrize("stopped", [False, True])
def test_the_second_start_is_told_who_has_the_folder_until_that_is_killed(stopped, tmp_path):
    """kill -9 frees it; a process that is only stopped (SIGSTOP) keeps it."""
    folder = tmp_path / "runs" / "a"
    first = holder(folder)
    try:
        if stopped:
            os.kill(first, signal.SIGSTOP)
        code, errors, seconds = second_start(folder)
        who = rf"in use by process {first} on \S+ since \d.* \(recipe {recipe_digest(RECIPE)}\); wait for its end"
        assert code == 2 and re.fullmatch(rf"error: output_dir {folder} is {who}.*\n", errors) and seconds < 3
        with pytest.raises(RecipeError, match=f"is in use by process {first} "):
            check_free(folder)
    finally:
        end(first)
    check_free(folder)
    assert second_start(folder)[:2] == (0, "")


def test_two_starts_at_once_are_one_run_and_one_refusal(tmp_path):
    for offset in (0, 0.01, 0.1):
        first = os.fork()
        if first == 0:
            try:
                hold(tmp_path / "run", RECIPE)
                time.sleep(30)
            finally:
                os._exit(3)
        time.sleep(offset)
        second = os.fork()
        if second == 0:
            try:
                hold(tmp_path / "run", RECIPE)
                time.sleep(30)
            finally:
                os._exit(3)
        ended, status = os.waitpid(-1, 0)
        assert os.waitstatus_to_exitcode(status) == 3
        time.sleep(0.2)
        other = second if ended == first else first
        assert os.waitpid(other, os.WNOHANG) == (0, 0), "one of them has it"
        end(other)


def test_a_worker_that_outlives_the_run_does_not_keep_its_folder(tmp_path):
    """datasets' and DataLoader's workers are forks, which have their parent's files open."""

    def fork_a_worker():
        if os.fork() == 0:
            time.sleep(8)
            os._exit(0)

    end(holder(tmp_path, then=fork_a_worker))
    assert second_start(tmp_path)[:2] == (0, "")


def test_a_start_that_is_refused_leaves_no_folder(tmp_path):
    def refused():
        hold(tmp_path / "runs" / "a", RECIPE)
        raise RecipeError("no")

    assert in_fork(exits_cleanly(refused))[0] == 2
    assert os.listdir(tmp_path) == []


def test_a_run_that_has_ended_leaves_no_name(tmp_path):
    (tmp_path / "model.safetensors").touch()

    def done():
        hold(tmp_path, RECIPE)
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        leave(0)

    assert in_fork(done)[0] == 0
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0" * 5000, '{"process": "x", "host": [1]}', "[" * 4000])
def test_what_a_dead_run_left_in_the_lock_is_in_nobodys_way(content, tmp_path):
    (tmp_path / LOCK).write_text(content)
    check_free(tmp_path)
    hold(tmp_path, RECIPE)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    for take in (lambda: hold(tmp_path, RECIPE), lambda: check_free(tmp_path)):
        with pytest.raises(RecipeError, match="a symbolic link, which is not followed"):
            take()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("lose", [lambda run: run.rename(f"{run}-moved"), lambda run: (run / LOCK).unlink()])
def test_a_run_does_not_write_on_in_a_folder_that_it_has_lost(lose, tmp_path):
    hold(tmp_path / "run", RECIPE)
    (tmp_path / "run" / "metrics.jsonl").touch()
    check_held()
    lose(tmp_path / "run")
    with pytest.raises(RecipeError, match="is no longer this run's"):
        check_held()


def test_a_requeued_job_waits_for_the_disk_and_another_does_not(tmp_path, monkeypatch):
    """The node of the job's first start is gone, and its network disk has not noticed yet."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = holder(tmp_path)
    assert second_start(tmp_path)[0] == 2, "a second step of the same job"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    waiting = holder_in_background(tmp_path)
    time.sleep(1)
    assert os.waitpid(waiting, os.WNOHANG) == (0, 0), "it waits"
    end(first)
    assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == 0


def holder_in_background(folder: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            hold(folder, RECIPE)
            code = 0
        finally:
            os._exit(code)
    return child


def test_without_locks_the_name_in_the_file_decides(tmp_path, monkeypatch, capfd):
    """As on a disk whose flock is ENOLCK: the holder's end frees the folder here, elsewhere a requeue of its job."""

    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", no_lock)
    monkeypatch.setattr(run_lock.fcntl, "lockf", no_lock)
    first = holder(tmp_path)
    code, errors, _ = second_start(tmp_path)
    assert (
        code == 2 and f"in use by process {first}" in errors and f"if it has ended, delete {tmp_path / LOCK}" in errors
    )
    with pytest.raises(RecipeError, match="in use"):
        check_free(tmp_path)
    end(first)
    check_free(tmp_path)
    left = json.loads((tmp_path / LOCK).read_text()) | {"host": "node9", "job": "17", "restart": "0"}
    (tmp_path / LOCK).write_text(json.dumps(left))
    assert second_start(tmp_path)[0] == 2, "it may still run there"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    hold(tmp_path, RECIPE)
    assert "has no locks" in capfd.readouterr().out
