"""LoRA over weights of 4 and 8 bits: stock TRL's numbers, the reference, what is known before, and what is refused."""

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DPOConfig, ModelConfig
from trl.trainer.utils import add_fused_lm_head

import test_trainer
from architectures import save_architecture
from core.modeling.parameters import lora_config
from core.modeling.policy import load_policy
from core.modeling.precision import Precision, hold, precision_of
from core.modeling.prefix import (
    EIGHT_BITS,
    HEAD_OUTPUTS,
    collator_for,
    enable_prefix_sharing,
    unsupported_reason,
)
from core.modeling.quantised import check_layers, quantisation, quantised_layers, stored_bytes
from core.modeling.reference_cache import open_cache
from core.modeling.skeleton import build_empty, choose
from core.objective.presets import Margin
from core.planning.memory_trace import FakeModel, MicroBatch
from core.runtime.errors import RecipeError
from test_memory_trace import examples_of, gap_loss, peak_allocated

FP32 = torch.float32
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as `prepare_environment` does
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
FOUR = {"load_in_4bit": True, "use_bnb_nested_quant": True}
EIGHT = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_architecture(tmp_path_factory.mktemp("llama"), "llama", **WIDE))


def settings(folder, **keys) -> ModelConfig:
    return ModelConfig(model_name_or_path=folder, use_peft=True, lora_r=4, lora_dropout=0.0, dtype="float32", **keys)


def arguments(folder, **keys) -> DPOConfig:
    return DPOConfig(output_dir=str(folder), use_cpu=True, **({"bf16": False} | keys))


def load(folder, tmp_path, args=None, **keys):
    model = settings(folder, **keys)
    return model, load_policy(model, None, args or arguments(tmp_path))


@pytest.mark.parametrize(
    ("keys", "precompute", "sharing", "checkpointing"),
    [
        (FOUR, True, True, False),
        (FOUR, True, False, False),
        (FOUR, True, True, True),
        (FOUR, False, True, True),
        (EIGHT, False, False, False),
        (EIGHT, False, False, True),
    ],
    ids=["shared", "padded", "shared checkpointing", "shared live checkpointing", "8 bits", "8 bits checkpointing"],
)
def test_training_is_stock_trl_s(folder, tmp_path, tokenizer, keys, precompute, sharing, checkpointing):
    """
    Losses, gradient norms, rewards and the adapters' weights after three updates, the reference being the quantised
    model without its adapter. TRL would hold the adapters in bfloat16: here they are float32 on either side.
    """
    rows = test_trainer.training_rows(tokenizer, Margin(), roles=False)
    same = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "precompute_ref_log_probs": precompute}
    same |= {"gradient_checkpointing": checkpointing}
    model, loaded = load(folder, tmp_path, **keys)
    config = lora_config(model, None, loaded)
    torch.manual_seed(1)
    ours = test_trainer.shifted(tmp_path, tokenizer, rows, Margin(), sharing, model=loaded, peft_config=config, **same)
    _, again = load(folder, tmp_path, **keys)
    torch.manual_seed(1)
    stock = test_trainer.stock_trainer(tmp_path, tokenizer, None, lora_config(model, None, again), model=again, **same)
    hold(stock.model, Precision(FP32, FP32), frozen=False)
    stock.order = list(ours._get_train_sampler())
    stock.train()
    ours.train()
    found, expected = (test_trainer.history(one, test_trainer.PARITY_KEYS) for one in (ours, stock))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-4, atol=2e-4)
    assert (
        found[0][0] == pytest.approx(0.693147, abs=1e-6 if not precompute else 1e-5)
        and len({row[0] for row in found}) == 3
    )
    trained = [name for name, weight in ours.model.named_parameters() if weight.requires_grad]
    assert len(trained) == 28 and all("lora_" in name for name in trained)  # 2 layers x 7 x (A, B)
    theirs = dict(stock.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5)
            assert "lora_B" not in name or weight.abs().max() > 0


def test_a_forward_without_gradient_changes_nothing(folder, tmp_path):
    """bitsandbytes would pack a layer anew for a CPU's inference, and hand no gradient through it afterwards."""
    model, loaded = load(folder, tmp_path, **FOUR)
    policy = get_peft_model(loaded, lora_config(model, None, loaded))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def gradients():
        policy.train()
        policy.zero_grad()
        logits = policy(ids).logits
        logits.square().sum().backward()
        return [logits.detach(), *(w.grad.clone() for n, w in policy.named_parameters() if "lora_B" in n)]

    before = gradients()
    policy.eval()
    with torch.no_grad():
        assert policy(ids).logits.equal(before[0])
    for one, other in zip(before, gradients(), strict=True):
        assert one.equal(other)


def test_eight_bits_pad_their_pairs(folder, tmp_path):
    """The reason is so: the numbers of a row hang on the rows beside it."""
    model, loaded = load(folder, tmp_path, **EIGHT)
    assert unsupported_reason(loaded, 64) == EIGHT_BITS
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        alone, beside = loaded(ids).logits, loaded(torch.cat([ids, ids + 20])).logits[:1]
    assert (alone - beside).abs().max() > 1e-3


@pytest.mark.parametrize(
    "keys",
    [FOUR, {"load_in_4bit": True}, FOUR | {"bnb_4bit_quant_type": "fp4"}, EIGHT],
    ids=["nested", "", "fp4", "8"],
)
def test_bytes_are_those_of_the_loaded_model(tmp_path, keys):
    """Which layers, and what their weights and constants take, known from the config; but for two code tables."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_hidden_layers": 1}
    folder = str(save_architecture(tmp_path / "wide", "llama", **wide))
    model, loaded = load(folder, tmp_path, **keys)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = quantised_layers(empty, quantisation(model, precision_of(FP32, "no", False)))
    weights = {
        name.removesuffix(".weight"): w
        for name, w in loaded.named_parameters()
        if w.dtype in (torch.uint8, torch.int8)
    }
    assert weights.keys() == layers.keys() and len(layers) == 7
    measured = 0
    for weight in weights.values():
        measured += weight.numel() * weight.element_size()
        if "load_in_8bit" in keys:
            measured += weight.SCB.numel() * 4
            continue
        state = weight.quant_state
        measured += state.absmax.numel() * state.absmax.element_size()
        if state.nested:
            measured += state.state2.absmax.numel() * 4
    assert stored_bytes(layers, model) == measured
    per_weight = measured / sum(layer.weight.numel() for layer in layers.values())
    assert per_weight == pytest.approx(
        {4: 0.516 if model.use_bnb_nested_quant else 0.5625, 8: 1.008}[8 if "load_in_8bit" in keys else 4], abs=2e-3
    )


@pytest.mark.parametrize(
    ("keys", "sharing", "checkpointing"),
    [(FOUR, True, False), (FOUR, True, True), (EIGHT, False, False)],
    ids=["4 bits", "4 bits checkpointing", "8 bits"],
)
def test_the_trace_is_what_the_allocator_hands_out(tmp_path, keys, sharing, checkpointing):
    """
    With the layers' wide weights, of which one of 512 x 4,096 takes 8 MB, a third of the least peak. In 8 bits a CPU
    makes more of them wide than a GPU has to: with checkpointing the trace was a quarter too low there.
    """
    wide = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": 3}
    folder = str(save_architecture(tmp_path / "wide", "llama", **wide))
    lengths = ((20, 30, 15), (12, 25, 40))
    kwargs = {"use_reentrant": False}

    model, loaded = load(folder, tmp_path, **keys)
    policy = get_peft_model(loaded, lora_config(model, None, loaded))
    add_fused_lm_head(loaded, outputs=HEAD_OUTPUTS)
    if sharing:
        enable_prefix_sharing(policy)
    if checkpointing:
        policy.activation_checkpointing_enable(kwargs)
        policy.enable_input_require_grads()
    policy.train()
    measured = peak_allocated(gap_loss(policy, collator_for(policy, sharing, 0)(examples_of(lengths))))

    config, precision = AutoConfig.from_pretrained(folder), precision_of(FP32, "no", False)
    skeleton = choose(build_empty(config, model, precision), model, None, precision)
    padded = {"rows": 4, "length": max(k + max(n, m) for k, n, m in lengths)}
    traced = FakeModel(skeleton).trace(
        MicroBatch(lengths) if sharing else MicroBatch(**padded),
        checkpointing=kwargs if checkpointing else None,
        gradients_kept=True,
        accumulates=False,
        autocast=None,
    )
    assert traced == pytest.approx(measured - 4 * skeleton.trained, rel=0.01)


def test_the_layers_compute_in_the_dtype_of_the_forward(folder, tmp_path):
    for keys, dtype in (({"bf16": True}, torch.bfloat16), ({"bf16": False}, FP32)):
        _, loaded = load(folder, tmp_path, arguments(tmp_path, **keys), **FOUR)
        layers = [module for module in loaded.modules() if hasattr(module, "compute_dtype")]
        assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {dtype}


def test_the_cache_tells_quantisations_apart(folder, tmp_path):
    names = set()
    for keys in ({}, {"load_in_4bit": True}, FOUR, FOUR | {"bnb_4bit_quant_type": "fp4"}, EIGHT):
        args = arguments(tmp_path)
        model, loaded = load(folder, tmp_path, args, **keys)
        names.add(open_cache(str(tmp_path / "cache"), model, args, loaded).folder.name)
    assert len(names) == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_modules_to_save": ["up_proj"]}, "lora_modules_to_save: 'up_proj' has quantised weights.*up_proj"),
        ({"lora_modules_to_save": ["mlp"]}, "lora_modules_to_save: 'mlp' has quantised weights"),
        ({"lora_target_parameters": ["up_proj.weight"]}, "lora_target_parameters: 'up_proj.weight' has quantised"),
        ({"lora_modules_to_save": ["lm_head"]}, None),
    ],
    ids=str,
)
def test_quantised_weights_are_not_trained_themselves(folder, keys, message):
    model = settings(folder, **FOUR, **keys)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = quantised_layers(empty, quantisation(model, precision_of(FP32, "no", False)))
    config = lora_config(model, None, empty)
    if message is None:
        check_layers(empty, layers, config)
        return
    with pytest.raises(RecipeError, match=message):
        check_layers(empty, layers, config)


def test_the_head_trains_beside_quantised_layers(folder, tmp_path, tokenizer):
    model, loaded = load(folder, tmp_path, **FOUR, lora_modules_to_save=["lm_head"])
    rows = test_trainer.training_rows(tokenizer, Margin(), roles=False)
    config = lora_config(model, None, loaded)
    trainer = test_trainer.shifted(tmp_path, tokenizer, rows, Margin(), True, model=loaded, peft_config=config)
    before = {
        name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    trainer.train()
    assert isinstance(trainer.model, PeftModel) and any("lm_head" in name for name in before)
    for name, weight in trainer.model.named_parameters():
        assert name not in before or weight.dtype == FP32 and not weight.equal(before[name]), name
