"""The order of rows: task and buffer in fixed proportion in every micro-batch, and equal work on every rank."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback

from core.runtime.errors import RecipeError

TASK, BUFFER = 0, 1  # the kinds of rows; also the streams of random numbers that shuffle them


class ReplaySampler(Sampler[int]):
    """
    Row indices such that each run of `batch_size` consecutive ones is one device micro-batch with exactly
    `task` : `buffer` task and buffer rows, the task rows first.

    An epoch is the task set: every task row once. Its last update is filled up with task rows from the epoch's head
    (`repeated` of them), so every update has the full size, nothing is dropped and accelerate has no tail to loop
    over. The buffer cycles through micro-batches and epochs and is shuffled anew each cycle, so at any time no buffer
    row has been used more than once oftener than another; nor does an update hold one twice, if the buffer has two
    updates' worth of rows.

    Which rows an update holds depends on the seed, the epoch and the pairs per update alone, not on how many
    processes share them. Inside an update the rows are dealt out by length: that leaves the update's gradient
    unchanged, since every micro-batch has the same number of rows of each kind.

    Args:
        is_buffer: of each row, shape (rows,), bool.
        lengths: tokens of each pair (prompt + chosen + rejected), shape (rows,).
        task, buffer: the proportion (`selection.replay`); without buffer rows every micro-batch holds task rows only.
        batch_size: pairs per device and micro-batch.
        accumulation: micro-batches per device and update.
        world_size: processes; accelerate gives micro-batch i to process i mod world_size.
        seed: of the order.

    Raises:
        RecipeError: there are no task rows, or the micro-batch can't hold the proportion.
    """

    def __init__(
        self,
        is_buffer: np.ndarray,
        lengths: np.ndarray,
        *,
        task: int,
        buffer: int,
        batch_size: int,
        accumulation: int,
        world_size: int,
        seed: int,
    ):
        is_buffer = np.asarray(is_buffer, dtype=bool)
        assert is_buffer.shape == np.shape(lengths), "one length per row"
        self.rows = [np.flatnonzero(~is_buffer), np.flatnonzero(is_buffer)]
        self.lengths = np.asarray(lengths, dtype=np.float64)
        self.per_micro_batch = _proportion(task, buffer, batch_size, self.rows)
        self.accumulation, self.world_size, self.seed = accumulation, world_size, seed
        self.micro_batches = accumulation * world_size  # per update
        self.updates = -(-len(self.rows[TASK]) // (self.micro_batches * self.per_micro_batch[TASK]))  # per epoch
        self.repeated = self.updates * self.micro_batches * self.per_micro_batch[TASK] - len(self.rows[TASK])
        self.epoch = 0

    def __len__(self) -> int:
        return self.updates * self.micro_batches * sum(self.per_micro_batch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).ravel().tolist())

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loaders at the start of each epoch, but see `EpochCallback`."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """The row indices of an epoch, shape (updates, accumulation, world_size, batch_size)."""
        drawn = np.concatenate([self._draw(kind, epoch).reshape(self.updates, -1) for kind in (TASK, BUFFER)], axis=1)
        place = deal(self.lengths[drawn], self.per_micro_batch, self.accumulation, self.world_size)
        # A stable sort keeps the order of the draw, task before buffer, inside each micro-batch.
        dealt = np.take_along_axis(drawn, np.argsort(place, axis=1, kind="stable"), axis=1)
        return dealt.reshape(self.updates, self.accumulation, self.world_size, -1)

    def _draw(self, kind: int, epoch: int) -> np.ndarray:
        """The rows of one kind that an epoch uses, update after update, shape (updates × rows per update,)."""
        count = self.updates * self.micro_batches * self.per_micro_batch[kind]
        if kind == TASK:
            return np.resize(self._shuffled(TASK, epoch), count)  # np.resize fills up from the head
        if not count:
            return np.empty(0, dtype=np.int64)
        # The buffer is one endless stream of shuffled cycles, of which epoch e reads [e·count, (e + 1)·count).
        first, last = epoch * count // len(self.rows[BUFFER]), ((epoch + 1) * count - 1) // len(self.rows[BUFFER])
        stream = np.concatenate([self._cycle(cycle, count // self.updates) for cycle in range(first, last + 1)])
        start = epoch * count - first * len(self.rows[BUFFER])
        return stream[start : start + count]

    def _cycle(self, cycle: int, per_update: int) -> np.ndarray:
        """A shuffle of the buffer, in which the update that it begins within meets no row of the last one again."""
        rows = self._shuffled(BUFFER, cycle)
        before = cycle * len(rows) % per_update  # rows of that update that are the last cycle's
        if before and len(rows) >= 2 * per_update:  # so many that the last cycle's end is as it was shuffled
            head = rows[:per_update]
            used = np.isin(head, self._shuffled(BUFFER, cycle - 1)[-before:])
            rows[:per_update] = np.concatenate([head[~used], head[used]])
        return rows

    def _shuffled(self, kind: int, cycle: int) -> np.ndarray:
        # Ranks of raw 64-bit draws: NumPy promises that these never change, and promises it of no shuffle.
        draws = np.random.PCG64(np.random.SeedSequence([self.seed, kind, cycle])).random_raw(len(self.rows[kind]))
        return self.rows[kind][np.argsort(draws, kind="stable")]


class EpochCallback(TrainerCallback):
    """
    Tell the sampler its epoch. A run resumed in the middle of an epoch on two or more processes needs it: accelerate's
    `set_epoch` does not reach a sampler below `skip_first_batches`, which would then train on epoch 0's order.
    """

    def __init__(self, sampler: ReplaySampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


def deal(costs: np.ndarray, per_micro_batch: tuple[int, int], accumulation: int, world_size: int) -> np.ndarray:
    """
    Deal the rows of every update to its micro-batches so that those which run at the same time cost nearly the same.

    Longest first, each row goes to the cheapest micro-batch with room for its kind; then micro-batches of neighbouring
    cost run together, the dearer ones on the ranks that have had less so far in the update.

    Args:
        costs: of each row, the task rows first, shape (updates, rows per update).
        per_micro_batch: task and buffer rows in each micro-batch.

    Returns:
        Each row's micro-batch, step · world_size + rank, shape (updates, rows per update).
    """
    updates, micro_batches = len(costs), accumulation * world_size
    every = np.arange(updates)
    load = np.zeros((updates, micro_batches))
    room = np.tile(np.array(per_micro_batch)[:, None], (updates, 1, micro_batches))
    place = np.empty(costs.shape, dtype=np.int64)
    for row in np.argsort(-costs, axis=1, kind="stable").T:  # in all updates at once, the longest row first
        kind = (row >= micro_batches * per_micro_batch[TASK]).astype(np.int64)
        cheapest = np.where(room[every, kind] > 0, load, np.inf).argmin(axis=1)
        load[every, cheapest] += costs[every, row]
        room[every, kind, cheapest] -= 1
        place[every, row] = cheapest

    by_load = np.argsort(-load, axis=1, kind="stable").reshape(updates, accumulation, world_size)
    slot = np.empty((updates, micro_batches), dtype=np.int64)
    so_far = np.zeros((updates, world_size))
    for step in range(accumulation):
        rank = np.argsort(so_far, axis=1, kind="stable")  # the rank that takes the step's dearest, second dearest, …
        np.put_along_axis(slot, by_load[:, step], step * world_size + rank, axis=1)
        so_far[every[:, None], rank] += np.take_along_axis(load, by_load[:, step], axis=1)
    return np.take_along_axis(slot, place, axis=1)


def _proportion(task: int, buffer: int, batch_size: int, rows: list[np.ndarray]) -> tuple[int, int]:
    """Task and buffer rows in each micro-batch."""
    if not len(rows[TASK]):
        raise RecipeError("no task row is left to train on: give a dataset `role: task`, or keep more in `selection`")
    if not len(rows[BUFFER]):
        return batch_size, 0
    if task < 1 or buffer < 1:
        raise RecipeError(
            f"selection.replay is {task} task : {buffer} buffer, but there are {len(rows[TASK]):,} task and "
            f"{len(rows[BUFFER]):,} buffer rows: make both at least 1, or leave the buffer's datasets out"
        )
    share, remainder = divmod(batch_size, task + buffer)
    if remainder:
        raise RecipeError(
            f"per_device_train_batch_size {batch_size} can't hold {task} task : {buffer} buffer rows "
            f"(selection.replay): make it a multiple of {task + buffer}"
        )
    return share * task, share * buffer
