"""A beat of every process in the store where they met, by which each notices when another is gone."""

import atexit
import os
import socket
import sys
import threading

import torch.distributed as dist

from core.runtime.errors import PEER_LOST, connection_broke, leave
from core.runtime.ranks import rank, world_size

BEAT_SECONDS = 3.0
LOST_SECONDS = 40.0  # so that a lost node ends the job within a minute everywhere
BROKEN_SECONDS = 10.0  # … and sooner where a broken connection already says that one is gone


class Watch:
    """
    Counts how long each other rank has left no beat, and ends this one where that is too long. `stop` it when the work
    is done.

    A process that dies closes its connections and its peers fail at once, but one that is frozen, or behind a dead
    link, leaves them waiting until the timeout of the collective (half an hour). torch's launcher sees only the
    processes of its own node.

    Two threads: reading from a store whose node stands still has no timeout, so that another one has to count.
    """

    def __init__(self, lost_after: float = LOST_SECONDS) -> None:
        self.lost_after = lost_after
        self.done = threading.Event()
        if not dist.is_initialized():
            return
        # A connection of its own: in the process group's a call may wait for minutes, and all others behind it.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self.store = dist.PrefixStore(f"beat-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.store.set(str(rank()), "0")
        self.hosts: list[str | None] = [None] * world_size()
        dist.all_gather_object(self.hosts, socket.gethostname())  # so every rank's first beat is there
        self.count = 0  # of the beats that this process was awake for
        self.heard = {peer: 0 for peer in range(world_size()) if peer != rank()}  # the count at its last beat
        self.beating = threading.Thread(target=self._beat, daemon=True)
        self.beating.start()
        threading.Thread(target=self._count, daemon=True).start()
        atexit.register(self._end)

    def stop(self) -> None:
        """Wait for all ranks, then watch no more."""
        if dist.is_initialized():
            dist.barrier()
            self._end()

    def _end(self) -> None:
        self.done.set()
        self.beating.join(BEAT_SECONDS)  # Python must not end while a thread is inside the store

    def _beat(self) -> None:
        """Leave this rank's beats and note where the others' have changed."""
        known, number = [b"0"] * len(self.heard), 0
        try:
            while not self.done.wait(BEAT_SECONDS):
                number += 1
                self.store.set(str(rank()), str(number))
                beats = self.store.multi_get([str(peer) for peer in self.heard])
                for peer, beat, before in zip(self.heard, beats, known, strict=True):
                    if beat != before:
                        self.heard[peer] = self.count
                known = beats
        except RuntimeError:  # torch's DistError: what held the store, rank 0 or its launcher, is no more
            if not self.done.wait(BEAT_SECONDS):  # else it has ended because all is done
                self._leave(0, "has ended; its own output says why")

    def _count(self) -> None:
        """
        Silence is counted in beats that this process was awake for: a job that is suspended as a whole (SIGSTOP) loses
        one of them, however long it slept, and hears its peers again before it has counted all.
        """
        while not self.done.wait(BEAT_SECONDS):
            self.count += 1
            limit = min(self.lost_after, BROKEN_SECONDS) if connection_broke.is_set() else self.lost_after
            # Of several the first: where the store's own node stands still nobody is heard of, and rank 0 is there.
            peer = min(self.heard, key=self.heard.__getitem__)
            if (self.count - self.heard[peer]) * BEAT_SECONDS >= limit:
                self._leave(peer, f"was not heard of for {limit:.0f} s: ended, frozen, or cut off")

    def _leave(self, peer: int, verdict: str) -> None:
        where = f"rank {rank()} on {socket.gethostname()}"
        print(f"error: {where} stops: rank {peer} on {self.hosts[peer]} {verdict}", file=sys.stderr, flush=True)
        leave(PEER_LOST)
