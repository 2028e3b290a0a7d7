"""Real runs, killed three times and resumed, split over two processes, and held against what they saved."""

import shutil
import signal
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from core.data.tokens import ids_digest
from core.runtime.errors import SAVED_ON_SIGNAL
from real_run import (
    EVALUATION,
    OTHER,
    REFERENCE,
    SAVE,
    TRAINING,
    Outcome,
    Start,
    difference,
    outcome,
    prepare,
    run,
)

SHORT = ["--max_steps", "5"]
AUTO = [*SHORT, "--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("real-run"))


@pytest.fixture(scope="module")
def deeds(recipe) -> bytes:
    """What the run does that nothing happens to."""
    done = run(Start(recipe.parent / "unbroken", SHORT), recipe)
    assert done.codes == [0], done.output
    return done.deeds


@pytest.fixture(scope="module")
def unbroken(recipe, deeds) -> Outcome:
    return outcome(recipe.parent / "unbroken")


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_is_the_run_that_was_not(recipe, unbroken):
    """
    In the reference pass; in the second micro-batch of an update; in the save of step 4. Each start goes on from what
    the one before has left, with the same rows in the same order.
    """
    folder = recipe.parent / "killed"
    for kill, step in [((REFERENCE, 3, 0.0), 0), ((TRAINING, 14, 0.0), 2), ((SAVE, 20, 0.0), 2)]:
        done = run(Start(folder, AUTO, kill=kill), recipe)
        assert done.codes == [-9], done.output
        saved = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
        assert max(saved, default=0) == step
    done = run(Start(folder, AUTO), recipe)
    assert done.codes == [0], done.output
    found = outcome(folder)
    assert len({update for _, update, _ in found.rows}) == 5
    assert found.rows == unbroken.rows
    assert difference(found, unbroken) == {"weights": 0, "losses": 0, "evaluation": 0, "rows": 0}


@pytest.mark.slow
def test_a_run_that_is_stopped_after_its_last_update_is_finished_by_the_next_start(recipe, unbroken, deeds):
    """SIGTERM in the final save, then in the final evaluation: exit code 75, and the third start does all of it."""
    folder = recipe.parent / "stopped"
    training_ends = deeds.rindex(SAVE)
    in_save = deeds.index(OTHER, deeds.index(OTHER, training_ends) + 1)
    first = Start(folder, AUTO, kill=(OTHER, deeds[: in_save + 1].count(OTHER), 0.0), signal=signal.SIGTERM)
    again = Start(folder, AUTO, kill=(EVALUATION, 1, 0.0), signal=signal.SIGTERM)
    for start in (first, again):
        done = run(start, recipe)
        assert done.codes == [SAVED_ON_SIGNAL], done.output
        assert "stopped by SIGTERM after the last update, which is saved" in done.output
        assert not (folder / "all_results.json").exists() or not (folder / "eval_results.json").exists()
    done = run(Start(folder, AUTO), recipe)
    assert done.codes == [0] and TRAINING not in done.deeds, done.output
    assert difference(outcome(folder), unbroken) == {"weights": 0, "losses": 0, "evaluation": 0, "rows": 0}
    expected = {path.name for path in (recipe.parent / "unbroken").iterdir()}
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.slow
def test_two_processes_under_zero3_are_one(recipe, unbroken):
    """Losses, evaluation and weights to 1e-5, and what was saved loads again; the accumulation is half of one's."""
    done = run(Start(recipe.parent / "split", SHORT, processes=2, zero_stage=3), recipe)
    assert done.codes == [0, 0], done.output
    found = difference(outcome(recipe.parent / "split"), unbroken)
    assert max(found["weights"], found["losses"], found["evaluation"]) < 1e-5


@pytest.mark.slow
def test_rows_are_chosen_by_the_reference_under_zero3(recipe):
    """
    The same rows as one process chooses, and the same run, whose own reference pass is one forward of held-out rows,
    the others being cached: ZeRO-3 must come through that too. A second start makes no reference forward.
    """
    score = ["--selection.score", "{signal: reference_gap, keep: 0.5}", *SHORT]
    alone, split = recipe.parent / "gap-alone", recipe.parent / "gap-split"
    assert run(Start(alone, score), recipe).codes == [0]
    done = run(Start(split, score, processes=2, zero_stage=3), recipe)
    assert done.codes == [0, 0], done.output
    assert (split / "selection.jsonl").read_text() == (alone / "selection.jsonl").read_text()
    assert max(difference(outcome(split), outcome(alone))[key] for key in ("weights", "losses", "evaluation")) < 1e-5
    shutil.rmtree(alone)
    again = run(Start(alone, score), recipe)
    assert again.codes == [0] and REFERENCE in done.deeds and REFERENCE not in again.deeds


@pytest.mark.slow
def test_lora_under_zero3_is_that_of_one_process(recipe):
    """Its reference is the base under the adapter, computed before and cached."""
    lora = ["--use_peft", "true", "--lora_dropout", "0", *SHORT]
    found = []
    for name, launch in (("lora-alone", {}), ("lora-split", {"processes": 2, "zero_stage": 3})):
        done = run(Start(recipe.parent / name, lora, **launch), recipe)
        assert not any(done.codes) and REFERENCE in done.deeds, done.output
        found.append(outcome(recipe.parent / name))
    assert max(difference(*found)[key] for key in ("weights", "losses", "evaluation")) < 1e-5


@pytest.mark.slow
def test_sft_under_zero3_proves_what_it_has_saved(recipe, tmp_path):
    """The end of the run is behind the comparison of saved and trained log-probabilities."""
    dpo = yaml.safe_load(recipe.read_text())
    keys = ("model_name_or_path", "output_dir", "learning_rate", "max_length", "bf16", "use_cpu", "disable_tqdm")
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    source = {"path": dpo["datasets"][0]["path"], "columns": columns}
    sft = {key: dpo[key] for key in keys} | {"datasets": [source], "conversations_per_update": 8, "max_steps": 3}
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(sft | {"per_device_train_batch_size": 4, "save_steps": 2}))
    done = run(Start(tmp_path / "run", script="sft", processes=2, zero_stage=3), path)
    assert not any(done.codes), done.output
    assert (tmp_path / "run" / "all_results.json").exists() and (tmp_path / "run" / "checkpoint-2").exists()


def test_ranks_compare_tokens_in_their_rows_and_order():
    def digest(*rows: list[int]) -> str:
        return ids_digest(Dataset.from_dict({"input_ids": list(rows)}), ["input_ids"])

    assert digest([1, 2], [3]) == digest([1, 2], [3])
    assert len({digest([1, 2], [3]), digest([1], [2, 3]), digest([3], [1, 2]), digest([1, 2], [4])}) == 4
