"""An output folder of another run, or one that cannot be written: refused at once, with the way out."""

import os
from pathlib import Path

import pytest
import yaml

from core.runtime.errors import RecipeError
from core.runtime.output_folder import claim_output_dir

RECIPE = {"beta": 0.1, "output_dir": "runs/a", "margin": {"preset": "bfpo", "a": 1.5}, "save_steps": 100}


def run_in(folder: Path, recipe: dict = RECIPE, checkpoint: bool = True) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if checkpoint:
        (folder / "checkpoint-100").mkdir()
    return folder


def test_a_new_folder_is_free_and_stays_unmade(tmp_path):
    claim_output_dir(tmp_path / "runs" / "a", RECIPE, resume=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_free(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim_output_dir(tmp_path, RECIPE, resume=False)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "checkpoint-5/trainer_state.json", "model.safetensors", "metrics.jsonl"]
)
def test_another_run_is_not_overwritten(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(
        RecipeError, match=f"holds another run \\({name.split('/')[0]}\\); .*resume_from_checkpoint: auto"
    ):
        claim_output_dir(tmp_path, RECIPE, resume=False)


def test_the_same_recipe_goes_on(tmp_path):
    """Where it runs and how often it saves may change; null and a missing key are the same."""
    folder = run_in(tmp_path / "a")
    moved = RECIPE | {"output_dir": str(folder), "resume_from_checkpoint": "auto", "save_steps": 50, "trust": None}
    claim_output_dir(folder, moved, resume=True)
    claim_output_dir(tmp_path / "empty", moved, resume=True)


def test_another_recipe_does_not_go_on(tmp_path):
    folder = run_in(tmp_path / "a")
    other = RECIPE | {"beta": 0.2, "margin": {"preset": "bfpo", "a": 1.0}, "learning_rate": 1e-6}
    with pytest.raises(RecipeError) as refused:
        claim_output_dir(folder, other, resume=True)
    assert "(beta: 0.1 there, 0.2 here; learning_rate: None there, 1e-06 here; margin.a: 1.5 there, 1.0 here)" in str(
        refused.value
    )


def test_checkpoints_of_nobody_are_not_gone_on_with(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    with pytest.raises(RecipeError, match="holds checkpoint-100 but no recipe.yaml"):
        claim_output_dir(tmp_path, RECIPE, resume=True)


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/none/run"])
def test_a_folder_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecipeError, match="cannot be written .*choose another output_dir"):
        claim_output_dir(tmp_path / place, RECIPE, resume=False)
    assert (tmp_path / "file").read_text() == "in the way"
