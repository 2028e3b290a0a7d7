"""
What weights are held in: what is trained in float32, what is frozen in the recipe's dtype.

A step of 5e-7 is less than most 16-bit weights can show, so updates of such weights are lost without a word. The rule,
for every script, launch and check (`precision_of`):

    | launch             | bf16 or fp16                                   | neither         |
    |--------------------|------------------------------------------------|-----------------|
    | without DeepSpeed  | trained float32, frozen `dtype`, autocast      | all float32     |
    | DeepSpeed          | its own: 16 bits with float32 masters          | all float32     |

Weights in float32 are not enough: autocast rounds each to 16 bits again before it is used. A model that was published
in 16 bits begins on their grid, and until a weight has moved half a step of the grid away, which at a learning rate of
5e-7 takes hundreds of updates, the forward is that of the start. So linear layers that are trained use their weights
in two parts (`TwoPartLinear`). DeepSpeed keeps the remainder to itself: there the forward sees a move late.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig
from trl import ModelConfig

from core.modeling.reference_cache import local_folder, weight_files
from core.runtime.errors import RecipeError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEPS_OF_A_RATE = "adam adafactor rmsprop adagrad".split()  # optimizers whose step is about the learning rate
MOVABLE = 0.5  # the share of the trained weights that a step must be able to move
SAMPLE = 65_536  # elements of a weight that are looked at


@dataclass(frozen=True)
class Precision:
    """Number formats of a run."""

    frozen: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None = None  # what the forward computes in, where that is not the weights' own
    masters: bool = False  # DeepSpeed casts the weights itself, and keeps float32 copies of the trained ones

    def itemsize(self, total: int, trained: int) -> int:
        """Bytes of a model with `total` elements, `trained` of them trained."""
        return (total - trained) * self.frozen.itemsize + trained * self.trained.itemsize


def precision_of(dtype: torch.dtype, mixed: str, deepspeed: bool) -> Precision:
    """
    The rule above.

    Args:
        dtype: the recipe's.
        mixed: no, bf16 or fp16.
        deepspeed: the launch is one of DeepSpeed.
    """
    if mixed == "no":
        return Precision(torch.float32, torch.float32)
    if deepspeed:
        return Precision(HALF[mixed], HALF[mixed], masters=True)
    return Precision(dtype, torch.float32, autocast=HALF[mixed])


def asked_dtype(model: ModelConfig, config: PretrainedConfig) -> torch.dtype:
    """The recipe's `dtype`; `auto` is that of the model's files."""
    return stored_dtype(config) if model.dtype == "auto" else getattr(torch, model.dtype or "float32")


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """What a model's config says of its files."""
    return config.dtype or config.get_text_config().dtype or torch.float32


@torch.no_grad()
def hold(model: nn.Module, precision: Precision, frozen: bool = True) -> None:
    """
    Hold trained and frozen weights as the rule has it, once it is known which are which.

    Args:
        frozen: the frozen ones too; not where a library holds them in formats of its own (PEFT, quantisation).
    """
    if precision.masters:
        return
    for weight in model.parameters():
        if weight.is_floating_point() and (frozen or weight.requires_grad):
            weight.data = weight.data.to(precision.trained if weight.requires_grad else precision.frozen)
    if precision.autocast is None or not frozen:
        return
    head = model.get_output_embeddings()  # its weight is read by the loss, past the module
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.requires_grad and module is not head:
            module.__class__ = TwoPartLinear


class TwoPartLinear(nn.Linear):
    """
    A linear layer with float32 weights whose forward under autocast sees all of them: W = rounded(W) + remainder, both
    in 16 bits, in one product that is summed in float32 and rounded once, y = rounded([W, remainder]·[x, x]).

    Rounded before the sum, y would lose what the remainder adds. At the start the remainder of weights of 16 bits is
    0, and the numbers are those of plain autocast; so are the gradients, that of the inputs by the rounded W.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        device = inputs.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(inputs)
        with torch.autocast(device, enabled=False):
            dtype = torch.get_autocast_dtype(device)
            return _TwoParts.apply(inputs.to(dtype), self.weight, None if self.bias is None else self.bias.to(dtype))


@contextlib.contextmanager
def in_one_part(model: nn.Module) -> Iterator[None]:
    """The forward that a model loaded anew has: its linear layers are plain, whatever training has made of them."""
    layers = [module for module in model.modules() if type(module) is TwoPartLinear]
    for layer in layers:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = TwoPartLinear


class _TwoParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        rounded = weight.to(inputs.dtype)
        parts = torch.cat([rounded, (weight - rounded).to(inputs.dtype)], dim=1)
        return F.linear(torch.cat([inputs, inputs], dim=-1), parts, bias)

    @staticmethod
    def backward(ctx: Any, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        rows = outputs.flatten(0, -2)
        of_weight = (rows.T @ inputs.flatten(0, -2)).to(weight.dtype)
        return outputs @ weight.to(outputs.dtype), of_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


# ----------------------------------------------------------------------------------------------- steps that are lost


def movable(weight: torch.Tensor, step: float, dtype: torch.dtype) -> torch.Tensor:
    """Whether a step up or down shows in each element, held in `dtype`. Shape: that of the weight, bool."""
    held = weight.to(dtype)
    wide = held.double()
    return ((wide + step).to(dtype) != held) & ((wide - step).to(dtype) != held)


def movable_share(weights: Iterable[tuple[torch.Tensor, int]], step: float, dtype: torch.dtype) -> float:
    """
    The share of the elements of all weights that one step can move.

    Args:
        weights: each, or a sample of it, with its number of elements.
    """
    moved = total = 0.0
    for sample, elements in weights:
        moved += movable(sample, step, dtype).double().mean().item() * elements
        total += elements
    return moved / total if total else 1.0


def check_steps(model: ModelConfig, trained: set[str], learning_rate: float, optim: str) -> None:
    """
    For run and check alike, before the first update, from the model's files: none there, nothing is found. Updates are
    added to float32: weights or masters. An adapter begins at zero, from which every step moves it.

    Args:
        trained: names of the weights to train.

    Raises:
        RecipeError: most updates would round away. An SGD's step is its gradient's, which nobody knows before.
    """
    if model.use_peft or not any(name in optim for name in STEPS_OF_A_RATE):
        return
    samples = stored_samples(model.model_name_or_path, model.model_revision, trained)
    share = movable_share(samples, learning_rate, torch.float32)
    if share < MOVABLE:
        raise RecipeError(
            f"learning_rate {learning_rate:g}: one step of it can move {share:.2%} of the trained weights, held in "
            "float32; the others would round back to what they were; raise it"
        )


# ------------------------------------------------------------------------------------------------------ what is saved


def check_save_dtype(save_dtype: str | None, masters: torch.dtype | None) -> None:
    """
    Args:
        masters: what DeepSpeed casts the weights to, and saves; None: it does not.

    Raises:
        RecipeError: the recipe asks for another.
    """
    if masters is not None and save_dtype not in (None, dtype_name(masters)):
        raise RecipeError(
            f"save_dtype: {save_dtype}: under DeepSpeed the final model is saved in {dtype_name(masters)}, which it "
            "casts the weights to; remove the key, or train without DeepSpeed"
        )


@dataclass(frozen=True)
class Moves:
    """Of `known` trained values: those that training has moved, and those of them that rounding gives back."""

    known: int = 0
    moved: int = 0
    given_back: int = 0

    def __str__(self) -> str:
        share = self.given_back / max(1, self.moved)
        return f"{self.moved / max(1, self.known):.2%} of the trained values moved, and {share:.2%} of these"


def stored_weights(source: str, revision: str | None = None) -> Iterator[tuple[str, Any]]:
    """Each tensor's name in a model's safetensors, with the open file that has it; nothing where there are none."""
    try:
        files = weight_files(local_folder(source, revision))
    except OSError:
        return
    for path in files:
        if path.is_file():
            try:
                opened = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise RecipeError(
                    f"model {source} cannot be loaded: {path.name}: {error}; mend that folder, or give another model"
                ) from error
            with opened as file:
                for name in file.keys():
                    yield name, file


def stored_samples(source: str, revision: str | None, names: set[str]) -> Iterator[tuple[torch.Tensor, int]]:
    """Of these weights the first `SAMPLE` elements or a few more, without reading the rest, and the number of all."""
    for name, file in stored_weights(source, revision):
        if name in names:
            part = file.get_slice(name)
            shape = part.get_shape()
            rows = math.ceil(SAMPLE / max(1, math.prod(shape[1:])))
            yield part[:rows] if shape else file.get_tensor(name), math.prod(shape)


@torch.no_grad()
def moves(model: nn.Module, source: str, revision: str | None, dtype: torch.dtype) -> Moves:
    """
    The trained weights held against those of the model that training began with, tensor by tensor.

    Args:
        source, revision: that model; weights that its files name otherwise are not compared.
        dtype: what rounding to is asked about.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    known = moved = given_back = 0
    for name, file in stored_weights(source, revision):
        weight = trained.get(name)
        if weight is None:
            continue
        before = file.get_tensor(name).to(weight.device)
        differs = weight != before.to(weight.dtype)
        known += differs.numel()
        moved += int(differs.sum())
        given_back += int((differs & (weight.to(dtype) == before.to(dtype))).sum())
    return Moves(known, moved, given_back)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
