"""What a preference run shows before it starts and leaves when it ends: tables, result files, plots, model card."""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers.trainer_utils import TrainOutput

from core.objective.margins import class_table
from core.objective.presets import PAIR_CLASSES, Margin
from core.reporting.card import write_card
from core.reporting.figures import draw_plots, plot_margin_histogram
from core.reporting.tables import evaluation_table, margin_table, print_table, stage_table
from core.selection.pairs import Pairs
from core.training.records import evaluations, read_metrics
from core.training.trainer import ConversationTrainer, ShiftedMarginTrainer


def show_selection(pairs: Pairs, margin: Margin, beta: float, title: str = "training") -> None:
    """Rows that each stage dropped, the pair classes with their margins and first losses, and what to look at."""
    counts = pairs.audit.counts
    print_table(f"Selection ({title}): {counts['kept']:,} of {counts['rows']:,} rows kept", *stage_table(counts))
    classes = class_table(pairs.classes, pairs.is_buffer, pairs.margins, margin, beta)
    print_table(f"Margins ({title}): {margin.link} link, beta {beta:g}", *margin_table(classes))
    cut = {key: count for key, count in pairs.cut.items() if key.endswith("_cut") and count}
    for key, count in cut.items():
        print(f"note: {count:,} of {len(pairs.dataset):,} {key.removesuffix('_cut')} answers are cut at max_length")
    for warning in pairs.warnings:
        print(f"warning: {warning}", flush=True)


def finish(trainer: ShiftedMarginTrainer, output: TrainOutput, held_out: Pairs | None, margin: Margin) -> None:
    """
    Evaluate, and write train_results.json, eval_results.json, all_results.json, trainer_state.json, plots/ and the
    model card. Every rank calls it; rank 0 writes.
    """
    trainer.save_metrics("train", output.metrics)
    histogram = None
    if held_out is not None:
        trainer.save_metrics("eval", trainer.evaluate())
        histogram = margin_histogram(trainer, held_out, margin)
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    folder = trainer.args.output_dir
    draw_plots(folder, histogram)
    card = write_card(folder, trainer.accelerator.num_processes)
    records = evaluations(read_metrics(folder))
    if records:
        before = records[0] if records[0]["step"] == 0 else {}
        print_table("Evaluation, before → after" if before else "Evaluation", *evaluation_table(before, records[-1]))
    print(f"\nThe model, its card and plots are in {card.parent}", flush=True)


def finish_sft(trainer: ConversationTrainer, output: TrainOutput) -> None:
    """The same for an SFT run, which has a loss and a token accuracy."""
    trainer.save_metrics("train", output.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if trainer.is_world_process_zero():
        draw_plots(trainer.args.output_dir)
        card = write_card(trainer.args.output_dir, trainer.accelerator.num_processes)
        print(f"\nThe model, its card and plots are in {card.parent}", flush=True)


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


def write_evaluation(trainer: ShiftedMarginTrainer, metrics: dict[str, float]) -> None:
    """Print an evaluation and write it to `output_dir`/evaluation.json."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print_table("Evaluation", *evaluation_table({}, metrics))
    print(f"\nAll of its numbers are in {folder / 'evaluation.json'}", flush=True)


def margin_histogram(trainer: ShiftedMarginTrainer, held_out: Pairs, margin: Margin) -> Figure:
    """The held-out pairs before and after, from the evaluation just made (`figures.plot_margin_histogram`)."""
    before, after, margins = torch.cat(trainer.evaluated).double().numpy().T
    classes = held_out.classes
    targets = None
    if margin.link == "squared":  # the one link with a target: βΔ = m
        present = np.unique(classes)
        targets = {PAIR_CLASSES[index]: float(margins[classes == index].mean()) for index in present}
    return plot_margin_histogram(before, after, classes, trainer.beta, targets)
