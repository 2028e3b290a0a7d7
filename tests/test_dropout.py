"""`disable_dropout` as promised: every rate, wherever a model keeps it."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DPOConfig, ModelConfig

import test_trainer
from conftest import build_model
from core.modeling.dropout import disable_dropout, draws_dropout
from core.modeling.policy import load_policy
from core.modeling.prefix import unsupported_reason
from core.objective.presets import Margin

RATES = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"attention_dropout": 0.0, "dropout": 0.5},
    "gptj": {"attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "rotary_dim": 4},
    "falcon": {"attention_dropout": 0.0, "hidden_dropout": 0.5},
    "granite": {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("architecture", RATES)
def test_no_forward_in_training_draws_after_it(architecture):
    """A number in attention, one in the config that the forward reads, F.dropout, nn.Dropout."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, **size, ffn_dim=48, word_embed_proj_dim=32, intermediate_size=48, **RATES[architecture]
    )
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert draws_dropout(model)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert not draws_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_what_is_no_dropout_of_the_forward_stays():
    """The rate of a classifier's head, which a causal model does not have, is saved as it was."""
    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = AutoModelForCausalLM.from_config(config)
    rate = model.config.classifier_dropout
    disable_dropout(model)
    assert model.config.classifier_dropout == rate > 0


@pytest.mark.parametrize("disable", [True, False])
def test_attention_dropout_of_a_saved_model_follows_the_recipe(tmp_path, tokenizer, disable):
    """ln 2 at step 0 and shared prompts; with dropout a random first loss, and padded pairs."""
    build_model(attention_dropout=0.5).save_pretrained(tmp_path / "model")
    args = DPOConfig(output_dir=str(tmp_path / "run"), disable_dropout=disable, use_cpu=True, bf16=False)
    model = load_policy(ModelConfig(model_name_or_path=str(tmp_path / "model"), dtype="float32"), None, args)
    sharing = unsupported_reason(model, test_trainer.MAX_LENGTH) is None
    assert sharing is disable
    rows = test_trainer.training_rows(tokenizer, Margin(), roles=False)
    trainer = test_trainer.shifted(
        tmp_path, tokenizer, rows, Margin(), sharing, model=model, max_steps=1, disable_dropout=disable
    )
    trainer.train()
    first = trainer.state.log_history[0]["loss"]
    assert (first == pytest.approx(math.log(2), rel=1e-6)) is disable
