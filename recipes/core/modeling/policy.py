"""The policy and its reference: loading them, and the proof that what was saved is what was trained."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import (
    deepspeed,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.utils import ADAPTER_CONFIG_NAME
from trl import DPOConfig, ModelConfig, SFTConfig

from core.modeling.dropout import disable_dropout
from core.modeling.parameters import select_parameters
from core.modeling.precision import (
    HALF,
    Precision,
    asked_dtype,
    check_save_dtype,
    check_steps,
    hold,
    in_one_part,
    precision_of,
    stored_dtype,
)
from core.modeling.prefix import has_router_loss, unsupported_reason
from core.runtime import loading
from core.runtime.errors import RecipeError
from core.runtime.ranks import first_rank_decides, rank

FLOAT_ERROR, HALF_ERROR = 1e-4, 0.05  # of a log-probability's size, for weights of 32 and of 16 bits
PROVEN_TOKENS = 64  # of a row: a model of billions of weights scores them on a CPU in seconds


def load_policy(
    model: ModelConfig, patterns: list[str] | None, args: TrainingArguments, path: str | None = None
) -> PreTrainedModel:
    """
    A model with what of it is trained chosen (`select_parameters`), held as `precision_of` has it, and without dropout
    where the recipe (by default) asks for none. The reference is loaded the same way, so that before the first update
    the two compute the same.

    Args:
        model: the recipe's model settings.
        patterns: the recipe's trainable_parameters, which with LoRA name its targets.
        args: their mixed precision and DeepSpeed.
        path: another model than the recipe's.
    """
    config = stored_config(model, path)
    precision = precision_of(asked_dtype(model, config), args.mixed_precision, args.deepspeed_plugin is not None)
    # Files in float32 may hold updates that 16 bits would round away: what is trained is read as it was saved.
    dtype = precision.frozen
    if not (model.use_peft or precision.masters):
        dtype = torch.promote_types(dtype, stored_dtype(config))
    loaded = load_model(model, path, asked_dtype(model, config) if precision.masters else dtype)
    select_parameters(loaded, None if model.use_peft else patterns)
    if not model.use_peft:
        hold(loaded, precision)
    if getattr(args, "disable_dropout", False):  # a key of DPOConfig, true by default
        disable_dropout(loaded)
    return loaded


def check_learning(
    causal_lm: PreTrainedModel,
    model: ModelConfig,
    args: TrainingArguments,
    save_dtype: str | None,
    precision: Precision,
) -> None:
    """
    Before the training: that its steps move what is trained, and that what it ends with can be saved.

    Args:
        causal_lm: what is trained of it is chosen; it needs no storage.

    Raises:
        RecipeError: one of the two is not so.
    """
    check_save_dtype(save_dtype, precision.trained if precision.masters else None)
    trained = {name for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    first_rank_decides(lambda: check_steps(model, trained, args.learning_rate, args.optim))
    with tempfile.TemporaryDirectory() as folder:
        try:
            causal_lm.config.save_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"model {model.model_name_or_path}: its config cannot be saved: {reason}") from error


def load_model(model: ModelConfig, path: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    A causal language model. Code from the Hub is never run, and weights are safetensors. Of a folder with an adapter,
    its base model with the adapter merged into it, in float32 where it is: 16 bits would round small adapters away.

    Args:
        model: the recipe's model settings.
        path: another model than the recipe's.
        dtype: another than the recipe's.

    Raises:
        RecipeError: it cannot be loaded, or its generation settings could not be saved again.
    """
    path, revision = (model.model_name_or_path, model.model_revision) if path is None else (path, None)
    base = adapted_model(path)
    if base is not None:
        if is_deepspeed_zero3_enabled():
            raise RecipeError(
                f"model {path} is an adapter, which cannot be merged under ZeRO-3; merge and save it first"
            )
        adapted = loading.with_adapter(load_model(model, base, dtype), path)
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.get_base_layer().float()
        return adapted.merge_and_unload().requires_grad_(True)
    if dtype is None:
        dtype = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    loaded = loading.causal_lm(path, revision=revision, dtype=dtype, attn_implementation=model.attn_implementation)
    if note := mend_generation(loaded.generation_config, path):
        if rank() == 0:
            print(f"note: {note}", flush=True)
    return loaded


def adapted_model(path: str) -> str | None:
    """The base model of a folder with an adapter; None of any other."""
    return loading.adapter_base(path) if (Path(path) / ADAPTER_CONFIG_NAME).is_file() else None


def stored_config(model: ModelConfig, path: str | None = None) -> PretrainedConfig:
    """The config of a model, or of that under an adapter."""
    path, revision = (model.model_name_or_path, model.model_revision) if path is None else (path, None)
    if base := adapted_model(path):
        return stored_config(model, base)
    return loading.model_config(path, revision)


def mend_generation(config: GenerationConfig | None, path: str) -> str | None:
    """
    Settings of sampling beside `do_sample: false` are published often, and transformers refuses to save them, which
    would be after the training: they are taken at their word, and the line to say so is returned.

    Raises:
        RecipeError: the settings are wrong in another way.
    """
    if config is None:
        return None
    try:
        config.validate(strict=True)
        return None
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise RecipeError(
            f"model {path}: generation_config.json is invalid, so the trained model could not be saved: "
            f"{' '.join(str(error).split())}; mend that file"
        ) from error
    return (
        f"model {path}: generation_config.json has settings of sampling without do_sample; saved with do_sample: true"
    )


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
        return loading.with_adapter(load_model(base), folder)
    return load_model(base, folder, stored_dtype(stored_config(base, folder)))


@contextlib.contextmanager
def loaded_whole() -> Iterator[None]:
    """Load and use a model whole, on this rank alone: ZeRO-3 would split it over all, and wait for the others."""
    found = deepspeed._hf_deepspeed_config_weak_ref
    config = None if found is None else found()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            # The same object: one made anew from accelerate's plugin has no batch size before a trainer fills it in.
            set_hf_deepspeed_config(config)


def share_prefixes(
    wanted: bool, model: torch.nn.Module, max_length: int | None, lora: PeftConfig | None = None
) -> bool:
    """Whether pairs share their prompt's computation; a line says why not where the recipe wants it."""
    reason = unsupported_reason(model, max_length, adapter=lora) if wanted else None
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
