"""Selective parameters: which weights are trained, all others frozen or left to LoRA's adapters."""

import difflib
import re

from peft import LoraConfig
from torch import nn
from trl import ModelConfig

from errors import RecipeError


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter; ZeRO-3 leaves an empty shell behind and keeps the true count in `ds_numel`."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def select_parameters(model: nn.Module, patterns: list[str] | None) -> tuple[int, int]:
    """
    Freeze every parameter whose name matches none of the patterns (regular expressions, searched in the name).
    None leaves all of them trainable.

    BFPO (arXiv 2408.15313) trains `down_proj` alone: on Mistral-7B 32 × 4096 × 14336 = 1,879,048,192 of 7.24 B.

    Returns:
        Trainable and total number of elements.

    Raises:
        RecipeError: a pattern that matches no parameter; the message lists near names.
    """
    if patterns is None:
        return count_parameters(model)
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            matched = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise RecipeError(f"trainable_parameters: {pattern!r} is not a regular expression: {error}") from error
        if not matched:
            parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            near = difflib.get_close_matches(pattern, parts, n=5, cutoff=0.4) or parts
            raise RecipeError(
                f"trainable_parameters: {pattern!r} matches no parameter of {type(model).__name__}; near names: "
                f"{', '.join(near)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
    return count_parameters(model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total number of elements."""
    total = sum(numel(parameter) for parameter in model.parameters())
    return sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad), total


def lora_config(model: ModelConfig, patterns: list[str] | None) -> LoraConfig | None:
    """LoRA's settings, or None without `use_peft`; `trainable_parameters` names its target modules."""
    if not model.use_peft:
        return None
    return LoraConfig(
        task_type=model.lora_task_type,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        # None lets PEFT choose by architecture.
        target_modules=patterns or model.lora_target_modules,
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        bias="none",
    )
