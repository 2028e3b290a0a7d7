"""From the recipe's datasets to what the trainer reads: load, select, tokenise, and give each row its margin."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from arguments import DatasetEntry, Margin, Selection
from buffer import Audit, select_rows
from margins import margin_warnings, pair_classes, row_margins
from preferences import load_preferences
from tokens import end_token_notice, render, tokenize_rows, with_system_message


@dataclass(frozen=True)
class Pairs:
    """Rows ready to train or evaluate on, and what became of the others."""

    dataset: Dataset  # the row schema plus prompt_ids, chosen_ids, rejected_ids, row, margin, pair_class, is_buffer
    audit: Audit
    cut: dict[str, int]  # rows, and answers cut at max_length
    warnings: list[str]

    @property
    def margins(self) -> np.ndarray:
        return np.asarray(self.dataset["margin"])

    @property
    def classes(self) -> np.ndarray:
        return np.asarray(self.dataset["pair_class"])

    @property
    def is_buffer(self) -> np.ndarray:
        return np.asarray(self.dataset["is_buffer"])


def prepare_pairs(
    entries: list[DatasetEntry],
    selection: Selection,
    margin: Margin,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    system_message: str | None,
    seed: int,
    held_out: Dataset | None = None,
    reference_gap: Callable[[Dataset], np.ndarray] | None = None,
    hygiene_only: bool = False,
    num_proc: int | None = None,
) -> Pairs:
    """
    Args:
        held_out: evaluation rows, whose prompts the n-gram rule of the hygiene keeps out of these.
        reference_gap: log π_ref(y_w) − log π_ref(y_l) of rows, where `selection.score.signal` asks for it.
        hygiene_only: an evaluation set: neither relabelled beyond the label policy, nor filtered, nor cut to quotas.

    Raises:
        RecipeError: see `load_preferences`, `select_rows`, `tokenize_rows` and `row_margins`.
    """
    rows, bad_rows = load_preferences(entries, seed, num_proc)

    def count_prompt_tokens(prompts: list[list[dict]]) -> list[int]:
        conversations = [with_system_message(prompt, system_message) for prompt in prompts]
        return [len(ids) for ids in render(tokenizer, conversations, open_turn=True)]

    kept, audit = select_rows(
        rows,
        selection,
        seed=seed,
        max_length=max_length,
        count_prompt_tokens=count_prompt_tokens,
        eval_prompts=None if held_out is None else held_out["prompt"],
        reference_gap=reference_gap,
        hygiene_only=hygiene_only,
        num_proc=num_proc,
        bad_rows=bad_rows,
    )
    tokenized, cut = tokenize_rows(kept, tokenizer, max_length, system_message, num_proc)
    values = row_margins(tokenized, margin)
    relabelled = (selection.labels or "helpful") != "helpful"
    warnings = margin_warnings(tokenized, margin, values, relabelled)
    notice = end_token_notice(tokenized, tokenizer)
    columns = {
        "row": np.arange(len(tokenized)),
        "margin": values,
        "pair_class": pair_classes(tokenized),
        "is_buffer": np.asarray(tokenized["role"]) == "buffer",
    }
    for name, column in columns.items():
        tokenized = tokenized.add_column(name, column)
    return Pairs(tokenized, audit, cut, warnings + ([notice] if notice else []))
