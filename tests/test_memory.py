"""The estimate of a run's memory and disk, by hand."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import build_model
from core.modeling.precision import precision_of
from core.planning.disk import Room, Saved, check_room, checkpoints_kept, room_for, updates_in_all
from core.planning.memory import PROOF, Work, phases, states
from core.runtime.errors import RecipeError
from core.runtime.launching import Launch

N, P = 7_241_732_096, 1_879_048_192  # Mistral-7B, and its down_proj: 32 x 4096 x 14336
ZERO3 = Launch("zero3.yaml", "DEEPSPEED", 2, zero_stage=3)
WIDE = precision_of(torch.bfloat16, "no", deepspeed=False)
MIXED = precision_of(torch.bfloat16, "bf16", deepspeed=False)
UNDER_DEEPSPEED = precision_of(torch.float32, "bf16", deepspeed=True)


def by_name(parts):
    return {part.name: part.bytes for part in parts}


def test_zero3_in_bf16_by_hand():
    """
    Two GPUs: weights N·2/2; gathered 1.05e9·2, since N is more; gradients P·2/2; masters P·4/2; Adam 2·P·4/2; bucket
    and its copy 5e8·2 each. A gathering fetches 5e7·2 at a time; the update casts P/2 gradients to float32: P/2·4.
    """
    work = Work(ZERO3, UNDER_DEEPSPEED, optim="adamw_torch_fused")
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
        PROOF: 14_483_464_192 + 456,
    }


def test_zero2_and_offload_by_hand():
    """ZeRO-2 splits all but the weights over 4; an offloaded optimizer leaves the GPU with weights and a bucket."""
    zero2 = Work(Launch("x", "DEEPSPEED", 4, zero_stage=2), UNDER_DEEPSPEED, optim="adamw_torch")
    expected = {"weights": 2000, "gradients": 500, "master weights": 1000, "optimizer": 2000}
    assert by_name(states(1000, 1000, zero2)) == expected | {"reduction bucket": 1e9}
    offload = Launch("x", "DEEPSPEED", 4, zero_stage=3, offload_optimizer=True, offload_param=True)
    parts = states(1000, 1000, Work(offload, UNDER_DEEPSPEED, optim="adamw_torch"))
    assert {part.name for part in parts if part.on_host} == {"weights", "gradients", "master weights", "optimizer"}


def test_without_deepspeed_by_hand():
    """All in float32: 4 + 4 + 8 bytes. In bf16: 50·2 frozen and 50·4 trained; DDP keeps each gradient twice."""
    work = Work(Launch("x", "NO", 1, use_cpu=True), WIDE, optim="adamw_torch")
    assert by_name(states(100, 50, work)) == {"weights": 400, "gradients": 200, "optimizer": 400}
    # When the saved weights are loaded beside the trained ones, the gradients are gone.
    assert by_name(phases(100, 50, 123, 456, work)) == {"forward and backward": 123, PROOF: 400 + 456 - 200}
    ddp = Work(Launch("x", "MULTI_GPU", 2), MIXED, optim="sgd", live_reference=True)
    assert by_name(states(100, 50, ddp)) == {"weights": 300, "gradients": 400, "optimizer": 0, "reference model": 300}
    assert [part.name for part in phases(100, 50, 1, 2, ddp) if part.on_host] == [PROOF], "no GPU has a second model"


def test_down_proj_of_a_7b_on_one_gpu():
    """5.36e9 frozen weights of 2 bytes are 10.7 GB; 1.88e9 trained ones of 4 + 4 + 8 bytes are 30.1 GB: 40.8 GB."""
    parts = by_name(states(N, P, Work(Launch("gpu.yaml", "NO", 1), MIXED, optim="adamw_torch_fused")))
    assert parts == {
        "weights": 5_362_683_904 * 2 + 1_879_048_192 * 4,
        "gradients": 1_879_048_192 * 4,
        "optimizer": 1_879_048_192 * 8,
    }
    assert sum(parts.values()) == 40_790_138_880


def test_qlora_by_hand():
    """
    Of 1,000 elements 800 are in 4 bits (0.516 bytes: 413), 100 frozen ones in 16 and 100 trained in 32; an Adam of 8
    bits has two states of a byte and 4/256 bytes of constants. The proof reads the adapter again, no model.
    """
    work = Work(Launch("x", "NO", 1), MIXED, "paged_adamw_8bit", adapter=True, quantised=800, quantised_bytes=413)
    assert by_name(states(1000, 100, work)) == {
        "weights": 100 * 2 + 100 * 4 + 413, "gradients": 400, "optimizer": pytest.approx(100 * 2 * (1 + 4 / 256)),
    }  # fmt: skip
    assert by_name(phases(1000, 100, 123, 0, work)) == {"forward and backward": 123, PROOF: 400}
    zero3 = Work(ZERO3, UNDER_DEEPSPEED, "adamw_torch", adapter=True)
    assert by_name(phases(1000, 100, 123, 456, zero3))[PROOF] == 2000 + 456, "under ZeRO-3 the model is loaded"


def test_zero3_in_float32_shares_its_masters():
    """The split weights are float32 themselves; on a CPU a bucket takes what it holds."""
    launch = Launch("x", "DEEPSPEED", 2, zero_stage=3, use_cpu=True)
    parts = by_name(states(100, 50, Work(launch, WIDE, optim="adamw_torch")))
    assert parts == {
        "weights": 200, "gathered weights": 400, "gradients": 100, "optimizer": 200, "reduction bucket": 200,
        "copy of the bucket": 200,
    }  # fmt: skip


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
    Float32, one process: 4N + 2·4P; frozen in bf16: 2·(N − P) + 4P + 2·4P. ZeRO-3 in bf16: 2N, then
    12 bytes a trained weight and 2 a frozen one. An adapter is saved alone, and so is a model without its optimizer.
    """
    assert Saved(100, 40, 4, 0).checkpoint("adamw_torch", False) == 400 + 320
    assert Saved(100, 40, 2, 0).checkpoint("adamw_torch", False) == 120 + 160 + 320
    assert Saved(100, 40, 2, 3, trained_bytes=2).checkpoint("adamw_torch", False) == 200 + 480 + 120
    assert Saved(100, 40, 2, 2, trained_bytes=2).checkpoint("adamw_torch", False) == 200 + 480 + 200
    assert Saved(100, 40, 4, 0, adapter=True).checkpoint("sgd", False) == 160
    assert Saved(100, 40, 4, 0).checkpoint("adamw_torch", True) == 400
    room = room_for(Saved(100, 40, 4, 0), saving(output_dir="none"), steps=1000)
    assert room == Room(3 * 720 + 400, 0, "3 checkpoints of 0.0 GB and the final weights")


def test_updates_in_all():
    assert updates_in_all(saving(max_steps=-1, num_train_epochs=1.5), updates=7) == 11
    assert updates_in_all(saving(max_steps=4), updates=7) == 4


def test_a_disk_that_is_too_small(tmp_path):
    Room(1, 0, "3 checkpoints").check(tmp_path / "not" / "yet")
    with pytest.raises(RecipeError, match="3 checkpoints need 1000000.0 GB and .* GB are free"):
        Room(10**15, 0, "3 checkpoints").check(tmp_path / "not" / "yet")


def leave_behind(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))


@pytest.mark.parametrize(
    ("steps", "written"),
    [
        ((), 0),  # the first start
        ((200, 400), 2),
        ((200, 400, 600), 2),  # killed before the oldest was removed: the next is written beside all three
        ((200,), 1),
    ],
)
def test_what_a_resumed_run_has_written_is_not_asked_for_again(steps, written, tmp_path, monkeypatch):
    """
    39,072 weights in float32 with two Adam states each are checkpoints of 468,864 bytes, two kept and one in the
    making, and final weights of 156,288. What an interrupted save and a finished run left is written over as well.
    """
    each, weights = 39_072 * 12, 39_072 * 4
    left = {f"checkpoint-{step}/global_step{step}/optim_states.pt": each for step in steps}
    left |= {".saving/checkpoint-800/model.safetensors": 1000, "model.safetensors": 500} if steps else {}
    leave_behind(tmp_path, left | {"checkpoint-notes/much": 10_000, "wandb/log": 10_000})
    need = 3 * each + weights - written * each - (1500 if steps else 0)
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 1, "max_steps": 1000}
    training = saving(**batch, output_dir=str(tmp_path), deepspeed_plugin=None)
    resolved = SimpleNamespace(training=training, model=SimpleNamespace(use_peft=False))

    def start(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
        check_room(build_model(), resolved, rows=2000)

    start(need)
    with pytest.raises(RecipeError, match="3 checkpoints of 0.0 GB and the final weights need 0.0 GB"):
        start(need - 1)
