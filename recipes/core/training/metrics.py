"""Means over pairs, overall, per pair class and role: exact under accumulation, ranks and uneven batches."""

from collections.abc import Callable

import torch

from core.objective.presets import PAIR_CLASSES

PAIR_STATS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "accuracy_helpful",
    "accuracy_target",
    "logps/chosen",
    "logps/rejected",
)
# Fields of `prefix.PairOutputs`.
TOKEN_STATS = ("chosen_tokens", "rejected_tokens", "chosen_logits", "rejected_logits", "entropy", "chosen_top1")
# "" is every pair. The slash of a pair class would read as a level of the metric's name.
GROUPS = ("", *(name.replace("/", "_") for name in PAIR_CLASSES), "task", "buffer")


class PairMetrics:
    """
    Sums and counts since the last report. Sums stay on the device and are reduced once a report, so that a
    micro-batch costs no synchronisation; a mean of micro-batch means would weigh rare classes wrongly.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(len(GROUPS), 1 + len(PAIR_STATS), dtype=torch.float64, device=self.device)
        self.token_sums = torch.zeros(len(TOKEN_STATS), dtype=torch.float64, device=self.device)
        self.empty = True

    def add(
        self, stats: torch.Tensor, tokens: torch.Tensor, pair_class: torch.Tensor, is_buffer: torch.Tensor
    ) -> None:
        """
        Args:
            stats: the columns of `PAIR_STATS`. Shape: (B, 8).
            tokens: the columns of `TOKEN_STATS`, summed over each pair's tokens. Shape: (B, 6).
            pair_class: index into `PAIR_CLASSES`. Shape: (B,).
            is_buffer: whether a row is replayed. Shape: (B,), bool.
        """
        is_buffer = is_buffer.unsqueeze(1)
        classes = pair_class.unsqueeze(1) == torch.arange(len(PAIR_CLASSES), device=pair_class.device)
        member = torch.cat([torch.ones_like(is_buffer), classes, ~is_buffer, is_buffer], dim=1)  # (B, groups)
        counted = torch.cat([torch.ones_like(stats[:, :1]), stats], dim=1)
        self.sums += member.double().T @ counted.double()
        self.token_sums += tokens.double().sum(dim=0)
        self.empty = False

    def report(
        self, buffer_weight: float, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> dict[str, float]:
        """
        Means by name (a group's as `group/name`), and a fresh start.

        Args:
            buffer_weight: λ of the overall loss: mean over task pairs + λ·mean over buffer pairs.
            reduce: sums a tensor over the ranks; None where every rank has seen all pairs.
        """
        sums, tokens = ((reduce(part) if reduce else part).tolist() for part in (self.sums, self.token_sums))
        self.reset()
        report = {}
        for group, (count, *totals) in zip(GROUPS, sums, strict=True):
            if count:
                prefix = f"{group}/" if group else ""
                report |= {f"{prefix}{name}": total / count for name, total in zip(PAIR_STATS, totals, strict=True)}
        if "task/loss" in report and "buffer/loss" in report:
            report["loss"] = report["task/loss"] + buffer_weight * report["buffer/loss"]
        total = dict(zip(TOKEN_STATS, tokens, strict=True))
        both = total["chosen_tokens"] + total["rejected_tokens"]
        return report | {
            "rewards/accuracies": report["accuracy_helpful"],  # TRL's name of the same number
            "logits/chosen": total["chosen_logits"] / total["chosen_tokens"],
            "logits/rejected": total["rejected_logits"] / total["rejected_tokens"],
            "entropy": total["entropy"] / both,
            "mean_token_accuracy": total["chosen_top1"] / total["chosen_tokens"],
        }
