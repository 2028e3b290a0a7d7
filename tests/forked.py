"""Real processes for tests: a fork per rank with the launcher's environment, after the slow imports were paid once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState


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
