"""Prefix-shared, padding-free micro-batches for pairs: each prompt is computed once, and no token is padding.

A pair with prompt P, chosen answer C (n tokens) and rejected answer R (m tokens) becomes

    tokens     P_1 … P_k   C_1 … C_(n−1)   P_k   R_1 … R_(m−1)
    positions  0 … k−1     k  … k+n−2      k−1   k  … k+m−2
    predicts   C_1 (at P_k), C_2 … C_n,    R_1,  R_2 … R_m

and the pairs of a micro-batch lie end to end in one row. The last prompt token stands there twice, because it predicts
the first token of either answer. Attention runs pair by pair: P and C are causal as ever; the second segment (P_k, R)
attends to P_1 … P_(k−1) and causally to itself, and never to C. Its cost is that of the pairs' own lengths.

The log-probabilities and gradients are those of the padded form (`trl`'s `DataCollatorForPreference`): the tests hold
every architecture of `SHARED_ARCHITECTURES` to it.
"""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from core.modeling.attention import ATTENTION, packed_keys
from core.modeling.head import add_answer_head

# Exactness against the padded form is tested for each of these, and is not claimed for any other.
SHARED_ARCHITECTURES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
# Rotary embeddings that don't look at the longest position of the batch (dynamic and longrope do).
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# What `pair_logps` needs of TRL's fused head (`add_fused_lm_head`).
HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class PairOutputs(NamedTuple):
    """
    What a forward over B pairs gives. Every field has shape (B,); sums run over the answer's tokens. What only metrics
    need has no gradient, and is None where it was not asked for.
    """

    chosen_logps: torch.Tensor  # log π(y_w|x) in nats, with gradient
    rejected_logps: torch.Tensor  # log π(y_l|x) in nats, with gradient
    chosen_tokens: torch.Tensor  # tokens of the answer, int64
    rejected_tokens: torch.Tensor
    entropy: torch.Tensor | None = None  # of the next-token distribution in nats, summed over both answers
    chosen_logits: torch.Tensor | None = None  # mean logit over the vocabulary, summed
    rejected_logits: torch.Tensor | None = None
    chosen_top1: torch.Tensor | None = None  # tokens of the chosen answer that are the model's first choice


def row_columns(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    The examples' own numbers (`margin`, `pair_class`, `is_buffer`, reference log-probabilities …), each of shape (B,).

    They stand first in a batch: accelerate reads the batch size from the first tensor that it finds.
    """
    return {
        key: torch.tensor([example[key] for example in examples])
        for key, value in examples[0].items()
        if isinstance(value, int | float)
    }


class PaddedCollator:
    """`trl`'s padded layout, chosen answers above rejected ones, after the examples' own numbers."""

    def __init__(self, pad_token_id: int):
        self.pad = DataCollatorForPreference(pad_token_id=pad_token_id)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return row_columns(examples) | self.pad(examples)


class PrefixSharedCollator:
    """
    Lay the pairs of a micro-batch end to end in one row (see the module's docstring).

    Each example holds `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of at least one token.

    Returns, after the examples' own numbers:
        input_ids, position_ids: shape (1, T), T = Σ (k + n + m − 1).
        shift_labels: the token that each position predicts, −100 where that is no answer's. Shape (1, T).
        pair_lengths: ((k, n, m), …) as integers, so that no layer has to ask a GPU for them.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = row_columns(examples)
        tokens, positions, labels, lengths = [], [], [], []
        for example in examples:
            prompt, chosen, rejected = example["prompt_ids"], example["chosen_ids"], example["rejected_ids"]
            k, n, m = len(prompt), len(chosen), len(rejected)
            assert k and n and m, "a pair needs a prompt and two answers of at least one token each"
            tokens += [*prompt, *chosen[:-1], prompt[-1], *rejected[:-1]]
            positions += [*range(k + n - 1), *range(k - 1, k - 1 + m)]
            labels += [*[-100] * (k - 1), *chosen, *rejected]
            lengths.append((k, n, m))
        batch["input_ids"] = torch.tensor([tokens])
        batch["position_ids"] = torch.tensor([positions])
        batch["shift_labels"] = torch.tensor([labels])
        batch["pair_lengths"] = tuple(lengths)
        return batch


def unsupported_reason(model: nn.Module, max_length: int | None) -> str | None:
    """Why pairs must be padded for this model, as one line for the user; None where sharing is exact."""
    config = model.config
    if config.model_type not in SHARED_ARCHITECTURES:
        known = ", ".join(SHARED_ARCHITECTURES)
        return f"exactness is established for {known}, and this model is a {config.model_type}"
    if isinstance(model, PeftModel) and any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
        return "a prompt-learning adapter puts tokens of its own before the prompt"
    window = getattr(config, "sliding_window", None)
    if window is not None and (max_length is None or max_length > window):
        return f"max_length ({max_length}) is not within the model's sliding window of {window} tokens"
    rope = config.rope_parameters["rope_type"]
    if rope not in STATIC_ROPE:
        return f"its {rope} rotary embedding depends on the longest sequence of the batch"
    if config.attention_dropout:
        return f"attention_dropout is {config.attention_dropout}"
    return None


def enable_prefix_sharing(model: nn.Module) -> None:
    """
    Let `model` (a causal language model or a PEFT model around one, with TRL's fused head) take shared batches.

    Any other call, `generate` and padded batches included, runs sdpa as before: the attention function looks for a
    batch's `pair_lengths` at each call. It isn't switched around the forward alone, because gradient checkpointing
    calls it again in the backward. transformers doesn't save the name in the model's config.
    """
    causal_lm: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    causal_lm.set_attn_implementation(ATTENTION)
    add_answer_head(causal_lm)


def hidden_states(causal_lm: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """
    What the head of `pair_logps` gets of a shared batch.

    Args:
        causal_lm: without wrappers, after `enable_prefix_sharing`; LoRA may be in its layers.
        batch: of `PrefixSharedCollator`.

    Returns:
        Shape (1, T, H).
    """
    return causal_lm.base_model(**_shared_inputs(batch)).last_hidden_state


def _shared_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments for a shared batch."""
    inputs, lengths = batch["input_ids"], batch["pair_lengths"]
    return {
        "input_ids": inputs,
        "position_ids": batch["position_ids"],
        # A 4-D mask is passed through as it is, so none is built; empty, it fails where it would be applied.
        "attention_mask": inputs.new_empty((1, 1, 0, 0)),
        "pair_lengths": lengths,
        "packed": None if inputs.device.type == "cpu" else packed_keys(lengths, inputs.device),
        "use_cache": False,
    }


def pair_logps(model: nn.Module, batch: dict[str, Any], statistics: bool = True) -> PairOutputs:
    """
    Log-probabilities of both answers of each pair, from a shared batch (`PrefixSharedCollator`) or a padded one
    (`trl`'s `DataCollatorForPreference`); the numbers are the same.

    Args:
        model: with TRL's fused head (`add_fused_lm_head`), also wrapped by PEFT, DDP or DeepSpeed; for a shared batch
            after `enable_prefix_sharing`.
        batch: may hold other columns.
        statistics: whether entropy, logits and first choices are wanted; a reference pass does without.
    """
    if "pair_lengths" in batch:
        labels = batch["shift_labels"]
        if labels.device.type == "cpu":
            head = {"answer_labels": labels, "answer_statistics": statistics}
        else:
            head = {"shift_labels": labels, "fused_lm_head": True}
        outputs = model(**_shared_inputs(batch), **head)
        parts = [size for k, n, m in batch["pair_lengths"] for size in (k - 1, n, m)]
        tokens = torch.tensor(parts, device=labels.device).view(-1, 3).unbind(1)[1:]

        def answer_sums(per_token: torch.Tensor) -> tuple[torch.Tensor, ...]:
            sums = [part.sum() for part in per_token[0].split(parts)]
            return torch.stack(sums).view(-1, 3).unbind(1)[1:]
    else:
        mask = batch["completion_mask"]
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(mask == 0, -100),
            fused_lm_head=True,
            use_cache=False,
        )
        tokens = mask.sum(1).chunk(2)

        def answer_sums(per_token: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return per_token.sum(1).chunk(2)

    logps = answer_sums(outputs.log_probs)
    if not statistics:
        return PairOutputs(*logps, *tokens)
    chosen_logits, rejected_logits = answer_sums(outputs.mean_logits)
    return PairOutputs(
        *logps,
        *tokens,
        sum(answer_sums(outputs.entropy.detach())),
        chosen_logits,
        rejected_logits,
        answer_sums(outputs.is_top1)[0],
    )
