"""A pulse between the processes of a run, by which each notices when another is gone."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from core.runtime.errors import PEER_LOST, leave
from core.runtime.ranks import rank

BEAT_SECONDS = 3.0
LOST_SECONDS = 40.0  # so that a lost node ends the job within a minute everywhere
SILENCES = 10  # parts of that time, each waited for by itself


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
            self.links.append(link)
            self._start(self._follow, link, None)

    def _beat(self) -> None:
        while not self.done.wait(BEAT_SECONDS):
            for link in list(self.links):
                self._send(link, "")

    def _follow(self, link: socket.socket, peer: str | None) -> None:
        """
        Read a peer's lines: its name if it is not known yet, empty ones as pulse, and any other as the end.

        Silence is counted in parts that this process was awake for: a job that is suspended as a whole (SIGSTOP) loses
        one of them, however long it slept, and hears its peers again before it has counted all.
        """
        link.settimeout(self.lost_after / SILENCES)
        rest, silences, verdict = b"", 0, None
        while verdict is None:
            try:
                received = link.recv(4096)
            except OSError as error:
                silences += 1
                if not isinstance(error, TimeoutError) or silences == SILENCES:
                    verdict = f"{peer or 'a rank'} was not heard of for {self.lost_after:.0f} s: frozen, or cut off"
                continue
            if not received:
                verdict = f"{peer or 'a rank'} has ended; its own output says why"
            silences = 0
            *lines, rest = (rest + received).split(b"\n")
            for line in (line.decode().strip() for line in lines):
                if peer is None:
                    peer = line
                else:
                    verdict = verdict or line or None
        if self.done.wait(BEAT_SECONDS):
            return  # the peer has ended because all is done
        for other in self.links:
            self._send(other, verdict)
        print(f"error: rank {rank()} on {socket.gethostname()} stops: {verdict}", file=sys.stderr, flush=True)
        leave(PEER_LOST)

    @staticmethod
    def _send(link: socket.socket, line: str) -> None:
        with contextlib.suppress(OSError):  # whoever reads from this link tells what is wrong with it
            link.sendall(f"{line}\n".encode())


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
