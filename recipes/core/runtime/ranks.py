"""What the processes of a run do together: start, decide once for all, take turns, and agree."""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from core.runtime.errors import RecipeError, first_line, full_disk, lost_file, unexpected
from core.runtime.text import flatten

Result = TypeVar("Result")

START_SECONDS = 50.0  # how long a rank waits for the others to start, unless the environment says otherwise


def rank() -> int:
    """This process's number in the whole job, 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that the launcher started, on all nodes together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(timeout: float = 1800.0, fault: str | None = None) -> None:
    """
    Form the process group before anything else is done; a single process does nothing.

    Accelerate and DeepSpeed take over a group that exists, and only so does a timeout reach gloo: on CPU both ignore
    `ddp_timeout` (and DEEPSPEED_TIMEOUT). With GPUs the group has gloo beside NCCL, for what is said in Python
    objects.

    Args:
        timeout: seconds that a collective may wait for the slowest rank; `ddp_timeout` of the recipe.
        fault: what stops this rank, e.g. its recipe: told to the others, which would wait for it in vain.

    Raises:
        RecipeError: the ranks did not find each other within START_SECONDS, or one of them has a fault.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    master = os.environ["MASTER_ADDR"]
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    wait = timedelta(seconds=min(timeout, float(os.environ.get("START_SECONDS", START_SECONDS))))
    try:
        # gloo binds to what the host's own name resolves to: often 127.0.0.1, which other nodes cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_towards(master))
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=wait)))
        # The launcher keeps its store when it starts the processes again.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        _call_roll(dist.PrefixStore("roll", store), wait, fault)
        store.set_timeout(timedelta(seconds=timeout))
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if gpus else "gloo",
            store=store,
            rank=rank(),
            world_size=world_size(),
            timeout=timedelta(seconds=timeout),
        )
        dist.barrier()
    except RecipeError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise RecipeError(
            f"rank {rank()} of {world_size()} on {socket.gethostname()} could not join the others at "
            f"{master}:{os.environ.get('MASTER_PORT')}: {first_line(error)}. Check that every node was started with "
            "the same number of machines and processes and can reach that address"
        ) from error


def _call_roll(store: dist.Store, wait: timedelta, fault: str | None) -> None:
    """Every rank says that it is there, or what stops it, and hears what the others say."""
    everyone = [str(index) for index in range(world_size())]
    store.set(str(rank()), json.dumps([socket.gethostname(), os.environ["LOCAL_WORLD_SIZE"], fault]))
    try:
        store.wait(everyone, wait)
    except RuntimeError as error:
        absent = [name for name in everyone if not store.check([name])]
        raise RecipeError(
            f"rank {rank()} of {world_size()} on {socket.gethostname()}: rank {', '.join(absent)} did not start "
            f"within {wait.total_seconds():.0f} s; the output of its node says why. Where starting takes longer, set "
            "START_SECONDS"
        ) from error
    said = [json.loads(store.get(name)) for name in everyone]
    store.add("heard", 1)
    until = time.monotonic() + 5
    # The store may be rank 0's own, so it must not leave before all have heard.
    while rank() == 0 and store.add("heard", 0) < world_size() and time.monotonic() < until:
        time.sleep(0.02)
    hosts, sizes, faults = zip(*said, strict=True)
    if len(set(sizes)) > 1:
        # Launchers that were given different numbers meet all the same, and train as a world of neither's size.
        each = ", ".join(sorted({f"{host} {size}" for host, size in zip(hosts, sizes, strict=True)}))
        raise RecipeError(
            f"the nodes do not have the same number of processes: {each}; start all alike", everywhere=True
        )
    index = next((index for index, text in enumerate(faults) if text), None)
    if index is not None:
        who = "" if len(set(faults)) == 1 else f"rank {index} on {hosts[index]} cannot start: "
        raise RecipeError(who + faults[index], everywhere=True)


def first_rank_decides(function: Callable[[], Result]) -> Result:
    """
    Run `function` on rank 0 alone and give every rank its result or its `RecipeError`.

    Any other exception on rank 0 ends the others too, with a `RecipeError` that points at rank 0.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome = ["result", function()]
        except Exception as error:
            told = error if isinstance(error, RecipeError) else full_disk(error) or lost_file(error)
            outcome = ["refused", str(told or f"rank 0 failed: {unexpected(error)}")]
    dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome
    if kind == "refused":
        raise RecipeError(value, everywhere=True)
    return value


def caches_in_turn(work: Callable[[], Result]) -> Result:
    """
    Run `work`, which leaves its result in a cache on disk, on every rank: rank 0 first, then the first rank of each
    other node, then all the rest. So it is computed once where the disk is shared, and once a node where it is not.

    Raises:
        RecipeError: on every rank, what the first that failed says.
    """
    if not dist.is_initialized():
        return work()
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    result = None
    for now in range(3):
        fault = None
        if now == turn:
            try:
                result = work()
            except RecipeError as error:
                fault = str(error)
        faults: list[Any] = [None] * world_size()
        dist.all_gather_object(faults, fault)
        for told in filter(None, faults):
            raise RecipeError(told, everywhere=True)
    return result


def agree(name: str, value: Any) -> None:
    """
    Make sure that every rank holds the same `value`, e.g. the recipe, the digest of the rows or the versions.

    Args:
        name: what it is, for the message.
        value: anything that JSON can hold, or a function that gives it, which a single process does not call; a
            mapping is compared key by key, nested ones under dotted keys.

    Raises:
        RecipeError: on every rank, naming the ranks and hosts that differ from rank 0, and the keys.
    """
    if not dist.is_initialized():
        return
    value = value() if callable(value) else value
    parts = {key: _digest(part) for key, part in flatten(value).items()} if isinstance(value, dict) else _digest(value)
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), parts))
    _, expected = everyone[0]
    others = [index for index, (_, theirs) in enumerate(everyone) if theirs != expected]
    if not others:
        return
    who = ", ".join(f"rank {index} ({everyone[index][0]})" for index in others)
    keys = ""
    if isinstance(expected, dict):
        theirs = everyone[others[0]][1]
        keys = " in " + ", ".join(key for key in sorted({*expected, *theirs}) if expected.get(key) != theirs.get(key))
    raise RecipeError(
        f"the ranks do not have the same {name}: {who} differ from rank 0{keys}; start every node alike",
        everywhere=True,
    )


def check_shared_folder(folder: str | Path) -> None:
    """
    Make sure that all nodes see the same `folder` (which exists): checkpoints of several nodes belong in one place.

    Raises:
        RecipeError: on every rank, naming the hosts that do not see what rank 0 wrote there.
    """
    if not dist.is_initialized():
        return
    with contextlib.ExitStack() as until_seen:
        name = [None]
        if rank() == 0:
            probe = until_seen.enter_context(tempfile.NamedTemporaryFile(prefix=".shared-", dir=folder))
            name = [Path(probe.name).name]
        dist.broadcast_object_list(name, src=0)
        blind: list[Any] = [None] * world_size()
        dist.all_gather_object(blind, None if Path(folder, name[0]).exists() else socket.gethostname())
    hosts = sorted({host for host in blind if host})
    if hosts:
        raise RecipeError(
            f"{', '.join(hosts)} cannot see what the first node writes into {folder}; put output_dir on a disk that "
            "all nodes share",
            everywhere=True,
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _interface_towards(host: str) -> str:
    """The network interface through which this machine reaches `host`."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        ours = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.split("%")[0] == ours for known in addresses):
            return name
    return "lo"
