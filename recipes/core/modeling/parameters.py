"""Selective parameters: which weights are trained, all others frozen or left to LoRA's adapters."""

import difflib
import re
from pathlib import Path

from peft import LoraConfig
from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME
from trl import ModelConfig, get_peft_config

from core.runtime.errors import RecipeError


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
            raise RecipeError(
                f"trainable_parameters: {pattern!r} matches no parameter of {type(model).__name__}; near names: "
                f"{_near(pattern, names)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
    return count_parameters(model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total number of elements."""
    total = sum(numel(parameter) for parameter in model.parameters())
    return sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad), total


def lora_config(settings: ModelConfig, patterns: list[str] | None, model: nn.Module) -> LoraConfig | None:
    """
    LoRA's settings, or None without `use_peft`; `trainable_parameters` names its target modules.

    Raises:
        RecipeError: a target that is the name of no module (the message lists near names), or a model that is itself
            an adapter, since the new one would be saved as one of the base model.
    """
    if not settings.use_peft:
        return None
    if (Path(settings.model_name_or_path) / ADAPTER_CONFIG_NAME).is_file():
        raise RecipeError(
            f"model {settings.model_name_or_path} is an adapter; merge and save it first, or train without use_peft"
        )
    targets = patterns or settings.lora_target_modules  # None lets PEFT choose by architecture
    names = [name for name, _ in model.named_modules()]
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            key = "trainable_parameters" if patterns else "lora_target_modules"
            raise RecipeError(
                f"{key}: {target!r} is no module of {type(model).__name__} that LoRA could adapt; near names: "
                f"{_near(target, names)}"
            )
    config = get_peft_config(settings)
    if patterns:
        config.target_modules = set(patterns)
    return config


def _near(word: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in name.split(".") if part and not part.isdigit()})
    return ", ".join(difflib.get_close_matches(word, parts, n=5, cutoff=0.4) or parts)
