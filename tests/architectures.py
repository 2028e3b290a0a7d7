"""Tiny models of the architectures that people train, with random weights, for tests that hold for each of them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import build_tokenizer

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
# What each is besides SHAPE, and the modules that LoRA adapts.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "q_proj"),
    "qwen3": ({}, "q_proj"),
    "gemma2": ({"sliding_window": 64, "query_pre_attn_scalar": 8}, "q_proj"),
    "gemma3_text": ({"sliding_window": 64, "query_pre_attn_scalar": 8}, "q_proj"),
    "mixtral": (EXPERTS, "q_proj"),
    "qwen3_moe": (EXPERTS | {"moe_intermediate_size": 32}, "q_proj"),
    "gpt_oss": (EXPERTS | {"sliding_window": 64}, "q_proj"),
    "olmo2": ({}, "q_proj"),
    "phi3": ({"sliding_window": None}, "qkv_proj"),
    "granite": ({"logits_scaling": 2.0}, "q_proj"),
    "mamba": ({"state_size": 4}, "x_proj"),
}


def build_architecture(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    own = ARCHITECTURES[name][0] if name in ARCHITECTURES else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SHAPE | own | settings)))


def save_architecture(folder: Path, name: str, **settings: Any) -> Path:
    """A model's folder with the tests' tokenizer, as a user's local checkpoint would be."""
    build_architecture(name, **settings).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
