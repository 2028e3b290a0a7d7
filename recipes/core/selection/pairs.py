"""From the recipe's datasets to what the trainer reads: load, select, tokenise, and give each row its margin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from core.config.schema import DatasetEntry, PreferenceRecipe, Selection
from core.data.preferences import load_preferences
from core.data.tokens import end_token_notice, ids_digest, render, template_digest, tokenize_rows, with_system_message
from core.objective.margins import margin_warnings, pair_classes, row_margins
from core.runtime.ranks import caches_in_turn
from core.selection.audit import Audit
from core.selection.buffer import select_rows


@dataclass(frozen=True)
class Pairs:
    """Rows ready to train or evaluate on, and what became of the others."""

    dataset: Dataset  # the row schema plus prompt_ids, chosen_ids, rejected_ids, row, margin, pair_class, is_buffer
    audit: Audit
    cut: dict[str, int]  # rows, and answers cut at max_length
    warnings: list[str]

    @property
    def margins(self) -> np.ndarray:
        return self._column("margin")

    @property
    def classes(self) -> np.ndarray:
        return self._column("pair_class")

    @property
    def is_buffer(self) -> np.ndarray:
        return self._column("is_buffer")

    def _column(self, name: str) -> np.ndarray:
        return self.dataset.with_format("arrow")[name].to_numpy()

    def token_ids(self, count: int) -> list[list[int]]:
        """The first `count` pairs as whole conversations, the prompt with either answer."""
        rows = self.dataset.select(range(min(count, len(self.dataset))))
        return [row["prompt_ids"] + row[answer] for row in rows for answer in ("chosen_ids", "rejected_ids")]

    def digest(self) -> str:
        """Of all that training reads, in its order: the tokens, margins and roles, and the ids that messages name."""
        tokens = ids_digest(self.dataset, ["prompt_ids", "chosen_ids", "rejected_ids"])
        numbers = np.stack([self.margins, self.classes, self.is_buffer]).tobytes()
        return xxhash.xxh3_128_hexdigest(numbers + (tokens + self.audit.digest).encode())


class Gaps:
    """The reference's gap of each row by its id, in the form that `select_rows` asks for it."""

    def __init__(self, row_ids: Sequence[str], gaps: np.ndarray) -> None:
        self.row_ids, self.gaps = pa.array(row_ids), gaps
        self.digest = xxhash.xxh3_128_hexdigest(gaps.tobytes())

    def __call__(self, rows: Dataset) -> np.ndarray:
        return self.gaps[pc.index_in(pa.array(rows["row_id"]), value_set=self.row_ids).to_numpy()]


def prepare_pairs(
    entries: list[DatasetEntry],
    recipe: PreferenceRecipe,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    held_out: "Pairs | None" = None,
    reference_gaps: Callable[[Dataset], np.ndarray] | None = None,
    evaluation: bool = False,
) -> Pairs:
    """
    Every rank gets the same rows: the first computes them, the others read its caches (`ranks.caches_in_turn`).

    Args:
        entries: the recipe's `datasets` or `eval_datasets`.
        recipe, args: settings of selection, margin, lengths and seed.
        tokenizer: None: rows without token ids, of which none is too long.
        held_out: evaluation rows, whose prompts the n-gram rule of the hygiene keeps out of these.
        reference_gaps: log π_ref(y_w) − log π_ref(y_l) of tokenised rows, for `selection.score.signal: reference_gap`.
        evaluation: select for hygiene only: no relabelling, no filter, no quotas.

    Raises:
        RecipeError: see `load_preferences`, `select_rows`, `tokenize_rows` and `row_margins`.
    """
    settings, max_length, num_proc = recipe.selection, args.max_length, args.dataset_num_proc
    seed = args.seed if settings.seed is None else settings.seed

    by_reference = not evaluation and settings.score is not None and settings.score.signal == "reference_gap"

    def count_prompt_tokens(prompts: list[list[dict]]) -> list[int]:
        conversations = [with_system_message(prompt, recipe.system_message) for prompt in prompts]
        return [len(ids) for ids in render(tokenizer, conversations, open_turn=True)]

    def tokenize(rows: Dataset) -> tuple[Dataset, dict[str, int]]:
        return tokenize_rows(rows, tokenizer, max_length, recipe.system_message, num_proc)

    rows, bad_rows = caches_in_turn(lambda: load_preferences(entries, seed, num_proc))

    def select(settings: Selection, gaps: Gaps | None = None) -> tuple[Dataset, Audit]:
        digest = None if tokenizer is None else template_digest(tokenizer, recipe.system_message)
        return select_rows(
            rows,
            settings,
            seed=seed,
            max_length=max_length,
            count_prompt_tokens=None if tokenizer is None else count_prompt_tokens,
            eval_prompts=None if held_out is None else held_out.dataset["prompt"],
            reference_gap=gaps,
            hygiene_only=evaluation,
            num_proc=num_proc,
            bad_rows=bad_rows,
            cache_key=digest and digest + (gaps.digest if gaps else ""),
        )

    gaps = None
    if by_reference:
        # The reference scores what hygiene and labels leave, on all ranks at once; the rest is one rank's work.
        left, _ = caches_in_turn(lambda: select(replace(settings, score=None, quotas=None)))
        if settings.score.role != "all":
            left = left.select(np.flatnonzero(_has_role(left, settings.score.role)))
        gaps = Gaps(left["row_id"], reference_gaps(caches_in_turn(lambda: tokenize(left)[0])))
    kept, audit = caches_in_turn(lambda: select(settings, gaps))
    tokenized, cut = (kept, {}) if tokenizer is None else caches_in_turn(lambda: tokenize(kept))
    values = row_margins(tokenized, recipe.margin)
    warnings = margin_warnings(tokenized, recipe.margin, values, (settings.labels or "helpful") != "helpful")
    notice = None if tokenizer is None else end_token_notice(tokenized, tokenizer, max_length)
    columns = {
        "row": np.arange(len(tokenized)),
        "margin": values,
        "pair_class": pair_classes(tokenized),
        "is_buffer": _has_role(tokenized, "buffer"),
    }
    for name, column in columns.items():
        tokenized = tokenized.add_column(name, column)
    return Pairs(tokenized, audit, cut, warnings + ([notice] if notice else []))


def _has_role(rows: Dataset, role: str) -> np.ndarray:
    """Shape: (N,), bool."""
    return pc.equal(rows.with_format("arrow")["role"], role).to_numpy()
