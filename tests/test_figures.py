import json

import numpy as np
from matplotlib.colors import to_hex

from core.objective.presets import PAIR_CLASSES
from core.reporting.figures import COLOURS, CURVES, draw_plots, plot_curves, plot_margin_histogram
from core.training.metrics import GROUPS

RECORDS = [
    {"step": 0, "epoch": 0.0, "eval_loss": 5.0, "eval_safe_unsafe/loss": 6.0},
    {"step": 1, "epoch": 0.5, "loss": 4.0, "safe_unsafe/loss": 4.5, "rewards/margins": 0.1, "buffer/loss": 1.0},
    {"step": 2, "epoch": 1.0, "loss": 3.0, "rewards/margins": 0.2},
    {"step": 2, "epoch": 1.0, "eval_loss": 2.5, "eval_safe_unsafe/loss": 3.5},
]


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def points(line):
    return list(zip(*(np.asarray(data).tolist() for data in line.get_data()), strict=True))


def test_curves_hold_each_group_on_the_panel_of_its_mode():
    figure = plot_curves(RECORDS, CURVES["loss"])
    training, evaluation = figure.axes
    drawn = {name: points(line) for name, line in lines(training).items()}
    assert drawn == {"all": [(1, 4.0), (2, 3.0)], "safe/unsafe": [(1, 4.5)]}  # no roles: they are in the table
    drawn = {name: points(line) for name, line in lines(evaluation).items()}
    assert drawn == {"all": [(0, 5.0), (2, 2.5)], "safe/unsafe": [(0, 6.0), (2, 3.5)]}
    assert (training.get_title(), evaluation.get_title()) == ("training", "evaluation")
    assert training.get_ylabel() == "loss" and training.get_xlabel() == "step (optimizer updates)"
    assert training.get_ylim() == evaluation.get_ylim()
    assert lines(training)["safe/unsafe"].get_marker() == "o"  # a single point has no line to be seen by
    assert to_hex(lines(training)["safe/unsafe"].get_color()).upper() == COLOURS["safe/unsafe"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["all", "safe/unsafe"]


def test_what_is_not_there_is_not_drawn():
    figure = plot_curves(RECORDS, CURVES["margins"])
    assert [axes.get_title() for axes in figure.axes] == ["training"]
    assert plot_curves(RECORDS, CURVES["accuracies"]) is None


def test_every_pair_class_has_its_colour():
    assert {"all", *PAIR_CLASSES} == set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert {name.replace("/", "_") for name in PAIR_CLASSES} < set(GROUPS)


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


def test_margin_histogram_by_hand():
    """β = 0.1. Two safe/safe pairs go from 0 and 2 to 40 and 2 nats: βΔ = 4 and 0; one unsafe/safe to −39: −4."""
    before, after = np.array([0.0, 2.0, 1.0, 5.0]), np.array([40.0, 2.0, -39.0, np.nan])
    classes = np.array([0, 0, 2, 2])
    figure = plot_margin_histogram(before, after, classes, 0.1, {"safe/safe": 0.5, "unsafe/safe": -1.0})
    safe, safe_margin, unsafe, unsafe_margin = figure.axes
    assert safe.get_title(loc="left") == "safe/safe, pairs: 2"
    assert unsafe.get_title(loc="left") == "unsafe/safe, pairs: 1, not finite: 1"

    # 40 bins of the log-probability gaps from −39 to 40, 1.975 wide; and of the margins from −4 to 4, 0.2 wide.
    was, now = safe.containers
    assert heights(was) == {-1.475: 1, 0.5: 1}
    assert heights(now) == {0.5: 1, 38.025: 1}
    assert heights(safe_margin.containers[0]) == {0.0: 1, 3.8: 1}
    assert heights(unsafe_margin.containers[0]) == {-4.0: 1}
    markers = {line.get_label(): line.get_xdata()[0] for line in unsafe_margin.lines}
    assert markers == {"before": 0, "target m": -1.0}
    assert unsafe_margin.get_xlabel() == "reward margin βΔ" and "nats" in unsafe.get_xlabel()


def test_plots_are_drawn_from_the_file_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    histogram = plot_margin_histogram(np.zeros(3), np.ones(3), np.array([0, 1, 4]), 0.1)
    paths = draw_plots(tmp_path, histogram)
    names = ["loss.png", "margins.png", "margin_histogram.png"]
    assert paths == [tmp_path / "plots" / name for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
