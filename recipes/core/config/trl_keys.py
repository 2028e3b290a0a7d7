"""
Which keys of TRL's ModelConfig, DPOConfig and SFTConfig a recipe may use, and the way out for those that would be
ignored here or would break what this project promises. What TRL says of a key is read from its source, because
importing TRL takes seconds and a misspelt key is told before; a test holds it against the classes themselves.
"""

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from core.config.schema import Count, NotNegative

Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NaturalNumber = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's range
Strategy = Literal["no", "steps", "epoch"]
Tracker = Literal["none", "wandb", "tensorboard"]
BITSANDBYTES = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")  # optimizers
LogLevel = Literal["debug", "info", "warning", "error", "critical", "passive"]


def _each(rows: dict[str, Any]) -> dict[str, Any]:
    """`{"a b": x}` → `{"a": x, "b": x}`."""
    return {key: value for keys, value in rows.items() for key in keys.split()}


# The types of TRL's that need no more words. Every other key, and so every number, has a row in RANGES.
PLAIN = {
    "bool": bool,
    "bool | None": bool | None,
    "str": str,
    "str | None": str | None,
    "list[str] | None": list[str] | None,
}
RANGES: dict[str, Any] = _each(
    {
        "model_name_or_path": str,
        "output_dir": Annotated[str, Field(min_length=1)],
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps ddp_timeout "
        "lora_r lora_alpha": Count,
        "save_total_limit dataset_num_proc dataloader_prefetch_factor ddp_bucket_cap_mb torch_empty_cache_steps "
        "precompute_ref_batch_size": Count | None,
        "dataloader_num_workers": NaturalNumber,
        "seed": Seed,
        "data_seed": Seed | None,
        "max_steps": Literal[-1] | Count,
        "max_length": Annotated[int, Field(ge=2, lt=2**31)] | None,
        "learning_rate beta num_train_epochs logging_steps save_steps adam_epsilon": Positive,
        "eval_steps neftune_noise_alpha": Positive | None,
        "weight_decay max_grad_norm eval_delay": NotNegative,
        "router_aux_loss_coef": NotNegative | None,
        "adam_beta1 adam_beta2 lora_dropout": BelowOne,
        "warmup_steps": BelowOne | NaturalNumber,  # below 1: a part of the run
        "lr_scheduler_kwargs gradient_checkpointing_kwargs": dict[str, Any] | None,
        "resume_from_checkpoint": str | bool | None,
        "lora_target_modules": str | list[str] | None,
        "logging_strategy eval_strategy": Strategy,
        "save_strategy": Literal["no", "steps", "epoch", "best"],
        "report_to": Tracker | list[Tracker],
        "log_level log_level_replica": LogLevel,
        "dtype": Literal["auto", "bfloat16", "float16", "float32"],
        "attn_implementation": (
            Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] | None
        ),
        "optim": Literal[
            "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", *BITSANDBYTES
        ],
        "bnb_4bit_quant_type": Literal["nf4", "fp4"],
        "lr_scheduler_type": Literal[
            "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
            "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
            "warmup_stable_decay", "greedy",
        ],
        "truncation_mode": Literal["keep_start"],
        "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
        "ddp_backend": Literal["nccl", "gloo", "mpi"] | None,
        "loss_type": Literal["nll", "dft"],
        "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
        "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    }
)  # fmt: skip


_REFUSED = _each(
    {
        "bnb_4bit_quant_storage": "weights of 4 bits are stored in bytes; another storage serves FSDP; remove the key",
        "lora_task_type": "a policy is always CAUSAL_LM; remove the key",
        "trust_remote_code": "code that comes with a model is never run; use a model that transformers knows",
        "model_init_kwargs": "use dtype, attn_implementation and model_revision",
        "optim_args optim_target_modules": "no optimizer that a recipe may choose reads it; remove the key",
        "label_smoothing_factor": "no trainer here uses it; remove the key",
        "bf16_full_eval fp16_full_eval": "evaluation runs in the precision of training; use bf16 or fp16",
        "activation_checkpointing": "use gradient_checkpointing",
        "activation_checkpointing_kwargs": "use gradient_checkpointing_kwargs",
        "torch_compile torch_compile_backend torch_compile_mode": "compiled models are not supported; remove the key",
        "use_liger_kernel liger_kernel_config": "Liger's kernels replace the head that the loss reads; remove the key",
        "use_cache": "the key-value cache is off in training; remove the key",
        "auto_find_batch_size": (
            "a batch found at run time would change the pairs per update; set per_device_train_batch_size"
        ),
        "logging_nan_inf_filter": "a NaN is always shown and never logged as 0; remove the key",
        "include_num_input_tokens_seen": "tokens are counted as num_tokens anyway; remove the key",
        "project trackio_space_id trackio_bucket_id trackio_static_space_id": (
            "trackio is not in requirements.txt; use report_to: wandb or tensorboard"
        ),
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics label_names": (
            "evaluation here keeps sums and no predictions; remove the key"
        ),
        "enable_jit_checkpoint restore_callback_states_from_checkpoint": (
            "checkpoints are written and found by checkpoints.py; remove the key"
        ),
        "ignore_data_skip": "a resumed run sees the rows that it has not seen yet; remove the key",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision": (
            "nothing is uploaded; run `hf upload` on the output folder"
        ),
        "accelerator_config parallelism_config fsdp fsdp_config deepspeed local_rank": (
            "the launcher decides it; choose a file of accelerate_configs/ by accelerate launch --config_file"
        ),
        "dataloader_in_order": "rows always come in order; remove the key",
        "remove_unused_columns length_column_name": "the trainer knows its own columns; remove the key",
        "debug": "remove the key",
        "do_train do_eval do_predict": "the script decides it; evaluation follows eval_datasets and eval_strategy",
        "pad_to_multiple_of": "batches are padded to their longest row; remove the key",
    }
)
_REFUSED_DPO = _REFUSED | _each(
    {
        "loss_type loss_weights label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting "
        "discopop_tau": "the loss is chosen by margin.preset or margin.link",
        "padding_free": "use prefix_sharing: true, which lays pairs end to end without padding",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps": "the reference model stays as it is",
        "neftune_noise_alpha": "noise in the policy alone would not leave Δ = 0 at the start; use it in the SFT stage",
        "train_sampling_strategy dataloader_drop_last": "the order of rows follows selection.replay and seed",
        "average_tokens_across_devices": "the loss is a mean over pairs; remove the key",
    }
)
_REFUSED_SFT = _REFUSED | _each(
    {
        "dataset_text_field dataset_kwargs": "use the columns of a datasets entry",
        "completion_only_loss": "rows are conversations; use assistant_only_loss",
        "eos_token": "the tokenizer has it; save another one with the tokenizer",
    }
)


# Keys of other versions, of other scripts and of habit, which no likeness of letters would lead to ours.
RENAMED = {
    "warmup_ratio": "warmup_steps (below 1 it is a part of the run: warmup_steps: 0.1)",
    "model": "model_name_or_path",
    "ref_model": "reference_model, in evaluate.py; in dpo.py the start is the reference",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "max_prompt_length": "max_length (the prompt's room is selection.hygiene.min_answer_tokens)",
    "selection.hygiene.min_characters": "selection.hygiene.min_tokens (tokens of the shorter answer; off by default)",
    "overwrite_output_dir": "resume_from_checkpoint, or another output_dir",
    "attn": "attn_implementation",
    "packing": "prefix_sharing",
    "dataset_name": "datasets (a list of entries with path, split, role, columns)",
    "dataset_config": "datasets: [{name: …}]",
    "dataset_train_split": "datasets: [{split: …}]",
    "dataset_test_split": "eval_datasets: [{split: …}]",
    "dataset_mixer": "datasets: [{fraction: …}]",
    "dataset_splits": "datasets: [{split: …}]",
    "dataset_streaming": "datasets",
    "streaming": "datasets",
    "test_split_size": "eval_datasets",
}


@dataclass(frozen=True)
class TrlKey:
    """A field of one of the configuration classes."""

    owner: str  # the class that says what it does
    annotation: str
    default: Any
    help: str


# Defaults that TRL works out, and words of its own that do not hold here.
WORKED_OUT = {"optim": "adamw_torch_fused"}
OUR_WORDS = {
    "load_in_4bit": "Hold the frozen linear layers in 4 bits (bitsandbytes), under LoRA alone",
    "load_in_8bit": "Hold the frozen linear layers in 8 bits (bitsandbytes), under LoRA alone; pairs are then padded",
    "use_bnb_nested_quant": "Quantise the constants of 4 bits as well; true here with load_in_4bit",
    "gradient_checkpointing_kwargs": "Keyword arguments of gradient checkpointing",
    "gradient_accumulation_steps": "Micro-batches per update; pairs_per_update or conversations_per_update set it",
    "precompute_ref_log_probs": "Compute the reference once, before training; true here unless margin.reference_free",
    "eval_on_start": "Evaluate before the first update; true in dpo.py where there are eval_datasets",
    "resume_from_checkpoint": "A checkpoint's folder, or auto: the newest complete one, if there is one",
    "output_dir": "The folder of the run: weights, resolved recipe, audit, metrics, plots, model card",
}


def _fields(file: str, name: str, owner: str) -> dict[str, TrlKey]:
    """The lines `key: annotation = field(default=…, metadata={"help": …})` of a class `name`."""
    package, _, path = file.partition("/")
    source = Path(importlib.util.find_spec(package).origin).parent.joinpath(path).read_text(encoding="utf-8")
    (declared,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for line in declared.body:
        if isinstance(line, ast.AnnAssign):
            key = line.target.id
            given = {keyword.arg: keyword.value for keyword in line.value.keywords}
            metadata = zip(given["metadata"].keys, given["metadata"].values, strict=True)
            said = next(ast.literal_eval(text) for word, text in metadata if word.value == "help")
            try:
                default = ast.literal_eval(given["default"])
            except (KeyError, ValueError):
                default = WORKED_OUT.get(key)
            found[key] = TrlKey(owner, ast.unparse(line.annotation), default, OUR_WORDS.get(key, said))
    return found


MODEL = _fields("trl/trainer/model_config.py", "ModelConfig", "ModelConfig")
_BASE = _fields("transformers/training_args.py", "TrainingArguments", "TrainingArguments")
_BASE |= _fields("trl/trainer/base_config.py", "_BaseConfig", "TrainingArguments")
_DPO = _BASE | _fields("trl/trainer/dpo_config.py", "DPOConfig", "DPOConfig")
_SFT = _BASE | _fields("trl/trainer/sft_config.py", "SFTConfig", "SFTConfig")
DEFAULTS = {name: key.default for name, key in (MODEL | _SFT | _DPO).items()}  # where the recipe says nothing
OURS = ("pad_token", "chat_template_path", "padding_free")  # keys of schema.py, which do not reach TRL

REFUSED = {"dpo": _REFUSED_DPO, "sft": _REFUSED_SFT, "evaluate": _REFUSED_DPO}
ACCEPTED = {
    kind: {name: key for name, key in (MODEL | fields).items() if name not in REFUSED[kind] and name not in OURS}
    for kind, fields in (("dpo", _DPO), ("sft", _SFT), ("evaluate", _DPO))
}


def type_of(name: str, key: TrlKey) -> Any:
    """What a recipe may give: TRL's own type, narrowed to what makes sense."""
    return RANGES[name] if name in RANGES else PLAIN[key.annotation]
