"""The shifted reward margin: one number per row, and the loss that it shifts.

Δ is in nats, from token-summed log-probabilities (or token means with length normalisation):

    Δ = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))

`w` is the response labelled better, `l` the other, and m the margin of the row:

    m = a·I_w − b·I_l + k·φ(score_w − score_l) + c

DPO, IPO, SimPO, ODPO, SafeDPO and BFPO are settings of (a, b, k, φ, c) and of the link below: see `presets.PRESETS`.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from core.objective.presets import Link


def shifted_margin_loss(
    delta: torch.Tensor,
    margin: torch.Tensor,
    beta: float,
    link: Link = "logistic",
    scaled: bool = False,
    p: float = 1.0,
    epsilon: float = 0.01,
) -> torch.Tensor:
    """
    Loss of each pair under a shifted reward margin.

    | link     | loss                                            | at Δ = 0           |
    |----------|-------------------------------------------------|--------------------|
    | logistic | −log σ(βΔ − m)                                  | softplus(m)        |
    | hinge    | max(0, 1 + m − βΔ)                              | max(0, 1 + m)      |
    | squared  | (Δ − m/β)², or (βΔ − m)² when `scaled`          | (m/β)², or m²      |
    | signed   | −log σ(sign(m)·βΔ·abs(2m)^p), sign(0) = 1       | ln 2               |
    | soft     | −q·log σ(βΔ) − (1−q)·log σ(−βΔ)                 | ln 2               |
    |          | with q = clip((1 + m)/2, ε, 1 − ε)              |                    |

    Limiting cases: at m = 0 logistic is DPO (2305.18290 Eq. 7) and hinge is SLiC; at m = 1/2 squared is IPO
    (2310.12036 Eq. 17); with BFPO's table squared is 2408.15313 and signed with p = −1 is 2504.20106 Eq. 7.

    Args:
        delta: Δ in nats. Shape: (B,).
        margin: m, without a unit (it is compared with βΔ). Shape: (B,).
        beta: weight of the KL term, per nat; above 0.
        link: which row of the table.
        scaled: squared link only: measure in units of βΔ, which divides the loss by β⁻².
        p: signed link only: exponent of the weight abs(2m).
        epsilon: soft link only: ε, the least probability given to either order.

    Returns:
        The loss of each pair. Shape: (B,).
    """
    if link == "logistic":
        return -F.logsigmoid(beta * delta - margin)
    if link == "hinge":
        return torch.relu(1 + margin - beta * delta)
    if link == "squared":
        return (beta * delta - margin) ** 2 if scaled else (delta - margin / beta) ** 2
    if link == "signed":
        return -F.logsigmoid(target_sign(margin) * beta * delta * (2 * margin).abs() ** p)
    if link == "soft":
        q = ((1 + margin) / 2).clamp(epsilon, 1 - epsilon)
        return -q * F.logsigmoid(beta * delta) - (1 - q) * F.logsigmoid(-beta * delta)
    raise ValueError(f"unknown link: {link}")


def target_sign(margin: torch.Tensor) -> torch.Tensor:
    """The order that a margin asks for: +1 where m ≥ 0 (keep the label), −1 where m < 0. Shape: (B,) → (B,)."""
    return torch.where(margin < 0, -1.0, 1.0).to(margin.dtype)


def row_margin(
    a: float,
    b: float,
    k: float,
    c: float,
    phi: Literal["identity", "log"],
    indicator_chosen: np.ndarray,
    indicator_rejected: np.ndarray,
    score_gap: np.ndarray | None = None,
) -> np.ndarray:
    """
    The margin of each row: m = a·I_w − b·I_l + k·φ(score_w − score_l) + c.

    Args:
        a, b, k, c, phi: the setting; see `presets.PRESETS`.
        indicator_chosen, indicator_rejected: I_w and I_l: 1 for a safe response, 0 for an unsafe one, or
            1 − severity/3. Shape: (N,).
        score_gap: score_w − score_l, needed when k is not 0; above 0 where φ is log. Shape: (N,).

    Returns:
        m in float64. Shape: (N,).
    """
    # 0·NaN is NaN: a response without a label may only stand where its weight is 0.
    margin = np.full(len(indicator_chosen), float(c))
    if a:
        margin += a * np.asarray(indicator_chosen, dtype=np.float64)
    if b:
        margin -= b * np.asarray(indicator_rejected, dtype=np.float64)
    if k:
        gap = np.asarray(score_gap, dtype=np.float64)
        margin += k * (np.log(gap) if phi == "log" else gap)
    return margin
