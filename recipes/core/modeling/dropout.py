"""What a forward in training draws at random. TRL's `disable_dropout` reaches `nn.Dropout` alone; attention keeps its
rate as a plain number of its module or of the config."""

import re
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig

DROPOUT = re.compile(r"(?<!classifier_)(?<!summary_first_)(dropout|pdrop|layerdrop)|^drop_path")
NOISE = re.compile(DROPOUT.pattern + "|jitter")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the model to 0, in its modules and in what they read of its config."""
    for holder, name in _rates(model, DROPOUT):
        setattr(holder, name, 0.0)


def draws_dropout(model: nn.Module, of_adapters: bool = True) -> bool:
    """Whether a forward pass in training is a random one: dropout, or a router's noise; with or without LoRA's."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if not of_adapters else []
    adapters = {id(module) for layer in layers for module in getattr(layer, "lora_dropout", {}).values()}
    return any(id(holder) not in adapters for holder, _ in _rates(model, NOISE))


def _rates(model: nn.Module, pattern: re.Pattern) -> Iterator[tuple[Any, str]]:
    """Each rate above 0: who holds it, and under which name."""
    modules = list(model.modules())
    configs = {id(config): config for module in modules for config in [getattr(module, "config", None)]}
    holders = [*modules, *(config for config in configs.values() if isinstance(config, PretrainedConfig))]
    for holder in holders:
        for name, value in [*vars(holder).items()]:
            named = pattern.search(name) or name == "p" and isinstance(holder, nn.modules.dropout._DropoutNd)
            if named and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                yield holder, name
