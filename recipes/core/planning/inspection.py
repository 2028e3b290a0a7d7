"""What a run would read, for `check.py`: output folder, network, model, rows. Shown, and what is wrong collected."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from core.config.entries import place
from core.config.parsing import Run
from core.config.schema import DatasetEntry
from core.data.preferences import load_conversations, load_preferences, oddities
from core.data.tokens import lead_with, render, token_lengths
from core.objective.margins import first_losses
from core.planning.findings import Findings
from core.reporting.results import show_selection
from core.reporting.tables import number, print_table
from core.runtime.errors import RecipeError
from core.runtime.network import hub_is_off, hub_is_reachable
from core.selection.buffer import REFERENCE_GAPS, refuse_overlap
from core.selection.pairs import Pairs, prepare_pairs
from core.training.session import Opened, check_models, open_model
from core.training.tracking import why_wandb_is_offline

SHOWN_CHARACTERS = 1200  # of each part of a pair
SAMPLE = 2000  # conversations that an SFT check tokenises


def show_network(resolved: Run) -> None:
    """What the network is needed for, and whether it is there."""
    if hub_is_off():
        print("Hub: not asked; model and data are on this disk, or HF_HUB_OFFLINE is set")
    else:
        print(f"Hub: {'reachable' if hub_is_reachable() else 'cannot be reached from here'}")
    if "wandb" in resolved.training.report_to:
        mode = os.environ.get("WANDB_MODE")
        reason = None if mode else why_wandb_is_offline()
        print(f"wandb: WANDB_MODE={mode}" if mode else f"wandb: {'offline, ' + reason if reason else 'online'}")


def inspect_model(resolved: Run, mixed: str, zero_stage: int, findings: Findings) -> Opened:
    """`session.open_model`, whose refusals are told; `mixed` and `zero_stage` are the launch's."""
    path = resolved.model.model_name_or_path
    try:
        check_models(resolved)
    except RecipeError as error:
        findings.fault(str(error))
        return Opened(None, None, None, None)
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        findings.note(f"model {path} has no weights (*.safetensors) yet; the run will need them")
    opened = open_model(resolved, mixed, zero_stage, findings.attempt)
    if opened.note:
        findings.note(opened.note)
    return opened


# ------------------------------------------------------------------------------------------------------------- rows


def inspect_pairs(resolved: Run, tokenizer: PreTrainedTokenizerBase | None, findings: Findings) -> Pairs | None:
    """Select the rows as the run would, and show them; None where no task row can be read."""
    recipe, args = resolved.recipe, resolved.training
    if recipe.selection.score is not None and recipe.selection.score.signal in REFERENCE_GAPS:
        recipe.selection.score = None
        findings.note("selection.score by the reference's gap needs the weights: the rows below are before it")

    def load(entry: DatasetEntry) -> Any:
        rows, _ = load_preferences([entry], args.seed, args.dataset_num_proc)
        return _noted(rows, entry, findings)

    held_out = None
    if entries := _readable(recipe.eval_datasets, load, findings):
        held_out = findings.attempt(prepare_pairs, entries, recipe, args, tokenizer, evaluation=True)
    entries = _readable(recipe.datasets, load, findings)
    if not any(entry.role == "task" for entry in entries):
        return None
    train = findings.attempt(prepare_pairs, entries, recipe, args, tokenizer, held_out=held_out)
    if train is None:
        return None
    if held_out is not None:
        findings.attempt(refuse_overlap, train.audit, held_out.audit)
    show_selection(train, recipe.margin, args.beta)
    if held_out is not None:
        show_selection(held_out, recipe.margin, args.beta, "evaluation")
    _show_first_loss(train, resolved)
    if tokenizer is not None:
        _show_pairs(train, tokenizer)
        _show_lengths(dict(zip(("prompt", "chosen", "rejected"), token_lengths(train.dataset).T, strict=True)))
    return train


def _noted(rows: Dataset, entry: DatasetEntry, findings: Findings) -> Dataset:
    for line in oddities(rows):
        findings.note(f"{place(entry)}: {line}")
    return rows


def _readable(
    entries: list[DatasetEntry], load: Callable[[DatasetEntry], Any], findings: Findings
) -> list[DatasetEntry]:
    """The entries that can be loaded; what is wrong with each of the others is a fault of its own."""
    return [entry for entry in entries if findings.attempt(load, entry) is not None]


def _show_first_loss(train: Pairs, resolved: Run) -> None:
    margin, weight = resolved.recipe.margin, resolved.recipe.selection.replay.weight
    if margin.reference_free:
        print("\nWithout a reference Δ is not 0 at the start, so no first loss is expected.")
        return
    losses = first_losses(train.margins, margin, resolved.training.beta)
    expected = float(losses[~train.is_buffer].mean())
    shown = f"task {number(expected)}"
    if train.is_buffer.any():
        buffer = float(losses[train.is_buffer].mean())
        expected += weight * buffer
        shown += f", buffer {number(buffer)} x {weight:g}"
    print(f"\nExpected loss at step 0: {number(expected)} ({shown}), as the mean over all rows")


def _show_pairs(train: Pairs, tokenizer: PreTrainedTokenizerBase) -> None:
    first: dict[str, int] = {}
    for index, source in enumerate(train.dataset["source"]):
        first.setdefault(source, index)
    for source, index in first.items():
        row = train.dataset[index]
        print(f"\nThe first pair of {source} as the model sees it ({row['row_id']}, margin {row['margin']:g})")
        for part in ("prompt", "chosen", "rejected"):
            _show_text(part, tokenizer.decode(row[f"{part}_ids"]))
        _show_ends(tokenizer, row["prompt_ids"] + row["chosen_ids"])


def _show_text(part: str, text: str) -> None:
    rest = len(text) - SHOWN_CHARACTERS
    lines = text[:SHOWN_CHARACTERS].splitlines() or [""]
    for line in lines + ([f"… and {rest:,} characters more"] if rest > 0 else []):
        print(f"  {part:8} | {line}")


def _show_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """The first and the last tokens of a conversation by their names."""
    first, last = (" ".join(tokenizer.convert_ids_to_tokens(part)) for part in (ids[:3], ids[-3:]))
    _show_text("tokens", f"{first} … {last}")


def _show_lengths(lengths: dict[str, np.ndarray]) -> None:
    rows = [
        [name, *(number(int(np.quantile(tokens, q, method="nearest"))) for q in (0.5, 0.95, 1))]
        for name, tokens in lengths.items()
    ]
    print_table("Tokens", ["Part", "Median", "95 %", "Longest"], rows)


def inspect_conversations(
    resolved: Run, tokenizer: PreTrainedTokenizerBase | None, findings: Findings
) -> tuple[int, np.ndarray]:
    """Load an SFT stage's conversations and show them: how many there are, and the tokens of all, or of a sample."""
    recipe, args = resolved.recipe, resolved.training

    def load(entry: DatasetEntry) -> Dataset:
        rows = load_conversations([entry], args.seed, args.dataset_num_proc)
        return _noted(rows, entry, findings)

    for entry in recipe.eval_datasets:
        findings.attempt(load, entry)
    count, lengths = 0, {}
    for entry in recipe.datasets:
        rows = findings.attempt(load, entry)
        if rows is None:
            continue
        count += len(rows)
        name = entry.source or entry.path
        print(f"\n{name}: {len(rows):,} conversations")
        if tokenizer is not None:
            sampled = f" (sample of {SAMPLE:,})" if len(rows) > SAMPLE else ""
            lengths[name + sampled] = _show_conversations(entry.path, rows, resolved, tokenizer, findings)
    if not lengths:
        return count, np.array([], int)
    _show_lengths(lengths)
    tokens = np.concatenate([*lengths.values()])
    return count, tokens if args.max_length is None else tokens.clip(max=args.max_length)


def _show_conversations(
    path: str, rows: Dataset, resolved: Run, tokenizer: PreTrainedTokenizerBase, findings: Findings
) -> np.ndarray:
    """The first conversation of a source as the model sees it; returns the tokens of all, or of a sample."""
    max_length = resolved.training.max_length
    sample = rows.select(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)), dtype=int))
    messages = list(lead_with(resolved.recipe.system_message, sample)["messages"])
    tokens = render(tokenizer, messages, open_turn=False)
    prompt = render(tokenizer, [messages[0][:-1]], open_turn=True)[0]
    if tokens[0][: len(prompt)] != prompt:
        findings.note(f"{path}: the template renders a conversation otherwise than its prompt alone")
    _show_text("prompt", tokenizer.decode(tokens[0][: len(prompt)]))
    _show_text("answer", tokenizer.decode(tokens[0][len(prompt) :]))
    _show_ends(tokenizer, tokens[0])
    lengths = np.array([len(ids) for ids in tokens])
    if max_length is not None:
        cut = (lengths > max_length).mean()
        print(f"  {cut:.1%} are longer than max_length {max_length} and are cut there")
    return lengths
