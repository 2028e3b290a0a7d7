"""Loading the policy and the reference, and the proof that what was saved is what was trained."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head

from errors import RecipeError
from prefix import HEAD_OUTPUTS, PaddedCollator, pair_logps


def load_model(model: ModelConfig) -> PreTrainedModel:
    """A causal language model in the recipe's dtype; code from the Hub is never run, weights are safetensors."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            dtype=model.dtype if model.dtype in ("auto", None) else getattr(torch, model.dtype),
            attn_implementation=model.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"{model.model_name_or_path}: the model cannot be loaded: {error}") from error


def load_saved(folder: str, base: ModelConfig) -> PreTrainedModel:
    """What a run saved: a model, or an adapter on the recipe's model."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base), folder)


@torch.no_grad()
def verify_saved(
    folder: str,
    base: ModelConfig,
    trained: torch.nn.Module,
    accelerator: Accelerator,
    examples: list[dict[str, Any]],
    pad_token_id: int,
) -> float:
    """
    Load the saved weights again and compare log-probabilities with those of the model in memory.

    Every rank runs the model in memory (ZeRO-3 gathers its weights for each forward); rank 0 loads the saved one.

    Returns:
        The largest difference, relative to the log-probability.

    Raises:
        RecipeError: the difference is above float error (1e-4; 5 % for weights of 16 bits).
    """
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = PaddedCollator(pad_token_id)([{key: example[key] for key in columns} for example in examples])
    batch = {key: value.to(accelerator.device) for key, value in batch.items()}
    was_training = trained.training
    trained.eval()
    with accelerator.autocast():
        expected = pair_logps(trained, batch)
    trained.train(was_training)
    difference = 0.0
    if accelerator.is_main_process:
        saved = load_saved(folder, base).to(accelerator.device).eval()
        add_fused_lm_head(
            saved.get_base_model() if hasattr(saved, "peft_config") else saved,
            outputs=HEAD_OUTPUTS,
        )
        with accelerator.autocast():
            found = pair_logps(saved, batch)
        for before, after in (
            (expected.chosen_logps, found.chosen_logps),
            (expected.rejected_logps, found.rejected_logps),
        ):
            relative = (before - after).abs() / before.abs().clamp(min=1.0)
            difference = max(difference, relative.max().item())
        half = saved.dtype in (torch.bfloat16, torch.float16) or accelerator.mixed_precision in ("bf16", "fp16")
        if not difference <= (0.05 if half else 1e-4):
            raise RecipeError(
                f"{folder}: the saved weights were loaded again and give other log-probabilities than the trained "
                f"model (off by {difference:.2g} of their size); do not use them, and keep the last checkpoint"
            )
    return difference
