"""Architecture by architecture: shared pairs against the padded form, and the trainer against stock TRL."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import test_trainer
from core.modeling.dropout import disable_dropout
from core.modeling.head import projects_plainly
from core.modeling.prefix import (
    HEAD_OUTPUTS,
    SHARED_ARCHITECTURES,
    PaddedCollator,
    collator_for,
    enable_prefix_sharing,
    has_router_loss,
    pair_logps,
    unsupported_reason,
)
from core.objective.presets import Margin
from test_prefix import loss_of, make_pairs, padded_outputs

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
OWN = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "deepseek_v3": {"first_k_dense_replace": 1, "v_head_dim": 8, **LATENT},
    "gemma3_text": {"final_logit_softcapping": 5.0, "head_dim": 8},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "global_head_dim": 8, "final_logit_softcapping": 5.0},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"sliding_window": None},
}


def tiny(architecture, vocabulary=97, dtype=torch.float32, seed=0, **overrides):
    """Four layers of width 32 with random weights, norms and biases included; dropout off."""
    settings = TINY | {"vocab_size": vocabulary} | OWN.get(architecture, {}) | overrides
    if architecture == "gemma4_text":
        settings["vocab_size_per_layer_input"] = vocabulary
    else:
        settings.setdefault("head_dim", 8)
    known = AutoConfig.for_model(architecture)
    settings |= {key: value for key, value in EXPERTS.items() if hasattr(known, key)}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings), dtype=torch.float32)
    if dtype is torch.float64 and any("Experts" in type(module).__name__ for module in model.modules()):
        model.set_experts_implementation("eager")  # the others have no float64 kernel
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                weight.normal_(std=0.2)
            elif "sinks" in name or not weight.any():
                weight.normal_(std=0.1)
    disable_dropout(model)
    return model.to(dtype)


@pytest.mark.parametrize("architecture", SHARED_ARCHITECTURES)
def test_shared_pairs_are_the_padded_ones(architecture):
    """
    In float64, log-probabilities and gradients, against the model's own logits of padded pairs. Norms fold in float32
    whatever the dtype, which leaves 1e-6 of a gradient; so do routers, and TRL's head, which scores where logits are
    scaled.
    """
    shared = tiny(architecture, dtype=torch.float64)
    assert unsupported_reason(shared, 128) is None
    padded = copy.deepcopy(shared)
    add_fused_lm_head(shared, outputs=HEAD_OUTPUTS)
    enable_prefix_sharing(shared)
    pairs = make_pairs(8)
    found, expected = pair_logps(shared, collator_for(shared, True, 0)(pairs)), padded_outputs(padded, pairs)
    exact = 2e-5 if not projects_plainly(shared.config) else 1e-6 if has_router_loss(shared.config) else 1e-9
    for name in ("chosen_logps", "rejected_logps", "entropy", "chosen_logits", "rejected_logits", "chosen_tokens"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name).double(), rtol=exact, atol=exact, msg=name
        )
    for outputs in (found, expected):
        loss_of(outputs).backward()
    trained = 0
    for (name, weight), other in zip(shared.named_parameters(), padded.parameters(), strict=True):
        assert (weight.grad is None) == (other.grad is None), name
        if other.grad is not None:
            size = other.grad.abs().max().item()
            torch.testing.assert_close(weight.grad, other.grad, rtol=0, atol=1e-5 * size + 1e-9, msg=name)
            trained += size > 0
    assert trained >= 20


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("gemma2", {}, "has a softcap"),
        ("gpt_oss", {}, "has sinks"),
        ("lfm2", {}, "not established for a lfm2"),
        ("mamba", {}, "not established for a mamba"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "its attention caps its logits"),
        ("gemma3_text", {"sliding_window": 32}, "not within the model's sliding window of 32"),
        ("qwen2_moe", {"sliding_window": 0}, "None"),
        (
            "olmo3",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its dynamic rotary embedding",
        ),
    ],
)
def test_why_pairs_are_padded(architecture, overrides, reason):
    assert reason in str(unsupported_reason(tiny(architecture, **overrides), 48))


def test_sinks_and_a_softcap_never_reach_attention_over_shared_pairs():
    model = tiny("gpt_oss")
    add_fused_lm_head(model, outputs=HEAD_OUTPUTS)
    enable_prefix_sharing(model)
    with pytest.raises(AssertionError, match="not over shared pairs"):
        pair_logps(model, collator_for(model, True, 0)(make_pairs(2)))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "qwen2_moe", "ernie4_5_moe", "olmoe"])
def test_the_router_loss_of_shared_pairs_is_that_of_padded_ones(architecture):
    """Value and gradients, by the model's own forward of the padded batch with its labels' loss taken off."""
    shared = tiny(architecture, dtype=torch.float64)
    padded = copy.deepcopy(shared)
    add_fused_lm_head(shared, outputs=HEAD_OUTPUTS)
    enable_prefix_sharing(shared)
    pairs = make_pairs(8)
    found = pair_logps(shared, collator_for(shared, True, 0)(pairs), router_loss=True).router_loss
    batch = PaddedCollator(0)(pairs)
    expected = padded(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_router_logits=True,
        use_cache=False,
    ).aux_loss
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)
    found.backward()
    expected.backward()
    gates = 0
    for (name, weight), other in zip(shared.named_parameters(), padded.named_parameters(), strict=True):
        if other[1].grad is not None:
            size = other[1].grad.abs().max().item()
            torch.testing.assert_close(weight.grad, other[1].grad, rtol=0, atol=1e-5 * size + 1e-9, msg=name)
            gates += "gate" in name or "router" in name
    assert gates


# Dense, with a window, capped, with sinks, scaled, with experts, hybrid, recurrent.
KINDS = (
    *("gemma2", "gemma3_text", "qwen3", "qwen3_moe", "mixtral", "olmo2", "gpt_oss", "smollm3", "phi3", "granite"),
    *("cohere", "lfm2", "mamba"),
)


def train_both(tmp_path, tokenizer, architecture, rows, **overrides):
    """Two updates of ours, with sharing where it is exact, and of stock TRL; the first losses and the weights."""
    same = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2, "gradient_accumulation_steps": 1} | overrides
    start = tiny(architecture, len(tokenizer), **({"sliding_window": 512} if "gemma" in architecture else {}))
    sharing = unsupported_reason(start, test_trainer.MAX_LENGTH) is None
    ours = test_trainer.shifted(tmp_path, tokenizer, rows, Margin(), sharing, model=copy.deepcopy(start), **same)
    stock = test_trainer.stock_trainer(tmp_path, tokenizer, model=copy.deepcopy(start), count=len(rows), **same)
    stock.order = list(ours._get_train_sampler())
    stock.train()
    ours.train()
    return start, ours, stock, sharing


@pytest.fixture(scope="module")
def rows(tokenizer):
    return test_trainer.training_rows(tokenizer, Margin(), count=8, roles=False)


@pytest.mark.parametrize("architecture", KINDS)
def test_each_kind_of_model_trains_as_under_stock_trl(tmp_path, tokenizer, rows, architecture):
    """TRL's defaults, so a mixture of experts with the coefficient of its config."""
    start, ours, stock, sharing = train_both(tmp_path, tokenizer, architecture, rows)
    assert sharing == (architecture not in ("gemma2", "gpt_oss", "lfm2", "mamba"))
    # Of an accuracy at Δ = 0, where float error decides, nothing is said.
    keys = [key for key in test_trainer.PARITY_KEYS if "accuracies" not in key]
    keys += ["aux_loss"] if has_router_loss(start.config) else []
    found, expected = test_trainer.history(ours, keys), test_trainer.history(stock, keys)
    assert len(found) == 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-5)
    moved = 0.0
    for (name, weight), other, before in zip(
        ours.model.named_parameters(), stock.model.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=2e-6, msg=name)
        moved = max(moved, (weight - before).abs().max().item())
    assert moved > 1e-3


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "padded"])
def test_the_router_loss_has_the_recipe_s_coefficient(tmp_path, tokenizer, rows, sharing, monkeypatch):
    if not sharing:
        monkeypatch.setattr("test_architectures.unsupported_reason", lambda *_: "padded on purpose")
    _, ours, stock, _ = train_both(tmp_path, tokenizer, "mixtral", rows, router_aux_loss_coef=0.5)
    (first, aux), (other, other_aux) = (test_trainer.history(one, ["loss", "aux_loss"])[0] for one in (ours, stock))
    assert first == pytest.approx(other, rel=1e-5) and aux == pytest.approx(other_aux, rel=1e-5)
    assert first == pytest.approx(np.log(2) + 0.5 * aux, rel=1e-5) and aux > 1


def test_without_a_coefficient_there_is_no_router_loss(tmp_path, tokenizer, rows):
    _, ours, _, _ = train_both(tmp_path, tokenizer, "mixtral", rows, router_aux_loss_coef=0.0, max_steps=1)
    assert ours.state.log_history[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
