"""What strangers hand over: no code of theirs runs, nothing asks on stdin, nothing is unpickled; no other loader."""

import ast
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from trl import ModelConfig

from conftest import build_model
from core.config.schema import DatasetEntry
from core.data.sources import load_rows
from core.modeling.policy import load_model
from core.runtime import loading
from core.runtime.errors import RecipeError
from core.runtime.text import masked, without_secrets
from processes import script_says

RECIPES = Path(__file__).parents[1] / "recipes"
LOADERS = {
    "from_pretrained", "load_dataset", "load_dataset_builder", "load_from_disk", "get_dataset_config_names",
    "Unpickler", "load_checkpoint_and_dispatch", "load_adapter", "load_state_dict", "load_checkpoint",
    "read_pickle", "load_module", "spec_from_file_location", "AutoProcessor", "pipeline",
}  # fmt: skip
# Modules whose `load` unpickles, or may.
UNPICKLING = {"torch", "pickle", "dill", "cloudpickle", "joblib", "np", "numpy", "marshal", "shelve"}


def loader_calls(source: str) -> list[str]:
    """Calls in a module that read what a stranger may have written, but for those of `loading` itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLING:
            found += [
                f"from {node.module} import {name.name}" for name in node.names if name.name in ("load", "loads")
            ]
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        safe = any(word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in node.keywords)
        if name in LOADERS or name in ("load", "loads") and owner in UNPICKLING or name == "from_config" and not safe:
            found.append(f"{ast.unparse(node.func)} (line {node.lineno})")
        if any(word.arg in ("trust_remote_code", "allow_pickle") and ast.unparse(word.value) != "False"
               for word in node.keywords):  # fmt: skip
            found.append(f"{ast.unparse(node)[:80]} (line {node.lineno})")
    return found


def test_nothing_else_loads():
    modules = sorted(RECIPES.rglob("*.py"))
    assert len(modules) >= 60
    own = RECIPES / "core/runtime/loading.py"
    others = {str(path.relative_to(RECIPES)): loader_calls(path.read_text()) for path in modules if path != own}
    assert {name: calls for name, calls in others.items() if calls} == {}
    assert len(loader_calls(own.read_text())) == 10


@pytest.mark.parametrize(
    "line",
    [
        "AutoTokenizer.from_pretrained(path)", "datasets.load_dataset(path)", "torch.load(path)", "pickle.loads(text)",
        "from torch import load", "AutoModel.from_config(config)", "f(trust_remote_code=True)", "np.load(path)",
    ],
)  # fmt: skip
def test_the_walk_sees_a_loader(line):
    assert loader_calls(line)


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that is made where a stranger's code has run; whoever asks on stdin is told yes."""
    answers = tmp_path / "answers"
    answers.write_text("y\n" * 20)
    monkeypatch.setattr("sys.stdin", answers.open())
    return tmp_path / "executed"


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()\n"


def stranger(model_folder: str, folder: Path, marker: Path, known: bool) -> Path:
    """A model with code of its own, of an architecture and a tokenizer that transformers knows, or of others."""
    shutil.copytree(model_folder, folder)
    (folder / "theirs.py").write_text(code(marker) + "class Theirs: ...\n")
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "theirs.Theirs")
    for name, change in (
        ("config.json", {"auto_map": classes} | ({} if known else {"model_type": "theirs", "architectures": ["T"]})),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
         | ({} if known else {"tokenizer_class": "Theirs"})),
    ):  # fmt: skip
        settings = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(settings))
    return folder


RECIPE = """\
model_name_or_path: {model}
output_dir: {out}
dtype: float32
bf16: false
use_cpu: true
max_steps: 1
per_device_train_batch_size: 2
datasets: [{{path: {rows}, columns: {{prompt: p, chosen: c, rejected: r}}}}]
"""


@pytest.mark.parametrize("name", ["dpo.py", "sft.py", "check.py", "evaluate.py"])
def test_a_strangers_code_is_one_line_and_does_not_run(name, model_folder, tmp_path, marker):
    model = stranger(model_folder, tmp_path / "model", marker, known=False)
    row = {"p": "what is bread", "c": "flour and water and salt", "r": "I do not know this"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"p": f"{i} bread"}) + "\n" for i in range(8)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, out=tmp_path / "run", rows=tmp_path / "rows.jsonl"))
    arguments = ["--config", str(recipe)]
    if name == "check.py":
        arguments += ["--accelerate_config", str(RECIPES.parent / "accelerate_configs/cpu.yaml")]
    ended, output, errors = script_says(name, arguments)
    output += errors
    assert ended == 2 and "Traceback" not in output
    assert not marker.exists() and os.listdir(tmp_path).count("run") == 0
    if name != "check.py":
        assert re.fullmatch(r"error: .* code of its own \(auto_map\), which is never run.*", errors.splitlines()[-1])


def test_known_architectures_are_transformers_own_and_saved_without_the_code(model_folder, tmp_path, marker, capsys):
    folder = stranger(model_folder, tmp_path / "model", marker, known=True)
    model, tokenizer = loading.causal_lm(str(folder)), loading.tokenizer(str(folder))
    assert capsys.readouterr().out.count("code of its own (auto_map), which is not run") == 2
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"auto_map", "local_files_only", "is_local", "trust_remote_code"} & set(saved)
    assert not marker.exists()


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_weights_in_a_pickle_are_not_read(model_folder, tmp_path, marker):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="model .* cannot be loaded"):
        loading.causal_lm(str(tmp_path / "model"))
    assert not marker.exists()


@pytest.mark.parametrize("quantised", [False, True], ids=["", "4 bits"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_that_are_in_no_file_are_named(tied, quantised, tmp_path):
    """transformers draws them at random, and warns; a head that is the embedding is missing by right."""
    build_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    options = {}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) is not tied
    loading.causal_lm(str(tmp_path), **options)
    lost = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("down", "up")]
    for name in lost:
        weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    told = "4 of its tensors are in none of its files: " + ", ".join(sorted(lost)[:3]) + ", …"
    with pytest.raises(RecipeError, match=told):
        loading.causal_lm(str(tmp_path), **options)


@pytest.fixture
def adapter(model_folder, tmp_path) -> Path:
    base = loading.causal_lm(model_folder)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be loaded"), ("[]", "names no base"), ('{"base_model_name_or_path": 7}', "names no base"),
        ('{"base_model_name_or_path": "FOLDER"}', "leads back to itself"), ("[" * 3000, "cannot be loaded"),
        ('{"base_model_name_or_path": "nowhere/none"}', "model nowhere/none cannot be loaded"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_junk_is_a_line(content, told, adapter):
    (adapter / "adapter_config.json").write_text(content.replace("FOLDER", str(adapter)))
    with pytest.raises(RecipeError, match=told):
        load_model(ModelConfig(str(adapter), dtype="float32"))


def test_an_adapter_in_a_pickle_is_not_read(adapter, marker):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(RecipeError, match="weights in a pickle are not read"):
        load_model(ModelConfig(str(adapter), dtype="float32"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", ["[]", "{", "7", '{"model_type": 5}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_that_is_junk_is_a_line(content, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    for load in (loading.model_config, loading.causal_lm):
        with pytest.raises(RecipeError, match="cannot be loaded: .*; "):
            load(str(tmp_path / "model"))


def test_rows_are_not_unpickled(tmp_path, marker):
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(RecipeError, match="rows are read from arrow, csv, json, parquet; convert them"):
        load_rows(DatasetEntry(path="pandas", data_files=str(tmp_path / "rows.pkl")))
    shutil.copy(tmp_path / "rows.pkl", tmp_path / "folder.py")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "folder.py").write_text(code(marker))
    (tmp_path / "folder" / "rows.pkl").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(RecipeError, match="it comes with a script, which is never run"):
        load_rows(DatasetEntry(path=str(tmp_path / "folder")))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf_" + "aB3" * 11, "hf_…"), ("key sk-proj-" + "x" * 20 + " is", "key sk-… is"),
        ("https://me:hunter2@host/a", "https://me:…@host/a"), ("s3://a:b@c", "s3://a:…@c"), ("0123456789abcdef", "…"),
        ("hf_datasets and sk-learn", "hf_datasets and sk-learn"), ("http://host:80/a@b", "http://host:80/a@b"),
    ],
)  # fmt: skip
def test_secrets_are_masked(text, shown, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert without_secrets(text) == shown
    assert masked({"a": [text, 1, None], text: {"b": text}}) == {"a": [shown, 1, None], shown: {"b": shown}}
