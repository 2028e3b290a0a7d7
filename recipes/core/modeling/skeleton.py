"""
The policy before its weights: config, architecture, trained parameters and adapters, on the meta device. A run lays it
out before it reads a row, and `check.py` does the same, so that what either refuses is refused by both.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from trl import ModelConfig

from core.modeling.parameters import count_parameters, lora_config, select_parameters
from core.modeling.policy import adapted_model, loaded_whole, mend_generation
from core.modeling.precision import Precision, hold
from core.modeling.quantised import check_layers, quantisation, quantised_layers, stand_in, stored_bytes
from core.modeling.reference_cache import local_folder, weight_files
from core.runtime import loading
from core.runtime.errors import RecipeError

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Skeleton:
    """A model without storage, as the run would train it."""

    causal_lm: PreTrainedModel
    policy: PreTrainedModel | PeftModel  # the same, or with LoRA around it
    trained: int  # elements
    total: int
    quantised: int = 0  # elements …
    quantised_bytes: int = 0  # … and what they take


def check_stored(config: PretrainedConfig, path: str) -> None:
    """
    Raises:
        RecipeError: the stored weights are quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(
            f"model {path}: its weights are quantised (quantization_config in config.json), which are not trained; "
            "start from the weights that it was made of"
        )


def check_tensors(model: ModelConfig) -> None:
    """
    Where the weights are on this disk: load all but their values.

    Raises:
        RecipeError: they cannot be loaded, or some are missing.
    """
    path, revision = model.model_name_or_path, model.model_revision
    while (base := adapted_model(path)) is not None:
        path, revision = base, None
    try:
        there = all(file.is_file() for file in weight_files(local_folder(path, revision)))
    except OSError:
        return
    if there:
        with loaded_whole():
            loading.causal_lm(path, revision=revision, device_map="meta")


def check_generation(model: ModelConfig) -> str | None:
    """
    `policy.mend_generation` of what is stored.

    Returns:
        What loading will mend.

    Raises:
        RecipeError: it cannot be mended, or not be read.
    """
    path, revision = model.model_name_or_path, model.model_revision
    while (base := adapted_model(path)) is not None:
        path, revision = base, None
    return mend_generation(loading.generation_config(path, revision), path)


def build_empty(config: PretrainedConfig, model: ModelConfig, precision: Precision) -> PreTrainedModel:
    """
    The recipe's model on the meta device.

    Raises:
        RecipeError: transformers cannot build it.
    """
    try:
        with loaded_whole(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=precision.frozen,
                attn_implementation=model.attn_implementation,
                trust_remote_code=False,
            )
    except Exception as error:  # of a config's values, in all ways
        path = model.model_name_or_path
        raise RecipeError(f"model {path} cannot be built from its config: {_line(error)}") from error


def choose(
    causal_lm: PreTrainedModel, model: ModelConfig, patterns: list[str] | None, precision: Precision
) -> Skeleton:
    """
    Freeze what the recipe does not train, add LoRA's adapters, and hold both as `precision` has it.

    Raises:
        RecipeError: a pattern or a target matches nothing, PEFT refuses, or what would be quantised cannot be.
    """
    select_parameters(causal_lm, None if model.use_peft else patterns)
    policy, adapters = causal_lm, lora_config(model, patterns, causal_lm)
    settings, elements, size = quantisation(model, precision), 0, 0
    if settings is not None:
        layers = quantised_layers(causal_lm, settings)
        check_layers(causal_lm, layers, adapters)
        elements, size = sum(layer.weight.numel() for layer in layers.values()), stored_bytes(layers, model)
        stand_in(layers, model)
        causal_lm.is_loaded_in_8bit = model.load_in_8bit  # what `prefix.unsupported_reason` looks at
    with torch.device("meta"):
        if adapters is not None:
            policy = get_peft_model(causal_lm, adapters)
        hold(policy, precision, frozen=adapters is None)  # as `policy.load_policy` does
    return Skeleton(causal_lm, policy, *count_parameters(policy), elements, size)


def check_trains(skeleton: Skeleton, args: Any, path: str) -> None:
    """
    Raises:
        RecipeError: what would be trained gets no gradient from text, or there is no gradient checkpointing for it.
    """
    causal_lm = skeleton.causal_lm
    if args.activation_checkpointing and not causal_lm.supports_gradient_checkpointing:
        raise RecipeError(
            f"model {path}: a {type(causal_lm).__name__} has no gradient checkpointing; set gradient_checkpointing: "
            "false"
        )
    if causal_lm.config.get_text_config() is causal_lm.config:
        return
    # A model of text and images: what only images reach would be trained on nothing.
    parts = (causal_lm.get_decoder(), causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    reached = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    trained = [(name, weight) for name, weight in skeleton.policy.named_parameters() if weight.requires_grad]
    lost = [name for name, weight in trained if id(weight) not in reached]
    if lost:
        raise RecipeError(
            f"model {path}: text does not reach {len(lost)} of the tensors that would be trained "
            f"({', '.join(lost[:SHOWN])}{', …' if len(lost) > SHOWN else ''}); name those of its language model in "
            "trainable_parameters, e.g. [language_model]"
        )


def check_positions(causal_lm: PreTrainedModel, max_length: int | None, path: str) -> None:
    """
    Raises:
        RecipeError: a row of max_length passes the positions that the model has learned; rotary ones go on.
    """
    most = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if most is None or max_length is not None and max_length <= most:
        return
    for name, module in causal_lm.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            raise RecipeError(
                f"model {path} has learned positions for {most} tokens, and max_length is "
                f"{'not set' if max_length is None else max_length}; set it to {most} or less"
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
