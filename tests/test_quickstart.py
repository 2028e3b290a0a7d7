"""The quickstart from end to end: what it must reach, and what it says when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RUN = ROOT / "recipes" / "quickstart" / "run.py"


def quickstart(*arguments: str | Path, timeout: float = 900) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, RUN, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    done = quickstart("--output_dir", folder, "--seed", "1", "--logging_steps", "10")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.slow
def test_the_model_refuses_harm_and_still_helps(finished):
    folder, printed = finished
    results = json.loads((folder / "dpo" / "results.json").read_text())
    assert results["harmful_compliance"]["before"] >= 0.4
    assert results["harmful_compliance"]["after"] <= 0.05
    assert results["over_refusal"]["after"] <= 0.05
    assert results["full_help"]["after"] >= results["full_help"]["before"]
    assert results["garbled"]["after"] <= 0.05
    assert "Behaviour on held-out requests" in printed


@pytest.mark.slow
def test_the_output_folder_has_what_people_expect(finished):
    folder, _ = finished
    out = folder / "dpo"
    for name in ("config.json", "tokenizer.json", "selection.json", "selection.jsonl", "metrics.jsonl"):
        assert (out / name).stat().st_size, name
    for plot in ("loss", "rewards", "reward_margins", "accuracies", "histograms"):
        assert (out / "plots" / f"{plot}.png").stat().st_size, plot
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["trainable_parameters"] == ["down_proj"]
    assert recipe["logging_steps"] == 10  # an option for the second stage arrived there
    card = (out / "README.md").read_text()
    assert "harmful compliance" in card
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert sum(row["harmful"] for row in answers) == len(answers) / 2 == 300


@pytest.mark.slow
def test_only_down_proj_has_moved(finished):
    from safetensors.torch import load_file

    before, after = (load_file(finished[0] / stage / "model.safetensors") for stage in ("sft", "dpo"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {name for name in before if "down_proj" in name}


def test_a_misspelt_key_is_told_before_anything_is_made(tmp_path):
    done = quickstart("--output_dir", tmp_path / "run", "--learning_rat", "1e-3")
    assert done.returncode == 2
    assert "did you mean learning_rate" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = quickstart("--output_dir", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    from run import free_folder

    monkeypatch.chdir(tmp_path)
    assert free_folder(None) == Path("runs/quickstart")
    Path("runs/quickstart").mkdir(parents=True)
    assert free_folder(None) == Path("runs/quickstart-2")
    Path("runs/quickstart-2").mkdir()
    assert free_folder(None) == Path("runs/quickstart-3")
