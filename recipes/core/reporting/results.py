"""What a run shows before it starts and leaves when it ends: tables, result files, plots, model card."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.trainer_utils import TrainOutput

from core.config.schema import PromptSet
from core.judging.answering import Judged
from core.objective.margins import class_table
from core.objective.presets import PAIR_CLASSES, Margin
from core.reporting.behaviour import NOT_MET, Requirement, behaviour_table, falls_short, shares, write_behaviour
from core.reporting.card import write_card
from core.reporting.tables import (
    before_and_after,
    comparable,
    evaluation_table,
    margin_table,
    off_table,
    print_table,
    stage_table,
)
from core.runtime.ranks import rank
from core.selection.pairs import Pairs
from core.training.records import read_metrics
from core.training.trainer import ConversationTrainer, ShiftedMarginTrainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show_selection(pairs: Pairs, margin: Margin, beta: float, title: str = "training") -> None:
    """Rows that each stage dropped, the pair classes with their margins and first losses, and what to look at."""
    counts = pairs.audit.counts
    print_table(f"Selection ({title}): {counts['kept']:,} of {counts['rows']:,} rows kept", *stage_table(counts))
    header, rows = off_table(counts)
    if rows:
        print_table(f"Rules that are off ({title})", header, rows)
    classes = class_table(pairs.classes, pairs.is_buffer, pairs.margins, margin, beta)
    print_table(f"Margins ({title}): {margin.link} link, beta {beta:g}", *margin_table(classes))
    for answer in ("chosen", "rejected"):
        if count := pairs.cut.get(f"{answer}_cut"):
            print(f"note: {count:,} of {len(pairs.dataset):,} {answer} answers are cut at max_length")
    for warning in pairs.warnings:
        print(f"warning: {warning}", flush=True)


def show_lengths(trainer: ConversationTrainer, conversations: int) -> None:
    """What `max_length` has taken from an SFT run's conversations, which TRL cuts and drops without a word."""
    args, rows = trainer.args, trainer.train_dataset
    if args.packing or args.max_length is None:
        return
    full = sum(len(ids) == args.max_length for ids in rows["input_ids"])
    if full:
        print(f"note: {full:,} of {conversations:,} conversations fill max_length {args.max_length} or are cut there")
    lost = conversations - len(rows)
    if lost:
        print(f"note: {lost:,} of {conversations:,} conversations have no answer within max_length and are left out")


def finish(
    trainer: ShiftedMarginTrainer | ConversationTrainer,
    output: TrainOutput,
    held_out: Pairs | None = None,
    margin: Margin | None = None,
) -> None:
    """
    Evaluate, and write train_results.json, eval_results.json, all_results.json, trainer_state.json, plots/ and the
    model card. Every rank calls it; rank 0 writes. An SFT run has no margin, but a loss and a token accuracy.
    """
    trainer.save_metrics("train", output.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    from core.reporting.figures import draw_plots  # only here: matplotlib takes a while to import

    folder = trainer.args.output_dir
    histograms = None if held_out is None else pair_histograms(trainer, held_out, margin)
    draw_plots(folder, histograms, margin is not None and margin.reference_free)
    card = write_card(folder, trainer.accelerator.num_processes)
    if held_out is not None:
        before, after = before_and_after(comparable(read_metrics(folder), margin.reference_free))
        print_table("Evaluation, before → after" if before else "Evaluation", *evaluation_table(before, after))
    print(f"\nThe model, its card and plots are in {card.parent}", flush=True)


def write_evaluation(
    output_dir: str,
    models: dict[str, str],
    reference: str | None,
    pairs: dict[str, dict[str, float]],
    sets: list[PromptSet],
    judged: dict[str, Judged],
    require: list[Requirement],
) -> None:
    """
    Print what came of an evaluation, and write it to `output_dir`: evaluation.json, behaviour.png; rank 0 alone.

    Raises:
        SystemExit: with `NOT_MET`, on every rank, where the last model does not meet `require`.
    """
    folder = Path(output_dir)
    found = {name: shares(sets, of_model) for name, of_model in judged.items()}
    short = falls_short(require, found.get(list(models)[-1], {}))
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        plain = write_behaviour(folder, found)
        written = {
            "reference": reference,
            "models": {
                name: {"path": path, "pairs": pairs.get(name), "answers": plain.get(name)}
                for name, path in models.items()
            },
        }
        (folder / "evaluation.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        for name, metrics in pairs.items():
            against = f"against {reference}" if reference else "without a reference"
            print_table(f"Preference rows: {name}, {against}", *evaluation_table({}, metrics))
        if found:
            print_table("Answers", *behaviour_table(found))
        print(f"\nAll of its numbers are in {folder / 'evaluation.json'}", flush=True)
        for line in short:
            print(f"require: {line}", flush=True)
    if short:
        raise SystemExit(NOT_MET)


def pair_histograms(trainer: ShiftedMarginTrainer, held_out: Pairs, margin: Margin) -> "Figure":
    """The held-out pairs before and after, from the evaluation just made (`figures.plot_histograms`)."""
    from core.reporting.figures import plot_histograms

    before, after, margins = torch.cat(trainer.evaluated).double().numpy().T
    reward_margins = trainer.beta * (after - before)
    if margin.reference_free or margin.length_normalized:  # `before` is then only what Δ was taken from
        before = None
    classes = held_out.classes
    targets = None
    if margin.link == "squared":  # the one link with a target: βΔ = m
        targets = {PAIR_CLASSES[index]: float(margins[classes == index].mean()) for index in np.unique(classes)}
    return plot_histograms(before, after, reward_margins, classes, targets)
