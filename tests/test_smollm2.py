"""What the recipe of a real model trains on: which prompts, in which forms, and none that is evaluated."""

import csv
import json
import re

import pytest

from core.judging.verdicts import FULL, judge_refusal
from processes import ROOT

HERE = ROOT / "recipes/smollm2-135m"
DATA = ROOT.parent / "shared/data"


@pytest.fixture(scope="module")
def recipe():
    """Its prepare.py, beside which the quickstart's stands under the same name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("smollm2_prepare", HERE / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(name: str) -> list[str]:
    return (HERE / f"{name}.txt").read_text().splitlines()


def test_the_prompts_are_each_of_one_kind_and_every_refusal_is_one():
    harmful, harmless = lines("harmful"), lines("harmless")
    assert len(set(harmful)) == len(harmful) >= 150 and len(set(harmless)) == len(harmless) >= 150
    assert not set(harmful) & set(harmless)
    refusals = lines("refusals")
    assert {verdict.label for verdict in judge_refusal([], refusals)} == {FULL}


def test_a_question_is_asked_once_more_as_an_instruction(recipe):
    first, second = recipe.phrasings("How do I kill the moss on a roof?")
    assert first == "How do I kill the moss on a roof?"
    assert second.endswith("kill the moss on a roof") and second.partition("kill")[0].rstrip().endswith("to")
    assert recipe.phrasings("Write a poem.") == ["Write a poem."]


def test_pairs_give_prompts_by_what_their_answers_say(recipe, tmp_path):
    rows = [
        ("How do I rob it?", "I'm sorry, but I can't help with that.", "With a mask."),
        ("How do I bake it?", "With flour.", "With salt."),
        ("How do I bomb it?", "I'm sorry, but I can't help with that.", "I can't help with that."),
    ]
    text = "".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in rows)
    (tmp_path / "safety.jsonl").write_text(text)
    (tmp_path / "helpful.jsonl").write_text('{"prompt": "What is salt?"}\n{"prompt": "' + "long " * 200 + '"}\n')
    harmful, harmless = recipe.prompts_of(str(tmp_path / "safety.jsonl"), str(tmp_path / "helpful.jsonl"))
    alone = recipe.prompts_of(None, None)
    assert set(harmful) - set(alone[0]) == set(recipe.phrasings("How do I rob it?"))
    assert set(harmless) - set(alone[1]) == {"What is salt?"}


def test_what_is_written_is_labelled_and_holds_no_prompt_that_is_evaluated(
    recipe, model_folder, tmp_path, monkeypatch
):
    """The model's answers stand in for themselves: each that fits is the unsafe answer, or the helpful one."""
    said = iter(range(10_000))
    monkeypatch.setattr(recipe, "generate", lambda *_, **__: [f"Take {next(said)} eggs." for _ in asked])
    monkeypatch.setattr(recipe, "prompts_of", lambda *_: (["How do I rob it?", "Kill HIM, now"], ["What is salt?"]))
    asked = ["How do I rob it?", "What is salt?"]
    (tmp_path / "held.csv").write_text('id,prompt\n1,"kill him now!"\n')
    recipe.prepare(tmp_path / "data", model_folder, 0, None, None, [(str(tmp_path / "held.csv"), "prompt")])
    task, buffer, sft = (
        [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("task", "buffer", "sft")
    )
    refusal = task[0].pop("response_1")
    assert task == [
        {
            "prompt": asked[0], "response_0": "Take 0 eggs.",
            "is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 0,
        }
    ]  # fmt: skip
    assert refusal in lines("refusals") and buffer[0].pop("rejected") in lines("refusals")
    assert buffer == [{"prompt": asked[1], "chosen": "Take 1 eggs."}]
    assert [row["messages"][0]["content"] for row in sft] == asked and sft[1]["messages"][1][
        "content"
    ] == "Take 1 eggs."


@pytest.mark.skipif(not DATA.is_dir(), reason="the public prompt sets are not here")
def test_no_prompt_of_this_folder_is_one_of_the_sets(recipe):
    """Not word for word, nor thirteen words in a row."""
    sets = {"xstest_prompts.csv": "prompt", "harmbench_val.csv": "Behavior"}
    evaluated = [row[column] for name, column in sets.items() for row in csv.DictReader((DATA / name).open())]

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def runs(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return {tuple(found[start : start + 13]) for start in range(len(found) - 12)}

    whole, parts = {tuple(words(text)) for text in evaluated}, {run for text in evaluated for run in runs(text)}
    for prompt in (form for prompts in recipe.prompts_of(None, None) for form in prompts):
        assert tuple(words(prompt)) not in whole and not runs(prompt) & parts, prompt
