import json

import numpy as np
from matplotlib.colors import to_hex

from core.objective.presets import PAIR_CLASSES
from core.reporting.figures import COLOURS, CURVES, draw_plots, plot_curves, plot_histograms

CLASSES = {"safe_unsafe/loss": 6.0, "safe_safe/loss": 2.0}
RECORDS = [
    {"step": 0, "epoch": 0.0, "eval_loss": 4.0, **{f"eval_{key}": value for key, value in CLASSES.items()}},
    {"step": 1, "epoch": 0.5, "loss": 5.0, "task/loss": 4.5, "buffer/loss": 0.5, **CLASSES, "rewards/margins": 0.1},
    {"step": 2, "epoch": 1.0, "loss": 4.0, "task/loss": 3.0, "buffer/loss": 1.0, "rewards/margins": 0.2},
    {"step": 2, "epoch": 1.0, "eval_loss": 2.5, "eval_safe_unsafe/loss": 3.5, "eval_safe_safe/loss": 1.5},
]


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def points(line):
    return list(zip(*(np.asarray(data).tolist() for data in line.get_data()), strict=True))


def test_curves_hold_each_group_on_the_panel_of_its_mode():
    """All are means: in training, where the overall loss is task + λ·buffer, the roles stand in its place."""
    figure = plot_curves(RECORDS, CURVES["loss"])
    training, evaluation = figure.axes
    drawn = {name: points(line) for name, line in lines(training).items()}
    classes = {"safe/unsafe": [(1, 6.0)], "safe/safe": [(1, 2.0)]}
    assert drawn == {"task": [(1, 4.5), (2, 3.0)], "buffer": [(1, 0.5), (2, 1.0)]} | classes
    drawn = {name: points(line) for name, line in lines(evaluation).items()}
    classes = {"safe/unsafe": [(0, 6.0), (2, 3.5)], "safe/safe": [(0, 2.0), (2, 1.5)]}
    assert drawn == {"all": [(0, 4.0), (2, 2.5)]} | classes
    assert (training.get_title(), evaluation.get_title()) == ("training", "evaluation")
    assert "mean over pairs" in training.get_ylabel() and training.get_xlabel() == "step (optimizer updates)"
    assert training.get_ylim() == evaluation.get_ylim()
    assert lines(training)["safe/unsafe"].get_marker() == "o"  # a single point has no line to be seen by
    assert to_hex(lines(training)["safe/unsafe"].get_color()).upper() == COLOURS["safe/unsafe"]
    (legend,) = figure.legends
    names = ["all", "task", "buffer", "safe/safe", "safe/unsafe"]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len({line.get_linestyle() for line in legend.get_lines()[:3]}) == 3  # all three are black


def test_an_only_class_is_one_line():
    records = [{"step": step, "loss": 1.0, "task/loss": 1.0, "unlabelled/loss": 1.0} for step in (1, 2)]
    (axes,) = plot_curves(records, CURVES["loss"]).axes
    assert list(lines(axes)) == ["all"]


def test_what_is_not_there_is_not_drawn():
    figure = plot_curves(RECORDS, CURVES["reward_margins"])
    assert [axes.get_title() for axes in figure.axes] == ["training"]
    assert plot_curves(RECORDS, CURVES["accuracies"]) is None


def test_every_pair_class_has_its_colour():
    colours = {name: colour for name, colour in COLOURS.items() if name in PAIR_CLASSES}
    assert set(colours) == set(PAIR_CLASSES) and len({"black", *colours.values()}) == 1 + len(PAIR_CLASSES)


def test_a_long_curve_is_a_running_mean_over_its_points():
    """90 points, so means of 3: the first is at step (1 + 2 + 3)/3 = 2, and of a straight line it is on the line."""
    records = [{"step": step, "loss": 10.0 * step} for step in range(1, 91)]
    (axes,) = plot_curves(records, CURVES["loss"]).axes
    faint, mean = axes.lines
    assert points(faint) == [(step, 10.0 * step) for step in range(1, 91)]
    np.testing.assert_allclose(points(mean), [(step, 10.0 * step) for step in range(2, 90)])
    assert axes.get_title() == "training (mean of 3 logged steps)"


def test_nan_is_a_gap():
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 3.0}]
    (axes,) = plot_curves(records, CURVES["loss"]).axes
    values = lines(axes)["all"].get_ydata()
    assert np.isnan(values[1]) and values[2] == 3.0


def heights(container):
    """Left edge → height of the bars that are not empty."""
    return {round(bar.get_x(), 6): bar.get_height() for bar in container if bar.get_height()}


def test_histograms_by_hand():
    """β = 0.1. Two safe/safe pairs go from 0 and 2 to 40 and 2 nats: βΔ = 4 and 0; one unsafe/safe to −39: −4."""
    before, after = np.array([0.0, 2.0, 1.0, 5.0]), np.array([40.0, 2.0, -39.0, np.nan])
    classes = np.array([0, 0, 2, 2])
    reward_margins = 0.1 * (after - before)
    figure = plot_histograms(before, after, reward_margins, classes, {"safe/safe": 0.5, "unsafe/safe": -1.0})
    safe, safe_margin, unsafe, unsafe_margin = figure.axes
    assert safe.get_title(loc="left") == "safe/safe, pairs: 2"
    assert unsafe.get_title(loc="left") == "unsafe/safe, pairs: 1, not finite: 1"

    # 40 bins of the log-probability gaps from −39 to 40, 1.975 wide; and of the reward margins from −4 to 4, 0.2 wide.
    was, now = safe.containers
    assert heights(was) == {-1.475: 1, 0.5: 1}
    assert heights(now) == {0.5: 1, 38.025: 1}
    assert heights(safe_margin.containers[0]) == {0.0: 1, 3.8: 1}
    assert heights(unsafe_margin.containers[0]) == {-4.0: 1}
    markers = {line.get_label(): line.get_xdata()[0] for line in unsafe_margin.lines}
    assert markers == {"before": 0, "target m": -1.0}
    assert unsafe_margin.get_xlabel() == "reward margin βΔ" and "nats" in unsafe.get_xlabel()

    without = plot_histograms(None, after, reward_margins, classes)  # a run without a reference has no before
    assert [len(axes.containers) for axes in without.axes] == [1, 1, 1, 1]
    assert not any(axes.lines for axes in without.axes)


def test_plots_are_drawn_from_the_file_alone(tmp_path):
    """And the accuracy of step 0, where Δ is 0, is no point of a curve unless there is no reference."""
    accuracies = [{"step": 0, "eval_loss": 1.0, "eval_accuracy_helpful": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS + accuracies))
    histograms = plot_histograms(np.zeros(3), np.ones(3), np.ones(3), np.array([0, 1, 4]))
    paths = draw_plots(tmp_path, histograms)
    names = ["loss.png", "reward_margins.png", "histograms.png"]
    assert paths == [tmp_path / "plots" / name for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert tmp_path / "plots" / "accuracies.png" in draw_plots(tmp_path, reference_free=True)
