"""Padding-free micro-batches for SFT: conversations lie end to end in one row, and no token is padding.

Positions start again with each conversation, and none attends to another: it is a pair without a second answer
(`attention.py`). So the loss, its gradients and its metrics are those of TRL's padded form, which the tests hold every
architecture of `SHARED_ARCHITECTURES` to. On a CPU the head scores the tokens that are trained on alone (`head.py`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from core.modeling.attention import packed_keys
from core.modeling.prefix import unsupported_reason
from core.runtime.ranks import rank


class PaddingFreeCollator:
    """
    TRL's own padding-free row of a micro-batch of B conversations, T tokens in all, of which it takes:

        input_ids, position_ids, labels: shape (1, T); a conversation's first token is no label.

    and with it

        rows: tokens of each, shape (B,). It stands first: transformers weighs an evaluation's losses by the size of
            the first tensor that it finds.
        pair_lengths: (1, length, 0) of each as integers, so that no layer has to ask a GPU for them.
    """

    def __init__(self, pad_token_id: int):
        self.flatten = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        flat = self.flatten(examples)
        lengths = flat["cu_seq_lens_q"].diff().tolist()
        row = {key: flat[key] for key in ("input_ids", "position_ids", "labels")}
        rows = torch.tensor([len(example["input_ids"]) for example in examples])
        return {"rows": rows} | row | {"pair_lengths": tuple((1, length, 0) for length in lengths)}


def model_inputs(batch: dict[str, Any], summed: bool) -> dict[str, Any]:
    """
    A model's arguments for a batch of `PaddingFreeCollator`, after `prefix.enable_prefix_sharing`.

    Args:
        summed: the loss adds up all log-probabilities with one weight.
    """
    inputs = {key: value for key, value in batch.items() if key != "rows"}
    # A 4-D mask is passed through as it is, so none is built; TRL counts tokens by it, and a router loss weighs them.
    inputs["attention_mask"] = torch.ones_like(batch["input_ids"])[None, None]
    device = batch["input_ids"].device
    if device.type == "cpu":
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return inputs | {"answer_labels": labels, "answer_sum": summed}
    return inputs | {"packed": packed_keys(batch["pair_lengths"], device)}


def omits_padding(wanted: bool, model: PreTrainedModel, args: SFTConfig) -> bool:
    """
    Whether conversations lie end to end without padding; a line says why not where the recipe wants it. TRL's packing
    has a layout of its own.
    """
    if not wanted or args.packing:
        return False
    reason = unsupported_reason(model, args.max_length, shares=False)
    if reason is None and args.neftune_noise_alpha is not None:
        reason = "the noise of neftune_noise_alpha is scaled by the length of a row"
    if reason and rank() == 0:
        print(f"note: padding_free falls back to padded conversations: {reason}", flush=True)
    return reason is None
