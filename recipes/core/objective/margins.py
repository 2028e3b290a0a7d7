"""The margin column of preference rows, what a row must carry for it, and the table of pair classes."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset

from core.objective.losses import row_margin, shifted_margin_loss
from core.objective.presets import PAIR_CLASSES, Margin
from core.runtime.errors import RecipeError

MAX_SEVERITY = 3


def number_column(rows: Dataset, name: str) -> np.ndarray:
    """A nullable column as float64, NaN where it is null. Shape: (N,)."""
    return rows.with_format("arrow")[name].cast("double").to_numpy()


def _score_gap(rows: Dataset) -> np.ndarray:
    return number_column(rows, "score_chosen") - number_column(rows, "score_rejected")


def _refuse(rows: Dataset, bad: np.ndarray, what: str) -> None:
    if bad.any():
        names = ", ".join(rows[int(i)]["row_id"] for i in np.flatnonzero(bad)[:5])
        raise RecipeError(f"{int(bad.sum())} of {len(bad)} rows {what}: {names}{', …' if bad.sum() > 5 else ''}")


def pair_classes(rows: Dataset) -> np.ndarray:
    """Index into `PAIR_CLASSES` of each row. Shape: (N,), int64."""
    chosen, rejected = number_column(rows, "chosen_safe"), number_column(rows, "rejected_safe")
    unlabelled = np.isnan(chosen) | np.isnan(rejected)
    return np.where(unlabelled, PAIR_CLASSES.index("unlabelled"), 2 * (chosen == 0) + (rejected == 0))


def row_margins(rows: Dataset, margin: Margin) -> np.ndarray:
    """
    m of each row (`losses.row_margin`). Shape: (N,), float64.

    Raises:
        RecipeError: a row lacks the safety label, severity or score that the margin weighs, a score gap of 0 or
            below under φ = log, or m = 0 under a signed link with p < 0; the message names the rows.
    """
    indicators = []
    for answer, weight, letter in (("chosen", margin.a, "a"), ("rejected", margin.b, "b")):
        if margin.indicator == "severity":
            what, indicator = "severity", 1 - number_column(rows, f"{answer}_severity") / MAX_SEVERITY
        else:
            what, indicator = "safety label", number_column(rows, f"{answer}_safe")
        indicators.append(indicator)
        if weight:
            _refuse(
                rows,
                np.isnan(indicator),
                f"have no {what} for the {answer} answer, which margin.{letter} = {weight:g} weighs (map it under "
                f"columns, or set margin.{letter}: 0)",
            )
    gap = None
    if margin.k:
        gap = _score_gap(rows)
        _refuse(
            rows,
            np.isnan(gap),
            f"have no scores, which margin.k = {margin.k:g} weighs (map score_chosen and score_rejected, "
            "or set margin.k: 0)",
        )
        if margin.phi == "log":
            _refuse(
                rows,
                gap <= 0,
                "have a score gap of 0 or below, which has no logarithm (selection.hygiene.ties: drop takes out the "
                "ties; a better answer with the lower score is a wrong mapping)",
            )
    values = row_margin(margin.a, margin.b, margin.k, margin.c, margin.phi, *indicators, gap)
    if margin.link == "signed" and margin.p < 0:
        _refuse(rows, values == 0, f"have margin 0, whose weight abs(2m)^{margin.p:g} is infinite (set margin.p or c)")
    return values


def margin_warnings(rows: Dataset, margin: Margin, values: np.ndarray, relabelled: bool) -> list[str]:
    """What is legal and seldom meant: reversed targets that a link can't represent, negative log gaps."""
    warnings = []
    negative = int((values < 0).sum())
    if negative and margin.link in ("logistic", "hinge") and not relabelled:
        warnings.append(
            f"{negative} of {len(values)} rows have a margin below 0, and a {margin.link} link cannot represent a "
            "reversed target: it only pushes Δ up more gently. Relabel (selection.labels) or take the squared, signed "
            "or soft link"
        )
    if margin.k and margin.phi == "log":
        below = int((_score_gap(rows) < 1).sum())
        if below:
            warnings.append(f"{below} of {len(values)} rows have a score gap under 1, whose logarithm is negative")
    return warnings


def link_settings(margin: Margin, beta: float) -> dict[str, float | str | bool]:
    """The keyword arguments of `shifted_margin_loss` that a recipe sets."""
    return {"beta": beta} | {name: getattr(margin, name) for name in ("link", "scaled", "p", "epsilon")}


def first_losses(values: Sequence[float] | np.ndarray, margin: Margin, beta: float) -> np.ndarray:
    """The loss of each row at Δ = 0, before any update. Shape: (N,) → (N,)."""
    values = torch.tensor(values, dtype=torch.float64)  # a copy: columns of a dataset are not writable
    return shifted_margin_loss(torch.zeros_like(values), values, **link_settings(margin, beta)).numpy()


def class_table(
    classes: np.ndarray, is_buffer: np.ndarray, values: np.ndarray, margin: Margin, beta: float
) -> list[tuple[str, str, int, float, float, float]]:
    """Per role and pair class: rows, mean margin, its target in nats (m/β), and the mean loss before training."""
    losses = first_losses(values, margin, beta)
    table = []
    for role, buffered in (("task", False), ("buffer", True)):
        for index, name in enumerate(PAIR_CLASSES):
            member = (classes == index) & (is_buffer == buffered)
            if member.any():
                mean = float(values[member].mean())
                table.append((role, name, int(member.sum()), mean, mean / beta, float(losses[member].mean())))
    return table
