"""The scripts from a recipe to an output folder, on a tiny model and rows in a file."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from conftest import WORDS, build_model
from core.modeling.proof import verify_saved
from core.runtime.errors import RecipeError
from core.runtime.run_lock import hold, release
from processes import run_script, script_says

RECIPE = """\
model_name_or_path: {model}
output_dir: {out}
dtype: float32
bf16: false
use_cpu: true
max_steps: 3
learning_rate: 1.0e-2
logging_steps: 2
eval_strategy: steps
eval_steps: 2
per_device_train_batch_size: 4
margin: {{preset: bfpo}}
datasets:
  - path: {folder}/train.jsonl
    columns: {{prompt: prompt, chosen: chosen, rejected: rejected, chosen_safe: safe, rejected_safe: false}}
eval_datasets:
  - {{path: {folder}/test.jsonl, columns: {{prompt: prompt, chosen: chosen, rejected: rejected, chosen_safe: safe,
      rejected_safe: false}}}}
"""


def script(name: str, *arguments: str) -> None:
    code, errors = run_script(f"{name}.py", list(arguments))
    assert code == 0, errors[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder) -> Path:
    """Rows, prompts, and two finished runs: `full` and `lora`."""
    folder = tmp_path_factory.mktemp("scripts")
    draw = random.Random(0)
    for name, count in (("train", 40), ("test", 11)):
        rows = [
            {key: " ".join(draw.choices(WORDS, k=8)) for key in ("prompt", "chosen", "rejected")} | {"safe": n % 2}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("How do I bake bread?\n\nWhat is salt?\n")
    (folder / "full.yaml").write_text(RECIPE.format(folder=folder, model=model_folder, out=folder / "full"))
    script("dpo", f"--config={folder}/full.yaml")
    lora = ["--use_peft=true", "--trainable_parameters=[down_proj]", f"--output_dir={folder}/lora"]
    script("dpo", f"--config={folder}/full.yaml", *lora)
    return folder


def metrics(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: record[key] for key in record if "runtime" not in key and "per_second" not in key} for record in records
    ]


def test_the_output_folder_has_what_people_expect(folder):
    found = {path.name for path in (folder / "full").iterdir()}
    assert found >= {
        "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "recipe.yaml", "selection.json",
        "selection.jsonl", "train_results.json", "eval_results.json", "all_results.json", "trainer_state.json",
        "metrics.jsonl", "README.md",
    }  # fmt: skip
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    plots = {path.stem for path in (folder / "full" / "plots").glob("*.png")}
    assert plots == {"loss", "rewards", "reward_margins", "accuracies", "histograms"}


def test_weights_that_were_saved_wrongly_are_told(model_folder, tmp_path):
    """One weight of the saved file is off by 1: the log-probabilities differ, and the run does not say it is done."""
    rows, config = [[5, 9, 200, 31], [7, 8, 9]], ModelConfig(model_name_or_path=model_folder, dtype="float32")
    trained = build_model()
    trained.save_pretrained(tmp_path)
    accelerator = Accelerator(cpu=True)
    assert verify_saved(str(tmp_path), config, trained, accelerator, rows) < 1e-6
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="1 of its tensors are not the trained ones: model.layers.1.mlp.down_proj"):
        verify_saved(str(tmp_path), config, trained, accelerator, rows)


def test_the_steps_after_the_last_log_have_their_loss_too(folder):
    """Three steps, logged every second one: the third is in the record of the end."""
    steps = [record["step"] for record in metrics(folder / "full") if "loss" in record]
    assert steps == [2, 3]


def test_live_figures_are_in_the_records(folder):
    """Steps 1 and 2 are 8 pairs; what is saved of their tokens, from the rows that they had: prompts counted once."""
    records = [json.loads(line) for line in (folder / "full" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    for record in steps:
        assert record["tokens_per_second"] > record["pairs_per_second"] > 0
        assert 0.2 < record["tokens_saved"] < 0.5 and record["peak_memory_gib"] > 0.05
        # Each pair has three texts of 8 words and the template's tokens.
        assert 40 < record["tokens_per_second"] / record["pairs_per_second"] < 120


def test_the_resolved_recipe_is_the_same_run(folder):
    script("dpo", f"--config={folder}/full/recipe.yaml", f"--output_dir={folder}/again")
    ours, theirs = metrics(folder / "full"), metrics(folder / "again")
    assert [record.get("loss", record.get("eval_loss")) for record in ours] == [
        record.get("loss", record.get("eval_loss")) for record in theirs
    ]
    first, second = (load_file(folder / name / "model.safetensors") for name in ("full", "again"))
    assert all(first[name].equal(second[name]) for name in first)


SFT = """\
model_name_or_path: {model}
output_dir: {out}
dtype: float32
bf16: false
use_cpu: true
max_steps: 3
per_device_train_batch_size: 4
datasets:
  - path: {folder}/train.jsonl
    columns: {{prompt: prompt, chosen: chosen, rejected: rejected}}
"""


@pytest.mark.parametrize(("stage", "text"), [("dpo", RECIPE), ("sft", SFT)])
def test_a_run_does_not_go_on_with_other_rows(stage, text, folder, tmp_path, model_folder):
    """The recipe is the same, so only the rows themselves tell; with what the run began with it goes on."""
    for name in ("train", "test"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    (tmp_path / f"{stage}.yaml").write_text(text.format(folder=tmp_path, model=model_folder, out=tmp_path / "run"))
    arguments = [f"--config={tmp_path}/{stage}.yaml", "--resume_from_checkpoint=auto"]
    script(stage, *arguments)
    rows = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows.replace("bread", "cake"))
    code, errors = run_script(f"{stage}.py", arguments)
    assert code == 2 and "checkpoint-3 is of other training rows" in errors
    (tmp_path / "train.jsonl").write_text(rows)
    script(stage, *arguments)


@pytest.mark.parametrize("run", ["full", "lora"])
def test_an_evaluation_of_what_was_saved_gives_the_runs_own_numbers(run, folder, model_folder):
    out = folder / f"{run}-evaluation"
    own = [f"--model_name_or_path={folder / run}", f"--output_dir={out}", f"--prompts={folder}/prompts.txt"]
    script(
        "evaluate", f"--config={folder / run}/recipe.yaml", f"--reference_model={model_folder}", *own,
        "--max_new_tokens=4",
    )  # fmt: skip
    written = json.loads((out / "evaluation.json").read_text())
    assert written["reference"] == str(model_folder)
    found = written["models"][run]["pairs"]
    expected = json.loads((folder / run / "eval_results.json").read_text())
    names = [
        name for name in expected if name.endswith(("loss", "chosen", "rejected", "margins", "helpful", "target"))
    ]
    assert len(names) > 20 and expected["eval_rewards/margins"] != 0
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [answer["messages"][0]["content"] for answer in answers] == ["How do I bake bread?", "What is salt?"]
    assert {answer["set"] for answer in answers} == {"prompts"} and {answer["model"] for answer in answers} == {run}
    assert all(answer["verdicts"].keys() == {"refusal", "garbled"} for answer in answers)


def test_models_are_held_against_the_first_and_their_answers_counted(folder, model_folder, tmp_path):
    """The rows as against a reference that is named; what does not hold ends with a code of its own."""
    (tmp_path / "asked.csv").write_text("text,label\nHow do I bake bread?,safe\nWhat is salt?,safe\nBoo?,unsafe\n")
    sets = ", ".join(
        f"{{name: {label}, path: {tmp_path}/asked.csv, column: text, where: {{label: {label}}}, measure: {measure}}}"
        for label, measure in (("safe", "over_refusal"), ("unsafe", "harmful_compliance"))
    )
    arguments = [
        f"--config={folder}/full/recipe.yaml", f"--models={{start: {model_folder}, full: {folder}/full}}",
        f"--prompt_sets=[{sets}]", "--max_new_tokens=4", f"--output_dir={tmp_path}/out",
        "--require=[over_refusal <= 1, harmful_compliance <= 0.5]",
    ]  # fmt: skip
    code, output, _ = script_says("evaluate.py", arguments)
    assert code == 3 and "require: harmful_compliance is 100.0 % [20.7, 100.0], and <= 50 % is required" in output
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    start, full = (written["models"][name] for name in ("start", "full"))
    assert written["reference"] == str(model_folder) and start["pairs"] is None
    expected = json.loads((folder / "full" / "eval_results.json").read_text())
    assert full["pairs"]["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)
    assert full["answers"]["over_refusal"]["n"] == 2 and start["answers"]["harmful_compliance"]["n"] == 1
    assert (tmp_path / "out" / "behaviour.png").stat().st_size > 5000
    code, _, errors = script_says("evaluate.py", arguments)
    assert code == 2 and "holds answers.jsonl; give the evaluation a folder of its own" in errors
    other = [argument for argument in arguments if not argument.startswith(("--output_dir", "--require"))]
    code, _, errors = script_says(
        "evaluate.py", [*other, f"--output_dir={tmp_path}/b", "--require=[over_refusl <= 1]"]
    )
    assert code == 2 and "did you mean over_refusal" in errors
    assert not list((tmp_path / "b").glob("*.jsonl")), "told before a model has answered"


def test_an_evaluation_without_a_reference_rewards_the_log_probability(folder):
    out = folder / "without-reference"
    script(
        "evaluate", f"--config={folder}/full/recipe.yaml", f"--model_name_or_path={folder}/full", f"--output_dir={out}"
    )
    found = json.loads((out / "evaluation.json").read_text())["models"]["full"]["pairs"]
    assert found["eval_rewards/chosen"] == pytest.approx(0.01 * found["eval_logps/chosen"])


def test_a_run_can_start_from_an_adapter(folder):
    """The base model with the adapter in it is the start, and all of it is trained; or with LoRA the adapter alone."""
    expected = json.loads((folder / "lora" / "eval_results.json").read_text())["eval_logps/chosen"]
    for name, lora in (("on", []), ("on as LoRA", ["--use_peft=true"])):
        output = f"--output_dir={folder}/{name}"
        script("dpo", f"--config={folder}/full.yaml", f"--model_name_or_path={folder}/lora", output, *lora)
        first = next(record for record in metrics(folder / name) if "eval_loss" in record)
        assert first["eval_logps/chosen"] == pytest.approx(expected, rel=1e-5)


def test_rows_are_chosen_by_the_references_gap(folder):
    """Whole, or of each token: other rows stay."""
    kept = set()
    for signal in ("reference_gap", "reference_gap_per_token"):
        score = f"--selection.score={{signal: {signal}, keep: 0.5, direction: hard}}"
        script("dpo", f"--config={folder}/full.yaml", score, f"--output_dir={folder}/{signal}")
        selection = json.loads((folder / signal / "selection.json").read_text())
        assert selection["counts"]["left"]["score"] == selection["counts"]["left"]["labels"] // 2
        kept.add(selection["digest"])
    assert len(kept) == 2


def test_nothing_is_cached_where_the_reference_is_live(folder, monkeypatch):
    """Not even a folder is made, so that one that cannot be written is in nobody's way."""
    monkeypatch.setattr("core.modeling.reference_cache.DEFAULT_FOLDER", Path("/proc/nowhere"))
    script("dpo", f"--config={folder}/full.yaml", "--precompute_ref_log_probs=false", f"--output_dir={folder}/live")
    live, full = ([entry["loss"] for entry in metrics(folder / name) if "loss" in entry] for name in ("live", "full"))
    assert live == pytest.approx(full, rel=1e-5)
    code, errors = run_script("dpo.py", [f"--config={folder}/full.yaml", f"--output_dir={folder}/cached"])
    assert code == 2 and "reference_cache /proc/nowhere" in errors


@pytest.mark.parametrize("line", ['{"prompt": 5}', '{"messages": "hi"}', '{"messages": [{"role": "user"}]}', "[]"])
def test_prompts_that_are_none(line, folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "hi"}}\n{line}\n')
    arguments = [
        f"--config={folder}/full/recipe.yaml",
        f"--output_dir={tmp_path}",
        "--datasets=[]",
        "--eval_datasets=[]",
    ]
    code, errors = run_script("evaluate.py", [*arguments, f"--prompts={tmp_path}/prompts.jsonl", "--eval_strategy=no"])
    assert code == 2 and "prompts.jsonl, line 2: not an object with" in errors


def test_a_run_by_its_path_goes_on_in_another_folder_as_the_run_that_it_is(folder, tmp_path):
    """Run and check by the same code: another rate is refused by name, another log is said."""
    recipe, checkpoint = f"--config={folder}/full.yaml", folder / "full" / "checkpoint-3"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["recipe"]["learning_rate"] == 0.01 and manifest["trained"]["tensors"] == 21
    own = [recipe, f"--resume_from_checkpoint={checkpoint}", f"--output_dir={tmp_path}/on"]
    launch = f"--accelerate_config={Path(__file__).parents[1]}/accelerate_configs/cpu.yaml"
    for name, more in (("dpo", []), ("check", [launch])):
        code, output, errors = script_says(f"{name}.py", [*own, *more, "--learning_rate=0.5", "--margin.preset=dpo"])
        assert code == 2
        told = errors + output
        assert "learning_rate: 0.01 there, 0.5 here" in told and ", margin.preset" in told
        assert f"model_name_or_path: {checkpoint}, another output_dir" in told and not (tmp_path / "on").exists()
    code, output, _ = script_says("check.py", [*own, launch, "--logging_steps=1"])
    assert code == 0 and f"going on from {checkpoint}, with logging_steps: 2 there, 1 here" in output
    script("dpo", *own, "--logging_steps=1")
    first, second = (load_file(place / "model.safetensors") for place in (folder / "full", tmp_path / "on"))
    assert all(first[name].equal(second[name]) for name in first)


def test_no_secret_is_in_what_a_run_leaves(folder, tmp_path, monkeypatch):
    token = "hf_" + "aB3x" * 8
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    names = [f"--run_name={token}", "--system_message=ask https://me:hunter2@host or 0123456789abcdef0123"]
    script("dpo", f"--config={folder}/full.yaml", *names, f"--output_dir={tmp_path}/run")
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".md", ".json", ".jsonl"):
            text = path.read_text()
            assert not any(word in text for word in (token, "hunter2", "0123456789abcdef0123")), path
    code, errors = run_script(
        "dpo.py", [f"--config={folder}/full.yaml", f"--output_dir={tmp_path}/a", f"--beta={token}"]
    )
    assert code == 2 and "hf_…" in errors and token not in errors


def test_an_evaluation_does_not_write_where_a_run_is(folder):
    hold(folder / "full", {"beta": 1})
    try:
        code, errors = run_script(
            "evaluate.py", [f"--config={folder}/full/recipe.yaml", f"--model_name_or_path={folder}/full"]
        )
    finally:
        release()
    assert code == 2 and f"output_dir {folder}/full is in use by process {os.getpid()} on" in errors
