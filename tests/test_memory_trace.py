"""The trace of a micro-batch against what torch's allocator hands out."""

import gc
from functools import partial

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from trl import ModelConfig

from conftest import build_model
from core.modeling.padding_free import PaddingFreeCollator, model_inputs
from core.modeling.parameters import select_parameters
from core.modeling.precision import precision_of
from core.modeling.prefix import PrefixSharedCollator, enable_prefix_sharing, pair_logps
from core.modeling.skeleton import Skeleton, build_empty, choose
from core.planning.memory_trace import FakeModel, LiveBytes, MicroBatch, largest_micro_batch
from core.runtime.errors import RecipeError


def test_live_bytes_are_counted_and_let_go():
    """1,000 floats are 4,000 bytes; a view is none; the peak is while two of them are alive."""
    model = torch.nn.Linear(2, 2)
    with LiveBytes(model) as alive:
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second.view(10, 100)
        del second
        assert (alive.now, alive.peak) == (4000, 8000)
        del third
    assert alive.now == 0


def skeleton(config, model: ModelConfig, patterns) -> Skeleton:
    precision = precision_of(torch.float32, "no", deepspeed=False)
    return choose(build_empty(config, model, precision), model, patterns, precision)


PAIRS = ((40, 60, 30), (25, 50, 80))
CONVERSATIONS = ((1, 130, 0), (1, 155, 0))
SHORT = ((1, 70, 0), (1, 50, 0), (1, 80, 0))
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 1000}


def pairs_loss(model):
    return gap_loss(model, PrefixSharedCollator()(examples_of(PAIRS)))


def gap_loss(model, batch):
    def loss():
        outputs = pair_logps(model, batch)
        return (outputs.chosen_logps - outputs.rejected_logps).sum()

    return loss


def conversations_loss(model, lengths=CONVERSATIONS):
    batch = PaddingFreeCollator(0)([{"input_ids": [5] * length} for _, length, _ in lengths])
    inputs = model_inputs(batch, summed=True)
    return lambda: -model(**inputs, use_cache=False).log_probs.sum()


def allocated(patterns, checkpointing: bool, loss_of) -> int:
    """Peak bytes of torch's CPU allocator in a real forward and backward, gradients included, beyond the weights."""
    model = build_model(**SHAPE)
    select_parameters(model, patterns)
    enable_prefix_sharing(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return peak_allocated(loss_of(model))


def examples_of(lengths) -> list[dict[str, list[int]]]:
    return [{"prompt_ids": [5] * k, "chosen_ids": [6] * n, "rejected_ids": [7] * m} for k, n, m in lengths]


def peak_allocated(loss) -> int:
    # A model with another forward is a circle: collected under the profiler, those of earlier tests would give back
    # gradients that it has seen made, and the peak would be too low by them.
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            loss().backward()
    finally:
        gc.enable()
    now = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("patterns", [None, ["down_proj"]])
@pytest.mark.parametrize(
    ("lengths", "loss_of"),
    [(PAIRS, pairs_loss), (CONVERSATIONS, conversations_loss), (SHORT, partial(conversations_loss, lengths=SHORT))],
)
def test_the_trace_is_what_the_allocator_hands_out(lengths, loss_of, patterns, checkpointing):
    model = FakeModel(skeleton(build_model(**SHAPE).config, ModelConfig(), patterns))
    traced = model.trace(
        MicroBatch(lengths, summed=lengths is not PAIRS),
        checkpointing={"use_reentrant": False} if checkpointing else None,
        gradients_kept=True,
        accumulates=False,
        autocast=None,
    )
    measured = allocated(patterns, checkpointing, loss_of) - 4 * model.trained
    assert traced == pytest.approx(measured, rel=0.1)


def test_kept_gradients_and_handed_over_ones():
    """With all weights trained, gradients that are handed over at once leave less than those that stay."""
    model = FakeModel(skeleton(build_model(**SHAPE).config, ModelConfig(), None))
    options = {"checkpointing": {"use_reentrant": False}, "autocast": None}
    kept = model.trace(MicroBatch(PAIRS), gradients_kept=True, accumulates=False, **options) + 4 * model.trained
    second = model.trace(MicroBatch(PAIRS), gradients_kept=True, accumulates=True, **options) + 4 * model.trained
    handed = model.trace(MicroBatch(PAIRS), gradients_kept=False, accumulates=False, **options)
    assert handed < kept < second <= handed + 4 * model.trained


def test_a_skeleton_counts_parameters():
    """By hand: `q, v` with rank 16 on two layers of width 32 (v: 32 → 16) are 16·(32+32) + 16·(32+16) each."""
    config = build_model().config
    whole = skeleton(config, ModelConfig(), None)
    assert (whole.total, whole.trained) == (39_072, 39_072)
    assert skeleton(config, ModelConfig(), ["down_proj"]).trained == 2 * 64 * 32
    lora = skeleton(config, ModelConfig(model_name_or_path="tiny", use_peft=True), ["q_proj", "v_proj"])
    assert lora.trained == 2 * 16 * (32 + 32 + 32 + 16)
    with pytest.raises(RecipeError, match="matches no parameter"):
        skeleton(config, ModelConfig(), ["down_prj"])


def test_the_largest_micro_batch():
    """Rows of 5, 9, 6 and 7 tokens in two micro-batches: 9 + 7 is the larger; padded, 4 rows of 4 + 5 tokens."""
    lengths = np.array([(2, 2, 2), (4, 5, 1), (3, 2, 2), (2, 3, 3)])
    order = np.array([[[[0, 2], [1, 3]]]])
    shared = largest_micro_batch(lengths, order, shared=True)
    assert (shared.pair_lengths, shared.tokens, shared.longest) == (((4, 5, 1), (2, 3, 3)), 9 + 7, 9)
    assert largest_micro_batch(lengths, order, shared=False) == MicroBatch(rows=4, length=9)
