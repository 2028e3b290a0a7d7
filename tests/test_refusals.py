"""
Bad input to the scripts themselves, as a user meets it: one clear line, exit code 2, no traceback, nothing written.
Each case is a change to a run that works, made in a process of its own: one for each room that refuses. What else a
room refuses is told in its own tests.
"""

import json
import os
import re
from pathlib import Path

import pytest

from conftest import build_tokenizer
from processes import run_script

PAIR = {"prompt": "How do I bake bread?", "chosen": "Mix, knead and wait.", "rejected": "Buy it from a baker."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder) -> Path:
    """Rows, variants of the tiny model's folder, and another run's."""
    folder = tmp_path_factory.mktemp("refusals")
    pairs = [PAIR | {"prompt": f"{PAIR['prompt']} {n}"} for n in range(8)]
    added = {"pairs": [], "null": [PAIR | {"rejected": None}], "empty": [PAIR | {"rejected": " "}]}
    for name, rows in added.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*pairs, *rows]))
    for name in ("torn weights", "broken template"):
        model, tokenizer = folder / name, build_tokenizer()
        tokenizer.chat_template += "{{ messages" if name == "broken template" else ""
        tokenizer.save_pretrained(model)
        for file in ("config.json", "model.safetensors"):
            (model / file).write_bytes((Path(model_folder) / file).read_bytes())
    os.truncate(folder / "torn weights" / "model.safetensors", 999)
    (folder / "another run").mkdir()
    (folder / "another run" / "trainer_state.json").write_text("{}")
    return folder


RECIPE = """\
model_name_or_path: {model}
output_dir: {folder}/out
dtype: float32
bf16: false
use_cpu: true
max_steps: 1
datasets:
  - path: {folder}/pairs.jsonl
    columns: {{prompt: prompt, chosen: chosen, rejected: rejected}}
"""
# What is wrong → overrides of the recipe, and what the line says ("{folder}" is filled in).
CASES = {
    "unknown key": (["--learning_rat=1e-4"], "learning_rat: unknown key; did you mean learning_rate?"),
    "no such model": (["--model_name_or_path={folder}/model"], "no such folder"),
    "torn weights": (["--model_name_or_path={folder}/torn weights"], "cannot be loaded: .*; mend that folder"),
    "broken template": (["--model_name_or_path={folder}/broken template"], "chat template: unexpected end of templ"),
    "null answer": (["--datasets.0.path={folder}/null.jsonl"], "`rejected` is null: row 8"),
    "empty answer": (
        ["--datasets.0.path={folder}/empty.jsonl", "--selection.hygiene.empty=error"],
        "empty.jsonl:8; mend them",
    ),
    "no module for LoRA": (
        ["--use_peft=true", "--trainable_parameters=[down_prj]"],
        "'down_prj' is no module .* down_proj",
    ),
    "another run's folder": (["--output_dir={folder}/another run"], "holds another run"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case, folder, model_folder, tmp_path):
    overrides, words = CASES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, model=model_folder))
    changes = [change.replace("{folder}", str(folder)) for change in overrides]
    before = sorted(folder.rglob("*"))
    code, errors = run_script("dpo.py", [f"--config={recipe}", *changes])
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2, errors[-2000:]
    assert len(lines) == 1 and "Traceback" not in errors, errors[-2000:]
    assert re.search(words, lines[0]), lines[0]
    assert sorted(folder.rglob("*")) == before
