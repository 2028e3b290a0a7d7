"""
Frozen linear layers of 4 or 8 bits under LoRA, by bitsandbytes: QLoRA (arXiv 2305.14314) and LLM.int8 (2208.07339).

Of 4 bits a layer computes with its dequantised weights, in the dtype of the forward: a token's numbers are its own,
and pairs may share their prompts. Of 8 bits it rounds activations too, but for columns in which any token of the batch
has an outlier: there the numbers of a token hang on its neighbours. So pairs are padded, as stock TRL has them, and
the reference sees each batch with the policy: before the first update the two are the same.

The embeddings, the head and the norms stay as `precision` has them, and so does what is no linear layer: the experts
of a mixture, which are one tensor.
"""

import copy
import math
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from trl import ModelConfig

from core.config.trl_keys import BITSANDBYTES
from core.modeling.precision import Precision
from core.runtime.errors import RecipeError

BLOCK, NESTED_BLOCK = 64, 256  # weights that share a constant, and constants that share one of their own
Quantised = dict[str, nn.Module]  # layers of a model by name


def quantisation(model: ModelConfig, precision: Precision) -> BitsAndBytesConfig | None:
    """What the recipe asks for, or None; the layers compute in the dtype of the forward."""
    if model.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=precision.autocast or precision.frozen,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model.load_in_8bit else None


def is_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def has_8_bits(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_8bit", False))


def settle(loaded: PreTrainedModel) -> None:
    """
    One form of a layer for every forward. On some CPUs bitsandbytes would pack a layer's weights anew at its first
    forward without gradient, with constants rounded to bfloat16, and from then on hand no gradient through it.
    """
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# --------------------------------------------------------------------------------------------- known without weights


def quantised_layers(empty: PreTrainedModel, settings: BitsAndBytesConfig) -> Quantised:
    """The layers of a model without storage that loading would quantise."""
    import bitsandbytes  # only here: most runs do without

    trial = copy.deepcopy(empty)
    quantizer = Bnb4BitHfQuantizer if settings.load_in_4bit else Bnb8BitHfQuantizer
    quantizer(settings, pre_quantized=False).preprocess_model(trial, device_map=None)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: empty.get_submodule(name) for name, module in trial.named_modules() if isinstance(module, kinds)}


def stored_bytes(layers: Quantised, model: ModelConfig) -> int:
    """
    Bytes of quantised weights. Of 4 bits: half a byte each, and a constant for each 64, of 4 bytes; or of one byte,
    with 4 for each 256 constants: 0.516 bytes a weight. Of 8 bits: one each, and 4 for each output.
    """
    total = 0
    for layer in layers.values():
        count = layer.weight.numel()
        if model.load_in_8bit:
            total += count + 4 * layer.weight.shape[0]
            continue
        constants = math.ceil(count / BLOCK)
        nested = constants + 4 * math.ceil(constants / NESTED_BLOCK)
        total += math.ceil(count / 2) + (nested if model.use_bnb_nested_quant else 4 * constants)
    return total


def check_launch(model: ModelConfig, optim: str, deepspeed: bool) -> None:
    """
    Raises:
        RecipeError: bitsandbytes under DeepSpeed, which would share out or cast what it holds in formats of its own.
    """
    if not deepspeed:
        return
    way_out = "accelerate_configs/gpu.yaml or ddp.yaml"
    if model.load_in_4bit or model.load_in_8bit:
        key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise RecipeError(
            f"{key}: DeepSpeed cannot share out quantised weights, and the adapters' optimizer is small; launch by "
            f"{way_out}"
        )
    if optim in BITSANDBYTES:
        raise RecipeError(
            f"optim: {optim}: DeepSpeed shares out an optimizer's states itself, in 32 bits; take adamw_torch, or "
            f"launch by {way_out}"
        )


def check_layers(empty: PreTrainedModel, layers: Quantised, lora: LoraConfig | None) -> None:
    """
    Raises:
        RecipeError: the model cannot be quantised, or LoRA would train a quantised weight itself.
    """
    kind = type(empty).__name__
    if any("mamba" in type(module).__name__.lower() for module in empty.modules()):
        raise RecipeError(
            f"load_in_4bit, load_in_8bit: a {kind}'s kernels read its weights past the layers; remove it"
        )
    if not layers:
        raise RecipeError(f"load_in_4bit, load_in_8bit: a {kind} has no linear layer to quantise; remove it")
    whole = [("lora_modules_to_save", name) for name in (lora and lora.modules_to_save) or []]
    whole += [("lora_target_parameters", name) for name in (lora and lora.target_parameters) or []]
    for key, name in whole:
        for layer in layers:
            parts = (layer, f"{layer}.weight") if key == "lora_target_parameters" else _above(layer)
            if any(f".{part}".endswith(f".{name}") for part in parts):
                raise RecipeError(
                    f"{key}: {name!r} has quantised weights, which are not trained: {layer}; leave it out"
                )


def _above(name: str) -> list[str]:
    """A module and those around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


class TracedLayer(nn.Linear):
    """
    In the place of a quantised layer where there are no values: what it takes of the memory. Its weights are made wide
    for each product, forward and backward; of 8 bits it keeps its inputs, and PEFT copies what one of 4 bits gives.
    """

    keeps_inputs = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = _Dequantised.apply(inputs, self.weight, self.keeps_inputs)
        return (outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)).clone()


class TracedLayerOf8Bits(TracedLayer):
    keeps_inputs = True


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, keeps_inputs: bool) -> torch.Tensor:
        ctx.shape = weight.shape
        ctx.save_for_backward(*([inputs] if keeps_inputs else []))
        return inputs @ inputs.new_empty(weight.shape).T

    @staticmethod
    def backward(ctx: Any, outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return outputs @ outputs.new_empty(ctx.shape), None, None


def stand_in(layers: Quantised, model: ModelConfig) -> None:
    """Let the layers of a model without storage take what they will take once they are quantised."""
    for layer in layers.values():
        if type(layer) is nn.Linear:
            layer.__class__ = TracedLayerOf8Bits if model.load_in_8bit else TracedLayer
