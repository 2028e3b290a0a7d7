"""How fast a run trains: tokens and pairs per second, the share of the GPU's peak, tokens saved, peak memory."""

import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from core.modeling.parameters import numel

# Dense bf16 matrix FLOP/s from the makers' data sheets (their figures "with sparsity" are twice these). The first
# pattern that matches torch's name of the device counts; a device that is not here gets no MFU.
PEAK_FLOPS = (
    (r"A100", 312e12),
    (r"H100.*PCIe", 756e12),
    (r"H(100|200).*NVL", 835e12),
    (r"H(100|200)\b", 989e12),
    (r"L40S", 362e12),
    (r"A10\b", 125e12),
    (r"RTX 4090$", 165e12),
    (r"MI300X", 1307e12),
)
GIB = 2**30


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by its name, or None where it isn't known (a MIG slice never is)."""
    if " MIG " in device_name:
        return None
    return next((flops for pattern, flops in PEAK_FLOPS if re.search(pattern, device_name)), None)


def training_flops(parameters: int, trainable: int) -> int:
    """
    Floating-point operations that training on one token takes: 2N forward, 2N backward to the activations and
    2·N_trainable to the weights; 6N where all is trained (PaLM, arXiv 2204.02311, Appendix B).

    Attention's own 12·L·H·Q·T is left out, and so are recomputation under gradient checkpointing and the reference
    pass: an MFU from this errs on the low side.

    Args:
        parameters: N, those that a token is multiplied with: see `matmul_parameters`.
        trainable: how many of them are trained.
    """
    return 4 * parameters + 2 * trainable


def matmul_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters that a token is multiplied with (all but a look-up of embeddings), and how many of them train."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = embedding.weight if head is None or head.weight is not embedding.weight else None
    counted = [parameter for parameter in model.parameters() if parameter is not looked_up]
    return sum(map(numel, counted)), sum(numel(parameter) for parameter in counted if parameter.requires_grad)


def peak_memory() -> int:
    """Most bytes that this process has held: of the GPU's memory as torch counts it, or resident ones on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Throughput(TrainerCallback):
    """
    Counts a run's work between two log lines. The clock runs while steps are trained, the wait for data included;
    it stands still during evaluation and saving.

    Args:
        model: the policy, its trainable parameters already chosen.
        device_name: the accelerator as torch names it; None: this process's, if it has one.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device_name: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if device_name is None and torch.cuda.is_available():
            device_name = torch.cuda.get_device_name()
        self.flops_per_token = training_flops(*matmul_parameters(model))
        self.peak_flops = peak_flops(device_name or "")
        self.clock, self.mark = clock, clock()
        self._reset()

    def _reset(self) -> None:
        self.seconds, self.pairs, self.computed, self.padded = 0.0, 0, 0, 0

    def count(self, pairs: int, computed_tokens: int, padded_tokens: int) -> None:
        """
        Add a training micro-batch of this rank.

        Args:
            pairs: its pairs.
            computed_tokens: tokens that went through the model.
            padded_tokens: tokens that the same pairs are when each answer repeats its prompt and is padded to the
                longest of the micro-batch, as TRL lays them out.
        """
        self.pairs += pairs
        self.computed += computed_tokens
        self.padded += padded_tokens

    def report(self) -> dict[str, float]:
        """
        Figures of all ranks since the last report, and a fresh start; {} before the first step. Every rank must call.

        Returns:
            `pairs_per_second` and `tokens_per_second` (computed ones) of all ranks together; `tokens_saved`, the
            fraction of `padded_tokens` not computed; `peak_memory_gib` of the rank that needs most; `mfu` as a
            fraction of the peak of all GPUs, where the GPU is known.
        """
        ranks = gather_object([(self.seconds, self.pairs, self.computed, self.padded, peak_memory())])
        self._reset()
        seconds, pairs, computed, padded, memory = zip(*ranks, strict=True)
        if not max(seconds) or not sum(padded):
            return {}
        tokens_per_second = sum(computed) / max(seconds)
        figures = {
            "pairs_per_second": sum(pairs) / max(seconds),
            "tokens_per_second": tokens_per_second,
            "tokens_saved": 1 - sum(computed) / sum(padded),
            "peak_memory_gib": max(memory) / GIB,
        }
        if self.peak_flops:
            figures["mfu"] = tokens_per_second * self.flops_per_token / (self.peak_flops * len(ranks))
        return figures

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = self.clock()
        self._reset()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = self.clock()
        self.seconds += now - self.mark
        self.mark = now

    def _skip(self, *_: Any, **__: Any) -> None:
        self.mark = self.clock()

    on_evaluate = on_save = _skip
