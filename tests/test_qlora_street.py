"""QLoRA by the scripts: the 7B recipe, and two stages with one adapter, in 4 bits from the first to the evaluation."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from architectures import save_architecture
from conftest import build_tokenizer
from processes import CONFIGS, ROOT, script_says

RECIPE = ROOT / "recipes/mistral-7b/qlora.yaml"
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SHAPE_OF_7B = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None, "dtype": "bfloat16",
}  # fmt: skip
ON_CPU = {"use_cpu": True, "bf16": False, "dtype": "float32"}


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(script: str, recipe: dict[str, Any], folder: Path, *options: str) -> tuple[int, str, str]:
    import core.planning.estimates  # noqa: F401 (here, so that the forks share it)

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return script_says(script, [f"--config={folder / 'recipe.yaml'}", *options])


def answers(number: int) -> list[list[dict[str, str]]]:
    question = {"role": "user", "content": f"{number} How do I bake bread?"}
    return [
        [question, {"role": "assistant", "content": text}] for text in (f"{number} Mix flour, then wait.", "I do not.")
    ]


def write_pairs(folder: Path) -> str:
    rows = [
        {"chosen": chosen, "rejected": rejected, "score_chosen": 8.0, "score_rejected": 3.0}
        for chosen, rejected in map(answers, range(40))
    ]
    return lines(folder / "ultrafeedback.jsonl", rows)


@pytest.fixture(scope="module")
def ultrafeedback(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_architecture(tmp_path_factory.mktemp("llama"), "llama", **WIDE))


def of_7b(ultrafeedback: str, model: str, output: Path, **others: Any) -> dict[str, Any]:
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["datasets"][0]["path"] = ultrafeedback
    return recipe | {"model_name_or_path": model, "output_dir": str(output)} | others


def test_the_7b_recipe_fits_a_gpu_of_24_gb(ultrafeedback, tmp_path):
    """
    By hand: 32 layers of 218,103,808 linear weights at 0.516 bytes and 262.1 M more at 2 make 3.84 GiB; of each layer
    the adapters have 16·(4·4096 + 4096 + 2·5120 + … ) = 1,310,720 float32 weights.
    """
    (tmp_path / "7b").mkdir()
    MistralConfig(**SHAPE_OF_7B).save_pretrained(tmp_path / "7b")
    build_tokenizer().save_pretrained(tmp_path / "7b")
    recipe = of_7b(ultrafeedback, str(tmp_path / "7b"), tmp_path / "out")
    code, output, errors = run(
        "check.py", recipe, tmp_path, f"--accelerate_config={CONFIGS / 'gpu.yaml'}", "--gpu_memory=24"
    )
    assert code == 0, output + errors
    assert f"Quantised: {32 * 218_103_808:,} of them, 0.516 bytes each" in output
    assert f"of which {32 * 1_310_720:,} are trained" in output
    weights = (32 * 218_103_808 * (0.5 + 1 / 64 + 4 / 16_384) + 262_410_240 * 2 + 32 * 1_310_720 * 4) / 2**30
    assert float(re.search(r"\| weights .* (\d+\.\d+) \|", output)[1]) == pytest.approx(weights, abs=0.01)


def test_the_7b_recipe_trains_a_tiny_model(ultrafeedback, model, tmp_path):
    recipe = of_7b(ultrafeedback, model, tmp_path / "out", **ON_CPU, optim="adamw_8bit", max_steps=2)
    for script, options in (("check.py", [f"--accelerate_config={CONFIGS / 'cpu.yaml'}"]), ("dpo.py", [])):
        code, output, errors = run(script, recipe, tmp_path, *options)
        assert code == 0, output + errors
    card = (tmp_path / "out/README.md").read_text()
    assert "load_in_4bit" in card and "merge_and_unload" in card


def test_two_stages_with_one_adapter(ultrafeedback, model, tmp_path):
    """SFT makes it, preferences go on with it, and the evaluation holds the one against the other, all in 4 bits."""
    four = {"load_in_4bit": True, "use_peft": True, **ON_CPU, "report_to": "none", "save_strategy": "no"}
    conversations = lines(tmp_path / "sft.jsonl", [{"messages": answers(number)[0]} for number in range(8)])
    first = four | {
        "model_name_or_path": model, "output_dir": str(tmp_path / "sft"), "max_steps": 3, "learning_rate": 1e-2,
        "lora_r": 4, "per_device_train_batch_size": 2,
        "datasets": [{"path": conversations, "columns": {"conversation": "messages"}}],
    }  # fmt: skip
    code, output, errors = run("sft.py", first, tmp_path)
    assert code == 0, output + errors
    second = of_7b(ultrafeedback, str(tmp_path / "sft"), tmp_path / "dpo", **four, optim="adamw_torch", max_steps=2)
    code, output, errors = run("dpo.py", second, tmp_path)
    assert code == 2 and "lora_r: has no effect: model_name_or_path is an adapter" in errors
    for key in ("lora_r", "lora_alpha"):
        del second[key]
    for script, options in (("check.py", [f"--accelerate_config={CONFIGS / 'cpu.yaml'}"]), ("dpo.py", [])):
        code, output, errors = run(script, second, tmp_path, *options)
        assert code == 0, output + errors
    saved = [json.loads((tmp_path / stage / "adapter_config.json").read_text()) for stage in ("sft", "dpo")]
    assert [(config["base_model_name_or_path"], config["r"]) for config in saved] == [(model, 4)] * 2

    evaluation = yaml.safe_load((tmp_path / "dpo/recipe.yaml").read_text())
    evaluation |= {"output_dir": str(tmp_path / "evaluation"), "model_name_or_path": str(tmp_path / "dpo")}
    code, output, errors = run("evaluate.py", evaluation, tmp_path, f"--reference_model={tmp_path / 'sft'}")
    assert code == 0, output + errors
    results = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert results["models"]["dpo"]["pairs"]["eval_rewards/margins"] > 0
    own = [f"--model_name_or_path={model}", f"--output_dir={tmp_path}/of-the-base"]
    code, output, errors = run("evaluate.py", evaluation, tmp_path, *own)
    assert code == 2 and "of quantised weights an adapter is evaluated, and it is none" in errors


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_resume_on_other_weights_is_refused(stage, ultrafeedback, tmp_path):
    """A checkpoint has the adapter alone: what it is on is held against by content."""
    model = save_architecture(tmp_path / "model", "llama", **WIDE)
    if stage == "sft":
        conversations = lines(tmp_path / "sft.jsonl", [{"messages": answers(number)[0]} for number in range(8)])
        recipe = of_7b(ultrafeedback, str(model), tmp_path / "out", **ON_CPU)
        for key in ("margin", "beta", "prefix_sharing", "precompute_ref_log_probs", "pairs_per_update"):
            del recipe[key]
        recipe["datasets"] = [{"path": conversations, "columns": {"conversation": "messages"}}]
    else:
        recipe = of_7b(ultrafeedback, str(model), tmp_path / "out", **ON_CPU, precompute_ref_log_probs=False)
    recipe |= {"optim": "adamw_torch", "max_steps": 2, "save_steps": 1, "resume_from_checkpoint": "auto"}
    recipe |= {"per_device_train_batch_size": 4}
    code, output, errors = run(f"{stage}.py", recipe, tmp_path)
    assert code == 0, output + errors
    weights = load_file(model / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    code, output, errors = run(f"{stage}.py", recipe, tmp_path)
    assert code == 2 and "is of another reference: the weights of model_name_or_path" in errors, errors
