"""
The trace of a micro-batch: the most bytes that its forward and backward hold at a time, without computing either.

What autograd keeps, what the backward holds, and gradients before they are handed over are not a formula: the
project's own forward, attention and head and autograd's backward run over tensors without storage (torch's
FakeTensorMode), while every storage that comes and goes is counted. So frozen layers, LoRA, gradient checkpointing,
shared prefixes and the head's tiles count as they are. Attention and head are those of the CPU; a GPU's kernels were
not measured. memory.py has what stays between two micro-batches, and how the sum compares with what runs took.
"""

import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe
from trl.trainer.utils import add_fused_lm_head

from core.modeling.head import AnswerLogProbs
from core.modeling.prefix import HEAD_OUTPUTS, enable_prefix_sharing, hidden_states
from core.modeling.skeleton import Skeleton

# torch's grouped product of a mixture of experts knows bfloat16 alone where there are no values; transformers has one
# of its own, of the same shapes.
EXPERTS = patch.object(moe, "_can_use_grouped_mm", lambda *_: False)
LONGEST_SECONDS = 120.0
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what it says is raised as well


@dataclass(frozen=True)
class MicroBatch:
    """Shapes of a micro-batch: pairs that share prompts, conversations end to end, or rows padded to one length."""

    pair_lengths: tuple[tuple[int, int, int], ...] = ()  # (k, n, m) of each pair; (1, length, 0) of a conversation
    rows: int = 0  # padded: rows (two for a pair) …
    length: int = 0  # … of this many tokens
    summed: bool = False  # the loss adds up all log-probabilities with one weight (`head.add_answer_head`)

    @property
    def tokens(self) -> int:
        return sum(k + n + m - 1 for k, n, m in self.pair_lengths) or self.rows * self.length

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its answers."""
        return max((k + max(n, m) for k, n, m in self.pair_lengths), default=self.length)


class FakeModel:
    """
    The policy as the run would have it (`skeleton.choose`), its tensors turned into ones without storage that are of
    the CPU for all that torch can see: on the meta device sdpa would keep all its weights, which no kernel that trains
    does.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.causal_lm, self.policy = skeleton.causal_lm, skeleton.policy
        self.trained, self.total = skeleton.trained, skeleton.total
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.policy.to_empty(device="cpu")
        self.causal_lm.tie_weights()
        for module in self.causal_lm.modules():
            # Rotary embeddings that look at the longest position, a value; what they take of the memory is the same.
            if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
                module.rope_type = "default"

    def trace(
        self,
        batch: MicroBatch,
        *,
        checkpointing: dict[str, Any] | None,
        gradients_kept: bool,
        accumulates: bool,
        autocast: torch.dtype | None,
    ) -> int:
        """
        Most bytes alive during the forward and backward of a micro-batch, beyond weights and gradients.

        Args:
            batch: its shapes.
            checkpointing: gradient_checkpointing_kwargs, or None without gradient checkpointing.
            gradients_kept: gradients stay until the update; else (ZeRO) each is handed over once it is computed.
            accumulates: gradients of an earlier micro-batch are there already.
            autocast: what the forward computes in where the weights are wider.
        """
        weights = [weight for weight in self.policy.parameters() if weight.requires_grad]
        alive = LiveBytes(self.policy)
        with self.mode, torch.device("cpu"), EXPERTS:
            self.policy.train()
            if checkpointing is not None:
                self.policy.activation_checkpointing_enable(checkpointing)
                if isinstance(self.policy, PeftModel):
                    self.policy.enable_input_require_grads()
            handles = []
            if not gradients_kept:
                handles = [weight.register_post_accumulate_grad_hook(_drop_gradient) for weight in weights]
            with alive:
                if gradients_kept and accumulates:
                    for weight in weights:
                        weight.grad = torch.empty_like(weight)
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    log_probs = self._forward(batch)
                log_probs.sum().backward()
                del log_probs
            for handle in handles:
                handle.remove()
            self.policy.zero_grad(set_to_none=True)
        kept = sum(weight.numel() * weight.element_size() for weight in weights) if gradients_kept else 0
        return max(0, alive.peak - kept)

    def trace_proof(self, length: int) -> int:
        """Most bytes alive while a row of this length is scored (`proof.verify_saved`), beyond the weights."""
        alive = LiveBytes(self.policy)
        with self.mode, torch.device("cpu"), EXPERTS, torch.no_grad(), alive:
            self.policy.eval()
            logits = self.policy(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False).logits
            logits[0, :-1].float().log_softmax(-1)
        return alive.peak

    def _forward(self, batch: MicroBatch) -> torch.Tensor:
        """As `prefix.pair_logps` has it, but that which positions are scored must not depend on values."""
        if not batch.pair_lengths:
            add_fused_lm_head(self.causal_lm, outputs=HEAD_OUTPUTS)
            ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
            mask = None  # a state-space model's is of the rows' padding alone
            if not getattr(self.causal_lm, "_is_stateful", False):
                mask = torch.ones(
                    batch.rows, 1, batch.length, batch.length, dtype=torch.bool
                )  # as transformers builds it
            outputs = self.policy(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, use_cache=False)
            return outputs.log_probs
        enable_prefix_sharing(self.causal_lm)
        ids, positions = (torch.zeros(1, batch.tokens, dtype=torch.long) for _ in range(2))
        shared = {"input_ids": ids, "position_ids": positions, "pair_lengths": batch.pair_lengths}
        hidden = hidden_states(self.causal_lm, shared).flatten(0, 1)
        head = self.causal_lm.get_output_embeddings()
        scored = torch.zeros(sum(n + m for _, n, m in batch.pair_lengths), dtype=torch.long)
        return AnswerLogProbs.apply(
            hidden.index_select(0, scored), head.weight, head.bias, scored, True, batch.summed
        )[0]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made under it, until they are freed; `peak` is the most bytes at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.until = time.monotonic() + LONGEST_SECONDS
        tensors = [*model.parameters(), *model.buffers()]
        self.alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in tensors}  # not counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.until:
            raise TimeoutError(f"it took longer than {LONGEST_SECONDS} s")  # a loop over tokens, written in Python
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self.alive.pop(key, None)

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _drop_gradient(weight: torch.Tensor) -> None:
    weight.grad = None


def largest_micro_batch(pair_lengths: Sequence[tuple[int, int, int]], order: np.ndarray, shared: bool) -> MicroBatch:
    """
    The micro-batch with the most tokens of an epoch.

    Args:
        pair_lengths: (k, n, m) of each row.
        order: row indices, shape (…, batch size), as `ReplaySampler.order` gives them.
        shared: pairs share their prompts; else both answers are padded to the longest of all.
    """
    lengths = np.asarray(pair_lengths)
    batches = order.reshape(-1, order.shape[-1])
    k, n, m = lengths.T
    if shared:
        largest = batches[(k + n + m)[batches].sum(axis=1).argmax()]
        return MicroBatch(tuple(map(tuple, lengths[largest].tolist())))
    longest = (k + np.maximum(n, m))[batches].max()
    return MicroBatch(rows=2 * batches.shape[1], length=int(longest))
