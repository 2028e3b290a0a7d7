"""The replay sampler against hand-computed cases, its promises as properties, and a real Trainer on two processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from core.runtime.errors import RecipeError
from core.selection.replay import EpochCallback, ReplaySampler, deal
from processes import run_ranks


def sampler_of(tasks: int, buffers: int, lengths=None, **overrides) -> ReplaySampler:
    """`tasks` task rows, then `buffers` buffer rows."""
    settings = {"task": 1, "buffer": 1, "batch_size": 4, "accumulation": 2, "world_size": 2, "seed": 42} | overrides
    is_buffer = np.arange(tasks + buffers) >= tasks
    return ReplaySampler(is_buffer, np.ones(tasks + buffers) if lengths is None else lengths, **settings)


# ---------------------------------------------------------------------------------------------------- dealing out


def test_longest_first_to_the_cheapest_micro_batch():
    """9 → A; 5 → B; 3 → B (5 < 9), which is full; 1 → A. A = 10 and B = 8, so A is the dearer and goes to rank 0."""
    assert deal(np.array([[9.0, 5.0, 3.0, 1.0]]), (2, 0), accumulation=1, world_size=2).tolist() == [[0, 1, 1, 0]]


def test_room_is_counted_by_kind():
    """
    One task and one buffer row each. Task 9 → A; buffer 8 → B; task 5 → B, the only one with room for a task row,
    though A's buffer place is free; buffer 1 → A. B = 13 is the dearer: rank 0.
    """
    costs = np.array([[9.0, 5.0, 8.0, 1.0]])  # tasks 9 and 5, buffers 8 and 1
    assert deal(costs, (1, 1), accumulation=1, world_size=2).tolist() == [[1, 0, 0, 1]]


def test_neighbours_run_together_and_the_dearer_changes_ranks():
    """Step 0 holds 10 (rank 0) and 8 (rank 1), so rank 1 takes the 5 of step 1. Slot = 2·step + rank."""
    costs = np.array([[1.0, 10.0, 5.0, 8.0]])
    assert deal(costs, (1, 0), accumulation=2, world_size=2).tolist() == [[2, 0, 3, 1]]


def test_balance_on_long_tailed_lengths():
    """Tokens of the slowest rank over the mean rank, summed over the forwards that run at the same time."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 0.7, 4096), 2048).round()
    sampler = sampler_of(2048, 2048, lengths, batch_size=4, accumulation=4, world_size=4)

    def wait(order: np.ndarray) -> float:
        tokens = np.array([[lengths[row] for row in micro_batch] for micro_batch in order.reshape(-1, 4)]).sum(axis=1)
        steps = tokens.reshape(-1, 4)  # four ranks at a time
        return steps.max(axis=1).sum() / steps.mean(axis=1).sum()

    order = sampler.order(0)
    undealt = np.random.default_rng(1).permuted(order.reshape(sampler.updates, -1), axis=1)
    assert wait(undealt) > 1.3
    assert wait(order) < 1.03


# ---------------------------------------------------------------------------------------------------- the order


def test_the_order_is_frozen():
    """Literal, so that another machine, NumPy or edit that moves the order (and with it every resume) is seen."""
    sampler = sampler_of(5, 3, np.arange(1.0, 9.0), batch_size=2, accumulation=1, world_size=2, seed=7)
    assert [sampler.order(epoch).reshape(-1, 2).tolist() for epoch in (0, 1)] == [
        [[3, 7], [4, 6], [0, 7], [2, 5], [3, 5], [1, 6]],
        [[1, 7], [2, 6], [4, 5], [0, 7], [3, 5], [1, 6]],
    ]
    assert (sampler.updates, sampler.repeated, len(sampler)) == (3, 1, 12)


cases = st.fixed_dictionaries(
    {
        "tasks": st.integers(1, 70),
        "buffers": st.integers(0, 40),
        "ratio": st.sampled_from([(1, 1), (3, 1), (1, 2), (2, 2)]),
        "times": st.integers(1, 2),
        "accumulation": st.integers(1, 3),
        "world_size": st.integers(1, 4),
        "seed": st.integers(0, 3),
    }
)


def build(case: dict, **overrides) -> ReplaySampler:
    case = case | overrides
    task, buffer = case["ratio"]
    lengths = np.random.default_rng(case["seed"]).integers(1, 100, case["tasks"] + case["buffers"])
    return sampler_of(
        case["tasks"],
        case["buffers"],
        lengths,
        task=task,
        buffer=buffer,
        batch_size=(task + buffer) * case["times"],
        accumulation=case["accumulation"],
        world_size=case["world_size"],
        seed=case["seed"],
    )


@settings(max_examples=150, deadline=None)
@given(cases)
def test_promises(case):
    sampler = build(case)
    task, buffer = case["ratio"]
    size = (task + buffer) * case["times"]
    share = task * case["times"] if case["buffers"] else size
    used = np.zeros(case["tasks"] + case["buffers"], dtype=int)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) and len(rows) % (size * case["accumulation"] * case["world_size"]) == 0
        for start in range(0, len(rows), size):  # the proportion, in every micro-batch, the task rows first
            is_buffer = [row >= case["tasks"] for row in rows[start : start + size]]
            assert is_buffer == [False] * share + [True] * (size - share)
        counts = np.bincount(rows, minlength=len(used))
        used += counts
        task_counts = counts[: case["tasks"]]
        assert task_counts.min() >= 1  # nothing is dropped
        assert (
            task_counts.sum() - case["tasks"] == sampler.repeated < case["accumulation"] * case["world_size"] * share
        )
        assert task_counts.max() - task_counts.min() <= 1
        if case["buffers"]:  # over the whole run so far, not only in this epoch
            assert np.ptp(used[case["tasks"] :]) <= 1


def test_no_update_holds_a_buffer_row_twice():
    """Updates of 8 buffer rows over cycles of 16 to 21 rows, most of which end within an update."""
    for buffers in range(16, 22):
        sampler = sampler_of(40, buffers, accumulation=2, world_size=2)
        stream = np.concatenate([sampler.order(epoch).reshape(sampler.updates, -1) for epoch in range(60)])
        drawn = np.sort(np.where(stream >= 40, stream, -np.arange(stream.shape[1])), axis=1)
        assert (np.diff(drawn, axis=1) != 0).all(), buffers


@settings(max_examples=80, deadline=None)
@given(cases, st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(0, 2))
def test_updates_hold_the_same_rows_whatever_the_world_size(case, shape, epoch):
    accumulation, world_size = shape
    alone = build(case, accumulation=4, world_size=1).order(epoch)
    shared = build(case, accumulation=accumulation, world_size=world_size).order(epoch)
    assert len(alone) == len(shared)
    for ours, theirs in zip(alone, shared, strict=True):
        assert sorted(ours.ravel()) == sorted(theirs.ravel())


def test_seed_and_epoch_change_the_order():
    first = sampler_of(64, 64).order(0)
    assert (first == sampler_of(64, 64).order(0)).all()
    assert (first != sampler_of(64, 64).order(1)).any()
    assert (first != sampler_of(64, 64, seed=43).order(0)).any()


@pytest.mark.parametrize(
    ("counts", "overrides", "message"),
    [
        ((8, 8), {"batch_size": 3}, "per_device_train_batch_size 3 can't hold 1 task : 1 buffer.*multiple of 2"),
        ((8, 8), {"buffer": 0}, "1 task : 0 buffer, but there are 8 task and 8 buffer rows"),
        ((0, 8), {}, "no task row is left"),
    ],
)
def test_refusals(counts, overrides, message):
    with pytest.raises(RecipeError, match=message):
        sampler_of(*counts, **overrides)


# ---------------------------------------------------------------------------------------------------- real Trainer


class Rows(Dataset):
    """Row i is the number i."""

    def __len__(self) -> int:
        return 19

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([float(row)])}


class RecordingTrainer(Trainer):
    """Trains a line and notes the rows of each forward."""

    def _get_train_sampler(self, train_dataset=None):
        sampler = sampler_of(
            13,
            6,
            np.arange(1.0, 20.0),
            accumulation=self.args.gradient_accumulation_steps,
            world_size=self.args.world_size,
        )
        self.add_callback(EpochCallback(sampler))
        self.seen, self.sampler = [], sampler
        return sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append([int(row) for row in inputs["x"][:, 0]])
        return model(inputs["x"]).square().mean()


def train(rank: int, folder: str, resume: str | None) -> tuple[list[list[int]], list, int, int]:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = RecordingTrainer(torch.nn.Linear(1, 1), arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return (
        trainer.seen,
        [trainer.sampler.order(epoch)[:, :, rank].tolist() for epoch in range(3)],
        trainer.state.global_step,
    )


def test_a_real_trainer_on_two_processes_and_its_resume(tmp_path):
    """13 task rows, 8 per update: 2 updates an epoch. The checkpoint of step 3 lies in the middle of epoch 1."""
    runs = run_ranks(2, train, str(tmp_path), None)
    for seen, expected, steps in runs:
        assert steps == 6
        assert seen == [micro_batch for epoch in expected for update in epoch for micro_batch in update]
        assert all([row >= 13 for row in micro_batch] == [False, False, True, True] for micro_batch in seen)
    resumed = run_ranks(2, train, str(tmp_path), str(tmp_path / "checkpoint-3"))
    for (seen, _, _), (again, _, _) in zip(runs, resumed, strict=True):
        assert len(again) == 6 and again == seen[6:]
