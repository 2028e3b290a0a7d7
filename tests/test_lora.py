"""LoRA's targets: which there are by default, and what is refused before anything is trained."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

import test_trainer
from conftest import build_model
from core.modeling.parameters import lora_config
from core.objective.presets import Margin
from core.runtime.errors import RecipeError
from test_architectures import KINDS, tiny


def settings(**keys):
    model = ModelConfig(model_name_or_path="tiny", use_peft=True, lora_dropout=0.0)
    for key, value in keys.items():
        setattr(model, key, value)
    return model


def adapted(config):
    """The names of the modules that get an adapter."""
    model = get_peft_model(build_model(), config)
    return {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("architecture", KINDS)
def test_every_architecture_has_targets_by_default(architecture):
    """And every adapter gets a gradient."""
    model = tiny(architecture)
    policy = get_peft_model(model, lora_config(settings(), None, model))
    adapters = {name: weight for name, weight in policy.named_parameters() if "lora_B" in name}
    assert len(adapters) >= 4
    policy(torch.tensor([[5, 6, 7, 8]])).logits.square().sum().backward()
    for name, weight in adapters.items():
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj", {"q_proj"}),
        (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        (r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
    ],
)
def test_targets(targets, expected):
    assert adapted(lora_config(settings(lora_target_modules=targets), None, build_model())) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_target_modules": ["q_prj"]}, "lora_target_modules: 'q_prj' .* near names: .*q_proj"),
        ({"lora_target_modules": "q_prj"}, "lora_target_modules: 'q_prj' .* near names: .*q_proj"),
        ({"lora_target_modules": "*"}, r"lora_target_modules: '\*' is not a regular expression"),
        ({"lora_target_modules": ["input_layernorm"]}, "LoRA does not fit MistralForCausalLM: .*not supported"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, "the head's adapter would be trained by no loss"),
        ({"lora_modules_to_save": ["lm_haed"]}, "lora_modules_to_save: 'lm_haed' .* near names: lm_head"),
        ({"lora_target_parameters": ["q_proj.wieght"]}, "lora_target_parameters: 'q_proj.wieght' .* near names: "),
    ],
    ids=str,
)
def test_what_lora_refuses(keys, message):
    with pytest.raises(RecipeError, match=message) as refused:
        lora_config(settings(**keys), None, build_model())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_target_modules": ["embed_tokens", "q_proj"]},
        {"lora_target_parameters": ["embed_tokens.weight"]},
        {"lora_modules_to_save": ["embed_tokens"]},
        {"lora_modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_embedding_that_is_also_the_head_is_left_alone(keys):
    """Merged, its adapter would move the head as well; where the two are apart, all of this trains."""
    lora_config(settings(**keys), None, build_model())
    with pytest.raises(RecipeError, match="ties its embedding to its head"):
        lora_config(settings(**keys), None, build_model(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("keys", "sharing"),
    [
        ({"lora_modules_to_save": ["lm_head"]}, True),
        ({"lora_modules_to_save": ["lm_head"]}, False),
        ({"lora_target_modules": ["embed_tokens"]}, True),
    ],
    ids=str,
)
def test_head_and_embedding_train_as_under_stock_trl(tmp_path, tokenizer, keys, sharing):
    """Losses of stock TRL, with the start as reference all along; merged, the model says what it said before."""
    rows = test_trainer.training_rows(tokenizer, Margin(), roles=False)
    same = {"optim": "sgd", "learning_rate": 0.1, "precompute_ref_log_probs": False, "max_steps": 2}
    config = lora_config(settings(**keys), None, build_model())
    ours = test_trainer.shifted(tmp_path, tokenizer, rows, Margin(), sharing, peft_config=config, **same)
    config = lora_config(settings(**keys), None, build_model())
    stock = test_trainer.stock_trainer(tmp_path, tokenizer, None, config, **same)
    stock.order = list(ours._get_train_sampler())
    stock.train()
    ours.train()
    losses = [[loss for (loss,) in test_trainer.history(one, ["loss"])] for one in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5) and len(set(losses[0])) > 1
    ids = torch.tensor([[5, 6, 7, 8]])
    policy = ours.accelerator.unwrap_model(ours.model).eval()
    with torch.no_grad():
        expected = policy(ids).logits
        torch.testing.assert_close(policy.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_are_adapted_by_their_parameters():
    model = tiny("mixtral")
    keys = {"lora_target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    policy = get_peft_model(model, lora_config(settings(**keys), None, model))
    assert any("experts" in name for name, weight in policy.named_parameters() if weight.requires_grad)
    with pytest.raises(RecipeError, match="LoRA does not fit MixtralForCausalLM: .*dropout"):
        lora_config(settings(**keys, lora_dropout=0.05), None, tiny("mixtral"))


def test_mamba_s_mixer_is_adapted_where_its_kernels_look():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1))
    policy = get_peft_model(model, lora_config(settings(), None, model))
    assert {name.split(".")[-4] for name, _ in policy.named_parameters() if "lora_A" in name} == {"in_proj"}
