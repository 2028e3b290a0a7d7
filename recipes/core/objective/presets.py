"""The margin's settings and the published methods that are settings of it: plain numbers, no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from core.runtime.described import key

Link = Literal["logistic", "hinge", "squared", "signed", "soft"]

# A preset is explicit numbers; what it leaves out stands at the defaults of `Margin`.
# `beta`, `labels` (the label policy) and `learning_rate` are set along with it unless the recipe names its own.
PRESETS: dict[str, dict[str, float | str | bool]] = {
    # arXiv 2305.18290 Eq. 7
    "dpo": {"link": "logistic"},
    # arXiv 2402.10571: −log σ(βΔ − log(score_w − score_l))
    "odpo": {"link": "logistic", "k": 1.0, "phi": "log", "beta": 0.1},
    # arXiv 2505.20065: −log σ(βΔ − δ(h_l − h_w)), h = 1 − I, δ = 10
    "safedpo": {"link": "logistic", "a": 10.0, "b": 10.0, "beta": 0.1, "labels": "safedpo_t", "learning_rate": 1e-6},
    # arXiv 2405.14734: c = γ, with β = 2 and γ/β = 0.8, the paper's values for a Mistral base; see PROPORTIONAL
    "simpo": {"link": "logistic", "c": 1.6, "beta": 2.0, "length_normalized": True, "reference_free": True},
    # arXiv 2310.12036 Eq. 17: (Δ − 1/(2β))². Not TRL's `ipo`, which divides Δ by the lengths.
    "ipo": {"link": "squared", "c": 0.5},
    # arXiv 2408.15313: t = B3(B1·I_w − I_l) − α with B1 = 3, B3 = 1/(B1 − 1) and α = 0.5
    "bfpo": {"link": "squared", "a": 1.5, "b": 0.5, "c": -0.5, "beta": 0.01},
    "bfpo_noshift": {"link": "squared", "a": 1.5, "b": 0.5, "c": 0.0, "beta": 0.01},
    # arXiv 2504.20106 Eq. 7 is the signed link with p = −1
    "bfpo_signed": {"link": "signed", "a": 1.5, "b": 0.5, "c": -0.5, "p": -1.0, "beta": 0.01},
    "bfpo_soft": {"link": "soft", "a": 1.5, "b": 0.5, "c": -0.5, "beta": 0.01},
}

# What follows β where the recipe has its own: SimPO's setting is the ratio γ/β.
PROPORTIONAL = {"simpo": "c"}

Preset = Literal[tuple(PRESETS)]

# The index is a row's `pair_class`: chosen/rejected.
PAIR_CLASSES = ("safe/safe", "safe/unsafe", "unsafe/safe", "unsafe/unsafe", "unlabelled")
# Figures of every evaluation of pairs, beside those of a class or role (training/metrics.py).
PAIR_METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "accuracy_helpful",
    "accuracy_target", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy",
    "mean_token_accuracy",
)  # fmt: skip


@dataclass
class Margin:
    """The shifted reward margin m = a·I_w − b·I_l + k·φ(score_w − score_l) + c and its link; see `losses.py`."""

    preset: Preset | None = key(None, "a published method's numbers; keys given beside it come before", "bfpo")
    a: float = key(0.0, "weight of I_w, the chosen answer's safety", "1.5")
    b: float = key(0.0, "weight of I_l, the rejected answer's safety", "0.5")
    k: float = key(0.0, "weight of φ(score_w − score_l)", "1.0")
    c: float = key(0.0, "the constant; BFPO's −α, SimPO's γ", "-0.5")
    phi: Literal["identity", "log"] = key("identity", "φ, of the difference of scores", "log")
    indicator: Literal["safe", "severity"] = key("safe", "I: the safety label, or 1 − severity/3", "severity")
    link: Link = key("logistic", "the loss as a function of βΔ and m", "squared")
    scaled: bool = key(False, "with link squared: (βΔ − m)² instead of (Δ − m/β)²", "true")
    p: float = key(1.0, "with link signed: exponent of the weight abs(2m)", "-1.0")
    epsilon: Annotated[float, Field(ge=0, lt=0.5)] = key(
        0.01, "with link soft: the least probability of either order", "0.1"
    )
    length_normalized: bool = key(False, "log-probabilities as means over the answer's tokens", "true")
    reference_free: bool = key(False, "no reference: Δ is of the policy alone", "true")
