"""What stops a run that cannot work: each with its cause, at the update in which it shows."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from core.objective.losses import shifted_margin_loss
from core.runtime.errors import RecipeError

SHOWN = 8  # names in a message
# Nats per square root of the tokens by which two passes of the same weights may differ (batches of other shapes sum
# in another order). Another model's log-probabilities are off by far more.
FLOAT_NOISE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.1}


class Tripwires:
    """
    Mixin for a `Trainer`, left of the class that it guards: `class X(Tripwires, DPOTrainer)`.

    Stops with a `RecipeError` at: nothing to train; a gradient of zero in the first update; a loss or gradient that
    is NaN or infinite; a trained weight that two updates have not moved. Where batches have a column `row` and the
    training set a column `row_id`, the message names the rows.
    """

    _movement: "Movement | None" = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._movement is None:
            trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
            if not trained:
                raise RecipeError("no parameter is trained: every weight is frozen; see trainable_parameters")
            self._movement = Movement(trained)
            self._update: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        elif not self._update:
            self._movement.check()
        rows = inputs.get("row")
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._update.append((rows, loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called once an update, after its last micro-batch; losses are read here, so that there is one wait, not many.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm = float(grad_norm)
        losses = torch.stack([loss for _, loss in self._update]).tolist()
        # DeepSpeed reports −1 for a norm that is not finite. In fp16 that is the business of the gradients' scaler,
        # accelerate's or DeepSpeed's: it leaves the update out.
        norm_is_finite = math.isfinite(norm) and norm >= 0 or self.accelerator.mixed_precision == "fp16"
        if not norm_is_finite or not all(map(math.isfinite, losses)):
            self._stop_at_nan(losses, norm_is_finite)
        if norm == 0 and self._movement.updates == 0:
            raise RecipeError(
                f"step {self.state.global_step + 1}: the gradient is zero, so nothing can be learnt: the loss "
                f"({sum(losses):.4g}) does not depend on the trained weights, or every row is beyond a hinge"
            )
        self._movement.updates += 1
        self._movement.note(self._get_learning_rate(), "adam" in str(self.args.optim).lower())
        self._update.clear()
        return grad_norm

    def _stop_at_nan(self, losses: list[float], norm_is_finite: bool) -> None:
        bad = [rows for (rows, _), loss in zip(self._update, losses, strict=True) if not math.isfinite(loss)]
        what = "loss" if bad else "gradient"
        names = [name for rows in bad or [rows for rows, _ in self._update] for name in self._row_names(rows)]
        if not norm_is_finite and dist.is_initialized():
            # The norm is the same on every rank, so all of them are here; the cause may be in another one's rows.
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (what, names))
            what = "loss" if any(theirs == "loss" for theirs, _ in everyone) else "gradient"
            names = [name for theirs, names in everyone if theirs == what for name in names]
        raise RecipeError(
            f"step {self.state.global_step + 1}: the {what} is NaN or infinite"
            + (f"; rows in the batch: {_list(names)}" if names else "")
            + "; look at these rows, lower learning_rate, or set bf16 instead of fp16; what is saved is from before"
        )

    def _row_names(self, rows: torch.Tensor | None) -> list[str]:
        if rows is None:
            return []
        dataset = self.train_dataset
        named = "row_id" in dataset.column_names
        return [str(dataset[row]["row_id"] if named else row) for row in rows.tolist()]


class Movement:
    """
    Whether the trained weights move. A weight is let off for as long as an update is too small to show in float32: a
    warm-up's first 2e-9 does not change a 1.0. That 16 bits could not show it is no excuse.
    """

    def __init__(self, trained: dict[str, nn.Parameter]) -> None:
        self.pending = trained
        self.before = dict(zip(trained, self._sums(trained), strict=True))
        self.updates = 0  # of this process; a resumed run counts from 0
        self.moving_updates = 0  # those with a learning rate above 0
        self.learning_rate = 0.0
        self.step_is_learning_rate = True

    def note(self, learning_rate: float, step_is_learning_rate: bool) -> None:
        """Take down an update. Adam moves a weight by about the learning rate; others by nobody knows how much."""
        self.moving_updates += learning_rate > 0
        self.learning_rate = max(self.learning_rate, learning_rate)
        self.step_is_learning_rate = step_is_learning_rate

    def check(self) -> None:
        """
        Raises:
            RecipeError: after two updates with a learning rate, a weight is what it was.
        """
        if self.moving_updates < 2 or not self.pending:
            return
        sums = self._sums(self.pending)
        self.pending = {
            name: weight
            for (name, weight), now in zip(self.pending.items(), sums, strict=True)
            if now == self.before[name]
        }
        if not self.pending:
            return
        none_moved = len(self.pending) == len(self.before)
        due = [
            name
            for name, smallest in zip(self.pending, self._smallest_steps(self.pending), strict=True)
            # An expert that no token was sent to has no gradient, and rightly stays.
            if self.learning_rate > smallest and ".experts." not in name
        ]
        if due and (self.step_is_learning_rate or none_moved):
            raise RecipeError(
                f"{len(due)} of {len(self.before)} trained weights have not moved in {self.moving_updates} updates at "
                f"a learning rate of up to {self.learning_rate:.2g}: {_list(due)}; the optimizer does not hold them, "
                "or the loss does not reach them"
            )

    @staticmethod
    @torch.no_grad()
    def _sums(weights: dict[str, nn.Parameter]) -> list[int]:
        """A checksum of each weight's bits, over all ranks where they share it out (ZeRO-3)."""
        kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        parts = [_own_part(weight) for weight in weights.values()]
        sums = torch.stack([part.view(kinds[part.element_size()]).sum(dtype=torch.int64) for part in parts])
        if _is_split(weights):
            dist.all_reduce(sums)
        return sums.tolist()

    @staticmethod
    @torch.no_grad()
    def _smallest_steps(weights: dict[str, nn.Parameter]) -> list[float]:
        """The step that would show in one of twenty of a weight's elements, given its size, in float32."""
        smallest = []
        for weight in weights.values():
            part = _own_part(weight).flatten()
            sample = part[:: max(1, part.numel() // 4096)].abs().float()
            size = sample.quantile(0.05) if len(sample) else torch.zeros((), device=part.device)
            smallest.append(torch.finfo(torch.float32).eps * size)
        stacked = torch.stack(smallest)
        if _is_split(weights):
            dist.all_reduce(stacked, dist.ReduceOp.MAX)
        return stacked.tolist()


def check_first_loss(
    losses: torch.Tensor,
    margin: torch.Tensor,
    gap: torch.Tensor,
    tokens: torch.Tensor,
    link: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """
    Before the first update the policy is the reference, so each loss is its link's value at Δ = 0. With another
    reference (an adapter on the wrong base, cached log-probabilities of other weights) it is not. For every
    micro-batch of a fresh run's first update, unless the loss has no reference or the forward pass has dropout.

    Args:
        losses: loss of each pair. Shape: (B,).
        margin: m. Shape: (B,).
        gap: Δ of token sums, in nats; it is what is held against float noise. Shape: (B,).
        tokens: tokens of both answers of each pair. Shape: (B,).
        link: the settings of `shifted_margin_loss`: beta, link and so on.
        dtype: what the forward pass computes in.

    Raises:
        RecipeError: Δ is not 0 by more than float noise.
    """
    off = (gap.abs() / tokens.sqrt()).mean().item()
    if not math.isfinite(off) or off <= FLOAT_NOISE[dtype]:
        return  # NaN is told with the rows that have it
    at_zero = shifted_margin_loss(torch.zeros_like(margin), margin, **link).mean().item()
    raise RecipeError(
        f"step 1: the loss is {losses.mean().item():.6g} instead of {at_zero:.6g}, the {link['link']} link's value at "
        f"Δ = 0: policy and reference differ by up to {gap.abs().max().item():.3g} nats before the first update, "
        "so the reference is not the model that is trained; check model_name_or_path and adapters, and empty "
        "reference_cache"
    )


def _list(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _is_split(weights: dict[str, nn.Parameter]) -> bool:
    return any(hasattr(weight, "ds_id") for weight in weights.values())


def _own_part(weight: nn.Parameter) -> torch.Tensor:
    """
    What this rank keeps of a weight: all of it, or under ZeRO-3 its share of the optimizer's float32 copy (the
    weights themselves may be of 16 bits, in which small updates do not show), without the padding of the last rank.
    """
    if not hasattr(weight, "ds_id"):
        return weight
    from deepspeed.utils import safe_get_local_fp32_param

    part = safe_get_local_fp32_param(weight)
    if part is None:
        part = weight.ds_tensor
    owned = weight.ds_numel - dist.get_rank() * weight.ds_tensor.ds_numel
    return part.flatten()[: max(0, min(part.numel(), owned))]
