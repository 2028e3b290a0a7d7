"""SFT without padding against stock TRL's padded SFT: loss, metrics, gradients, evaluation, and the resumed run."""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from architectures import build_architecture
from conftest import build_model, build_tokenizer, words
from core.modeling import attention, head
from core.modeling.head import AnswerLogProbs
from core.modeling.padding_free import PaddingFreeCollator, model_inputs, omits_padding
from core.modeling.parameters import select_parameters
from core.modeling.policy import share_prefixes
from core.modeling.prefix import SHARED_ARCHITECTURES, enable_prefix_sharing, has_router_loss, unsupported_reason
from core.training.trainer import ConversationTrainer
from processes import run_ranks
from test_architectures import tiny
from test_prefix import slow_varlen

MAX_LENGTH = 48  # cuts some of the conversations below
ANSWERS_MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def conversations(count=32, seed=0):
    draw = random.Random(seed)

    def turns():
        return [
            {"role": "user", "content": words(draw, 1, 8)},
            {"role": "assistant", "content": words(draw, 1, 20)},
        ]

    return Dataset.from_list([{"messages": turns()} for _ in range(count)])


def settings(folder, **overrides):
    return SFTConfig(
        **{
            "output_dir": str(folder),
            "optim": "sgd",  # its updates are as exact as the gradients
            "learning_rate": 0.1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 5,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "max_length": MAX_LENGTH,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        | overrides
    )


def trainer(folder, kind, model, peft_config=None, marked=False, eval_dataset=None, **overrides):
    tokenizer = build_tokenizer()
    if marked:
        tokenizer.chat_template = ANSWERS_MARKED
        overrides["assistant_only_loss"] = True
    return kind(
        model=model,
        args=settings(folder, **overrides),
        train_dataset=conversations(),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
        **({"omits_padding": True} if kind is ConversationTrainer else {}),
    )


def both(folder, start, **options):
    """Ours and stock TRL's after the training, from copies of one model."""
    trained = []
    for kind in (ConversationTrainer, SFTTrainer):
        trained.append(trainer(folder / kind.__name__, kind, copy.deepcopy(start), **options))
        trained[-1].train()
    return trained


KEYS = ["loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"]
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "down_proj"])


def figures(trainer, keys=KEYS):
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if keys[0] in entry]


def same_weights(ours, stock, start):
    moved = 0.0
    first = dict(start.named_parameters())
    for (name, weight), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=2e-6, msg=name)
        before = first.get(name, torch.zeros(()))
        moved = max(moved, (weight - before).abs().max().item()) if weight.requires_grad else moved
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {"marked": True}),
        ({}, {"marked": True, "gradient_checkpointing": True}),
        ({}, {"peft_config": LORA}),
        ({}, {"peft_config": LORA, "gradient_checkpointing": True}),
        ({}, {"loss_type": "dft", "learning_rate": 10.0}),
        ({"trained": "down_proj"}, {"per_device_train_batch_size": 1}),
        ({"trained": "down_proj"}, {"max_length": None, "train_sampling_strategy": "group_by_length"}),
    ],
    ids=["full", "answers", "checkpointing", "lora", "lora-checkpointing", "dft", "selected", "by-length"],
)
def test_the_training_is_that_of_stock_trl(tmp_path, overrides, options):
    """Four updates with accumulation: losses, gradient norms, metrics and weights."""
    overrides = dict(overrides)
    trained = overrides.pop("trained", None)
    start = build_model(**overrides)
    select_parameters(start, trained and [trained])
    ours, stock = both(tmp_path, start, **options)
    found, expected = figures(ours), figures(stock)
    assert len(found) == 4 and len({row[0] for row in found}) == 4
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    same_weights(ours.model, stock.model, start)


@pytest.mark.parametrize("architecture", ["mixtral", "granite", "gemma3_text"])
def test_a_router_loss_a_scale_and_a_softcap_are_those_of_stock_trl(tmp_path, architecture):
    start = tiny(architecture, 320, **({"sliding_window": 512} if "gemma" in architecture else {}))
    ours, stock = both(tmp_path, start, learning_rate=0.01, max_steps=2)
    keys = KEYS + ["aux_loss"] * has_router_loss(start.config)
    np.testing.assert_allclose(figures(ours, keys), figures(stock, keys), rtol=5e-5)
    same_weights(ours.model, stock.model, start)


def test_an_evaluation_is_that_of_stock_trl(tmp_path):
    """Of 11 conversations in micro-batches of 5, 5 and 1, of which each counts for its rows."""
    options = {"eval_dataset": conversations(11, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    ours, stock = both(tmp_path, build_model(), **options)
    keys = ["eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"]
    found, expected = figures(ours, keys), figures(stock, keys)
    assert len(found) == 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def on_a_rank(rank, folder):
    torch.set_num_threads(1)
    start = build_model()
    ours, stock = both(folder, start)
    unwrapped = [one.accelerator.unwrap_model(one.model) for one in (ours, stock)]
    same_weights(*unwrapped, start)
    return figures(ours), figures(stock)


def test_two_processes_train_as_under_stock_trl(tmp_path):
    """The loss is a mean over the tokens of both."""
    (found, expected), (other, _) = run_ranks(2, on_a_rank, tmp_path)
    assert len(found) == 4
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in other], rtol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    """LoRA's dropout draws, so a random state that is lost would be seen."""
    lora = copy.deepcopy(LORA)
    lora.lora_dropout = 0.5
    options = {"peft_config": lora, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    runs = [trainer(tmp_path / name, ConversationTrainer, build_model(), **options) for name in ("whole", "resumed")]
    for run in runs:
        run.recipe, run.rows_digest, run.begun_from, run.save_dtype = {}, "rows", None, None
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found, expected = (figures(run, KEYS[:-1]) for run in runs)  # TRL counts tokens from the start of a process
    assert len(found) == 4 and found[2:] == expected[2:]
    for weight, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(weight, other)


def examples(count=6, seed=0):
    """Random conversations; the first half of each is no label, the shortest has two tokens."""
    draw = random.Random(seed)
    rows = []
    for length in [2, *(draw.randint(3, 24) for _ in range(count - 1))]:
        ids = [draw.randrange(3, 97) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


@pytest.mark.parametrize("architecture", SHARED_ARCHITECTURES)
def test_log_probabilities_and_gradients_are_those_of_each_conversation_alone(architecture, monkeypatch):
    """In float64 by the model's own logits; norms and routers fold in float32, which leaves 1e-6 of a gradient."""
    monkeypatch.setattr(attention, "SHORT", 0)
    packed = tiny(architecture, dtype=torch.float64)
    assert unsupported_reason(packed, 128, shares=False) is None
    alone = copy.deepcopy(packed)
    enable_prefix_sharing(packed)
    rows = examples()
    inputs = model_inputs(PaddingFreeCollator(0)(rows), summed=True)
    labels, layout = inputs["answer_labels"][0], ("input_ids", "position_ids", "attention_mask", "pair_lengths")
    log_probs = packed(**{key: inputs[key] for key in layout}, use_cache=False).logits[0].log_softmax(-1)
    found = log_probs[labels != -100].gather(1, labels[labels != -100, None]).squeeze(1)
    expected = []
    for row in rows:
        ids, wanted = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = alone(input_ids=ids, use_cache=False).logits[0, :-1]
        kept = wanted != -100
        expected.append(logits.log_softmax(-1)[kept].gather(1, wanted[kept, None]).squeeze(1))
    exact = 1e-6 if has_router_loss(packed.config) else 1e-9
    torch.testing.assert_close(found, torch.cat(expected), rtol=exact, atol=exact)
    found.sum().backward()
    torch.cat(expected).sum().backward()
    trained = 0
    for (name, weight), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        if other.grad is not None:
            size = other.grad.abs().max().item()
            torch.testing.assert_close(weight.grad, other.grad, rtol=0, atol=1e-5 * size + 1e-9, msg=name)
            trained += size > 0
    assert trained >= 20


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_s_gradient_of_a_sum(bias, monkeypatch):
    """Tile by tile, against autograd's through a softmax over all logits; another weight for one token is told."""
    monkeypatch.setattr(head, "TILE_TOKENS", 3)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, 6, dtype=torch.float64, requires_grad=True) for size in (7, 11))
    inputs = [hidden, weight] + [torch.randn(11, dtype=torch.float64, requires_grad=True)] * bias
    targets = torch.tensor([3, 0, 10, 3, 5, 3, 1])
    log_probs = torch.nn.functional.linear(*inputs).log_softmax(-1).gather(1, targets[:, None])
    expected = torch.autograd.grad(-0.3 * log_probs.sum(), inputs)
    arguments = (hidden, weight, inputs[2] if bias else None, targets, True, True)
    found = torch.autograd.grad(-0.3 * AnswerLogProbs.apply(*arguments)[0].sum(), inputs)
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match="several weights"):
        torch.autograd.grad(AnswerLogProbs.apply(*arguments)[0][:6].sum(), inputs)


def test_the_form_that_a_gpu_takes_is_that_of_a_cpu(monkeypatch):
    """TRL's head over packed keys (a slow form of the kernel stands in: no GPU) against the answers' head."""
    monkeypatch.setattr(attention, "varlen_attn", slow_varlen)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: True)
    model = build_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    enable_prefix_sharing(model)
    inputs = model_inputs(PaddingFreeCollator(0)(examples()), summed=True)
    expected = model(**inputs, use_cache=False)
    wanted = torch.autograd.grad(expected.log_probs.sum(), model.parameters())
    inputs = {key: value for key, value in inputs.items() if "answer" not in key}
    inputs["packed"] = attention.packed_keys(inputs["pair_lengths"])
    assert inputs["packed"].key_index is None
    found = model(**inputs, fused_lm_head=True)
    assert torch.equal(found.label_mask.sum(), expected.label_mask.sum())
    for name in ("log_probs", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(found, name).sum().float(), getattr(expected, name).sum().float())
    for grad, want in zip(torch.autograd.grad(found.log_probs.sum(), model.parameters()), wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


def test_the_row_by_hand():
    """10 11 12, of which 12 is learnt, then 20 21, of which all is: but a first token has nothing to predict it."""
    batch = PaddingFreeCollator(0)(
        [{"input_ids": [10, 11, 12], "labels": [-100, -100, 12]}, {"input_ids": [20, 21], "labels": [20, 21]}]
    )
    assert next(iter(batch)) == "rows" and batch["rows"].tolist() == [3, 2]
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 12, -100, 21]]
    assert batch["pair_lengths"] == ((1, 3, 0), (1, 2, 0))
    inputs = model_inputs(batch, summed=True)
    assert inputs["answer_labels"].tolist() == [[-100, 12, -100, 21, -100]]
    assert inputs["attention_mask"].sum() == 5 and "rows" not in inputs


@pytest.mark.parametrize(
    ("architecture", "overrides", "arguments", "reason"),
    [
        ("llama", {}, {}, None),
        ("gemma2", {}, {}, "the attention of a gemma2 has a softcap"),
        ("mamba", {}, {}, "its exactness is not established for a mamba"),
        ("llama", {"attention_dropout": 0.1}, {}, "it draws dropout\n"),
        ("llama", {}, {"neftune_noise_alpha": 5.0}, "the noise of neftune_noise_alpha is scaled by"),
    ],
)
def test_what_is_padded_all_the_same_and_said(tmp_path, capsys, architecture, overrides, arguments, reason):
    model = build_architecture(architecture, **overrides)
    assert omits_padding(True, model, settings(tmp_path, **arguments)) == (reason is None)
    said = capsys.readouterr().out
    assert f"padding_free falls back to padded conversations: {reason}" in said if reason else not said
    assert not omits_padding(False, model, settings(tmp_path, **arguments))
    assert not omits_padding(True, model, settings(tmp_path, packing=True, **arguments))
    assert not capsys.readouterr().out


def test_dropout_of_adapters_is_none_of_a_conversation_s_neighbours():
    """One draw would serve both answers of a pair, which is padded; dpo.py asks before the trainer puts LoRA in."""
    config = copy.deepcopy(LORA)
    config.lora_dropout = 0.1
    model = get_peft_model(build_model(), config)
    assert unsupported_reason(model, 48, shares=False) is None
    assert "it draws dropout" in unsupported_reason(model, 48)
    assert not share_prefixes(True, build_model(), 48, config)
    assert share_prefixes(True, build_model(), 48, LORA)
