"""Shared pairs against the padded form in float64: log-probabilities, loss and every gradient, by architecture."""

import copy
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from conftest import build_model
from core.modeling import attention
from core.modeling.prefix import (
    HEAD_OUTPUTS,
    PaddedCollator,
    PairOutputs,
    PrefixSharedCollator,
    enable_prefix_sharing,
    hidden_states,
    pair_logps,
    unsupported_reason,
)

OWN_SETTINGS = {"gemma": {"head_dim": 8}, "qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}}
OWN_SETTINGS["phi3"] = OWN_SETTINGS["mistral"]
EXACT = {"rtol": 1e-9, "atol": 1e-10}  # in float64, of log-probabilities of some hundred nats
BETA = 0.3


def tiny(architecture="mistral", seed=0, **overrides):
    """Two layers, four heads over two key-value heads, width 32, in float64."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(architecture, **(settings | OWN_SETTINGS.get(architecture, {}) | overrides))
    return without_rounding(AutoModelForCausalLM.from_config(config, dtype=torch.float32).double())


def without_rounding(model):
    """transformers' norms fold in float32 whatever the dtype, which rounds the gradients; these keep float64."""
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
            norm.forward = partial(full_norm, norm, epsilon, 1.0 if "Gemma" in type(norm).__name__ else 0.0)
    return model


def full_norm(norm, epsilon, shift, hidden):
    return (norm.weight + shift) * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)


def both_forms(model):
    """Two models of the same weights: one as transformers has it, one for shared batches."""
    # A config of its own: `enable_prefix_sharing` names its attention in the other's.
    padded = without_rounding(type(model)(copy.deepcopy(model.config)).double())
    padded.load_state_dict(model.state_dict())
    add_fused_lm_head(model, outputs=HEAD_OUTPUTS)
    enable_prefix_sharing(model)
    return padded, model


def padded_outputs(model, pairs):
    """`PairOutputs` from the whole logits of TRL's padded batch: its fused head would fold them in float32."""
    batch = PaddedCollator(0)(pairs)
    ids, scored = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    log_probs = logits.log_softmax(-1)

    def halves(per_token):
        return (per_token * scored).sum(1).chunk(2)

    chosen_logps, rejected_logps = halves(log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1))
    with torch.no_grad():
        entropy = halves(-(log_probs.exp() * log_probs).sum(-1))
        return PairOutputs(
            chosen_logps,
            rejected_logps,
            *halves(torch.ones_like(ids[:, 1:])),
            sum(entropy),
            *halves(logits.mean(-1)),
            halves(logits.argmax(-1) == ids[:, 1:])[0],
        )


def make_pairs(count, seed=0, longest=12):
    """Random pairs; from the first on: one-token answers, a one-token prompt, equal answers, one cut short."""
    draw = random.Random(seed)

    def ids(low=1, high=longest):
        return [draw.randrange(3, 97) for _ in range(draw.randint(low, high))]

    pairs = [
        {"prompt_ids": ids(2), "chosen_ids": ids(1, 1), "rejected_ids": ids(1, 1)},
        {"prompt_ids": ids(1, 1), "chosen_ids": ids(2), "rejected_ids": ids(2)},
        {"prompt_ids": ids(2), "chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 7]},
        {"prompt_ids": ids(2), "chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 6]},
    ]
    pairs += [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()} for _ in range(count)]
    return pairs[:count]


def loss_of(outputs):
    return -F.logsigmoid(BETA * (outputs.chosen_logps - outputs.rejected_logps) - 0.1).mean()


def gradients(model, outputs):
    loss = loss_of(outputs)
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss, grads


def assert_same(padded, shared, pairs):
    outputs, expected = pair_logps(shared, PrefixSharedCollator()(pairs)), padded_outputs(padded, pairs)
    loss, grads = gradients(shared, outputs)
    expected_loss, expected_grads = gradients(padded, expected)
    for name, value in outputs._asdict().items():
        if name == "router_loss":
            continue  # tests/test_architectures.py
        torch.testing.assert_close(value.double(), getattr(expected, name).double(), **EXACT, msg=name)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **EXACT, msg=name)
    return grads


@pytest.mark.parametrize("architecture", ["gemma", "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_each_architecture_with_grouped_queries(architecture):
    grads = assert_same(*both_forms(tiny(architecture)), make_pairs(8))
    assert len(grads) >= 15 and all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("count", range(1, 9))
def test_micro_batches_of_one_to_eight_random_pairs(count):
    for seed in range(3):
        assert_same(*both_forms(tiny(seed=seed)), make_pairs(count + 4, seed)[4 * (seed > 0) :][:count])


@pytest.mark.parametrize(
    "overrides",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}, {"sliding_window": 24}],
    ids=["all-heads", "one-head", "tied", "window"],
)
def test_other_forms_of_the_model(overrides):
    """24 tokens are as many as the longest prompt and answer have: a window of that size changes nothing."""
    model = tiny(**overrides)
    assert unsupported_reason(model, 24) is None
    assert_same(*both_forms(model), make_pairs(6))


@pytest.mark.parametrize("trained", ["down_proj", "lm_head", "embed_tokens"])
def test_selected_weights_have_the_padded_form_s_gradients(trained):
    padded, shared = both_forms(tiny())
    for model in (padded, shared):
        for name, weight in model.named_parameters():
            weight.requires_grad_(trained in name)
    grads = assert_same(padded, shared, make_pairs(6))
    assert grads and all(trained in name for name in grads)


def test_lora():
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    padded, shared = tiny(), tiny()
    add_fused_lm_head(shared, outputs=HEAD_OUTPUTS)
    adapters = []
    for model in (padded, shared):
        torch.manual_seed(1)
        adapters.append(get_peft_model(model, config))
        for name, weight in adapters[-1].named_parameters():
            if "lora_B" in name:  # zero at the start, and A's gradient with it
                torch.nn.init.normal_(weight, std=0.1)
        adapters[-1].double()
    enable_prefix_sharing(adapters[1])
    grads = assert_same(*adapters, make_pairs(6))
    assert len(grads) == 8 and all("lora" in name for name in grads)


def test_a_prompt_learning_adapter_falls_back():
    model = get_peft_model(build_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "tokens of its own before the prompt" in unsupported_reason(model, 16)


def test_hidden_states_are_those_that_the_head_scores():
    """The head's weights over them give the log-probabilities of `pair_logps`."""
    _, shared = both_forms(tiny())
    batch = PrefixSharedCollator()(make_pairs(3))
    with torch.no_grad():
        log_probs = shared.lm_head(hidden_states(shared, batch)).log_softmax(-1)[0]
        labels = batch["shift_labels"][0]
        scored = labels != -100
        total = log_probs[scored].gather(1, labels[scored, None]).sum()
        outputs = pair_logps(shared, batch)
    torch.testing.assert_close(total, (outputs.chosen_logps + outputs.rejected_logps).sum(), **EXACT)


def test_gradient_checkpointing():
    padded, shared = both_forms(tiny())
    shared.gradient_checkpointing_enable({"use_reentrant": False})
    shared.train()
    assert_same(padded, shared, make_pairs(6))


def test_a_padded_call_and_generation_still_work_after_sharing():
    padded, shared = both_forms(tiny())
    pairs = make_pairs(5)
    found = pair_logps(shared, PaddedCollator(0)(pairs)).chosen_logps
    expected = padded_outputs(padded, pairs).chosen_logps
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)  # TRL's head folds in float32
    prompt = torch.tensor([[5, 6, 7]])
    answers = (model.generate(prompt, max_new_tokens=5, do_sample=False) for model in (padded, shared))
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_changed_answer_leaves_the_other_one_s_log_probability_bit_for_bit(dtype):
    """And in a micro-batch, that of every other pair; the changed one's own moves."""
    _, shared = both_forms(tiny())
    shared = shared.to(dtype)
    pairs = make_pairs(6)
    changed = [dict(pair) for pair in pairs]
    changed[4]["rejected_ids"] = [96 - token % 90 for token in pairs[4]["rejected_ids"]]
    with torch.no_grad():
        before, after = (pair_logps(shared, PrefixSharedCollator()(rows)) for rows in (pairs, changed))
    assert torch.equal(before.chosen_logps, after.chosen_logps)
    others = [0, 1, 2, 3, 5]
    assert torch.equal(before.rejected_logps[others], after.rejected_logps[others])
    assert before.rejected_logps[4] != after.rejected_logps[4]


def test_the_layout_by_hand():
    """Prompt 10 11 12, chosen 20 21, rejected 30 31 32; then prompt 13, chosen 22, rejected 33."""
    batch = PrefixSharedCollator()(
        [
            {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [30, 31, 32], "margin": 0.5},
            {"prompt_ids": [13], "chosen_ids": [22], "rejected_ids": [33], "margin": -1.0},
        ]
    )
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 12, 30, 31, 13, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 0]]
    assert batch["shift_labels"].tolist() == [[-100, -100, 20, 21, 30, 31, 32, 22, 33]]
    assert batch["pair_lengths"] == ((3, 2, 3), (1, 1, 1))
    assert batch["margin"].tolist() == [0.5, -1.0]


def slow_varlen(q, k, v, query_starts, key_starts, longest_query, longest_key, *, scale, window_size, enable_gqa):
    """`varlen_attn` where there is no GPU for it, one sequence after another."""
    assert window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
    parts = []
    for a, b, c, d in zip(query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False):
        assert b - a <= longest_query and d - c <= longest_key
        visible = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))  # aligned to the bottom right
        one = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])), attn_mask=visible, scale=scale, enable_gqa=True
        )
        parts.append(one.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "lengths",
    [((3, 2, 4), (1, 1, 1), (1, 3, 0), (2, 5, 1)), ((1, 4, 0), (1, 1, 0), (1, 6, 0))],
    ids=["shared", "alone"],
)
@pytest.mark.parametrize("groups", [1, 2], ids=["heads", "grouped"])
def test_attention_of_either_path_is_that_of_a_mask_over_the_row(monkeypatch, groups, lengths):
    """
    Pair by pair, and packed as for `varlen_attn` (a slow form of it stands in: no GPU), against one softmax over the
    whole row under the mask that the layout says: causal, within the pair, and the second answer not to the first.
    A pair without a second answer is a sequence alone.
    """
    total = sum(k + n + m - 1 for k, n, m in lengths)
    torch.manual_seed(0)
    query = torch.randn(1, 4, total, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 4 // groups, total, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    allowed, start = torch.zeros(total, total, dtype=torch.bool), 0
    for k, n, m in lengths:
        for i in range(k + n + m - 1):
            for j in range(i + 1):
                second = i >= k + n - 1
                allowed[start + i, start + j] = not second or j < k - 1 or j >= k + n - 1
        start += k + n + m - 1
    repeated = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=allowed, scale=0.3).transpose(1, 2)
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value))

    monkeypatch.setattr(attention, "varlen_attn", slow_varlen)
    by_pairs = attention._attend_pair_by_pair(query, key, value, 0.3, lengths)
    packed = attention._attend_packed(query, key, value, 0.3, attention.packed_keys(lengths))
    outputs = [by_pairs, packed]
    if not any(m for _, _, m in lengths):
        outputs.append(attention._attend_short(query, key, value, 0.3, [k + n - 1 for k, n, _ in lengths]))
    for found in outputs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for grad, want in zip(torch.autograd.grad(found.square().sum(), (query, key, value)), wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("overrides", "max_length", "reason"),
    [
        ({}, 16, "None"),
        ({"sliding_window": 16}, 17, "not within the model's sliding window of 16 tokens"),
        ({"sliding_window": 16}, None, "not within the model's sliding window of 16 tokens"),
        ({"attention_dropout": 0.1}, 16, "it draws dropout"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            16,
            "its dynamic rotary embedding depends on the longest sequence",
        ),
    ],
)
def test_what_falls_back_to_padded_pairs(overrides, max_length, reason):
    assert reason in str(unsupported_reason(build_model(**overrides), max_length))


def test_an_unknown_architecture_falls_back():
    model = build_model()
    model.config.model_type = "falcon"
    assert "not established for a falcon" in unsupported_reason(model, 16)
