"""
Real processes for tests, after the slow imports were paid once: ranks and scripts forked from this process, ranks
forked from a server that can be killed at will, and two nodes on one machine, each with recipes/launch.sh.
"""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "recipes" / "launch.sh"
CONFIGS = ROOT / "accelerate_configs"
# What the forks of the server have imported: all that a script imports late.
PRELOADED = ["conftest", "real_run", "core.training.trainer", "core.training.session", "core.reporting.results"]
PRELOADED += ["core.selection.pairs", "core.runtime.watch", "transformers.trainer", "deepspeed"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def allowed(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def take_place(rank: int, world_size: int, port: int) -> None:
    """Set what torch's launcher tells a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})


def forget_the_parents_group() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------ forks of this process


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call `work(rank, *arguments)` in `world_size` forked processes; return what each gave back, by rank."""
    import core.training.trainer  # noqa: F401 (here, so that the forks share it)

    context, port = multiprocessing.get_context("fork"), free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, rank, world_size, port, work, arguments), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout), f"rank {rank} said nothing for {timeout} s"
            ok, result = pipe.recv()
            assert ok, f"rank {rank}:\n{result}"
            results.append(result)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return results


def _rank(sender, rank: int, world_size: int, port: int, work: Callable[..., Any], arguments: tuple) -> None:
    take_place(rank, world_size, port)
    forget_the_parents_group()
    try:
        sender.send((True, work(rank, *arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        os._exit(0)  # without the parent's exit handlers


def in_fork(work: Callable[[], object]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `work` in a fork of this process."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1), os.dup2(errors.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)  # never back into the fork's copy of pytest
        _, status = os.waitpid(child, 0)
        output.seek(0), errors.seek(0)
        return os.waitstatus_to_exitcode(status), output.read(), errors.read()


def run_script(script: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of `script_says`."""
    code, _, errors = script_says(script, arguments)
    return code, errors


def script_says(script: str, arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script in recipes/, run as a user would, but in a fork of this process."""
    import core.training.trainer  # noqa: F401 (here, so that the forks share it)

    def work() -> None:
        import torch

        torch.set_num_threads(1)
        forget_the_parents_group()
        sys.argv = [script, *arguments]
        runpy.run_path(str(ROOT / "recipes" / script), run_name="__main__")

    return in_fork(work)


# ------------------------------------------------------------------------------------------ forks of a server


def start_ranks(world_size: int, zero_stage: int | None, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start `work(rank, *arguments)` with the environment that `accelerate launch` would give each process."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(PRELOADED)
    ranks = [
        context.Process(target=_launched, args=(rank, world_size, port, zero_stage, work, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _launched(rank: int, world_size: int, port: int, zero_stage: int | None, work: Callable, arguments: tuple) -> None:
    if world_size > 1:
        take_place(rank, world_size, port)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if zero_stage is not None:
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(zero_stage))
        os.environ.update(ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true")
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    work(rank, *arguments)
    sys.stdout.flush()
    os._exit(0)


def exit_codes(ranks: list[Any], timeout: float, left_alone: float = 10.0) -> list[int]:
    """
    Wait for the end of all; −9: killed. When one has failed, the others fail at their next exchange, or wait in it: a
    launcher would end them, and here that is after `left_alone` seconds.
    """
    deadline = time.monotonic() + timeout
    while alive := [process for process in ranks if process.exitcode is None]:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + left_alone)
        if (left := deadline - time.monotonic()) <= 0:
            break
        wait([process.sentinel for process in alive], left)
    for process in ranks:
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


# ------------------------------------------------------------------------------------------ two nodes

Place = tuple[list[str], dict[str, str]]  # what a command on the node begins with, and its environment

NAMESPACES = allowed("unshare", "-n", "true") and allowed("ip", "netns", "list")
CAN_MOUNT = allowed("unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt")


@contextlib.contextmanager
def nodes_of_two() -> Iterator[list[Place]]:
    """Network namespaces, or where they are not allowed two launchers on loopback."""
    if not NAMESPACES:
        shared = {"NODES": "127.0.0.1 127.0.0.1", "PORT": str(free_port())}
        yield [([], shared | {"NODE_RANK": str(node)}) for node in range(2)]
        return
    name = f"n{os.getpid() % 10000}"
    subnet = f"10.{os.getpid() % 250}.77"
    commands = [f"ip netns add {name}a", f"ip netns add {name}b"]
    commands += [f"ip link add {name}a netns {name}a type veth peer name {name}b netns {name}b"]
    for number, side in enumerate("ab", start=1):
        commands += [f"ip -n {name}{side} addr add {subnet}.{number}/24 dev {name}{side}"]
        commands += [f"ip -n {name}{side} link set {link} up" for link in ("lo", f"{name}{side}")]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        nodes = {"NODES": f"{subnet}.1 {subnet}.2"}
        yield [(["ip", "netns", "exec", f"{name}{side}"], nodes) for side in "ab"]
    finally:
        for side in "ab":
            subprocess.run(["ip", "netns", "del", f"{name}{side}"], check=False)


def user_environment(**more: str) -> dict[str, str]:
    """That of a shell outside of Slurm, with this interpreter's environment activated."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return env | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"} | more


class Node:
    """A node's launcher, started by the same command on each, and its output."""

    def __init__(self, prefix: list[str], environment: dict[str, str], config: Path, arguments: list[str]) -> None:
        self.script = arguments[0]
        self.process = subprocess.Popen(
            [*prefix, LAUNCH, config, *arguments],
            cwd=ROOT,
            env=user_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, seconds: float) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def children(self) -> list[psutil.Process]:
        """The training processes."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        commands = [(child, child.cmdline()) for child in descendants]
        return [
            child for child, words in commands if self.script in words and "accelerate_launch" not in "".join(words)
        ]

    def kill(self) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.kill()


def await_checkpoint(folder: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not list(folder.glob("checkpoint-*")):
        assert time.monotonic() < deadline, "no checkpoint yet"
        time.sleep(0.2)
