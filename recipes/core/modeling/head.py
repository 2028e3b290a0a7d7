"""The head of a shared micro-batch on a CPU: log-probabilities of the answers' tokens, in the model's own precision.

TRL's fused head (`add_fused_lm_head`) is made for GPUs. On a CPU it scores every position, the prompts' too, folds in
float32 whatever the model's dtype, and projects a second time in the backward; this one does none of that.
"""

import functools
import types
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

# Names of what a config multiplies or divides logits by, as `add_fused_lm_head` reads them.
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
TILE_TOKENS = 256  # fewer weigh on the matrix products, more on the cache


def add_answer_head(model: PreTrainedModel) -> None:
    """
    Let `model(…, answer_labels=labels)` return what TRL's fused head would for `shift_labels=labels`, without a loss.

    `answer_labels` has the shape of the input; −100 marks what is not scored, and gives 0. With
    `answer_statistics=False` there are log-probabilities alone. `answer_sum=True` is for a loss that adds up all of
    them with one weight, and saves memory where the head is trained. Where logits are more than a projection
    (softcapped, or scaled), and with a router's loss, it is TRL's head. What else asks for TRL's head (`labels`,
    `fused_lm_head`) is not looked at.

    Args:
        model: with TRL's fused head, or before it gets one.
    """
    original_forward, projects = model.forward, projects_plainly(model.config)

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        answer_labels: torch.Tensor | None = None,
        answer_statistics: bool = True,
        answer_sum: bool = False,
        **kwargs: Any,
    ) -> Any:
        if answer_labels is None:
            return original_forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "fused_lm_head")}
        if not projects or kwargs.get("output_router_logits"):
            # Through the outermost forward: TRL's head may have been added after this one.
            return self.forward(*args, shift_labels=answer_labels, fused_lm_head=True, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        labels = answer_labels.flatten()
        scored = (labels != -100).nonzero().squeeze(1)
        head = self.get_output_embeddings()
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            weight, bias = head.weight, head.bias
            if not torch.is_grad_enabled():
                # A Function isn't told of no_grad: it would keep the probabilities for the head's gradient.
                weight, bias = weight.detach(), None if bias is None else bias.detach()
            states = hidden.flatten(0, 1).index_select(0, scored)
            outputs = AnswerLogProbs.apply(states, weight, bias, labels[scored], answer_statistics, answer_sum)
        log_probs, entropy, mean_logits, is_top1 = (
            None
            if output is None
            else output.new_zeros(len(labels)).index_copy(0, scored, output).view_as(answer_labels)
            for output in outputs
        )
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            mean_logits=mean_logits,
            is_top1=is_top1,
            label_mask=answer_labels != -100,
        )

    model.forward = types.MethodType(forward, model)


def projects_plainly(config: PretrainedConfig) -> bool:
    """Whether a model's logits are W·h + b and no more, as far as TRL's head can tell."""
    config = config.get_text_config()
    if getattr(config, "final_logit_softcapping", None) is not None:
        return False
    scales = (getattr(config, name, None) for name in LOGIT_SCALES)
    return all(scale in (None, 1.0) for scale in scales)


class AnswerLogProbs(torch.autograd.Function):
    """
    Log-probability, entropy, mean logit and whether it is the first choice, of each of N tokens, from N hidden states.

    d log p_t / d hidden = W_t − p·W, but for the factor that arrives in the backward. So the forward computes it while
    the probabilities are at hand, and the backward needs neither the logits nor W (which ZeRO-3 has taken away by
    then). Only where the head itself is trained are the N × V probabilities kept; not even then if one factor arrives
    for all tokens (`summed`): Σ_t (e_t − p)·hidden_t, which has the head's own V × H, is then its gradient but for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        statistics: bool,
        summed: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Shapes: hidden (N, H), weight (V, H), bias (V,), targets (N,); four of (N,) are returned, or without
        `statistics` the first and three None.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)  # sums over the vocabulary
        inputs, weights = hidden.to(dtype), weight.to(dtype)
        trains_head = any(ctx.needs_input_grad[1:3])
        slope = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        kept = inputs.new_empty((len(inputs), len(weight))) if trains_head and not summed else None
        total = torch.zeros_like(weight, dtype=wide) if trains_head and summed else None
        total_bias = None if total is None or bias is None else torch.zeros_like(bias, dtype=wide)
        log_probs = inputs.new_empty(len(inputs), dtype=wide)
        entropy, is_top1 = torch.empty_like(log_probs), torch.empty_like(log_probs, dtype=torch.bool)
        for start in range(0, len(inputs), TILE_TOKENS):
            tile = slice(start, start + TILE_TOKENS)
            logits = torch.mm(inputs[tile], weights.t())
            if bias is not None:
                logits += bias.to(dtype)
            # One kernel, row by row in the cache, where each step written out would stream all logits from memory.
            every = torch.log_softmax(logits, dim=1, dtype=wide)
            log_probs[tile] = every.gather(1, targets[tile, None]).squeeze(1)
            if not (statistics or trains_head or slope is not None):
                continue
            probabilities = every.exp()
            if statistics:
                is_top1[tile] = every.amax(1) == log_probs[tile]
                entropy[tile] = every.mul_(probabilities).sum(1).neg_()
            probabilities = probabilities.to(dtype)
            if slope is not None:
                torch.sub(weights[targets[tile]], torch.mm(probabilities, weights), out=slope[tile])
            if kept is not None:
                kept[tile] = probabilities
            if total is not None:
                _subtract_product(total, probabilities.t(), inputs[tile])
            if total_bias is not None:
                total_bias -= probabilities.sum(0)
        if total is not None:
            total.index_add_(0, targets, inputs.to(wide))
        if total_bias is not None:
            total_bias.index_add_(0, targets, torch.ones_like(log_probs))
        ctx.save_for_backward(slope, kept, None if kept is None else inputs, targets, total, total_bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        if not statistics:
            return log_probs, None, None, None
        # A row's mean logit is its product with the mean of the weights: no pass over the logits.
        mean_logits = inputs.to(wide) @ weights.mean(0, dtype=wide)
        if bias is not None:
            mean_logits += bias.mean(dtype=wide)
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return log_probs, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        slope, probabilities, inputs, targets, total, total_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad[:, None] * slope).to(hidden_dtype)
        if total is not None:
            factor = grad[:1].sum()  # 0 of no token
            torch._assert_async((grad == factor).all(), "answer_sum: the log-probabilities have several weights")
            grad_weight = (total * factor).to(weight_dtype)
            grad_bias = None if total_bias is None else (total_bias * factor).to(weight_dtype)
            return grad_hidden, grad_weight, grad_bias, None, None, None
        if ctx.needs_input_grad[1]:
            scaled = (grad[:, None] * inputs).to(inputs.dtype)
            grad_weight = torch.mm(probabilities.t(), -scaled).index_add_(0, targets, scaled).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            grad = grad.to(probabilities.dtype)
            grad_bias = (-(grad @ probabilities)).index_add_(0, targets, grad).to(weight_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _subtract_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total −= left·right, which may be narrower."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=-1)
    else:
        total -= torch.mm(left, right)
