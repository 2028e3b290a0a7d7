"""The proof that what was saved is what was trained."""

from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl import ModelConfig

from core.modeling.policy import adapted_model, load_model, loaded_whole, stored_config
from core.modeling.precision import HALF, in_one_part, stored_dtype
from core.runtime import loading
from core.runtime.errors import RecipeError
from core.runtime.ranks import first_rank_decides

FLOAT_ERROR, HALF_ERROR = 1e-4, 0.05  # of a log-probability's size, for weights of 32 and of 16 bits
PROVEN_TOKENS = 64  # of a row: a model of billions of weights scores them on a CPU in seconds


def load_saved(base: ModelConfig, folder: str) -> PreTrainedModel | PeftModel:
    """What a run has saved in a folder: a model, or an adapter on the model that it names."""
    if (under := adapted_model(folder)) is not None:
        return loading.with_adapter(load_model(base, None if under == base.model_name_or_path else under), folder)
    return load_model(base, folder, stored_dtype(stored_config(base, folder)))


def verify_saved(
    folder: str,
    base: ModelConfig,
    trained: torch.nn.Module,
    accelerator: Accelerator,
    rows: list[list[int]],
) -> float:
    """
    Load the saved weights again, on rank 0's CPU, and hold them against the trained model: tensor by tensor and bit by
    bit but for the one rounding, and by the log-probabilities of a few rows. Of an adapter its own weights alone are
    read. Under ZeRO-3, where no rank has the weights whole, there are the log-probabilities alone.

    Every rank runs the trained model (ZeRO-3 gathers its weights for each forward).

    Args:
        rows: token ids of whole conversations, the same on every rank; the first `PROVEN_TOKENS` of each are scored.

    Returns:
        The largest difference of a log-probability, as a part of it.

    Raises:
        RecipeError: a tensor differs, or a log-probability by more than float error; on every rank.
    """
    plugin = accelerator.state.deepspeed_plugin
    whole = plugin is None or plugin.zero_stage < 3
    adapter = isinstance(trained, PeftModel)
    mixed = None if plugin is not None else HALF.get(accelerator.mixed_precision)
    rows = [row[:PROVEN_TOKENS] for row in rows]
    expected = None if whole and adapter else _row_logps(trained, rows, accelerator.device, mixed).cpu()

    def compare() -> float:
        advice = f"{folder}: the model lies there, but do not use it; a checkpoint in that folder is of before"
        with loaded_whole():
            try:
                if whole and adapter:
                    compared = get_peft_model_state_dict(trained), load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
                else:
                    saved = load_saved(base, folder)
                    compared = trained.state_dict(), saved.state_dict()
            except (OSError, SafetensorError, RecipeError) as error:
                raise RecipeError(f"{advice}: it cannot be loaded again: {error}") from error
            if whole and (names := differing(*compared)):
                shown = ", ".join(names[:3])
                raise RecipeError(f"{advice}: {len(names)} of its tensors are not the trained ones: {shown}")
            if expected is None:
                return 0.0
            found = _row_logps(saved, rows, torch.device("cpu"), mixed)
        difference = ((found - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
        half = saved.dtype != torch.float32 or mixed is not None
        if not difference <= (HALF_ERROR if half else FLOAT_ERROR):
            raise RecipeError(
                f"{advice}: loaded again, it gives other log-probabilities than the trained model (off by "
                f"{difference:.2g} of their size)"
            )
        return difference

    return first_rank_decides(compare)


def differing(trained: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not in both, or not the same once the trained one is rounded to the saved one's."""
    return sorted(trained.keys() ^ saved.keys()) + [
        name
        for name, weight in trained.items()
        if name in saved and not torch.equal(weight.to(saved[name].dtype).cpu(), saved[name])
    ]


@torch.no_grad()
def _row_logps(
    model: torch.nn.Module, rows: list[list[int]], device: torch.device, mixed: torch.dtype | None
) -> torch.Tensor:
    """Log-probability of each row after its first token, one by one: the logits of all would be the run's peak."""
    training = model.training
    model.eval()
    sums = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        with in_one_part(model), torch.autocast(device.type, dtype=mixed, enabled=mixed is not None):
            logits = model(input_ids=ids, use_cache=False).logits
        sums.append(logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
        del logits
    model.train(training)
    return torch.stack(sums)
