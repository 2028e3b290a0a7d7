"""The trainer against stock TRL at margin 0, and its loss and metrics against the formulas written out apart."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from conftest import build_model, preference_rows
from core.config.schema import Replay
from core.data.tokens import tokenize_rows, trainable_rows
from core.modeling.reference_cache import ReferenceCache
from core.objective.margins import pair_classes, row_margins
from core.objective.presets import PAIR_CLASSES, Margin
from core.training.trainer import ShiftedMarginTrainer, role_weighted_mean

MAX_LENGTH = 48  # cuts some answers of the rows below


def training_rows(tokenizer, margin, count=32, seed=0, roles=True):
    rows = preference_rows(count, seed)
    if not roles:
        rows = rows.remove_columns("role").add_column("role", ["task"] * count)
    tokenized, cut = trainable_rows(tokenize_rows(rows, tokenizer, MAX_LENGTH))
    assert cut["chosen_cut"] > 0, "the rows are to exercise truncation"
    for name, column in {
        "row": np.arange(count),
        "margin": row_margins(tokenized, margin),
        "pair_class": pair_classes(tokenized),
        "is_buffer": np.asarray(tokenized["role"]) == "buffer",
    }.items():
        tokenized = tokenized.add_column(name, column)
    return tokenized


def settings(folder, **overrides):
    return DPOConfig(
        **{
            "output_dir": str(folder),
            "learning_rate": 1e-3,
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
            "precompute_ref_log_probs": True,
            "beta": 0.3,
        }
        | overrides
    )


def shifted(tmp_path, tokenizer, rows, margin, sharing, replay=None, eval_rows=None, model=None, **overrides):
    peft_config = overrides.pop("peft_config", None)
    model = build_model() if model is None else model
    return ShiftedMarginTrainer(
        model=model,
        ref_model=None if overrides.get("precompute_ref_log_probs", True) or peft_config else build_model(),
        args=settings(tmp_path / "run", **overrides),
        train_dataset=rows,
        eval_dataset=eval_rows,
        margin=margin,
        replay=replay or Replay(),
        prefix_sharing=sharing,
        reference_cache=ReferenceCache(str(tmp_path / "cache"), "tiny"),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


class Stock(DPOTrainer):
    """Stock TRL in the order of the trainer beside it; nothing else is changed."""

    def _get_train_sampler(self, train_dataset=None):
        return self.order


def stock_trainer(tmp_path, tokenizer, ref_model=None, peft_config=None, model=None, count=32, **overrides):
    conversations = preference_rows(count).map(
        lambda row: {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    )
    return Stock(
        model=build_model() if model is None else model,
        ref_model=ref_model,
        args=settings(tmp_path / "stock", **overrides),
        train_dataset=conversations.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def history(trainer, keys):
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if keys[0] in entry]


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "down_proj"])
PARITY_KEYS = [
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
]
TOKEN_KEYS = ["logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"]


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "padded"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "live"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_parity_with_stock_trl_at_margin_zero(tmp_path, tokenizer, sharing, peft_config, precompute, checkpointing):
    """
    Four updates with accumulation, in the same order: losses, gradient norms, rewards and weights of stock TRL, which
    tokenises the conversations itself. Token means are compared without accumulation below.
    """
    rows = training_rows(tokenizer, Margin(), roles=False)
    # SGD's updates are as exact as the gradients; Adam's hang on the signs of the tiny ones, and forget their size.
    same = {"optim": "sgd", "learning_rate": 0.1}
    same |= {"precompute_ref_log_probs": precompute, "gradient_checkpointing": checkpointing}
    ours = shifted(tmp_path, tokenizer, rows, Margin(), sharing, peft_config=peft_config, **same)
    stock = stock_trainer(
        tmp_path, tokenizer, None if precompute or peft_config else build_model(), peft_config, **same
    )
    stock.order = list(ours._get_train_sampler())
    stock.train()
    ours.train()
    # Log-probabilities near 100 nats are float32 numbers 8e-6 apart, and rewards are 0.3 times their differences.
    np.testing.assert_allclose(history(ours, PARITY_KEYS), history(stock, PARITY_KEYS), rtol=2e-5, atol=1e-5)
    moved = 0.0
    for (name, weight), expected in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6, msg=name)
        moved = max(moved, (weight - dict(build_model().named_parameters()).get(name, weight)).abs().max().item())
    assert peft_config is not None or moved > 1e-2, "the run must have trained something"


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "padded"])
def test_token_means_are_those_of_stock_trl(tmp_path, tokenizer, sharing):
    rows = training_rows(tokenizer, Margin(), roles=False)
    once = {"gradient_accumulation_steps": 1, "max_steps": 2}
    ours = shifted(tmp_path, tokenizer, rows, Margin(), sharing, **once)
    stock = stock_trainer(tmp_path, tokenizer, **once)
    stock.order = list(ours._get_train_sampler())
    stock.train()
    ours.train()
    np.testing.assert_allclose(history(ours, TOKEN_KEYS), history(stock, TOKEN_KEYS), rtol=2e-5, atol=1e-6)


def test_trl_does_not_digest_the_weights(tmp_path, tokenizer, monkeypatch):
    """It would at every start, on every rank, for a cache that is not used."""

    def digest(_):
        raise AssertionError("all weights were read")

    monkeypatch.setattr("trl.trainer.dpo_trainer.hash_module", digest)
    shifted(tmp_path, tokenizer, training_rows(tokenizer, Margin()), Margin(), True)


BFPO = Margin(a=1.5, b=0.5, c=-0.5, link="squared")


def one_by_one(model, row):
    """Log-probabilities of each token of either answer, from the padded forward of that answer alone."""
    for answer in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[answer]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0, :-1]
        yield log_probs.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "padded"])
def test_metrics_are_means_over_pairs_of_their_class_and_role(tmp_path, tokenizer, sharing):
    """
    An evaluation of 22 rows in batches of 5 (the last one short) after two updates, against the padded forward of
    every row alone and the formulas written out: per class, per role, and overall as task + λ·buffer.
    """
    rows = training_rows(tokenizer, BFPO)
    held = training_rows(tokenizer, BFPO, count=22, seed=7)
    trainer = shifted(
        tmp_path, tokenizer, rows, BFPO, sharing, Replay(task=3, buffer=1, weight=0.5), held, beta=0.05, max_steps=2
    )
    trainer.train()
    report = trainer.evaluate()

    reference, policy = build_model().eval(), trainer.model.eval()
    table = []
    for row in held:
        chosen, rejected, ref_chosen, ref_rejected = (
            logps.sum().item() for model in (policy, reference) for logps in one_by_one(model, row)
        )
        delta = (chosen - ref_chosen) - (rejected - ref_rejected)
        m = 1.5 * row["chosen_safe"] - 0.5 * row["rejected_safe"] - 0.5
        sign = 1 if m >= 0 else -1
        table.append(
            {
                "class": PAIR_CLASSES[row["pair_class"]].replace("/", "_"),
                "role": row["role"],
                "loss": (delta - m / 0.05) ** 2,
                "rewards/chosen": 0.05 * (chosen - ref_chosen),
                "rewards/rejected": 0.05 * (rejected - ref_rejected),
                "rewards/margins": 0.05 * delta,
                "accuracy_helpful": float(delta > 0),
                "accuracy_target": float(sign * delta > 0),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
            }
        )
    names = [key for key in table[0] if key not in ("class", "role")]
    checked = 0
    for prefix, members in [("", table)] + [
        (f"{group}/", [row for row in table if group in (row["class"], row["role"])])
        for group in ("safe_safe", "safe_unsafe", "unsafe_safe", "unsafe_unsafe", "task", "buffer")
    ]:
        for name in names:
            if (prefix, name) != ("", "loss"):
                mean = sum(row[name] for row in members) / len(members)
                assert report[f"eval_{prefix}{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-5), prefix + name
                checked += 1
    assert checked == 7 * len(names) - 1
    assert report["eval_loss"] == pytest.approx(report["eval_task/loss"] + 0.5 * report["eval_buffer/loss"], rel=1e-6)
    assert "eval_unlabelled/loss" not in report


def test_first_loss_is_bfpos(tmp_path, tokenizer):
    """At step 0: buffer 2500, task 10⁴·(0.25 + 0.75·fraction of rows with one safe, one unsafe answer)."""
    rows = training_rows(tokenizer, BFPO, count=32)
    once = {"beta": 0.01, "gradient_accumulation_steps": 8, "max_steps": 1}
    trainer = shifted(tmp_path, tokenizer, rows, BFPO, True, Replay(task=3, buffer=1), **once)
    trainer.train()
    first = trainer.state.log_history[0]
    mixed = np.isin(np.asarray(rows["pair_class"])[~np.asarray(rows["is_buffer"])], [1, 2]).mean()
    assert first["buffer/loss"] == pytest.approx(2500, rel=1e-3)
    assert first["task/loss"] == pytest.approx(1e4 * (0.25 + 0.75 * mixed), rel=1e-3)
    assert first["loss"] == pytest.approx(first["task/loss"] + first["buffer/loss"], rel=1e-3)


def test_length_normalisation_divides_each_log_ratio_by_its_own_length(tmp_path, tokenizer):
    """SimPO's form: no reference, token means; the loss of the first micro-batch written out."""
    margin = Margin(c=1.6, link="logistic", length_normalized=True, reference_free=True)
    rows = training_rows(tokenizer, margin, roles=False)
    once = {"beta": 2.0, "gradient_accumulation_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    trainer = shifted(tmp_path, tokenizer, rows, margin, True, **once)
    trainer.train()
    model, losses = build_model().eval(), []
    for row in rows.select(list(trainer._get_train_sampler())[:4]):
        chosen, rejected = (logps.mean().item() for logps in one_by_one(model, row))
        losses.append(math.log1p(math.exp(-(2.0 * (chosen - rejected) - 1.6))))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_role_weighted_mean_by_hand():
    """Task 1 and 3, buffer 10: 2 + 0.5·10 = 7; one role alone: its own mean."""
    losses, is_buffer = torch.tensor([1.0, 10.0, 3.0]), torch.tensor([False, True, False])
    assert role_weighted_mean(losses, is_buffer, 0.5).item() == 7.0
    assert role_weighted_mean(losses[:1], is_buffer[:1], 0.5).item() == 1.0
    assert role_weighted_mean(losses[1:2], is_buffer[1:2], 0.5).item() == 5.0
