"""What a preference run shows before it starts and leaves when it ends: tables, result files, plots, model card."""

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers.trainer_utils import TrainOutput

from arguments import Margin
from card import write_card
from figures import draw_plots, plot_margin_histogram
from margins import PAIR_CLASSES, class_table
from pairs import Pairs
from report import evaluation_table, evaluations, margin_table, print_table, read_metrics, stage_table
from trainer import ShiftedMarginTrainer


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


def margin_histogram(trainer: ShiftedMarginTrainer, held_out: Pairs, margin: Margin) -> Figure:
    """The held-out pairs before and after, from the evaluation just made (`figures.plot_margin_histogram`)."""
    before, after, margins = torch.cat(trainer.evaluated).double().numpy().T
    classes = held_out.classes
    targets = None
    if margin.link == "squared":  # the one link with a target: βΔ = m
        present = np.unique(classes)
        targets = {PAIR_CLASSES[index]: float(margins[classes == index].mean()) for index in present}
    return plot_margin_histogram(before, after, classes, trainer.beta, targets)
