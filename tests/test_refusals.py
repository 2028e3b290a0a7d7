"""
Bad input to the scripts themselves, as a user meets it: one clear line, exit code 2, no traceback, nothing written.
Each case is a change to a run that works, made in a process of its own. What else is wrong with rows, files and
mappings is told in test_preferences.py; one bad row stands for it here.
"""

import json
import re
from pathlib import Path

import pytest

from conftest import build_tokenizer
from processes import run_script

QUESTION, ANSWERS = "How do I bake bread?", ("Mix, knead and wait.", "Buy it from a baker.")
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content + eos_token }}{% endfor %}"
TEMPLATES = {
    "none": None,
    "no prefix": CHAT + "{% if add_generation_prompt %}<|assistant|>Sure: {% endif %}",
    "broken": CHAT + "{{ messages",
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder) -> Path:
    """Rows, and variants of the tiny model's folder whose tokenizer or weights lack something."""
    folder = tmp_path_factory.mktemp("refusals")
    pairs = [{"prompt": f"{QUESTION} {n}", "chosen": ANSWERS[0], "rejected": ANSWERS[1]} for n in range(8)]
    texts = {
        "pairs": pairs,
        "one pair": pairs[2:3],
        "null": [*pairs, pairs[0] | {"rejected": None}],
        "empty": [*pairs, pairs[0] | {"rejected": " "}],
        "twins": [row | {"rejected": row["chosen"]} for row in pairs],
    }
    for name, rows in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("no pad", "torn weights", *TEMPLATES):
        model, tokenizer = folder / name, build_tokenizer()
        model.mkdir()
        for file in ("config.json", "model.safetensors"):
            (model / file).symlink_to(Path(model_folder) / file)
        tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
        tokenizer.pad_token = None if name == "no pad" else tokenizer.pad_token
        tokenizer.save_pretrained(model)
    (folder / "torn weights" / "model.safetensors").unlink()
    (folder / "torn weights" / "model.safetensors").write_bytes(
        Path(model_folder, "model.safetensors").read_bytes()[:999]
    )
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
# What is wrong → what is added to the recipe, the overrides, and what the line says ("{folder}" is filled in).
CASES = {
    "unknown key": (
        "learning_rat: 1.0e-4\n", "",
        "recipe.yaml line 10: learning_rat: unknown key; did you mean learning_rate?",
    ),
    "unknown key within": (
        "", "--selection.hygene.empty=drop",
        "selection.hygene: unknown key; did you mean hygiene?",
    ),
    "key given twice": ("beta: 0.1\nbeta: 0.2\n", "", "line 11: beta is given twice, first in .*line 10"),
    "type": ("", "--beta=high", 'beta: must be a number, not "high"'),
    "range": ("", "--datasets.0.fraction=1.5", "fraction: must be less than or equal to 1, not 1.5"),
    "set": ("", "--margin.link=logistc", "did you mean logistic?"),
    "no such model": ("", "--model_name_or_path={folder}/model", "no such folder"),
    "a model of the Hub": (
        "", "--model_name_or_path=someone/no-such-model",
        "neither a folder here nor in the Hub's cache",
    ),
    "torn weights": ("", "--model_name_or_path={folder}/torn weights", "cannot be loaded: .*; mend that folder"),
    "null answer": ("", "--datasets.0.path={folder}/null.jsonl", "`rejected` is null: row 8"),
    "empty answer": (
        "", "--datasets.0.path={folder}/empty.jsonl|--selection.hygiene.empty=error",
        "empty.jsonl:8; mend them",
    ),
    "nothing left": (
        "", "--datasets.0.path={folder}/twins.jsonl",
        "leaves no row of 8; dropped: 8 by hygiene.identical",
    ),
    "no parameter": ("", "--trainable_parameters=[down_prj]", "'down_prj' matches no parameter .* down_proj"),
    "no parameter for LoRA": (
        "", "--use_peft=true|--trainable_parameters=[down_prj]",
        "'down_prj' is no module .* down_proj",
    ),
    "no pad token": ("", "--model_name_or_path={folder}/no pad", "no pad token; set one"),
    "no chat template": ("", "--model_name_or_path={folder}/none", "no chat template"),
    "prompt no prefix": (
        "", "--model_name_or_path={folder}/no prefix",
        "row pairs.jsonl:0: the prompt's tokens are not the beginning",
    ),
    "broken template": ("", "--model_name_or_path={folder}/broken", "chat template: unexpected end of template"),
    "refusing template": (
        "", "--model_name_or_path={folder}/no system|--system_message=hi",
        "chat template: no system role",
    ),
    "folder not to be made": ("", "--output_dir=/proc/out", "output_dir /proc/out cannot be written"),
    "another run's folder": ("", "--output_dir={folder}/another run", "holds another run"),
    "no safety labels": ("", "--selection.labels=safedpo_t", "safedpo_t needs safety labels; map safe"),
    "a row in both sets": (
        "eval_datasets:\n  - path: {folder}/one pair.jsonl\n"
        "    columns: {{prompt: prompt, chosen: chosen, rejected: rejected}}\n",
        "",
        "1 evaluation rows are training rows too",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case, folder, model_folder, tmp_path):
    added, overrides, words = CASES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPE + added).format(folder=folder, model=model_folder))
    changes = [change.replace("{folder}", str(folder)) for change in overrides.split("|") if change]
    before = sorted(folder.rglob("*"))
    code, errors = run_script("dpo.py", [f"--config={recipe}", *changes])
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2, errors[-2000:]
    assert len(lines) == 1 and "Traceback" not in errors, errors[-2000:]
    assert re.search(words, lines[0]), lines[0]
    assert sorted(folder.rglob("*")) == before
