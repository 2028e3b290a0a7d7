"""What a model's config rules out, said by check and run alike."""

import pytest
from transformers import AutoConfig
from trl import DPOConfig, SFTConfig

from core.modeling.policy import check_config
from core.runtime.errors import RecipeError


def args(tmp_path, kind=DPOConfig, **keys):
    return kind(output_dir=str(tmp_path), use_cpu=True, bf16=False, **keys)


def config(architecture, tokenizer, **keys):
    return AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **keys)


def test_a_tokenizer_larger_than_the_embedding(tmp_path, tokenizer):
    size = len(tokenizer)
    check_config(config("llama", tokenizer), tokenizer, args(tmp_path))
    with pytest.raises(RecipeError, match=f"the tokenizer has {size} tokens and the model {size - 1}; "):
        check_config(AutoConfig.for_model("llama", vocab_size=size - 1), tokenizer, args(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "coefficient", "message"),
    [
        ("llama", None, None),
        ("llama", 0.0, None),
        ("llama", 0.1, "a llama returns no router logits"),
        ("mixtral", None, None),
        ("mixtral", 0.5, None),
        ("granitemoe", None, "0.001 for a granitemoe, and TRL finds no num_experts"),
        ("granitemoe", 0.0, None),
        ("deepseek_v3", None, None),  # its config has no coefficient
        ("deepseek_v3", 0.1, "TRL finds no num_experts"),
    ],
)
def test_a_router_loss_that_trl_cannot_compute(tmp_path, tokenizer, architecture, coefficient, message):
    given = args(tmp_path, router_aux_loss_coef=coefficient)
    if message is None:
        check_config(config(architecture, tokenizer), tokenizer, given)
    else:
        with pytest.raises(RecipeError, match=message):
            check_config(config(architecture, tokenizer), tokenizer, given)


def test_sft_computes_a_router_loss_by_the_model_s_own_forward(tmp_path, tokenizer):
    check_config(config("granitemoe", tokenizer), tokenizer, args(tmp_path, SFTConfig))
