"""The estimate of a run's memory and disk: by hand, and the trace against what torch's allocator hands out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from trl import ModelConfig

from conftest import build_model
from disk import Saved, checkpoints_kept, disk_needed
from errors import RecipeError
from launching import Launch
from memory import FakeModel, LiveBytes, MicroBatch, Work, largest_micro_batch, phases, states
from parameters import select_parameters
from prefix import PrefixSharedCollator, enable_prefix_sharing, pair_logps

N, P = 7_241_732_096, 1_879_048_192  # Mistral-7B, and its down_proj: 32 x 4096 x 14336
ZERO3 = Launch("zero3.yaml", "DEEPSPEED", 2, zero_stage=3)


def by_name(parts):
    return {part.name: part.bytes for part in parts}


def test_zero3_in_bf16_by_hand():
    """
    Two GPUs: weights N·2/2; gathered 1.05e9·2, since N is more; gradients P·2/2; masters P·4/2; Adam 2·P·4/2; bucket
    and its copy 5e8·2 each. A gathering fetches 5e7·2 at a time; the update casts P/2 gradients to float32: P/2·4.
    """
    work = Work(ZERO3, half=True, weight_bytes=2, optim="adamw_torch_fused")
    assert by_name(states(N, P, work)) == {
        "weights": 7_241_732_096,
        "gathered weights": 2_100_000_000,
        "gradients": 1_879_048_192,
        "master weights": 3_758_096_384,
        "optimizer": 7_516_192_768,
        "reduction bucket": 1_000_000_000,
        "copy of the bucket": 1_000_000_000,
    }
    passing = by_name(phases(N, P, 123, 456, work))
    assert passing == {
        "forward and backward": 123,
        "gathering of weights": 100_000_000,
        "update": 3_758_096_384,
        "proof of what was saved": 14_483_464_192 + 456,
    }


def test_zero2_and_offload_by_hand():
    """ZeRO-2 splits all but the weights over 4; an offloaded optimizer leaves the GPU with weights and a bucket."""
    zero2 = Work(Launch("x", "DEEPSPEED", 4, zero_stage=2), half=True, weight_bytes=4, optim="adamw_torch")
    expected = {"weights": 2000, "gradients": 500, "master weights": 1000, "optimizer": 2000}
    assert by_name(states(1000, 1000, zero2)) == expected | {"reduction bucket": 1e9}
    offload = Launch("x", "DEEPSPEED", 4, zero_stage=3, offload_optimizer=True, offload_param=True)
    parts = states(1000, 1000, Work(offload, half=True, weight_bytes=2, optim="adamw_torch"))
    assert {part.name for part in parts if part.on_host} == {"weights", "gradients", "master weights", "optimizer"}


def test_without_deepspeed_by_hand():
    """float32: 4 + 4 + 8 bytes; DDP keeps each gradient twice; a model in bfloat16 has a bfloat16 optimizer."""
    alone = Launch("x", "NO", 1)
    work = Work(alone, half=True, weight_bytes=4, optim="adamw_torch")
    assert by_name(states(100, 50, work)) == {"weights": 400, "gradients": 200, "optimizer": 400}
    ddp = Work(Launch("x", "MULTI_GPU", 2), half=True, weight_bytes=2, optim="sgd", live_reference=True)
    assert by_name(states(100, 50, ddp)) == {"weights": 200, "gradients": 200, "optimizer": 0, "reference model": 200}


def test_zero3_in_float32_shares_its_masters():
    """The split weights are float32 themselves; on a CPU a bucket takes what it holds."""
    launch = Launch("x", "DEEPSPEED", 2, zero_stage=3, use_cpu=True)
    parts = by_name(states(100, 50, Work(launch, half=False, weight_bytes=4, optim="adamw_torch")))
    assert parts == {
        "weights": 200, "gathered weights": 400, "gradients": 100, "optimizer": 200, "reduction bucket": 200,
        "copy of the bucket": 200,
    }  # fmt: skip


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


PAIRS = ((40, 60, 30), (25, 50, 80))
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 1000}


def allocated(patterns, checkpointing: bool) -> int:
    """Peak bytes of torch's CPU allocator in a real forward and backward, gradients included, beyond the weights."""
    model = build_model(**SHAPE)
    select_parameters(model, patterns)
    enable_prefix_sharing(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    examples = [{"prompt_ids": [5] * k, "chosen_ids": [6] * n, "rejected_ids": [7] * m} for k, n, m in PAIRS]
    batch = PrefixSharedCollator()(examples)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        outputs = pair_logps(model, batch)
        (outputs.chosen_logps - outputs.rejected_logps).sum().backward()
    now = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("patterns", [None, ["down_proj"]])
def test_the_trace_is_what_the_allocator_hands_out(patterns, checkpointing):
    model = FakeModel(build_model(**SHAPE).config, ModelConfig(), patterns, torch.float32)
    traced = model.trace(
        MicroBatch(PAIRS),
        checkpointing={"use_reentrant": False} if checkpointing else None,
        gradients_kept=True,
        accumulates=False,
        autocast=None,
    )
    measured = allocated(patterns, checkpointing) - 4 * model.trained
    assert traced == pytest.approx(measured, rel=0.1)


def test_kept_gradients_and_handed_over_ones():
    """With all weights trained, gradients that are handed over at once leave less than those that stay."""
    model = FakeModel(build_model(**SHAPE).config, ModelConfig(), None, torch.float32)
    options = {"checkpointing": {"use_reentrant": False}, "autocast": None}
    kept = model.trace(MicroBatch(PAIRS), gradients_kept=True, accumulates=False, **options) + 4 * model.trained
    second = model.trace(MicroBatch(PAIRS), gradients_kept=True, accumulates=True, **options) + 4 * model.trained
    handed = model.trace(MicroBatch(PAIRS), gradients_kept=False, accumulates=False, **options)
    assert handed < kept < second <= handed + 4 * model.trained


def test_a_fake_model_counts_parameters():
    """By hand: `q, v` with rank 16 on two layers of width 32 (v: 32 → 16) are 16·(32+32) + 16·(32+16) each."""
    config = build_model().config
    whole = FakeModel(config, ModelConfig(), None, torch.float32)
    assert (whole.total, whole.trained) == (39_072, 39_072)
    assert FakeModel(config, ModelConfig(), ["down_proj"], torch.float32).trained == 2 * 64 * 32
    lora = FakeModel(
        config, ModelConfig(model_name_or_path="tiny", use_peft=True), ["q_proj", "v_proj"], torch.float32
    )
    assert lora.trained == 2 * 16 * (32 + 32 + 32 + 16)
    with pytest.raises(RecipeError, match="matches no parameter"):
        FakeModel(config, ModelConfig(), ["down_prj"], torch.float32)


def test_the_largest_micro_batch():
    """Rows of 5, 9, 6 and 7 tokens in two micro-batches: 9 + 7 is the larger; padded, 4 rows of 4 + 5 tokens."""
    lengths = np.array([(2, 2, 2), (4, 5, 1), (3, 2, 2), (2, 3, 3)])
    order = np.array([[[[0, 2], [1, 3]]]])
    shared = largest_micro_batch(lengths, order, shared=True)
    assert (shared.pair_lengths, shared.tokens, shared.longest) == (((4, 5, 1), (2, 3, 3)), 9 + 7, 9)
    assert largest_micro_batch(lengths, order, shared=False) == MicroBatch(rows=4, length=9)


# ---------------------------------------------------------------------------------------------------------- disk


def saving(**settings):
    defaults = {"save_strategy": "steps", "save_steps": 200, "save_total_limit": 2, "num_train_epochs": 1}
    return SimpleNamespace(**(defaults | {"optim": "adamw_torch", "save_only_model": False} | settings))


def test_checkpoints_on_the_disk_at_a_time():
    """The limit and one in the making; as many as there are where that is fewer; the last update saves too."""
    assert checkpoints_kept(saving(), steps=1000) == 3
    assert checkpoints_kept(saving(), steps=201) == 2
    assert checkpoints_kept(saving(save_total_limit=None), steps=1000) == 5
    assert checkpoints_kept(saving(save_steps=0.1, save_total_limit=None), steps=50) == 10
    assert checkpoints_kept(saving(save_strategy="epoch", num_train_epochs=3), steps=10) == 3
    assert checkpoints_kept(saving(save_strategy="no"), steps=10) == 0


def test_bytes_of_a_checkpoint():
    """
    Float32, one process: 4N + 2·4P. ZeRO-3 in bf16: 2N, then 12 bytes a trained weight and 2 a frozen one. An
    adapter is saved alone, and so is a model without its optimizer.
    """
    assert Saved(100, 40, 4, 0).checkpoint("adamw_torch", False) == 400 + 320
    assert Saved(100, 40, 2, 3).checkpoint("adamw_torch", False) == 200 + 480 + 120
    assert Saved(100, 40, 2, 2).checkpoint("adamw_torch", False) == 200 + 480 + 200
    assert Saved(100, 40, 4, 0, adapter=True).checkpoint("sgd", False) == 160
    assert Saved(100, 40, 4, 0).checkpoint("adamw_torch", True) == 400
    needed, what = disk_needed(Saved(100, 40, 4, 0), saving(), steps=1000)
    assert needed == 3 * 720 + 400 and what.startswith("3 checkpoints of")
