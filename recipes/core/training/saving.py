"""The model that a run ends with: on the disk before anything else is tried, rounded once, and said how."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import ModelConfig

from core.modeling.policy import stored_config
from core.modeling.precision import dtype_name, moves, stored_dtype


class SavesFinal:
    """
    Mixin for a `Trainer`: `class X(SavesFinal, DPOTrainer)`.

    After the last update the model is written before the last evaluation and whatever may fail after it. Checkpoints
    hold what is trained in float32, so that a run goes on bit for bit; the final model has the dtype of the model that
    training began with, or `save_dtype`. Where that would give back more than half of the values that training has
    moved, as after a short run, it has float32 unless the recipe insists.
    """

    begun_from: ModelConfig | None = None  # without it the model is saved as it is held
    save_dtype: str | None = None
    _final_is_saved = False

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.begun_from is not None and self.state.global_step >= self.state.max_steps:
            self.save_final()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def save_final(self) -> None:
        """On every rank; once, or again where the best checkpoint has been loaded since."""
        if self._final_is_saved and not self.args.load_best_model_at_end:
            return
        self._final_is_saved = True
        dtype = None
        if self.args.deepspeed_plugin is None and self.args.should_save:  # DeepSpeed's are in 16 bits anyway
            dtype = self._final_dtype()
        with rounded(self.model, dtype):
            self.save_model()

    def _final_dtype(self) -> torch.dtype | None:
        """The dtype to round to; None: as held. A line tells what it costs."""
        model, base = self.model, self.begun_from
        asked = self.save_dtype and getattr(torch, self.save_dtype)
        if isinstance(model, PeftModel):
            return asked
        dtype = asked or stored_dtype(stored_config(base))
        if dtype == torch.float32:
            return None
        found = moves(model, base.model_name_or_path, base.model_revision, dtype)
        name = dtype_name(dtype)
        if found.known == 0:
            print(f"note: the final model is saved in {name}, rounded once", flush=True)
        elif asked is None and 2 * found.given_back > found.moved:
            print(
                f"note: the final model is saved in float32: {found} would be given back by rounding to {name}, the "
                f"dtype of the model that training began with (save_dtype: {name} rounds all the same)",
                flush=True,
            )
            return None
        else:
            print(
                f"note: the final model is saved in {name}, rounded once: {found} were given back by that "
                "(save_dtype: float32 keeps all)",
                flush=True,
            )
        return dtype

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.deepspeed_plugin is not None or not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        wide = any(weight.dtype == torch.float32 for weight in model.parameters())
        if isinstance(model, PreTrainedModel) and wide and model.dtype != torch.float32:
            # transformers writes the dtype of the first weight, and whoever loads the folder rounds all others to it.
            model.config.dtype = "float32"
            model.config.save_pretrained(output_dir or self.args.output_dir)


@contextlib.contextmanager
def rounded(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Hold a model's weights, of an adapter its own, in another dtype for a while; the old values come back."""
    adapter, kept = isinstance(model, PeftModel), []
    for weight in model.parameters() if dtype is not None else ():
        if weight.is_floating_point() and weight.dtype != dtype and (weight.requires_grad or not adapter):
            kept.append((weight, weight.data))
            weight.data = weight.data.to(dtype)
    try:
        yield
    finally:
        for weight, data in kept:
            weight.data = data
