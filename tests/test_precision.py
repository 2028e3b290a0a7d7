"""What is trained is held in float32 and learns; what is saved has the base's dtype; lost steps are refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, ModelConfig

from conftest import build_model, build_tokenizer
from core.config.schema import Replay
from core.modeling.policy import check_learning, load_policy
from core.modeling.precision import (
    TwoPartLinear,
    check_save_dtype,
    check_steps,
    hold,
    movable_share,
    moves,
    precision_of,
)
from core.modeling.proof import verify_saved
from core.modeling.reference_cache import open_cache
from core.objective.presets import Margin
from core.runtime.errors import RecipeError
from core.training.trainer import ShiftedMarginTrainer
from test_trainer import training_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory) -> str:
    """The tiny model as people publish them: in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    build_model(dtype=BF16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("dtype", "mixed", "deepspeed", "frozen", "trained", "autocast"),
    [
        (BF16, "bf16", False, BF16, FP32, BF16),
        (FP32, "bf16", False, FP32, FP32, BF16),
        (FP16, "fp16", False, FP16, FP32, FP16),
        (BF16, "no", False, FP32, FP32, None),  # "bf16: false for float32" is true
        (BF16, "no", True, FP32, FP32, None),  # DeepSpeed would add updates to 16 bits
        (FP32, "bf16", True, BF16, BF16, None),  # it casts, and keeps masters
    ],
)
def test_the_rule(dtype, mixed, deepspeed, frozen, trained, autocast):
    held = precision_of(dtype, mixed, deepspeed)
    assert (held.frozen, held.trained, held.autocast) == (frozen, trained, autocast)
    assert held.masters is (trained != FP32)


def test_a_share_that_a_step_can_move_by_hand():
    """
    Beside 1.0 the next bfloat16 is 1 + 2^-7, so half of that is a tie and rounds back; beside 2^-10 it is 2^-17 away.
    """
    weights = torch.tensor([1.0, 2**-10, 0.0, -(2**-10)])
    for step, share in ((2**-18, 0.25), (2**-17, 0.75), (2**-8, 0.75), (2**-7, 1.0)):
        assert movable_share([(weights, 4)], step, BF16) == share
    # Three elements of which a sample says all of that, and nine of which none moves.
    assert movable_share([(weights, 3), (torch.ones(2), 9)], 2**-17, BF16) == 0.75 * 3 / 12
    assert movable_share([], 1.0, BF16) == 1.0


def test_a_forward_in_16_bits_sees_what_training_has_moved():
    """
    Weights on bf16's grid are moved by 1e-3 of themselves, a fourth of the grid's step. Of what that moves the outputs
    by, worked out in float64, plain autocast shows nothing, and the two parts all of it on the mean. Before the move
    and in their gradients the two are the same.
    """
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 256)
    plain.weight.data = plain.weight.data.to(BF16).float()
    both = TwoPartLinear(256, 256)
    both.load_state_dict(plain.state_dict())
    inputs = torch.randn(64, 256).to(BF16).float()

    def run(layer):
        given = inputs.clone().requires_grad_()
        layer.weight.grad = None
        with torch.autocast("cpu", BF16):
            outputs = layer(given)
        outputs.float().square().sum().backward()
        return outputs.detach().double(), given.grad, layer.weight.grad

    before, *gradients = run(plain)
    found, *others = run(both)
    assert torch.equal(found, before)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * one.abs().max().item())
    moved = plain.weight.data * 1e-3 * torch.randn(256, 256).sign()
    exact = inputs.double() @ moved.double().T
    for layer, wanted in ((plain, 0.0), (both, 1.0)):
        layer.weight.data += moved
        seen = (run(layer)[0] - before) * exact
        assert (seen.sum() / exact.square().sum()).item() == pytest.approx(wanted, abs=0.1)


def test_lost_steps_are_refused(half_folder):
    """Weights near 0.2 are float32 numbers 1.5e-8 apart: 1e-10 is lost, 5e-7 is not; as files, so for check too."""
    model = ModelConfig(model_name_or_path=half_folder)
    names = {name for name, _ in build_model().named_parameters()}
    check_steps(model, names, 5e-7, "adamw_torch")
    check_steps(model, names, 1e-10, "sgd")
    with pytest.raises(RecipeError, match=r"learning_rate 1e-10: one step of it can move \d\.\d+% of the trained"):
        check_steps(model, names, 1e-10, "adamw_torch_fused")


def arguments(folder, **overrides) -> DPOConfig:
    return DPOConfig(
        **{
            "output_dir": str(folder),
            "learning_rate": 5e-7,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "max_length": 48,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": True,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "precompute_ref_log_probs": True,
        }
        | overrides
    )


LORA = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], lora_dropout=0.0, task_type="CAUSAL_LM")


def trainer_of(folder, base, patterns=None, sharing=True, lora=None, **overrides) -> ShiftedMarginTrainer:
    args, tokenizer = arguments(folder / "run", **overrides), build_tokenizer()
    settings = ModelConfig(model_name_or_path=base, dtype="bfloat16", use_peft=lora is not None)
    model = load_policy(settings, patterns, args)
    live = lora is None and not args.precompute_ref_log_probs
    trainer = ShiftedMarginTrainer(
        model=model,
        ref_model=load_policy(settings, patterns, args) if live else None,
        args=args,
        train_dataset=training_rows(tokenizer, Margin(), roles=False),
        margin=Margin(),
        replay=Replay(),
        prefix_sharing=sharing,
        reference_cache=open_cache(str(folder / "cache"), settings, args, model),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.begun_from = settings
    return trainer


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "padded"])
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "live"])
@pytest.mark.parametrize("trained", [None, ["down_proj"], ["norm"], ["lm_head"], ["embed"], "lora"])
def test_what_is_trained_is_float32_and_moves(trained, precompute, sharing, half_folder, tmp_path):
    """
    At 5e-7 the same steps on bfloat16 weights move under 1 % of them. The first loss is that of Δ = 0: of a live
    reference, whose forward is the policy's, exactly.
    """
    lora = LORA if trained == "lora" else None
    trainer = trainer_of(
        tmp_path, half_folder, None if lora else trained, sharing, lora, precompute_ref_log_probs=precompute
    )
    weights = dict(trainer.model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["rewards/margins"]) <= (0.02 if precompute else 0.0)
    assert first["loss"] == pytest.approx(0.693147, abs=0.01 if precompute else 1e-6)
    moved = {}
    for name, weight in weights.items():
        assert weight.dtype == (FP32 if weight.requires_grad else BF16), name
        if not weight.requires_grad:
            assert weight.equal(before[name]), name
        elif (
            "embed" not in name and "lora_A" not in name
        ):  # rows of unseen tokens have no gradient; nor has A, as B = 0
            moved.setdefault("norm" in name, []).append((weight != before[name]).flatten())
    # Norms begin at 1, where float32 numbers are 6e-8 and 1.2e-7 apart: some steps of 5e-7 lead back to it.
    for norms, differs in moved.items():
        assert torch.cat(differs).double().mean() >= (0.9 if norms else 0.95)
    assert moved or trained == ["embed"]


def test_a_run_goes_on_bit_for_bit(half_folder, tmp_path):
    """Four updates, and two more from a checkpoint that holds the trained weights in float32."""
    whole = trainer_of(tmp_path / "a", half_folder, ["down_proj"], max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = tmp_path / "a" / "run" / "checkpoint-2"
    stored = load_file(checkpoint / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == FP32
    assert stored["model.embed_tokens.weight"].dtype == BF16
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float32", "loaded so, nothing is rounded"
    again = trainer_of(tmp_path / "a", half_folder, ["down_proj"], max_steps=4)
    again.train(resume_from_checkpoint=str(checkpoint))
    for (name, weight), expected in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert weight.equal(expected), name


@pytest.mark.parametrize(
    ("rate", "asked", "dtype", "said"),
    [
        (5e-7, None, FP32, "saved in float32: 9"),  # rounding would give back nearly all
        (5e-7, "bfloat16", BF16, "saved in bfloat16, rounded once: "),
        (3e-2, None, BF16, "saved in bfloat16, rounded once: "),  # the base's dtype again
        (3e-2, "float32", FP32, ""),
    ],
)
def test_the_final_model(rate, asked, dtype, said, half_folder, tmp_path, capsys):
    trainer = trainer_of(tmp_path, half_folder, ["down_proj"], learning_rate=rate)
    trainer.save_dtype = asked
    trainer.train()  # it is saved before `train` returns
    out, folder = capsys.readouterr().out, str(tmp_path / "run")
    assert said in out
    stored = load_file(tmp_path / "run" / "model.safetensors")
    held = dict(trainer.model.named_parameters())
    name = "model.layers.1.mlp.down_proj.weight"
    assert held[name].dtype == FP32 and stored[name].dtype == dtype
    assert stored[name].equal(held[name].detach().to(dtype)), "rounded once"
    assert stored["model.embed_tokens.weight"].dtype == BF16
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    rows = [[5, 9, 200, 31], [7, 8, 9]]
    verify_saved(folder, trainer.begun_from, trainer.model, trainer.accelerator, rows)
    # The model that training began with is not taken for it, though its log-probabilities are almost the same.
    shutil.copy(f"{half_folder}/model.safetensors", tmp_path / "run" / "model.safetensors")
    with pytest.raises(RecipeError, match=f"{folder}: the model lies there, but do not use it; .*of its tensors"):
        verify_saved(folder, trainer.begun_from, trainer.model, trainer.accelerator, rows)


def test_moves_by_hand(half_folder):
    """Of 4,096 values one moves by a whole and one by a millionth, which bfloat16 does not show."""
    model = build_model(dtype=BF16)
    for name, weight in model.named_parameters():
        weight.requires_grad_("down_proj" in name)
    hold(model, precision_of(BF16, "bf16", deepspeed=False))
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight[0, 0] += 1
        weight[0, 1] += weight[0, 1] * 1e-6
    found = moves(model, half_folder, None, BF16)
    assert (found.known, found.moved, found.given_back) == (4096, 2, 1)


def test_weights_that_rounding_would_hide_are_proven_too(half_folder, tmp_path):
    """Training sees float32 weights in two parts, a loaded model's autocast does not: the proof asks both alike."""
    trainer = trainer_of(tmp_path, half_folder, max_steps=1, learning_rate=1e-9)
    trainer.train()
    two_part = [module for module in trainer.model.modules() if type(module) is TwoPartLinear]
    assert len(two_part) == 14  # seven in each of two layers
    with torch.no_grad():
        for module in two_part:
            module.weight.mul_(1 + 2**-10)  # less than half a step of bfloat16's grid
    trainer.save_model()
    differs = verify_saved(str(tmp_path / "run"), trainer.begun_from, trainer.model, trainer.accelerator, [[5, 9, 7]])
    assert differs == 0
    assert all(type(module) is TwoPartLinear for module in two_part)


def test_an_adapter_is_proven_alone(half_folder, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, half_folder, lora=LORA, max_steps=1)
    trainer.train()
    monkeypatch.setattr("core.modeling.proof.load_saved", None)  # no second model
    verify_saved(str(tmp_path / "run"), trainer.begun_from, trainer.model, trainer.accelerator, [[5, 9]])
    with torch.no_grad():
        next(weight for weight in trainer.model.parameters() if weight.requires_grad)[0, 0] += 1e-3
    with pytest.raises(RecipeError, match="1 of its tensors"):
        verify_saved(str(tmp_path / "run"), trainer.begun_from, trainer.model, trainer.accelerator, [[5, 9]])


def test_a_failing_last_evaluation_does_not_cost_the_model(half_folder, tmp_path):
    trainer = trainer_of(tmp_path, half_folder, ["down_proj"], max_steps=1, eval_strategy="no")
    trainer.args.eval_strategy = "steps"

    def fail(*_, **__):
        raise ValueError("no evaluation")

    trainer._evaluate = fail
    trainer.callback_handler.on_step_end_original = trainer.callback_handler.on_step_end

    def wants_evaluation(args, state, control):
        control = trainer.callback_handler.on_step_end_original(args, state, control)
        control.should_evaluate = True
        return control

    trainer.callback_handler.on_step_end = wants_evaluation
    with pytest.raises(ValueError, match="no evaluation"):
        trainer.train()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def with_generation(base: str, folder, **settings) -> str:
    shutil.copytree(base, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


def test_invalid_generation_settings_are_met_before_the_training(half_folder, tmp_path, capsys):
    sampling = with_generation(half_folder, tmp_path / "sampling", temperature=0.6)
    trainer = trainer_of(tmp_path, sampling, ["down_proj"], max_steps=1)
    assert "sampling without do_sample; saved with do_sample: true" in capsys.readouterr().out
    trainer.train()
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"]) == (True, 0.6)
    broken = with_generation(half_folder, tmp_path / "broken", num_return_sequences=3, num_beams=2)
    with pytest.raises(RecipeError, match="cannot be loaded: `num_return_sequences`"):
        load_policy(ModelConfig(model_name_or_path=broken), None, arguments(tmp_path))


def test_updates_of_a_stage_before_are_not_rounded_away(tmp_path):
    """A stage that was saved in float32 is read so where it is trained, whatever the recipe's dtype."""
    stage = build_model()
    stage.save_pretrained(tmp_path / "stage")
    settings = ModelConfig(model_name_or_path=str(tmp_path / "stage"), dtype="bfloat16")
    loaded = load_policy(settings, ["down_proj"], arguments(tmp_path))
    weight = loaded.model.layers[0].mlp.down_proj.weight
    assert weight.equal(stage.model.layers[0].mlp.down_proj.weight) and loaded.lm_head.weight.dtype == BF16
    assert load_policy(settings, None, arguments(tmp_path, bf16=False)).lm_head.weight.equal(stage.lm_head.weight)


def test_a_small_adapter_survives_its_merging(half_folder, tmp_path):
    """Of 1e-5 of a weight bfloat16 shows nothing; merged in float32 it is there."""
    base = AutoModelForCausalLM.from_pretrained(half_folder)
    adapted = get_peft_model(base, LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(1e-5)
    adapted.save_pretrained(tmp_path / "adapter")
    settings = ModelConfig(model_name_or_path=half_folder, dtype="bfloat16")
    loaded = load_policy(settings, None, arguments(tmp_path), str(tmp_path / "adapter"))
    merged, plain = loaded.model.layers[0].mlp.down_proj.weight, build_model(dtype=BF16).model.layers[0].mlp.down_proj
    assert (merged != plain.weight.float()).float().mean() > 0.95


def test_what_deepspeed_casts_is_not_saved_otherwise():
    check_save_dtype("float32", None)
    check_save_dtype("bfloat16", BF16)
    with pytest.raises(RecipeError, match="save_dtype: float32: under DeepSpeed the final model is saved in bfloat16"):
        check_save_dtype("float32", BF16)


def test_fp16_gradients_can_be_unscaled(half_folder):
    """torch refuses to unscale gradients of 16 bits, as weights of `dtype: float16` would have."""
    model = build_model(dtype=FP16)
    hold(model, precision_of(FP16, "fp16", deepspeed=False))
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    scaler.scale(model.lm_head.weight.square().mean()).backward()
    scaler.unscale_(optimizer)


def test_a_run_looks_before_it_trains(half_folder, tmp_path):
    settings = ModelConfig(model_name_or_path=half_folder, dtype="bfloat16")
    args = arguments(tmp_path, learning_rate=1e-10)
    with pytest.raises(RecipeError, match="one step of it can move"):
        check_learning(load_policy(settings, None, args), settings, args, None, precision_of(BF16, "bf16", False))
