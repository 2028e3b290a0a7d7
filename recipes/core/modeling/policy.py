"""The policy and its reference: loading them, and what is known of them before."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    BitsAndBytesConfig,
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
    Precision,
    asked_dtype,
    check_save_dtype,
    check_steps,
    hold,
    precision_of,
    stored_dtype,
)
from core.modeling.prefix import has_router_loss, unsupported_reason
from core.modeling.quantised import quantisation, settle
from core.modeling.reference_cache import quantised_as
from core.runtime import loading
from core.runtime.errors import RecipeError
from core.runtime.ranks import first_rank_decides, rank


def load_policy(
    model: ModelConfig,
    patterns: list[str] | None,
    args: TrainingArguments,
    path: str | None = None,
    trains: bool = True,
) -> PreTrainedModel | PeftModel:
    """
    A model with what of it is trained chosen (`select_parameters`), held as `precision_of` has it, and without dropout
    where the recipe (by default) asks for none. The reference is loaded the same way, so that before the first update
    the two compute the same.

    Args:
        model: the recipe's model settings.
        patterns: the recipe's trainable_parameters, which with LoRA name its targets.
        args: their mixed precision and DeepSpeed.
        path: another model than the recipe's.
        trains: LoRA goes on with a folder that is an adapter itself. Elsewhere its adapter is merged, but for
            quantised weights, which would be rounded again: it then stays beside them.
    """
    config = stored_config(model, path)
    precision = precision_of(asked_dtype(model, config), args.mixed_precision, args.deepspeed_plugin is not None)
    quantised = quantisation(model, precision)
    frozen = model.use_peft or quantised is not None
    # Files in float32 may hold updates that 16 bits would round away: what is trained is read as it was saved.
    dtype = precision.frozen
    if not (frozen or precision.masters):
        dtype = torch.promote_types(dtype, stored_dtype(config))
    folder = model.model_name_or_path if path is None else path
    base = adapted_model(folder) if quantised or model.use_peft and trains else None
    dtype = asked_dtype(model, config) if precision.masters else dtype
    loaded = load_model(model, base or path, dtype, quantised, args.device if quantised else None)
    if base is not None:
        loaded = loading.with_adapter(loaded, folder, is_trainable=trains)
        hold(loaded, precision, frozen=False)
        loaded.is_its_own_reference = True  # `reference.as_reference`
        loaded.is_loaded_in_4bit = loaded.is_loaded_in_8bit = False  # or TRL rounds the adapter to bfloat16
    if not frozen:
        select_parameters(loaded, patterns)
        hold(loaded, precision)
    if getattr(args, "disable_dropout", False):  # a key of DPOConfig, true by default
        disable_dropout(loaded)
    return loaded


def check_start(model: ModelConfig, zero_stage: int) -> None:
    """
    Raises:
        RecipeError: the model is an adapter that cannot be merged or trained on, or, under quantisation, none.
    """
    path = model.model_name_or_path
    base = adapted_model(path)
    if base is None:
        if quantised_as(model) and not model.use_peft:
            raise RecipeError(
                f"model {path}: of quantised weights an adapter is evaluated, and it is none; give the adapter, or "
                "load_in_4bit: false, load_in_8bit: false"
            )
        return
    if zero_stage == 3:
        raise RecipeError(f"model {path} is an adapter, which cannot be merged under ZeRO-3; merge and save it first")
    if adapted_model(base) is not None and (model.use_peft or quantised_as(model)):
        raise RecipeError(f"model {path} is an adapter of an adapter, {base}; merge that and save it first")


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


def load_model(
    model: ModelConfig,
    path: str | None = None,
    dtype: torch.dtype | None = None,
    quantised: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """
    A causal language model. Code from the Hub is never run, and weights are safetensors. Of a folder with an adapter,
    its base model with the adapter merged into it, in float32 where it is: 16 bits would round small adapters away.

    Args:
        model: the recipe's model settings.
        path: another model than the recipe's.
        dtype: another than the recipe's.
        quantised, device: how its linear layers are quantised, and where; None: they are not, and on the CPU.

    Raises:
        RecipeError: it cannot be loaded, or its generation settings could not be saved again.
    """
    path, revision = (model.model_name_or_path, model.model_revision) if path is None else (path, None)
    base = adapted_model(path)
    if base is not None:
        assert quantised is None and not is_deepspeed_zero3_enabled(), "refused by `check_start`"
        adapted = loading.with_adapter(load_model(model, base, dtype), path)
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.get_base_layer().float()
        return adapted.merge_and_unload().requires_grad_(True)
    if dtype is None:
        dtype = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    options = {"revision": revision, "dtype": dtype, "attn_implementation": model.attn_implementation}
    if quantised is not None:
        options |= {"quantization_config": quantised, "device_map": {"": device}}
    loaded = loading.causal_lm(path, **options)
    settle(loaded)
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
