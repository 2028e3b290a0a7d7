"""What the processes of a run do together: start, decide once for all, agree, and notice when one is gone."""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from errors import RecipeError
from runs import flatten

Result = TypeVar("Result")

BEAT_SECONDS = 3.0
LOST_SECONDS = 40.0  # so that a lost node ends the job within a minute everywhere
PEER_LOST = 70  # exit code of a rank that stops because another one is gone


def rank() -> int:
    """This process's number in the whole job, 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that the launcher started, on all nodes together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(timeout: float = 1800.0) -> None:
    """
    Form the process group before anything else is done; a single process does nothing.

    Accelerate and DeepSpeed take over a group that exists, and only so does a timeout reach gloo: on CPU both ignore
    `ddp_timeout` (and DEEPSPEED_TIMEOUT). With GPUs the group has gloo beside NCCL, for what is said in Python
    objects.

    Args:
        timeout: seconds that a collective may wait for the slowest rank; `ddp_timeout` of the recipe.

    Raises:
        RecipeError: the ranks did not find each other.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    master = os.environ["MASTER_ADDR"]
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        # gloo binds to what the host's own name resolves to: often 127.0.0.1, which other nodes cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_towards(master))
        dist.init_process_group("cuda:nccl,cpu:gloo" if gpus else "gloo", timeout=timedelta(seconds=timeout))
        dist.barrier()
    except (OSError, RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise RecipeError(
            f"rank {rank()} of {world_size()} on {socket.gethostname()} could not join the others at "
            f"{master}:{os.environ.get('MASTER_PORT')}: {_first_line(error)}. Check that every node was started with "
            "the same number of machines and processes and can reach that address"
        ) from error
    # Launchers that were given different numbers meet all the same, and train as a world of neither's size.
    agree("number of processes per node", os.environ["LOCAL_WORLD_SIZE"])
    agree("number of processes", world_size())


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
        except RecipeError as error:
            outcome = ["refused", str(error)]
        except Exception as error:
            traceback.print_exc()
            outcome = ["failed", f"{type(error).__name__}: {_first_line(error)}"]
    dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome
    if kind == "refused":
        raise RecipeError(value)
    if kind == "failed":
        raise RecipeError(f"rank 0 failed: {value}")
    return value


def agree(name: str, value: Any) -> None:
    """
    Make sure that every rank holds the same `value`, e.g. the recipe, the digest of the rows or the versions.

    Args:
        name: what it is, for the message.
        value: anything that JSON can hold; a mapping is compared key by key, nested ones under dotted keys.

    Raises:
        RecipeError: on every rank, naming the ranks and hosts that differ from rank 0, and the keys.
    """
    if not dist.is_initialized():
        return
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
    raise RecipeError(f"the ranks do not have the same {name}: {who} differ from rank 0{keys}; start every node alike")


def check_world(num_processes: int | None, deepspeed: bool | None = None) -> None:
    """
    Hold what the launcher started against what the recipe expects. A launcher that misreads its configuration starts
    fewer processes, or none of DeepSpeed, and trains on without a word.

    Args:
        num_processes: processes on all nodes together; None: any number.
        deepspeed: whether the launch configuration is one of DeepSpeed; None: either.

    Raises:
        RecipeError: they differ.
    """
    started = dist.get_world_size() if dist.is_initialized() else 1
    if num_processes is not None and started != num_processes:
        raise RecipeError(
            f"the recipe is for num_processes: {num_processes}, but {started} started; launch it with "
            f"`accelerate launch --num_processes {num_processes}` and a config file of accelerate_configs/ that has "
            "them (without --cpu, which starts a single process), or set num_processes in the recipe"
        )
    active = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed is not None and active != deepspeed:
        raise RecipeError(
            "the recipe expects DeepSpeed, but the launcher did not start it; launch with a config file whose "
            "distributed_type is DEEPSPEED and without --cpu"
            if deepspeed
            else "the recipe is not for DeepSpeed, but the launcher started it; use another config file"
        )


def check_shared_folder(folder: str | Path) -> None:
    """
    Make sure that all nodes see the same `folder` (which exists): checkpoints of several nodes belong in one place.

    Raises:
        RecipeError: on every rank, naming the hosts that do not see what rank 0 wrote there.
    """
    if not dist.is_initialized():
        return
    token = Path(folder) / ".shared"
    if rank() == 0:
        token.write_text("")
    dist.barrier()
    blind: list[Any] = [None] * world_size()
    dist.all_gather_object(blind, None if token.exists() else socket.gethostname())
    if rank() == 0:
        token.unlink()
    hosts = sorted({host for host in blind if host})
    if hosts:
        raise RecipeError(
            f"output_dir {folder}: {', '.join(hosts)} cannot see what the first node writes there; put it on a disk "
            "that all nodes share"
        )


class Watch:
    """
    A pulse between rank 0 and every other, so that a node that hangs or cannot be reached ends the run everywhere.

    A process that dies closes its connections and its peers fail at once, but one that is frozen, or behind a dead
    link, leaves them waiting until the timeout of the collective (half an hour). Call `stop` when the work is done.
    """

    def __init__(self, lost_after: float = LOST_SECONDS) -> None:
        self.lost_after = lost_after
        self.done = threading.Event()
        self.links: list[socket.socket] = []
        if not dist.is_initialized():
            return
        # Sockets of our own: a read from torch's TCPStore has no timeout once its server stands still.
        server = _listen() if rank() == 0 else None
        port = [server.getsockname()[1] if server else None]
        dist.broadcast_object_list(port, src=0)
        if server:
            self._start(self._accept, server)
        else:
            link = socket.create_connection((os.environ["MASTER_ADDR"], port[0]), timeout=self.lost_after)
            self._send(link, f"rank {rank()} on {socket.gethostname()}")
            self.links.append(link)
            self._start(self._follow, link, "rank 0")
        self._start(self._beat)

    def stop(self) -> None:
        """Wait for all ranks, then watch no more."""
        if dist.is_initialized():
            dist.barrier()
        self.done.set()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        while True:
            link, _ = server.accept()
            link.settimeout(self.lost_after)
            self.links.append(link)
            self._start(self._follow, link, None)

    def _beat(self) -> None:
        while not self.done.wait(BEAT_SECONDS):
            for link in list(self.links):
                self._send(link, "")

    def _follow(self, link: socket.socket, peer: str | None) -> None:
        """Read a peer's lines: its name if it is not known yet, empty ones as pulse, and any other as the end."""
        lines = link.makefile()
        verdict = None
        while verdict is None:
            try:
                line = lines.readline()
            except OSError:  # the timeout is one
                verdict = f"{peer or 'a rank'} was not heard of for {self.lost_after:.0f} s: frozen, or cut off"
                break
            if not line:
                verdict = f"{peer or 'a rank'} has ended; its own output says why"
            elif peer is None:
                peer = line.strip()
            else:
                verdict = line.strip() or None
        if self.done.wait(BEAT_SECONDS):
            return  # the peer has ended because all is done
        for other in self.links:
            self._send(other, verdict)
        print(f"error: rank {rank()} on {socket.gethostname()} stops: {verdict}", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)

    @staticmethod
    def _send(link: socket.socket, line: str) -> None:
        with contextlib.suppress(OSError):  # whoever reads from this link tells what is wrong with it
            link.sendall(f"{line}\n".encode())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


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
