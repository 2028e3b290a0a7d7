"""The plots of a run: curves against steps from metrics.jsonl, and the margin histogram before and after."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.objective.presets import PAIR_CLASSES
from core.reporting.tables import group_name
from core.training.metrics import GROUPS
from core.training.records import Record, read_metrics, series

# Okabe and Ito's colours, told apart by colour-blind readers too; black is all pairs.
COLOURS = {
    "all": "black",
    "safe/safe": "#0072B2",
    "safe/unsafe": "#009E73",
    "unsafe/safe": "#D55E00",
    "unsafe/unsafe": "#CC79A7",
    "unlabelled": "#E69F00",
}
# File name → its panels from above: metric and axis label.
CURVES = {
    "loss": {"loss": "loss"},
    "rewards": {
        "rewards/chosen": "chosen reward\nβ·log(π / reference)",
        "rewards/rejected": "rejected reward\nβ·log(π / reference)",
    },
    "margins": {"rewards/margins": "reward margin βΔ"},
    "accuracies": {"accuracy_helpful": "helpful accuracy\nΔ > 0", "accuracy_target": "target accuracy\nsign(m)·Δ > 0"},
}
MARKED_UP_TO = 30  # points, each of which is then marked: a single one has no line
SMOOTHED_ABOVE = 60  # points, from which a curve is drawn as a running mean over its faint points
BINS = 40


def plot_curves(records: list[Record], metrics: Mapping[str, str]) -> Figure | None:
    """
    One row of panels per metric, training on the left and evaluation on the right on the same scale; a line for all
    pairs and one per pair class. Panels without data are left out; None where there is none at all.
    """
    modes = [
        (title, prefix)
        for title, prefix in (("training", ""), ("evaluation", "eval_"))
        if any(series(records, prefix + metric)[0] for metric in metrics)
    ]
    if not modes:
        return None
    figure = Figure(figsize=(1 + 4.5 * len(modes), 0.9 + 2.6 * len(metrics)), dpi=120, layout="constrained")
    panels = figure.subplots(len(metrics), len(modes), sharex=True, sharey="row", squeeze=False)
    for row, (metric, label) in zip(panels, metrics.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, (_, prefix) in zip(row, modes, strict=True):
            for group in GROUPS:
                if group_name(group) in COLOURS:  # roles are in the evaluation table
                    key = f"{prefix}{group}/{metric}" if group else prefix + metric
                    _draw_curve(axes, *series(records, key), name=group_name(group))
            axes.grid(alpha=0.3)
            if metric.startswith("accuracy"):
                axes.set_ylim(-0.03, 1.03)
                axes.axhline(0.5, color="grey", linewidth=0.8, zorder=1)
            elif metric.startswith("rewards"):
                axes.axhline(0, color="grey", linewidth=0.8, zorder=1)
    for axes, (title, prefix) in zip(panels[0], modes, strict=True):
        window = _window(len(series(records, prefix + next(iter(metrics)))[0]))
        axes.set_title(f"{title} (mean of {window} logged steps)" if window > 1 else title)
    for axes in panels[-1]:
        axes.set_xlabel("step (optimizer updates)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, panels)
    return figure


def _window(points: int) -> int:
    """Points that a running mean takes together, so that a long noisy curve can still be read."""
    return max(1, points // 30) if points > SMOOTHED_ABOVE else 1


def _draw_curve(axes: Axes, steps: list[int], values: list[float], name: str) -> None:
    if not steps:
        return
    style = {"color": COLOURS[name], "linewidth": 2.2 if name == "all" else 1.4, "zorder": 3}
    if len(steps) <= MARKED_UP_TO:
        style |= {"marker": "o", "markersize": 4}
    window = _window(len(steps))
    if window > 1:
        axes.plot(steps, values, color=COLOURS[name], linewidth=0.6, alpha=0.25, zorder=2)
        # A window that is whole at both ends, so that the curve isn't pulled to 0 there.
        values = np.convolve(values, np.ones(window), "valid") / window
        steps = np.convolve(steps, np.ones(window), "valid") / window
    axes.plot(steps, values, label=name, **style)


def _legend(figure: Figure, panels: np.ndarray) -> None:
    handles = {}
    for axes in panels.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    names = [name for name in COLOURS if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False)


def plot_margin_histogram(
    before: np.ndarray, after: np.ndarray, classes: np.ndarray, beta: float, targets: Mapping[str, float] | None = None
) -> Figure:
    """
    The same pairs before and after training, a row of panels per pair class that has pairs. Left: the model's own
    preference, log π(y_w) − log π(y_l); right: the reward margin βΔ, what training has added to it (0 before).

    Args:
        before, after: log π(y_w) − log π(y_l) in nats under the reference and under the policy. Shape: (N,).
        classes: index into `PAIR_CLASSES`. Shape: (N,).
        beta: β, per nat.
        targets: pair class → the βΔ that the loss asks for, where its link has one (squared: m).
    """
    assert before.shape == after.shape == classes.shape
    present = [index for index in range(len(PAIR_CLASSES)) if (classes == index).any()]
    figure = Figure(figsize=(10, 0.9 + 1.9 * len(present)), dpi=120, layout="constrained")
    panels = figure.subplots(len(present), 2, sharex="col", squeeze=False)
    margins = beta * (after - before)
    finite = np.isfinite(margins)
    gap_edges = np.histogram_bin_edges(np.concatenate([before[finite], after[finite]]), bins=BINS)
    margin_edges = np.histogram_bin_edges(margins[finite], bins=BINS)
    for index, (left, right) in zip(present, panels, strict=True):
        name = PAIR_CLASSES[index]
        drawn = (classes == index) & finite
        lost = int((classes == index).sum() - drawn.sum())
        title = f"{name}, pairs: {int(drawn.sum()):,}" + (f", not finite: {lost}" if lost else "")
        left.set_title(title, loc="left", fontsize="medium")
        left.hist(before[drawn], bins=gap_edges, color="0.55", alpha=0.7, label="before")
        left.hist(after[drawn], bins=gap_edges, color=COLOURS[name], alpha=0.6, label="after")
        left.set_ylabel("pairs")
        right.hist(margins[drawn], bins=margin_edges, color=COLOURS[name], alpha=0.6, label="after")
        right.axvline(0, color="0.55", linewidth=1.5, label="before")
        if targets and name in targets:
            right.axvline(targets[name], color="black", linestyle="--", linewidth=1.5, label="target m")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            axes.legend(frameon=False, fontsize="small")
    panels[-1, 0].set_xlabel("log π(chosen) − log π(rejected) (nats)")
    panels[-1, 1].set_xlabel("reward margin βΔ")
    return figure


def draw_plots(output_dir: str | os.PathLike, histogram: Figure | None = None) -> list[Path]:
    """Draw `output_dir/plots/*.png` from the run's metrics.jsonl (and save the histogram); their paths."""
    records = read_metrics(output_dir)
    figures = {name: plot_curves(records, metrics) for name, metrics in CURVES.items()}
    figures["margin_histogram"] = histogram
    folder = Path(output_dir) / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths
