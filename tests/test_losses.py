"""The loss family against hand-computed tables, finite differences, and each paper's own formula in float64."""

import math
import warnings

import numpy as np
import pytest
import torch

from core.config.schema import LabelPolicy
from core.objective.losses import row_margin, shifted_margin_loss, target_sign
from core.objective.margins import first_losses
from core.objective.presets import PRESETS, Margin

DELTA = [0.0, 2.0, -3.0]
MARGIN = [0.5, -1.0, 1.0]


def loss(link, beta=0.1, **settings):
    delta, margin = (torch.tensor(x, dtype=torch.float64) for x in (DELTA, MARGIN))
    return shifted_margin_loss(delta, margin, beta, link=link, **settings).tolist()


def test_logistic_by_hand():
    """βΔ − m = −0.5, 1.2, −1.3; −log σ(x) = log(1 + e^−x): log 2.648721, log 1.301194, log 4.669297."""
    assert loss("logistic") == pytest.approx([0.974077, 0.263282, 1.541008], abs=1e-6)


def test_hinge_by_hand():
    """1 + m − βΔ = 1.5, 0 − 0.2 → 0, 2 + 0.3 = 2.3."""
    assert loss("hinge") == pytest.approx([1.5, 0.0, 2.3])


def test_squared_by_hand():
    """(Δ − m/β)² = (0 − 5)², (2 + 10)², (−3 − 10)²; scaled: (0 − 0.5)², (0.2 + 1)², (−0.3 − 1)²."""
    assert loss("squared") == pytest.approx([25.0, 144.0, 169.0])
    assert loss("squared", scaled=True) == pytest.approx([0.25, 1.44, 1.69])


def test_signed_by_hand():
    """
    sign(m)·βΔ·abs(2m)^p with p = 1: 0·1 = 0, −0.2·2 = −0.4, −0.3·2 = −0.6; −log σ: log 2, log(1 + e^0.4),
    log(1 + e^0.6). With p = −1 the weights are 1, 1/2, 1/2: 0, −0.1, −0.15.
    """
    assert loss("signed", p=1.0) == pytest.approx([math.log(2), 0.913015, 1.037488], abs=1e-6)
    assert loss("signed", p=-1.0) == pytest.approx([math.log(2), 0.744397, 0.770957], abs=1e-6)


def test_soft_by_hand():
    """
    q = (1 + m)/2 = 0.75, 0 → ε = 0.1, 1 → 0.9; −log σ(±0) = log 2, −log σ(0.2) = 0.598139, −log σ(−0.2) = 0.798139,
    −log σ(−0.3) = 0.854355, −log σ(0.3) = 0.554355. Row 2: 0.1·0.598139 + 0.9·0.798139; row 3: 0.9·0.854355 +
    0.1·0.554355.
    """
    assert loss("soft", epsilon=0.1) == pytest.approx([math.log(2), 0.778139, 0.824355], abs=1e-6)


# The table's last column: the loss at Δ = 0.
LINKS = [
    ("logistic", {}, lambda m, beta: math.log1p(math.exp(m))),
    ("hinge", {}, lambda m, beta: max(0.0, 1 + m)),
    ("squared", {}, lambda m, beta: (m / beta) ** 2),
    ("squared", {"scaled": True}, lambda m, beta: m**2),
    ("signed", {"p": 1.0}, lambda m, beta: math.log(2)),
    ("signed", {"p": -1.0}, lambda m, beta: math.log(2)),
    ("soft", {}, lambda m, beta: math.log(2)),
]


@pytest.mark.parametrize(("link", "settings", "expected"), LINKS)
def test_value_before_training(link, settings, expected):
    """At BFPO's margins, from a column as a dataset gives it: read-only, of which torch would warn."""
    margins = np.array([-1.0, -0.5, 0.5, 1.0, 1.5])
    margins.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = first_losses(margins, Margin(link=link, **settings), 0.01)
    assert values.tolist() == pytest.approx([expected(m, 0.01) for m in margins], rel=1e-12)


@pytest.mark.parametrize(("link", "settings", "_"), LINKS)
def test_gradient_is_that_of_finite_differences(link, settings, _):
    delta = torch.tensor([0.3, 2.0, -3.0, 7.0], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor([0.5, -1.0, 1.0, -0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: shifted_margin_loss(x, margin, 0.2, link=link, **settings), delta)


def test_squared_gradient_vanishes_at_the_target_and_pulls_towards_it():
    """d/dΔ (Δ − m/β)² = 2(Δ − m/β): at m = 1, β = 0.01 the target is 100 nats; at m = −1 it is −100."""
    delta = torch.tensor([100.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    shifted_margin_loss(delta, torch.tensor([1.0, 1.0, -1.0]).double(), 0.01, link="squared").sum().backward()
    assert delta.grad.tolist() == pytest.approx([0.0, -200.0, 200.0])


def test_unknown_link_is_an_error():
    with pytest.raises(ValueError, match="unknown link"):
        shifted_margin_loss(torch.zeros(1), torch.zeros(1), 0.1, link="sigmoid")


def test_target_sign_counts_zero_as_plus():
    assert target_sign(torch.tensor([-0.5, 0.0, 0.5])).tolist() == [-1.0, 1.0, 1.0]


CHOSEN_SAFE = np.array([1.0, 1.0, 0.0, 0.0])  # safe/safe, safe/unsafe, unsafe/safe, unsafe/unsafe
REJECTED_SAFE = np.array([1.0, 0.0, 1.0, 0.0])


def margins_of(preset, gap=None):
    setting = Margin(**{key: value for key, value in PRESETS[preset].items() if key in Margin.__annotations__})
    return row_margin(setting.a, setting.b, setting.k, setting.c, setting.phi, CHOSEN_SAFE, REJECTED_SAFE, gap)


def test_bfpo_table():
    assert margins_of("bfpo").tolist() == [0.5, 1.0, -1.0, -0.5]
    assert margins_of("bfpo_noshift").tolist() == [1.0, 1.5, -0.5, 0.0]
    assert (margins_of("bfpo") / PRESETS["bfpo"]["beta"]).tolist() == pytest.approx([50, 100, -100, -50])


def test_bfpo_is_the_papers_formula():
    """2408.15313: (Δ − t/τ)² with t = B3·(B1·I_w − I_l) − α, B1 = 3, B3 = 1/(B1 − 1), α = 0.5, written out apart."""
    generator = np.random.default_rng(0)
    delta = generator.normal(0, 50, 64)
    chosen, rejected = generator.integers(0, 2, 64).astype(float), generator.integers(0, 2, 64).astype(float)
    b1, alpha, tau = 3.0, 0.5, 0.01
    expected = (delta - ((b1 * chosen - rejected) / (b1 - 1) - alpha) / tau) ** 2
    margin = row_margin(1.5, 0.5, 0.0, -0.5, "identity", chosen, rejected)
    ours = shifted_margin_loss(torch.tensor(delta), torch.tensor(margin), tau, link="squared")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_safedpo_is_the_papers_formula():
    """2505.20065: −log σ(βΔ − δ(h_l − h_w)), h = 1 − I, δ = 10: margins 0, 10, −10, 0."""
    assert margins_of("safedpo").tolist() == [0.0, 10.0, -10.0, 0.0]
    delta = np.linspace(-100, 100, 4)
    harm_gap = (1 - REJECTED_SAFE) - (1 - CHOSEN_SAFE)
    expected = np.log1p(np.exp(-(0.1 * delta - 10 * harm_gap)))
    ours = shifted_margin_loss(torch.tensor(delta), torch.tensor(margins_of("safedpo")), 0.1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_odpo_margin_is_the_log_of_the_score_gap():
    assert margins_of("odpo", np.array([1.0, math.e, 2.0, 0.5])).tolist() == pytest.approx(
        [0.0, 1.0, 0.693147, -0.693147], abs=1e-6
    )


def test_ipo_target_is_half_the_inverse_temperature():
    """2310.12036 Eq. 17: (h − 1/(2τ))²: at τ = 0.1 zero at 5 nats, 25 at 0."""
    value = shifted_margin_loss(torch.tensor([5.0, 0.0]), torch.tensor([0.5, 0.5]), 0.1, link="squared")
    assert value.tolist() == pytest.approx([0.0, 25.0])
    assert margins_of("ipo").tolist() == [0.5] * 4


def test_simpo_margin_is_gamma():
    """2405.14734: −log σ(β(mean log p_w − mean log p_l) − γ) with γ = 0.8·β = 1.6."""
    assert margins_of("simpo").tolist() == [1.6] * 4
    assert PRESETS["simpo"]["beta"] == 2.0


def test_severity_indicator_grades_the_margin():
    """I = 1 − severity/3: severities 0 and 2 give 1.5·1 − 0.5·(1/3) − 0.5 = 0.8333."""
    margin = row_margin(1.5, 0.5, 0.0, -0.5, "identity", np.array([1.0]), np.array([1 / 3]))
    assert margin.tolist() == pytest.approx([0.833333], abs=1e-6)


def test_a_missing_label_is_no_matter_where_its_weight_is_zero():
    nan = np.array([np.nan])
    assert row_margin(0, 0, 0, 1.6, "identity", nan, nan, nan).tolist() == [1.6]


def test_presets_name_known_settings():
    known = {*Margin.__annotations__, "beta", "labels", "learning_rate"} - {"preset"}
    for name, setting in PRESETS.items():
        assert set(setting) <= known, name
    assert PRESETS["safedpo"]["labels"] in LabelPolicy.__args__
