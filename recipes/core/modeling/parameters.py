"""Selective parameters: which weights are trained, all others frozen or left to LoRA's adapters."""

import copy
import difflib
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME
from trl import ModelConfig, get_peft_config

from core.runtime import loading
from core.runtime.errors import RecipeError

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
# Mamba's kernels read these weights themselves and pass an adapter by.
MIXER_WEIGHTS = ["conv1d", "x_proj", "dt_proj", "out_proj"]


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
    LoRA's settings, or None without `use_peft`, or where `model` has LoRA already; `trainable_parameters` names its
    target modules, which are by default all linear layers but the head. A model that is itself an adapter is trained
    on with the settings of that.

    Raises:
        RecipeError: a name that is in no module or parameter (the message lists near names), or what PEFT cannot adapt
            or a merge would not keep.
    """
    if not settings.use_peft or isinstance(model, PeftModel):
        return None
    if (Path(settings.model_name_or_path) / ADAPTER_CONFIG_NAME).is_file():
        config = loading.adapter_config(settings.model_name_or_path)
        config.inference_mode = False
        _rehearse(config, model)
        return config
    config = get_peft_config(settings)
    targets = patterns or settings.lora_target_modules or (None if config.target_parameters else ALL_LINEAR)
    modules = [name for name, _ in model.named_modules()]
    if isinstance(targets, str) and targets in {name.rpartition(".")[2] for name in modules}:
        targets = [targets]  # a name, where PEFT would read a pattern of the whole path
    if targets in (ALL_LINEAR, [ALL_LINEAR]):
        targets = ALL_LINEAR
        if any("mamba" in type(module).__name__.lower() for module in model.modules()):
            config.exclude_modules = MIXER_WEIGHTS
    elif isinstance(targets, str):
        _refuse_unknown("lora_target_modules", [targets], modules, model, _matches_whole)
    else:
        key = "trainable_parameters" if patterns else "lora_target_modules"
        _refuse_unknown(key, targets or [], modules, model, _ends_path)
    parameters = [name for name, _ in model.named_parameters()]
    _refuse_unknown("lora_target_parameters", config.target_parameters or [], parameters, model, _ends_path)
    _refuse_unknown("lora_modules_to_save", config.modules_to_save or [], modules, model, str.endswith)
    config.target_modules = set(targets) if isinstance(targets, list) else targets
    _rehearse(config, model)
    return config


def _ends_path(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _matches_whole(name: str, pattern: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise RecipeError(f"lora_target_modules: {pattern!r} is not a regular expression: {error}") from error


def _refuse_unknown(
    key: str, given: list[str], names: list[str], model: nn.Module, matches: Callable[[str, str], bool]
) -> None:
    kind = "parameter" if key == "lora_target_parameters" else "module"
    for target in given:
        if not any(matches(name, target) for name in names):
            raise RecipeError(
                f"{key}: {target!r} is no {kind} of {type(model).__name__} that LoRA could adapt; near names: "
                f"{_near(target, names)}"
            )


def _rehearse(config: LoraConfig, model: nn.Module) -> None:
    """Adapt a model of the same config that has no storage, to see what PEFT says and where its adapters come."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rehearsed = type(model)(copy.deepcopy(model.config))
        tied = rehearsed.get_input_embeddings().weight is rehearsed.get_output_embeddings().weight
        try:
            adapted = get_peft_model(rehearsed, copy.deepcopy(config))
        except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
            raise RecipeError(f"LoRA does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error
    embedding, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise RecipeError(
            "lora_target_modules: the head's adapter would be trained by no loss here, which reads its weights; leave "
            "the head out, or name it in lora_modules_to_save"
        )
    if tied and any(isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in (embedding, head)):
        raise RecipeError(
            f"LoRA: {type(model).__name__} ties its embedding to its head, so that merging an adapter of one would "
            "move the other too; leave both out of lora_target_modules, lora_target_parameters, lora_modules_to_save"
        )


def _near(word: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in name.split(".") if part and not part.isdigit()})
    return ", ".join(difflib.get_close_matches(word, parts, n=5, cutoff=0.4) or parts)
