"""
`check.py` and the run never disagree: the exit code of either, over architectures, ways of training and launches, and
over recipes and folders with a fault. Each is really started, in a fork of this process.
"""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from architectures import ARCHITECTURES, build_architecture, save_architecture
from core.config.parsing import parse
from core.runtime.errors import RecipeError
from processes import CONFIGS, ROOT, exit_codes, script_says, start_ranks

QUESTION, CHOSEN, REJECTED = "How do I bake bread?", "Mix, knead and wait.", "Buy it from a baker."


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Rows, and a model of each architecture once it is asked for."""
    folder = tmp_path_factory.mktemp("verdicts")
    for name, others in (("pairs", ""), ("held_out", "today")):
        rows = [
            {"prompt": f"{QUESTION} {n}{others}", "chosen": f"{n} {CHOSEN}", "rejected": REJECTED} for n in range(4)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def architecture(workspace) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        place = workspace / name
        return place if place.is_dir() else save_architecture(place, name)

    return folder


def recipe_of(workspace: Path, model: Path, output: Path) -> dict[str, Any]:
    columns = {key: key for key in ("prompt", "chosen", "rejected")}
    return {
        "model_name_or_path": str(model), "output_dir": str(output), "dtype": "float32", "bf16": False,
        "use_cpu": True, "max_steps": 1, "max_length": 64, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "save_strategy": "no", "report_to": "none",
        "datasets": [{"path": str(workspace / "pairs.jsonl"), "columns": columns}],
    }  # fmt: skip


def start(script: str, *arguments: str) -> tuple[int, str, str]:
    import core.planning.estimates  # noqa: F401 (here, so that the forks share it)

    return script_says(script, [*arguments])


def verdicts(recipe: dict[str, Any], folder: Path, launch: str = "cpu", *overrides: str) -> tuple[str, str]:
    """What the check and then the run say: "yes", or the line of the refusal."""
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    said = []
    config = f"--accelerate_config={CONFIGS / launch}.yaml"
    for script, options in (("check.py", [config]), ("dpo.py", [])):
        code, output, errors = start(script, f"--config={path}", *options, *overrides)
        assert "Traceback" not in errors and len(errors) < 20_000, errors[-3000:]
        lines = re.findall(r"^error: (.*)", errors, re.MULTILINE)
        lines += re.findall(r"^  \d+\. (.*)", output.rpartition("to mend:")[2], re.MULTILINE) if code else []
        assert (code == 0) == (not lines) and code in (0, 2), (script, code, output[-500:], errors[-3000:])
        said.append("; ".join(lines) or "yes")
        if code == 0 and script == "check.py":
            said_of_memory = re.search("could not be traced: .*", output)
            assert said_of_memory is None, said_of_memory[0]
    return said[0], said[1]


WAYS = {
    "full": lambda target: {},
    "selective": lambda target: {"trainable_parameters": [target]},
    "lora": lambda target: {"use_peft": True, "trainable_parameters": [target]},
    "qlora": lambda target: {"use_peft": True, "trainable_parameters": [target], "load_in_4bit": True},
}
# The others by `make torture`.
QUICK = [("gemma2", "lora"), ("mixtral", "full"), ("mamba", "selective"), ("llama", "qlora"), ("qwen3_moe", "qlora")]
# Either says of these what it cannot do.
NOT_QUANTISED = {"mamba"}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[] if (name, way) in QUICK else pytest.mark.torture, id=f"{name}-{way}")
        for name in ARCHITECTURES
        for way in WAYS
    ],
)
def test_architectures(name, way, architecture, workspace, tmp_path):
    recipe = recipe_of(workspace, architecture(name), tmp_path / "out") | WAYS[way](ARCHITECTURES[name][1])
    if way == "qlora" and name in NOT_QUANTISED:
        checked, ran = verdicts(recipe, tmp_path)
        assert checked == ran and "kernels read its weights past the layers" in ran
        return
    assert verdicts(recipe, tmp_path) == ("yes", "yes")


def one_of_two(rank: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = ["dpo.py", *arguments]
    runpy.run_path(str(ROOT / "recipes" / "dpo.py"), run_name="__main__")


@pytest.mark.torture
@pytest.mark.parametrize("way", ["full", "selective", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_architectures_under_zero3(name, way, architecture, workspace, tmp_path):
    recipe = recipe_of(workspace, architecture(name), tmp_path / "out") | WAYS[way](ARCHITECTURES[name][1])
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [f"--config={tmp_path / 'dpo.yaml'}"]
    code, output, errors = start("check.py", *arguments, f"--accelerate_config={CONFIGS / 'zero3-cpu.yaml'}")
    assert code == 0, output + errors
    assert exit_codes(start_ranks(2, 3, one_of_two, arguments), 120) == [0, 0]


# ------------------------------------------------------------------------------------------ what either must refuse

Change = Callable[[dict[str, Any], Path, Path], None]  # of the recipe, in a folder, with the workspace at hand


def put(**values: Any) -> Change:
    return lambda recipe, folder, workspace: recipe.update(values)


def evaluated(**values: Any) -> Change:
    def change(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
        recipe["eval_datasets"] = [dict(recipe["datasets"][0], path=str(workspace / "held_out.jsonl"))]
        recipe["selection"] = {"hygiene": {"eval_ngram": None}}
        recipe.update({"eval_strategy": "steps", "eval_steps": 1} | values)

    return change


def model_file(name: str, change: Callable[[Any], Any]) -> Change:
    """The model's folder with another JSON file."""

    def apply(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
        model = folder / "model"
        shutil.copytree(recipe["model_name_or_path"], model)
        file = model / name
        there = json.loads(file.read_text()) if file.is_file() else {}
        changed = change(there)
        file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        recipe["model_name_or_path"] = str(model)

    return apply


def adapter(text: str) -> Change:
    def apply(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(text.replace("HERE", str(folder / "adapter")))
        recipe["model_name_or_path"] = str(folder / "adapter")

    return apply


def learned_positions(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    save_model(build_architecture("gpt2", max_position_embeddings=48), folder / "gpt2", recipe)


def multimodal(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    save_model(build_gemma3(), folder / "gemma3", recipe)


def build_gemma3():
    from transformers import Gemma3Config

    from architectures import SHAPE

    text = SHAPE | {"sliding_window": 64, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def save_model(model, folder: Path, recipe: dict[str, Any]) -> None:
    from conftest import build_tokenizer

    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    recipe["model_name_or_path"] = str(folder)


def torn_weights(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    shutil.copytree(recipe["model_name_or_path"], folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    recipe["model_name_or_path"] = str(folder / "torn")


def missing_tensor(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    shutil.copytree(recipe["model_name_or_path"], folder / "lacking")
    weights = load_file(folder / "lacking" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "lacking" / "model.safetensors", {"format": "pt"})
    recipe["model_name_or_path"] = str(folder / "lacking")


def adapter_of_adapter(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    on_an_adapter(recipe, folder, workspace)
    shutil.copytree(folder / "adapter", folder / "second")
    config = json.loads((folder / "second" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "adapter")
    (folder / "second" / "adapter_config.json").write_text(json.dumps(config))
    recipe.update(model_name_or_path=str(folder / "second"), use_peft=True)


def broken_run(text: str) -> Change:
    def apply(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
        (folder / "out").mkdir()
        (folder / "out" / "recipe.yaml").write_text(text)
        recipe["resume_from_checkpoint"] = "auto"

    return apply


REFUSED: dict[str, tuple[Change, str]] = {
    "generation config": (
        model_file("generation_config.json", lambda there: {"max_new_tokens": -3}),
        "generation_config.json is invalid",
    ),
    "broken generation config": (
        model_file("generation_config.json", lambda there: "{"), "generation_config.json is invalid"
    ),
    "config of a list": (model_file("config.json", lambda there: []), "its config cannot be loaded"),
    "config of nothing": (model_file("config.json", lambda there: ""), "its config cannot be loaded"),
    "config of an unknown kind": (
        model_file("config.json", lambda there: there | {"model_type": "lama"}), "its config cannot be loaded"
    ),
    "config of words": (
        model_file("config.json", lambda there: there | {"hidden_size": "many"}), "its config cannot be loaded"
    ),
    "config that does not divide": (
        model_file("config.json", lambda there: there | {"num_hidden_layers": -1, "rope_parameters": 3}), "config"
    ),
    "quantised": (
        model_file("config.json", lambda there: there | {"quantization_config": {"quant_method": "bitsandbytes"}}),
        "its weights are quantised",
    ),
    "torn weights": (torn_weights, "cannot be loaded: .*header"),
    "missing tensor": (missing_tensor, "1 of its tensors are in none of its files: model.layers.1.mlp.up_proj.weight"),
    "adapter of an adapter": (adapter_of_adapter, "is an adapter of an adapter"),
    "quantised weights that LoRA would train": (
        put(use_peft=True, load_in_4bit=True, lora_modules_to_save=["up_proj"]), "'up_proj' has quantised weights"
    ),
    "smaller vocabulary": (
        model_file("config.json", lambda there: there | {"vocab_size": 300}),
        "the tokenizer has 320 tokens and the model 300",
    ),
    "junk of an adapter": (adapter("{]"), "adapter .* cannot be loaded"),
    "adapter of a list": (adapter("[]"), "names no base_model_name_or_path"),
    "adapter without a base": (adapter("{}"), "names no base_model_name_or_path"),
    "adapter of itself": (adapter('{"base_model_name_or_path": "HERE"}'), "leads back to itself"),
    "learned positions": (learned_positions, "learned positions for 48 tokens, and max_length is 64"),
    "images": (multimodal, "text does not reach .*vision_tower.*trainable_parameters"),
    "attention that it has not": (put(attn_implementation="flash_attention_2"), "needs a GPU, and use_cpu is true"),
    "best without an evaluation": (put(save_strategy="best"), "save_strategy: best needs eval_strategy"),
    "best of nothing": (evaluated(save_strategy="best"), "best needs metric_for_best_model"),
    "best of an unknown figure": (
        evaluated(save_strategy="best", metric_for_best_model="rewards/margin"),
        "no evaluation here gives .*did you mean rewards/margins",
    ),
    "a figure for nobody": (evaluated(metric_for_best_model="loss"), "has no effect without save_strategy: best"),
    "plateau without an evaluation": (put(lr_scheduler_type="reduce_lr_on_plateau"), "needs eval_strategy"),
    "schedule without its numbers": (put(lr_scheduler_type="cosine_with_min_lr"), "cosine_with_min_lr cannot be made"),
    "schedule with others": (
        put(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay": 3}),
        "warmup_stable_decay cannot be made",
    ),
    "schedule of words": (
        put(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": "low"}), "cannot be made"
    ),
    "schedule that takes none": (put(lr_scheduler_kwargs={"power": 2}), "linear cannot be made"),
    "checkpointing": (
        put(gradient_checkpointing_kwargs={"use_reentrent": True}), "did you mean use_reentrant"
    ),
    "checkpointing of words": (put(gradient_checkpointing_kwargs={"use_reentrant": "no"}), "use_reentrant .bool."),
    "seed": (put(seed=2**32), "seed: must be less than 4294967296"),
    "length": (put(max_length=10**18), "max_length: must be less than"),
    "broken recipe of the run": (broken_run("a: ["), "recipe.yaml cannot be read"),
    "recipe of the run that is none": (broken_run("- 1"), "recipe.yaml is no recipe"),
}  # fmt: skip


# Of these the first that stands in the recipe alone; what comes before needs the model's folder.
OF_THE_RECIPE = list(REFUSED)[list(REFUSED).index("attention that it has not") : list(REFUSED).index("length") + 1]
STARTED = [
    "generation config",
    "missing tensor",
    "quantised weights that LoRA would train",
    "quantised",
    "images",
    "learned positions",
    "best of an unknown figure",
    "checkpointing",
]


@pytest.mark.parametrize("fault", OF_THE_RECIPE)
def test_what_parsing_refuses(fault, workspace, tmp_path):
    """`check.py` and the run both read a recipe by `look_over` and `build`."""
    change, words = REFUSED[fault]
    recipe = recipe_of(workspace, tmp_path / "none", tmp_path / "out")
    change(recipe, tmp_path, workspace)
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=words):
        parse("dpo", ["--config", str(tmp_path / "dpo.yaml")])


@pytest.mark.parametrize(
    "fault", [fault if fault in STARTED else pytest.param(fault, marks=pytest.mark.torture) for fault in REFUSED]
)
def test_what_either_refuses(fault, architecture, workspace, tmp_path):
    """Neither before the other, and in the same words."""
    change, words = REFUSED[fault]
    recipe = recipe_of(workspace, architecture("llama"), tmp_path / "out")
    change(recipe, tmp_path, workspace)
    checked, ran = verdicts(recipe, tmp_path)
    assert re.search(words, checked), checked
    assert re.search(words, ran), ran


# ------------------------------------------------------------------------------------------ what either must take


def on_an_adapter(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    base = recipe["model_name_or_path"]
    shutil.copytree(base, folder / "adapter", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    recipe["model_name_or_path"] = str(folder / "adapter")


def trained_on(**values: Any) -> Change:
    def change(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
        on_an_adapter(recipe, folder, workspace)
        recipe.update(use_peft=True, **values)

    return change


def dynamic_rope(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    save_model(build_architecture("llama", rope_parameters=rope), folder / "dynamic", recipe)


def text_of_a_multimodal(recipe: dict[str, Any], folder: Path, workspace: Path) -> None:
    multimodal(recipe, folder, workspace)
    recipe.update(trainable_parameters=["language_model"], max_steps=3, num_train_epochs=3)


TAKEN: dict[str, Change] = {
    "sampling without do_sample": model_file("generation_config.json", lambda there: {"temperature": 0.6}),
    "adapter": on_an_adapter,
    "adapter that is trained on": trained_on(),
    "adapter that is trained on in 4 bits": trained_on(load_in_4bit=True),
    "8 bits": put(use_peft=True, load_in_8bit=True),
    "dynamic rope": dynamic_rope,
    "text of a multimodal model": text_of_a_multimodal,
    "best": evaluated(save_strategy="best", metric_for_best_model="rewards/margins"),
    "schedule with its numbers": put(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 1, "min_lr_ratio": 0.1}
    ),
    "plateau": evaluated(lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="loss"),
    "checkpointing": put(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
}
QUICK_TAKEN = ["adapter", "dynamic rope", "text of a multimodal model"]


@pytest.mark.parametrize(
    "case", [case if case in QUICK_TAKEN else pytest.param(case, marks=pytest.mark.torture) for case in TAKEN]
)
def test_what_either_takes(case, architecture, workspace, tmp_path):
    recipe = recipe_of(workspace, architecture("llama"), tmp_path / "out")
    TAKEN[case](recipe, tmp_path, workspace)
    assert verdicts(recipe, tmp_path) == ("yes", "yes")
