"""The plots of a run: curves against steps from metrics.jsonl, and histograms of its pairs before and after."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.objective.presets import PAIR_CLASSES
from core.reporting.tables import ROLES, comparable, group_name, groups_apart
from core.training.records import Record, read_metrics, series

# Okabe and Ito's colours, told apart by colour-blind readers too; black is more than one pair class.
COLOURS = {
    "all": "black",
    "task": "black",
    "buffer": "black",
    "safe/safe": "#0072B2",
    "safe/unsafe": "#009E73",
    "unsafe/safe": "#D55E00",
    "unsafe/unsafe": "#CC79A7",
    "unlabelled": "#E69F00",
}
DASHES = {"task": "--", "buffer": ":"}
# File name → its panels from above: metric and axis label.
CURVES = {
    "loss": {"loss": "loss\nmean over pairs"},
    "rewards": {
        "rewards/chosen": "chosen reward\nβ·log(π / reference)",
        "rewards/rejected": "rejected reward\nβ·log(π / reference)",
    },
    "reward_margins": {"rewards/margins": "reward margin βΔ"},
    "accuracies": {"accuracy_helpful": "helpful accuracy\nΔ > 0", "accuracy_target": "target accuracy\nsign(m)·Δ > 0"},
}
MARKED_UP_TO = 30  # points, each of which is then marked: a single one has no line
SMOOTHED_ABOVE = 60  # points, from which a curve is drawn as a running mean over its faint points
BINS = 40


def draw_plots(
    output_dir: str | os.PathLike, histograms: Figure | None = None, reference_free: bool = False
) -> list[Path]:
    """Draw `output_dir/plots/*.png` from the run's metrics.jsonl (and save the histograms); their paths."""
    records = comparable(read_metrics(output_dir), reference_free)
    figures = {name: plot_curves(records, metrics) for name, metrics in CURVES.items()} | {"histograms": histograms}
    folder = Path(output_dir) / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def plot_curves(records: list[Record], metrics: Mapping[str, str]) -> Figure | None:
    """
    One row of panels per metric, training on the left and evaluation on the right on the same scale. Panels without
    data are left out; None where there is none at all.
    """
    keys = {key for record in records for key in record}
    modes = {
        title: prefix
        for title, prefix in (("training", ""), ("evaluation", "eval_"))
        if any(prefix + metric in keys for metric in metrics)
    }
    if not modes:
        return None
    figure = Figure(figsize=(1 + 4.5 * len(modes), 0.9 + 2.6 * len(metrics)), dpi=120, layout="constrained")
    panels = figure.subplots(len(metrics), len(modes), sharex=True, sharey="row", squeeze=False)
    for row, (metric, label) in zip(panels, metrics.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, prefix in zip(row, modes.values(), strict=True):
            for name, key in lines(keys, prefix, metric).items():
                _draw_curve(axes, *series(records, key), name)
            axes.grid(alpha=0.3)
            if metric.startswith("accuracy"):
                axes.set_ylim(-0.03, 1.03)
                axes.axhline(0.5, color="grey", linewidth=0.8, zorder=1)
            elif metric.startswith("rewards"):
                axes.axhline(0, color="grey", linewidth=0.8, zorder=1)
    for axes, (title, prefix) in zip(panels[0], modes.items(), strict=True):
        window = _window(len(series(records, prefix + next(iter(metrics)))[0]))
        axes.set_title(f"{title} (mean of {window} logged steps)" if window > 1 else title)
    for axes in panels[-1]:
        axes.set_xlabel("step (optimizer updates)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = {
        name: handle for axes in panels.flat for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in COLOURS if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=8, frameon=False)
    return figure


def lines(keys: set[str], prefix: str, metric: str) -> dict[str, str]:
    """
    Name → key of each line on a panel, all of them means over pairs: all pairs, and the pair classes if there are two
    or more (`groups_apart`). The overall loss of a run with a buffer is no mean but task + λ·buffer; the means of the
    two roles stand in its place.
    """
    groups = groups_apart(keys, prefix)
    if metric == "loss" and "buffer" in groups:
        groups.remove("")
    else:
        groups = [group for group in groups if group not in ROLES]  # of other metrics they are in the evaluation table
    named = {group_name(group): f"{prefix}{group}/{metric}" if group else prefix + metric for group in groups}
    return {name: key for name, key in named.items() if key in keys}


def _window(points: int) -> int:
    """Points that a running mean takes together, so that a long noisy curve can still be read."""
    return max(1, points // 30) if points > SMOOTHED_ABOVE else 1


def _draw_curve(axes: Axes, steps: list[int], values: list[float], name: str) -> None:
    style = {"color": COLOURS[name], "linestyle": DASHES.get(name, "-"), "zorder": 3}
    style["linewidth"] = 2.2 if COLOURS[name] == "black" else 1.4
    if len(steps) <= MARKED_UP_TO:
        style |= {"marker": "o", "markersize": 4}
    window = _window(len(steps))
    if window > 1:
        axes.plot(steps, values, color=COLOURS[name], linewidth=0.6, alpha=0.25, zorder=2)
        # A window that is whole at both ends, so that the curve isn't pulled to 0 there.
        values = np.convolve(values, np.ones(window), "valid") / window
        steps = np.convolve(steps, np.ones(window), "valid") / window
    axes.plot(steps, values, label=name, **style)


def plot_histograms(
    before: np.ndarray | None,
    after: np.ndarray,
    reward_margins: np.ndarray,
    classes: np.ndarray,
    targets: Mapping[str, float] | None = None,
) -> Figure:
    """
    The same pairs before and after training, a row of panels per pair class that has pairs. Left: the model's own
    preference, log π(y_w) − log π(y_l); right: the reward margin βΔ, what training has added to it (0 before).

    Args:
        before, after: log π(y_w) − log π(y_l) in nats under the reference and under the policy; `before` is None where
            no reference is known. Shape: (N,).
        reward_margins: βΔ. Shape: (N,).
        classes: index into `PAIR_CLASSES`. Shape: (N,).
        targets: pair class → the βΔ that the loss asks for, where its link has one (squared: m).
    """
    assert after.shape == reward_margins.shape == classes.shape
    present = [index for index in range(len(PAIR_CLASSES)) if (classes == index).any()]
    figure = Figure(figsize=(10, 0.9 + 1.9 * len(present)), dpi=120, layout="constrained")
    panels = figure.subplots(len(present), 2, sharex="col", squeeze=False)
    finite = np.isfinite(reward_margins)
    gaps = after[finite] if before is None else np.concatenate([before[finite], after[finite]])
    left_edges = np.histogram_bin_edges(gaps, bins=BINS)
    right_edges = np.histogram_bin_edges(reward_margins[finite], bins=BINS)
    for index, (left, right) in zip(present, panels, strict=True):
        name = PAIR_CLASSES[index]
        drawn = (classes == index) & finite
        lost = int((classes == index).sum() - drawn.sum())
        title = f"{name}, pairs: {int(drawn.sum()):,}" + (f", not finite: {lost}" if lost else "")
        left.set_title(title, loc="left", fontsize="medium")
        if before is not None:
            left.hist(before[drawn], bins=left_edges, color="0.55", alpha=0.7, label="before")
            right.axvline(0, color="0.55", linewidth=1.5, label="before")
        left.hist(after[drawn], bins=left_edges, color=COLOURS[name], alpha=0.6, label="after")
        left.set_ylabel("pairs")
        right.hist(reward_margins[drawn], bins=right_edges, color=COLOURS[name], alpha=0.6, label="after")
        if targets and name in targets:
            right.axvline(targets[name], color="black", linestyle="--", linewidth=1.5, label="target m")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            axes.legend(frameon=False, fontsize="small")
    panels[-1, 0].set_xlabel("log π(chosen) − log π(rejected) (nats)")
    panels[-1, 1].set_xlabel("reward margin βΔ")
    return figure
