"""Real processes for tests: a fork per rank with the launcher's environment, after the slow imports were paid once."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

import core.training.trainer  # noqa: F401 (what the scripts are slow to import: their forks share it)


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call `work(rank, *arguments)` in `world_size` forked processes; return what each gave back, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
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
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which knows of one process
    try:
        sender.send((True, work(rank, *arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        os._exit(0)  # without the parent's exit handlers


def run_script(script: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a script in recipes/, run as a user would, but in a fork of this process."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            torch.set_num_threads(1)
            AcceleratorState._reset_state(reset_partial_state=True)
            sys.argv = [script, *arguments]
            try:
                runpy.run_path(str(Path(__file__).parents[1] / "recipes" / script), run_name="__main__")
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read()
