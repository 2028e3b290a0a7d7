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
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from core.modeling.attention import ATTENTION, PairLengths, packed_keys
from core.modeling.dropout import draws_dropout
from core.modeling.head import add_answer_head

# Exactness against the padded form is tested for each of these, and is not claimed for any other.
SHARED_ARCHITECTURES = (
    *("apertus", "arcee", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma"),
    *("gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "granite", "granitemoe", "helium"),
    *("hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe"),
    *("opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
)
# Rotary embeddings that don't look at the longest position of the batch (dynamic and longrope do).
STATIC_ROPE = ("default", "linear", "llama3", "proportional", "yarn")
# What attention over shared pairs leaves out, so that they are padded.
OWN_ATTENTION = {
    "gemma2": "a softcap",
    "gpt_oss": "sinks",
    "llama4_text": "chunks",
}
EIGHT_BITS = "what a layer of 8 bits makes of a token depends on the batch that it is in"
# What `pair_logps` needs of TRL's fused head (`add_fused_lm_head`).
HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class PairOutputs(NamedTuple):
    """
    What a forward over B pairs gives. Every field but the last has shape (B,); sums run over the answer's tokens. What
    only metrics need has no gradient, and is None where it was not asked for.
    """

    chosen_logps: torch.Tensor  # log π(y_w|x) in nats, with gradient
    rejected_logps: torch.Tensor  # log π(y_l|x) in nats, with gradient
    chosen_tokens: torch.Tensor  # tokens of the answer, int64
    rejected_tokens: torch.Tensor
    entropy: torch.Tensor | None = None  # of the next-token distribution in nats, summed over both answers
    chosen_logits: torch.Tensor | None = None  # mean logit over the vocabulary, summed
    rejected_logits: torch.Tensor | None = None
    chosen_top1: torch.Tensor | None = None  # tokens of the chosen answer that are the model's first choice
    router_loss: torch.Tensor | None = None  # a scalar with gradient: a mixture of experts' load balance


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

    Args:
        whole_answers: for a model with a router loss, which is a mean over all tokens: the last token of each answer
            stands in the row as well, though it predicts nothing, and `token_counts` says how often the padded form
            has each token (a prompt's twice), so that the mean is the same.

    Returns, after the examples' own numbers:
        input_ids, position_ids: shape (1, T), T = Σ (k + n + m − 1), two more for each pair with whole answers.
        shift_labels: the token that each position predicts, −100 where that is no answer's. Shape (1, T).
        pair_lengths: ((k, n, m), …) as integers, so that no layer has to ask a GPU for them.
    """

    def __init__(self, whole_answers: bool = False):
        self.whole_answers = whole_answers

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = row_columns(examples)
        tokens, positions, labels, lengths, counts = [], [], [], [], []
        extra = int(self.whole_answers)
        unscored = [-100] * extra
        for example in examples:
            prompt, chosen, rejected = example["prompt_ids"], example["chosen_ids"], example["rejected_ids"]
            k, n, m = len(prompt), len(chosen), len(rejected)
            assert k and n and m, "a pair needs a prompt and two answers of at least one token each"
            tokens += [*prompt, *chosen[: n - 1 + extra], prompt[-1], *rejected[: m - 1 + extra]]
            positions += [*range(k + n - 1 + extra), *range(k - 1, k - 1 + m + extra)]
            labels += [*[-100] * (k - 1), *chosen, *unscored, *rejected, *unscored]
            counts += [2.0] * (k - 1) + [1.0] * (n + m + 2 * extra)
            lengths.append((k, n, m))
        batch["input_ids"] = torch.tensor([tokens])
        batch["position_ids"] = torch.tensor([positions])
        batch["shift_labels"] = torch.tensor([labels])
        batch["pair_lengths"] = tuple(lengths)
        if self.whole_answers:
            batch["token_counts"] = torch.tensor([counts])
        return batch


def collator_for(model: nn.Module, sharing: bool, pad_token_id: int) -> PaddedCollator | PrefixSharedCollator:
    """How pairs are laid out for this model."""
    return PrefixSharedCollator(has_router_loss(model.config)) if sharing else PaddedCollator(pad_token_id)


def has_router_loss(config: PretrainedConfig) -> bool:
    """Whether this is a mixture of experts whose router logits TRL can ask for."""
    return hasattr(config.get_text_config(), "output_router_logits")


def unsupported_reason(
    model: nn.Module, max_length: int | None, shares: bool = True, adapter: PeftConfig | None = None
) -> str | None:
    """
    Why rows must be padded for this model, as one line for the user; None where laying them end to end is exact.

    Args:
        shares: whether they share prompts, so that one draw of LoRA's dropout would serve both answers. Where they
            don't, each token has its own, as in the padded form.
        adapter: LoRA that the trainer will put into the model.
    """
    config = model.config
    if config.model_type in OWN_ATTENTION:
        return f"the attention of a {config.model_type} has {OWN_ATTENTION[config.model_type]}"
    if config.model_type not in SHARED_ARCHITECTURES:
        return f"its exactness is not established for a {config.model_type}"
    if isinstance(model, PeftModel) and any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
        return "a prompt-learning adapter puts tokens of its own before the prompt"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps its logits"
    window = getattr(config, "sliding_window", None)
    if window and (max_length is None or max_length > window):
        return f"max_length ({max_length}) is not within the model's sliding window of {window} tokens"
    for rope in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if rope not in STATIC_ROPE:
            return f"its {rope} rotary embedding depends on the longest sequence of the batch"
    if getattr(causal_lm_of(model), "is_loaded_in_8bit", False):
        return EIGHT_BITS
    if draws_dropout(model, of_adapters=shares) or shares and getattr(adapter, "lora_dropout", 0):
        return "it draws dropout" + (" (disable_dropout: true would let it)" if shares else "")
    return None


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Of all layers: some architectures have rotary parameters for each type of layer."""
    return {parameters[key] for key in parameters if key == "rope_type"}.union(
        *(_rope_types(value) for value in parameters.values() if isinstance(value, dict))
    )


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """A model without PEFT around it; LoRA may be in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def enable_prefix_sharing(model: nn.Module) -> None:
    """
    Let `model` (a causal language model or a PEFT model around one, with TRL's fused head) take shared batches.

    Any other call, `generate` and padded batches included, runs sdpa as before: the attention function looks for a
    batch's `pair_lengths` at each call. It isn't switched around the forward alone, because gradient checkpointing
    calls it again in the backward. transformers doesn't save the name in the model's config.
    """
    causal_lm = causal_lm_of(model)
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


def _row_lengths(batch: dict[str, Any]) -> PairLengths:
    """`pair_lengths` as the row has them: with whole answers each has one token more than it predicts."""
    extra = int("token_counts" in batch)
    return tuple((k, n + extra, m + extra) for k, n, m in batch["pair_lengths"])


def _shared_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments for a shared batch."""
    inputs, lengths, counts = batch["input_ids"], _row_lengths(batch), batch.get("token_counts")
    return {
        "input_ids": inputs,
        "position_ids": batch["position_ids"],
        # A 4-D mask is passed through as it is, so none is built; empty, it fails where it would be applied. A router
        # loss reads it too, as the weight of each token.
        "attention_mask": inputs.new_empty((1, 1, 0, 0)) if counts is None else counts[None, None],
        "pair_lengths": lengths,
        "packed": None if inputs.device.type == "cpu" else packed_keys(lengths, inputs.device),
        "use_cache": False,
    }


def pair_logps(
    model: nn.Module, batch: dict[str, Any], statistics: bool = True, router_loss: bool = False
) -> PairOutputs:
    """
    Log-probabilities of both answers of each pair, from a shared batch (`PrefixSharedCollator`) or a padded one
    (`trl`'s `DataCollatorForPreference`); the numbers are the same.

    Args:
        model: with TRL's fused head (`add_fused_lm_head`), also wrapped by PEFT, DDP or DeepSpeed; for a shared batch
            after `enable_prefix_sharing`.
        batch: may hold other columns.
        statistics: whether entropy, logits and first choices are wanted; a reference pass does without.
        router_loss: whether a mixture of experts' load balance is wanted, as stock TRL has it.
    """
    router = {"output_router_logits": True} if router_loss else {}
    if "pair_lengths" in batch:
        labels = batch["shift_labels"]
        if labels.device.type == "cpu":
            head = {"answer_labels": labels, "answer_statistics": statistics}
        else:
            head = {"shift_labels": labels, "fused_lm_head": True}
        outputs = model(**_shared_inputs(batch), **head, **router)
        tokens = torch.tensor(batch["pair_lengths"], device=labels.device).unbind(1)[1:]
        parts = [size for k, n, m in _row_lengths(batch) for size in (k - 1, n, m)]

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
            **router,
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
        outputs.aux_loss,
    )
