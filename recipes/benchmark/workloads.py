"""From a recipe to what the bench gives both trainers: rows of one role with margin 0, a tokenizer and a model."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from benchmark.generated import LENGTHS, SHAPES, random_model, train_tokenizer, write_pairs
from benchmark.paired_runs import Workload
from core.config.parsing import Resolved
from core.config.schema import DatasetEntry
from core.data.preferences import load_preferences
from core.data.tokens import load_tokenizer, token_lengths
from core.modeling.policy import load_model
from core.runtime.errors import RecipeError
from core.runtime.network import check_model_path
from core.runtime.text import did_you_mean
from core.selection.pairs import prepare_pairs

GENERATED = "generated/"  # before the name of a source in `LENGTHS`: rows of its lengths are made
SPARE = 2  # times as many rows are generated as are trained on, since the selection drops some


def prepare_workload(resolved: Resolved, updates: int, reference_pairs: int = 0) -> Workload:
    """
    Load, select and tokenise the recipe's rows, and draw by the seed as many as `updates` updates need, or whole
    micro-batches of at least `reference_pairs` if that is more.

    A model that is none of `SHAPES` is loaded with its tokenizer; for one of those, with random weights, a tokenizer
    is trained on the rows.

    Raises:
        RecipeError: also where the recipe wants LoRA, or too few rows are left.
    """
    model, args, recipe = resolved.model, resolved.training, resolved.recipe
    if model.use_peft:
        raise RecipeError(f"{resolved.path}: use_peft: the bench trains weights themselves; set it to false")
    shape = SHAPES.get(model.model_name_or_path)
    if shape is None:
        check_model_path(model.model_name_or_path, model.model_revision)
    batch = args.per_device_train_batch_size
    needed = max(updates * batch * args.gradient_accumulation_steps, -(-reference_pairs // batch) * batch)
    with tempfile.TemporaryDirectory() as folder:
        entries = [_made(entry, Path(folder), SPARE * needed, args.seed) for entry in recipe.datasets]
        if shape is None:
            tokenizer = load_tokenizer(model, recipe.chat_template_path, recipe.pad_token)
        else:
            tokenizer = _tokenizer_of(entries, args.seed)
        pairs = prepare_pairs(entries, recipe, args, tokenizer).dataset
    if len(pairs) < needed:
        raise RecipeError(
            f"{resolved.path}: {len(pairs):,} rows are left by the selection, and {updates} updates and a reference "
            f"pass over {reference_pairs} pairs need {needed:,}: give a larger --dataset, or lower --updates, "
            "--reference_pairs or per_device_train_batch_size"
        )
    rows = pairs.shuffle(seed=args.seed).select(range(needed)).flatten_indices()
    # Stock TRL knows neither margins nor roles.
    own = {"row": np.arange(needed), "margin": np.zeros(needed), "is_buffer": np.zeros(needed, bool)}
    for name, value in own.items():
        rows = rows.remove_columns(name).add_column(name, value)
    if shape is None:
        build_model = partial(load_model, model)
    else:
        build_model = partial(random_model, shape, getattr(torch, model.dtype or "float32"), args.seed)
    return Workload(
        name=" + ".join(_title(entry.path) for entry in recipe.datasets),
        model_name=model.model_name_or_path,
        build_model=build_model,
        tokenizer=tokenizer,
        rows=rows,
        updates=updates,
        args=args,
        system_message=recipe.system_message,
        trained=recipe.trainable_parameters,
        source_lengths=np.random.default_rng(args.seed).permutation(token_lengths(pairs)),
    )


def _made(entry: DatasetEntry, folder: Path, count: int, seed: int) -> DatasetEntry:
    """The entry itself, or with generated rows on disk in its place."""
    if not entry.path.startswith(GENERATED):
        return entry
    name = entry.path.removeprefix(GENERATED)
    if name not in LENGTHS:
        raise RecipeError(f"datasets: {entry.path}: no such lengths{did_you_mean(name, LENGTHS)}")
    path = folder / f"{name}.jsonl"
    write_pairs(path, count, LENGTHS[name], seed)
    return replace(entry, path=str(path))


def _tokenizer_of(entries: list[DatasetEntry], seed: int) -> PreTrainedTokenizerBase:
    rows, _ = load_preferences(entries, seed)
    prompts = (turn["content"] for prompt in rows["prompt"] for turn in prompt)
    return train_tokenizer([*prompts, *rows["chosen"], *rows["rejected"]])


def _title(path: str) -> str:
    return f"lengths of {path.removeprefix(GENERATED)}" if path.startswith(GENERATED) else Path(path).name
