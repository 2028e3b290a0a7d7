"""
Which keys of TRL's ModelConfig, DPOConfig and SFTConfig a recipe may use, with their ranges, and the way out for those
that would be ignored here or would break what this project promises. Written out, so that a recipe is checked before
TRL is imported; a test holds the tables against the pinned TRL, field by field.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from core.config.schema import Count, NotNegative

Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NaturalNumber = Annotated[int, Field(ge=0)]
Strategy = Literal["no", "steps", "epoch"]
Tracker = Literal["none", "wandb", "tensorboard"]
LogLevel = Literal["debug", "info", "warning", "error", "critical", "passive"]

MODEL: dict[str, Any] = {
    "model_name_or_path": str,
    "model_revision": str,
    "dtype": Literal["auto", "bfloat16", "float16", "float32"],
    "attn_implementation": Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] | None,
    "use_peft": bool,
    "lora_r": Count,
    "lora_alpha": Count,
    "lora_dropout": BelowOne,
    "lora_target_modules": str | list[str] | None,
    "lora_target_parameters": list[str] | None,
    "lora_modules_to_save": list[str] | None,
    "use_rslora": bool,
    "use_dora": bool,
}

TRAINING: dict[str, Any] = {
    "output_dir": Annotated[str, Field(min_length=1)],
    # batch and length of the run
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": Positive,
    "max_steps": Literal[-1] | Count,
    "max_length": Annotated[int, Field(ge=2)] | None,
    "truncation_mode": Literal["keep_start"],
    # optimizer
    "learning_rate": Positive,
    "lr_scheduler_type": Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
    ],
    "lr_scheduler_kwargs": dict[str, Any] | None,
    "warmup_steps": BelowOne | NaturalNumber,
    "optim": Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"],
    "weight_decay": NotNegative,
    "adam_beta1": BelowOne,
    "adam_beta2": BelowOne,
    "adam_epsilon": Positive,
    "max_grad_norm": NotNegative,
    # precision and memory
    "bf16": bool | None,
    "fp16": bool,
    "tf32": bool | None,
    "gradient_checkpointing": bool,
    "gradient_checkpointing_kwargs": dict[str, Any] | None,
    "activation_offloading": bool,
    "torch_empty_cache_steps": Count | None,
    "use_cpu": bool,
    # log, evaluate, save
    "logging_strategy": Strategy,
    "logging_steps": Positive,
    "logging_first_step": bool,
    "log_on_each_node": bool,
    "log_level": LogLevel,
    "log_level_replica": LogLevel,
    "report_to": Tracker | list[Tracker],
    "run_name": str | None,
    "disable_tqdm": bool | None,
    "skip_memory_metrics": bool,
    "eval_strategy": Strategy,
    "eval_steps": Positive | None,
    "eval_delay": NotNegative,
    "eval_on_start": bool,
    "save_strategy": Literal["no", "steps", "epoch", "best"],
    "save_steps": Positive,
    "save_total_limit": Count | None,
    "save_only_model": bool,
    "save_on_each_node": bool,
    "load_best_model_at_end": bool,
    "metric_for_best_model": str | None,
    "greater_is_better": bool | None,
    "resume_from_checkpoint": str | bool | None,
    # seeds, workers, processes
    "seed": NaturalNumber,
    "data_seed": NaturalNumber | None,
    "full_determinism": bool,
    "dataset_num_proc": Count | None,
    "dataloader_num_workers": NaturalNumber,
    "dataloader_pin_memory": bool,
    "dataloader_persistent_workers": bool,
    "dataloader_prefetch_factor": Count | None,
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "ddp_backend": Literal["nccl", "gloo", "mpi"] | None,
    "ddp_timeout": Count,
    "ddp_find_unused_parameters": bool | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_broadcast_buffers": bool | None,
    "ddp_static_graph": bool | None,
}  # fmt: skip

DPO: dict[str, Any] = {
    "beta": Positive,
    "disable_dropout": bool,
    "precompute_ref_log_probs": bool,
    "precompute_ref_batch_size": Count | None,
}

SFT: dict[str, Any] = {
    "loss_type": Literal["nll", "dft"],
    "assistant_only_loss": bool,
    "shuffle_dataset": bool,
    "packing": bool,
    "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
    "padding_free": bool,
    "eval_packing": bool | None,
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    "dataloader_drop_last": bool,
    "neftune_noise_alpha": Positive | None,
    "router_aux_loss_coef": NotNegative | None,
    "average_tokens_across_devices": bool,
}

# What stands where the recipe says nothing, as far as the checks need it.
DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": -1,
    "seed": 42,
    "beta": 0.1,
    "fp16": False,
    "use_cpu": False,
    "use_peft": False,
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": False,
    "report_to": "none",
    "save_only_model": False,
    "attn_implementation": None,
}


def _refused(reasons: dict[str, str]) -> dict[str, str]:
    return {key: reason for keys, reason in reasons.items() for key in keys.split()}


REFUSED_ALWAYS = _refused(
    {
        "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage": (
            "quantised training needs bitsandbytes, which requirements.txt does not have; use use_peft: true with "
            "dtype: bfloat16"
        ),
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
REFUSED_DPO = REFUSED_ALWAYS | _refused(
    {
        "loss_type loss_weights label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting "
        "discopop_tau": "the loss is chosen by margin.preset or margin.link",
        "padding_free": "use prefix_sharing: true, which lays pairs end to end without padding",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps": "the reference model stays as it is",
        "router_aux_loss_coef": "the loss has no router term; remove the key",
        "neftune_noise_alpha": "noise in the policy alone would not leave Δ = 0 at the start; use it in the SFT stage",
        "train_sampling_strategy dataloader_drop_last": "the order of rows follows selection.replay and seed",
        "average_tokens_across_devices": "the loss is a mean over pairs; remove the key",
    }
)
REFUSED_SFT = REFUSED_ALWAYS | _refused(
    {
        "dataset_text_field dataset_kwargs": "use the columns of a datasets entry",
        "completion_only_loss": "rows are conversations; use assistant_only_loss",
        "eos_token": "the tokenizer has it; save another one with the tokenizer",
    }
)

# Keys of other versions, of other scripts and of habit, which no likeness of letters would lead to ours.
RENAMED = {
    "warmup_ratio": "warmup_steps (below 1 it is a part of the run: warmup_steps: 0.1)",
    "torch_dtype": "dtype",
    "model": "model_name_or_path",
    "ref_model": "reference_model, in evaluate.py; in dpo.py the start is the reference",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "max_prompt_length": "max_length (the prompt's room is selection.hygiene.min_answer_tokens)",
    "overwrite_output_dir": "resume_from_checkpoint, or another output_dir",
    "attn": "attn_implementation",
    "packing": "prefix_sharing",
    "dataset": "datasets",
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

KINDS = {
    "dpo": (MODEL | TRAINING | DPO, REFUSED_DPO),
    "sft": (MODEL | TRAINING | SFT, REFUSED_SFT),
    "evaluate": (MODEL | TRAINING | DPO, REFUSED_DPO),
}
