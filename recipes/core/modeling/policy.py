"""The policy and its reference: loading them, and the proof that what was saved is what was trained."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.utils import ADAPTER_CONFIG_NAME
from trl import DPOConfig, ModelConfig, SFTConfig

from core.modeling.dropout import disable_dropout
from core.modeling.prefix import has_router_loss, unsupported_reason
from core.runtime.errors import RecipeError
from core.runtime.ranks import first_rank_decides, rank

FLOAT_ERROR, HALF_ERROR = 1e-4, 0.05  # of a log-probability's size, for weights of 32 and of 16 bits


def load_model(model: ModelConfig, path: str | None = None) -> PreTrainedModel:
    """
    A causal language model in the recipe's dtype. Code from the Hub is never run, and weights are safetensors. Of a
    folder with an adapter, its base model with the adapter merged into it.

    Args:
        model: the recipe's model settings.
        path: another model than the recipe's, in the same precision.

    Raises:
        RecipeError: it cannot be loaded.
    """
    path, revision = (model.model_name_or_path, model.model_revision) if path is None else (path, None)
    adapter = Path(path) / ADAPTER_CONFIG_NAME
    if adapter.is_file():
        if is_deepspeed_zero3_enabled():
            raise RecipeError(
                f"model {path} is an adapter, which cannot be merged under ZeRO-3; merge and save it first"
            )
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return PeftModel.from_pretrained(load_model(model, base), path).merge_and_unload().requires_grad_(True)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=model.dtype if model.dtype == "auto" else getattr(torch, model.dtype),
            attn_implementation=model.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RecipeError(
            f"model {path} cannot be loaded: {' '.join(str(error).split())}; mend that folder, or give another model"
        ) from error


def load_policy(model: ModelConfig, args: DPOConfig) -> PreTrainedModel:
    """The recipe's model, without dropout where the recipe (by default) asks for none."""
    policy = load_model(model)
    if args.disable_dropout:
        disable_dropout(policy)
    return policy


def check_config(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, args: DPOConfig | SFTConfig) -> None:
    """
    What the model's config rules out, whether or not its weights are there.

    Raises:
        RecipeError: token ids beyond the embedding, or a router loss that TRL cannot compute.
    """
    path, config = config.name_or_path, config.get_text_config()
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"model {path}: the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}; an id beyond "
            "it would fail; save a tokenizer that belongs to the model"
        )
    coefficient = args.router_aux_loss_coef
    if not has_router_loss(config):
        if coefficient:
            raise RecipeError(
                f"router_aux_loss_coef: a {config.model_type} returns no router logits, so there is no loss to "
                "weight; remove the key"
            )
        return
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if coefficient and isinstance(args, DPOConfig):
        missing = [name for name in ("num_experts", "num_experts_per_tok") if not hasattr(config, name)]
        if missing:
            raise RecipeError(
                f"router_aux_loss_coef: {coefficient:g} for a {config.model_type}, and TRL finds no {missing[0]} in "
                "its config to compute the loss with; set router_aux_loss_coef: 0"
            )


def load_saved(base: ModelConfig, folder: str) -> PreTrainedModel | PeftModel:
    """What a run has saved in a folder: a model, or an adapter on the recipe's model."""
    if (Path(folder) / ADAPTER_CONFIG_NAME).is_file():
        return PeftModel.from_pretrained(load_model(base), folder)
    return load_model(base, folder)


@contextlib.contextmanager
def loaded_whole(accelerator: Accelerator) -> Iterator[None]:
    """Load and use a model whole, on this rank alone: ZeRO-3 would split it over all, and wait for the others."""
    plugin = accelerator.state.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            set_hf_deepspeed_config(plugin.hf_ds_config)


def share_prefixes(wanted: bool, model: PreTrainedModel, max_length: int | None) -> bool:
    """Whether pairs share their prompt's computation; a line says why not where the recipe wants it."""
    reason = unsupported_reason(model, max_length) if wanted else None
    if reason and rank() == 0:
        print(f"note: prefix_sharing falls back to padded pairs: {reason}", flush=True)
    return wanted and reason is None


def verify_saved(
    folder: str,
    base: ModelConfig,
    trained: torch.nn.Module,
    accelerator: Accelerator,
    rows: list[list[int]],
) -> float:
    """
    Load the saved weights again and compare the log-probabilities of a few rows with the trained model's.

    Every rank runs the trained model (ZeRO-3 gathers its weights for each forward); rank 0 loads the saved one.

    Args:
        rows: token ids of whole conversations, the same on every rank.

    Returns:
        The largest difference, as a part of the log-probability.

    Raises:
        RecipeError: it is above float error; on every rank.
    """
    expected = _row_logps(trained, rows, accelerator)

    def compare() -> float:
        with loaded_whole(accelerator):
            saved = load_saved(base, folder).to(accelerator.device)
            found = _row_logps(saved, rows, accelerator)
        difference = ((found - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
        half = saved.dtype != torch.float32 or accelerator.mixed_precision != "no"
        if not difference <= (HALF_ERROR if half else FLOAT_ERROR):
            raise RecipeError(
                f"{folder}: the saved weights, loaded again, give other log-probabilities than the trained model (off "
                f"by {difference:.2g} of their size): do not use them; the last checkpoint in that folder is whole"
            )
        return difference

    return first_rank_decides(compare)


@torch.no_grad()
def _row_logps(model: torch.nn.Module, rows: list[list[int]], accelerator: Accelerator) -> torch.Tensor:
    """Log-probability of each row after its first token, one by one: the logits of all would be the run's peak."""
    training = model.training
    model.eval()
    sums = []
    for row in rows:
        ids = torch.tensor([row], device=accelerator.device)
        with accelerator.autocast():
            logits = model(input_ids=ids, use_cache=False).logits
        sums.append(logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
        del logits
    model.train(training)
    return torch.stack(sums)
