"""From the recipe's datasets to what the trainer reads: load, tokenise, select, and give each row its margin."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from core.config.schema import DatasetEntry, PreferenceRecipe
from core.data.preferences import BadRows, load_preferences
from core.data.tokens import ids_digest, token_notices, tokenize_rows, trainable_rows
from core.objective.margins import margin_warnings, row_margins
from core.runtime.ranks import caches_in_turn
from core.selection.audit import Audit
from core.selection.buffer import select_rows
from core.selection.hygiene import has_role


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
    Every rank gets the same rows: what is heavy is left in datasets' cache by the first (`ranks.caches_in_turn`), and
    the decisions are each rank's own.

    Args:
        entries: the recipe's `datasets` or `eval_datasets`.
        recipe, args: settings of selection, margin, lengths and seed.
        tokenizer: None: rows without token ids, of which none is too long.
        held_out: evaluation rows, whose prompts the n-gram rule of the hygiene keeps out of these.
        reference_gaps: log π_ref(y_w) − log π_ref(y_l) in nats of N rows with token ids, shape (N,), float64; for
            `selection.score.signal: reference_gap`. It is asked once, about the rows that hygiene and labels leave.
        evaluation: select for hygiene only: no relabelling, no filter, no quotas.

    Raises:
        RecipeError: see `load_preferences`, `select_rows`, `trainable_rows` and `row_margins`.
    """
    seed = args.seed if recipe.selection.seed is None else recipe.selection.seed
    rows, bad_rows = caches_in_turn(partial(_read, entries, recipe, args, tokenizer, seed))
    kept, audit = select_rows(
        rows,
        recipe.selection,
        seed=seed,
        max_length=args.max_length,
        eval_prompts=None if held_out is None else held_out.dataset["prompt"],
        reference_gap=reference_gaps and partial(_gaps_of, reference_gaps),
        hygiene_only=evaluation,
        bad_rows=bad_rows,
        margin=recipe.margin,
    )
    notices = [] if tokenizer is None else token_notices(kept, tokenizer)
    dataset, cut = (kept, {}) if tokenizer is None else trainable_rows(kept)
    dataset = _written_out(dataset)

    margins = row_margins(dataset, recipe.margin)
    warnings = margin_warnings(dataset, recipe.margin, margins, (recipe.selection.labels or "helpful") != "helpful")
    columns = {
        "row": np.arange(len(dataset)),
        "margin": margins,
        "pair_class": audit.classes[audit.codes == 0],
        "is_buffer": has_role(dataset, "buffer"),
    }
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return Pairs(dataset, audit, cut, warnings + notices)


def _read(
    entries: list[DatasetEntry],
    recipe: PreferenceRecipe,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> tuple[Dataset, BadRows]:
    """All rows, with their tokens: also those that the selection will drop, for its rules look at the tokens."""
    rows, bad_rows = load_preferences(entries, seed, args.dataset_num_proc)
    if tokenizer is not None:
        rows = tokenize_rows(rows, tokenizer, args.max_length, recipe.system_message, args.dataset_num_proc)
    return rows, bad_rows


def _gaps_of(reference_gaps: Callable[[Dataset], np.ndarray], rows: Dataset) -> np.ndarray:
    return reference_gaps(_written_out(trainable_rows(rows)[0]))


def _written_out(rows: Dataset) -> Dataset:
    """A choice of rows as a file of their own; adding a column would make one too, by way of Python objects."""
    return caches_in_turn(lambda: rows.with_format("arrow").flatten_indices().with_format(None))
