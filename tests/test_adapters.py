"""Adapters: trained on from where they are, saved, loaded by PEFT alone, merged; and what is refused of them."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

import test_trainer
from architectures import save_architecture
from conftest import build_tokenizer
from core.config.schema import Replay
from core.modeling.parameters import lora_config
from core.modeling.policy import load_policy
from core.modeling.proof import verify_saved
from core.modeling.reference_cache import open_cache
from core.objective.presets import Margin
from core.planning.disk import EIGHT_BITS
from core.training.trainer import ShiftedMarginTrainer

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 40, 41]])
FOUR = {"load_in_4bit": True, "use_bnb_nested_quant": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_architecture(tmp_path_factory.mktemp("llama"), "llama", **WIDE))


def trainer_of(folder, start, rows, seed=0, quantised=False, **overrides) -> ShiftedMarginTrainer:
    keys = {"lora_r": overrides.pop("lora_r", 4), "lora_dropout": 0.0} | (FOUR if quantised else {})
    model = ModelConfig(model_name_or_path=str(start), use_peft=True, dtype="float32", **keys)
    args = test_trainer.settings(folder, gradient_accumulation_steps=1, max_steps=3, learning_rate=1e-2, **overrides)
    torch.manual_seed(seed)
    policy = load_policy(model, None, args)
    trainer = ShiftedMarginTrainer(
        model=policy,
        args=args,
        train_dataset=rows,
        margin=Margin(),
        replay=Replay(),
        prefix_sharing=True,
        reference_cache=open_cache(str(folder.parent / "cache"), model, args, policy),
        processing_class=build_tokenizer(),
        peft_config=lora_config(model, None, policy),
    )
    trainer.begun_from = model
    return trainer


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "nf4"])
def trained(request, base, tmp_path_factory):
    """A first adapter, trained and saved, with its trainer and rows."""
    rows = test_trainer.training_rows(build_tokenizer(), Margin(), roles=False)
    trainer = trainer_of(tmp_path_factory.mktemp("first") / "run", base, rows, quantised=request.param)
    trainer.train()
    return trainer, rows, request.param


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_saved_adapter_is_loaded_by_peft_alone(trained, base):
    """From its folder's own words, onto the base that it names: the same logits, bit for bit; not the base's."""
    trainer, _, quantised = trained
    folder = trainer.args.output_dir
    assert json.loads(open(f"{folder}/adapter_config.json").read())["base_model_name_or_path"] == base
    options = {"quantization_config": trainer.model.config.quantization_config} if quantised else {}
    again = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    for module in again.modules():  # `quantised.settle`
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    expected = logits(trainer.model)
    assert logits(again).equal(expected)
    with again.disable_adapter():
        assert (logits(again) - expected).abs().max() > 0.1
    assert verify_saved(folder, trainer.begun_from, trainer.model, trainer.accelerator, [[5, 6]]) == 0


def test_a_merged_adapter_says_what_it_said_beside_its_base(trained, tmp_path):
    """Merged into float32 weights and saved, within rounding; 4 bits would be rounded again, so the base is wide."""
    trainer, _, quantised = trained
    if quantised:
        pytest.skip("of weights of 4 bits another model")
    merged = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype=torch.float32).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(trainer.model), rtol=1e-5, atol=1e-4)


def test_training_goes_on_with_an_adapter(trained, base, tmp_path):
    """
    It is the start and, as it was, the reference; its weights are not rounded on the way; what is saved is one adapter
    on the same base.
    """
    first, rows, quantised = trained
    trainer = trainer_of(tmp_path / "run", first.args.output_dir, rows, quantised=quantised)
    stored = load_file(f"{first.args.output_dir}/adapter_model.safetensors")
    begun = {
        name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    assert len(begun) == len(stored) == 28
    for name, weight in begun.items():
        assert weight.dtype == torch.float32 and weight.equal(stored[name.replace(".default.", ".")]), name
    assert list(trainer.model.peft_config) == ["default"]
    assert logits(trainer.model).equal(logits(first.model))

    # The reference by hand: the first adapter's own log-probabilities of the first row.
    row = trainer.train_dataset[0]
    for answer in ("chosen", "rejected"):
        ids = torch.tensor([row["prompt_ids"] + row[f"{answer}_ids"]])
        with torch.no_grad():
            every = first.model.eval()(ids).logits[0, :-1].log_softmax(-1)
        own = every.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum()
        assert row[f"ref_{answer}_logps"] == pytest.approx(own.item(), abs=1e-3)

    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved.keys() == stored.keys() and all(not saved[name].equal(stored[name]) for name in saved)
    assert not (tmp_path / "run" / "ref").exists()
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["r"] == 4
    assert verify_saved(str(tmp_path / "run"), trainer.begun_from, trainer.model, trainer.accelerator, [[5, 6]]) == 0


@pytest.mark.parametrize("on_adapter", [True, False], ids=["on an adapter", "8 bits"])
def test_a_run_resumes_bit_for_bit(trained, base, tmp_path, on_adapter):
    """On an adapter; and with an Adam of 8 bits, which keeps 32 for weights of less than 4,096 elements."""
    first, rows, quantised = trained
    keys = {"save_strategy": "steps", "save_steps": 2, "quantised": quantised}
    keys |= {} if on_adapter else {"lora_r": 64, "optim": "adamw_8bit"}
    start = first.args.output_dir if on_adapter else base
    whole = trainer_of(tmp_path / "a", start, rows, **keys)
    whole.train()
    again = trainer_of(tmp_path / "b", start, rows, seed=7, **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, weight), expected in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert weight.equal(expected), name


def test_an_adam_of_8_bits_keeps_bytes(base, tmp_path):
    """What the memory formula counts of a state, measured: all tensors of 4,096 elements and more."""
    rows = test_trainer.training_rows(build_tokenizer(), Margin(), roles=False)
    trainer = trainer_of(tmp_path / "run", base, rows, optim="adamw_bnb_8bit", lora_r=64)
    trainer.train()
    checked = 0
    for weight, state in trainer.optimizer.optimizer.state.items():
        if weight.numel() >= 4096:
            kept = [state[key] for key in ("state1", "state2", "absmax1", "absmax2")]
            size = sum(tensor.numel() * tensor.element_size() for tensor in kept)
            assert state["state1"].dtype == torch.uint8
            assert size == pytest.approx(weight.numel() * EIGHT_BITS * 4)
            checked += 1
    assert checked == 24  # of 28: B of k_proj and v_proj is smaller
