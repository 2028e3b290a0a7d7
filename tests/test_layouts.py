"""
The layouts that people's data comes in, by rows written by hand: what each becomes, and what is left out and why. And
what check proposes for a file that no recipe names.
"""

import json
import sys
from pathlib import Path

import datasets
import pytest
import yaml

import check
from core.config.parsing import resolve
from core.config.schema import Columns, DatasetEntry
from core.data.pairing import ALONE, BETWEEN, UNKNOWN
from core.data.preferences import FEATURES, load_conversations, load_preferences
from core.runtime.errors import RecipeError
from test_preferences import LAYOUTS as PUBLISHED

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def user(content: str) -> dict:
    return message("user", content)


def assistant(content: str) -> dict:
    return message("assistant", content)


def pair(row_id: str, prompt: str | list[dict], chosen: str, rejected: str, **known) -> dict:
    """A row of the schema in which everything not given is unknown."""
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    told = {"row_id": f"mine.jsonl:{row_id}", "prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": False}
    return dict.fromkeys(FEATURES) | told | {"role": "task", "source": "mine.jsonl"} | known


def arena(number: int, winner: str, a: list[dict], b: list[dict]) -> dict:
    return {
        "question_id": f"q{number}", "model_a": "x", "model_b": "y", "winner": winner, "judge": "j", "turn": 1,
        "conversation_a": a, "conversation_b": b, "anony": True, "language": "English", "tstamp": 1.0,
    }  # fmt: skip


def helpsteer2(prompt: str, response: str, helpfulness: int) -> dict:
    scores = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **scores}


def beaver(prompt: str, response: str, is_safe: bool) -> dict:
    category = {"privacy_violation": False, "violence,aiding_and_abetting,incitement": not is_safe}
    return {"prompt": prompt, "response": response, "category": category, "is_safe": is_safe}


def nectar(prompt: str, *answers: tuple[str, float]) -> dict:
    ranked = [{"answer": answer, "model": "m", "rank": rank} for answer, rank in answers]
    return {"prompt": prompt, "answers": ranked, "turns": 1, "num_responses": len(ranked), "source": ["ultrachat"],
            "good_natured": True}  # fmt: skip


def shp(label: int, score_a: int, score_b: int) -> dict:
    return {
        "post_id": "p", "domain": "askbaking_train", "history": "Why?", "human_ref_A": "a", "human_ref_B": "b",
        "labels": label, "score_A": score_a, "score_B": score_b, "seconds_difference": 3.0, "score_ratio": 2.0,
    }  # fmt: skip


TALK = [user("Hi"), assistant("Hello"), user("Two?")]
# The rows of a file; the pairs that they become; what is in no pair, by its reason.
LAYOUTS = {
    "own-pairs": (
        [{"prompt": "Two?", "chosen": "2", "rejected": "3"}, {"prompt": "Six?", "chosen": "6", "rejected": "7"},
         {"prompt": "Is 1 < 2?", "chosen": "yes", "rejected": ""}],
        [pair("0", "Two?", "2", "3"), pair("1", "Six?", "6", "7"), pair("2", "Is 1 < 2?", "yes", "")],
        {},
    ),
    "alpaca": (
        [{"instruction": "Add.", "input": "1, 1", "chosen": "2", "rejected": "3"},
         {"instruction": "Greet.", "input": "", "chosen": "Hi", "rejected": "Bye"},
         {"instruction": "Go.", "input": None, "chosen": "ok", "rejected": "no"}],
        [pair("0", "Add.\n1, 1", "2", "3"), pair("1", "Greet.", "Hi", "Bye"), pair("2", "Go.", "ok", "no")],
        {},
    ),
    "openai": (
        [{"input": {"messages": TALK, "tools": [], "parallel_tool_calls": True},
          "preferred_output": [assistant("2")], "non_preferred_output": [assistant("3")]},
         {"input": {"messages": [user("Six?")], "tools": [], "parallel_tool_calls": True},
          "preferred_output": [assistant("6")], "non_preferred_output": [assistant("7")]},
         {"input": {"messages": [message("system", "Be kind."), user("Hm?")], "tools": [],
                    "parallel_tool_calls": True},
          "preferred_output": [assistant("yes")], "non_preferred_output": [assistant("no")]}],
        [pair("0", TALK, "2", "3"), pair("1", "Six?", "6", "7"),
         pair("2", [message("system", "Be kind."), user("Hm?")], "yes", "no")],
        {},
    ),
    "argilla-dpo-mix": (
        [{"dataset": "argilla/distilabel-capybara-dpo-9k-binarized", "chosen": [*TALK, assistant("2")],
          "rejected": [*TALK, assistant("3")], "chosen_rating": 5.0, "rejected_rating": 4.0},
         {"dataset": "argilla/distilabel-intel-orca-dpo-pairs", "chosen": [user("Six?"), assistant("6")],
          "rejected": [user("Six?"), assistant("7")], "chosen_rating": 10.0, "rejected_rating": 1.0},
         {"dataset": "argilla/ultrafeedback", "chosen": [user("Hm?"), assistant("a")],
          "rejected": [user("Hm?"), assistant("b")], "chosen_rating": 4.0, "rejected_rating": 4.0}],
        [pair("0", TALK, "2", "3", score_chosen=5.0, score_rejected=4.0,
              category="argilla/distilabel-capybara-dpo-9k-binarized"),
         pair("1", "Six?", "6", "7", score_chosen=10.0, score_rejected=1.0,
              category="argilla/distilabel-intel-orca-dpo-pairs"),
         pair("2", "Hm?", "a", "b", score_chosen=4.0, score_rejected=4.0, tie=True,
              category="argilla/ultrafeedback")],
        {},
    ),
    "orca-dpo": (
        [{"system": "Be brief.", "question": "Two?", "chosen": "2", "rejected": "Two is 3"},
         {"system": "", "question": "Six?", "chosen": "6", "rejected": "7"},
         {"system": None, "question": "Nine?", "chosen": "9", "rejected": "8"}],
        [pair("0", [message("system", "Be brief."), user("Two?")], "2", "Two is 3"), pair("1", "Six?", "6", "7"),
         pair("2", "Nine?", "9", "8")],
        {},
    ),
    "ultrainteract": (
        [{"task": "Math_CoT", "dataset": "gsm8k", "trajectory": [{"from": "user", "value": "Two?"}], "chosen": "2",
          "rejected": "3", "id": "a_0", "parent_id": "root"},
         {"task": "Coding", "dataset": "apps", "chosen": "x", "rejected": "y", "id": "a_1", "parent_id": "a_0",
          "trajectory": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"},
                         {"from": "user", "value": "Two?"}]},
         {"task": "Logic", "dataset": "folio", "trajectory": [{"from": "human", "value": "So?"}], "chosen": "yes",
          "rejected": "no", "id": "b_0", "parent_id": "root"}],
        [pair("a_0", "Two?", "2", "3", category="Math_CoT"), pair("a_1", TALK, "x", "y", category="Coding"),
         pair("b_0", "So?", "yes", "no", category="Logic")],
        {},
    ),
    "helpsteer2": (  # rows of one prompt need not follow one another
        [helpsteer2("p", "low", 1), helpsteer2("q", "one", 3), helpsteer2("p", "high", 4), helpsteer2("p", "mid", 2),
         helpsteer2("q", "two", 3), helpsteer2("r", "alone", 4)],
        [pair("2+0", "p", "high", "low", score_chosen=4.0, score_rejected=1.0)],
        {"3": BETWEEN, "1": ALONE, "4": ALONE, "5": ALONE},
    ),
    "nectar": (  # a prompt that comes twice is ranked twice
        [nectar("\n\nHuman: Two? \n\nAssistant: ", ("3", 2.0), ("2", 1.0), ("\n\nHuman: 4", 3.0)),
         nectar("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Two?\n\nAssistant: ", ("2", 1.0), ("5", 7.0)),
         nectar("\n\nHuman: Two? \n\nAssistant: ", ("same", 1.0), ("as good", 1.0))],
        [pair("0.1+0.2", "Two?", "2", "\n\nHuman: 4"), pair("1.0+1.1", TALK, "2", "5")],
        {"0.0": BETWEEN, "2.0": ALONE, "2.1": ALONE},
    ),
    "shp": (
        [shp(1, 9, 2), shp(0, 3, 8), shp(1, 5, 1)],
        [pair("0", "Why?", "a", "b", score_chosen=9.0, score_rejected=2.0, category="askbaking_train"),
         pair("1", "Why?", "b", "a", score_chosen=8.0, score_rejected=3.0, category="askbaking_train"),
         pair("2", "Why?", "a", "b", score_chosen=5.0, score_rejected=1.0, category="askbaking_train")],
        {},
    ),
    "chatbot-arena": (
        [arena(0, "model_a", [user("Two?"), assistant("2")], [user("Two?"), assistant("3")]),
         arena(1, "model_b", [user("Six?"), assistant("7")], [user("Six?"), assistant("6")]),
         arena(2, "tie", [user("Hm?"), assistant("a")], [user("Hm?"), assistant("b")]),
         arena(3, "tie (bothbad)", [user("So?"), assistant("c")], [user("So?"), assistant("d")]),
         arena(4, "model_a", [user("Hi"), assistant("x"), user("Two?"), assistant("2")],
               [user("Hi"), assistant("y"), user("Two?"), assistant("3")])],
        [pair("q0", "Two?", "2", "3", category="English"), pair("q1", "Six?", "6", "7", category="English"),
         pair("q2", "Hm?", "a", "b", tie=True, category="English"),
         pair("q3", "So?", "c", "d", tie=True, category="English")],
        {"q4": "`conversation_a` and `conversation_b` have different prompts"},
    ),
    "beavertails": (
        [beaver("p", "bad one", False), beaver("p", "good one", True), beaver("p", "good two", True),
         beaver("q", "fine", True), beaver("p", "bad two", False), beaver("p", "bad three", False)],
        [pair("1+0", "p", "good one", "bad one", chosen_safe=True, rejected_safe=False),
         pair("2+4", "p", "good two", "bad two", chosen_safe=True, rejected_safe=False)],
        {"5": ALONE, "3": ALONE},
    ),
    "kto": (
        [{"prompt": [user("Two?")], "completion": [assistant("3")], "label": False},
         {"prompt": [user("Two?")], "completion": [assistant("2")], "label": True},
         {"prompt": TALK, "completion": [assistant("x")], "label": True},
         {"prompt": [user("Hm?")], "completion": [assistant("y")], "label": None}],
        [pair("1+0", "Two?", "2", "3")],
        {"3": UNKNOWN, "2": ALONE},
    ),
}  # fmt: skip


def of_layout(name: str, path: str) -> DatasetEntry:
    [entry] = resolve("dpo", ["--config", str(ROOT / f"recipes/layouts/{name}.yaml")]).recipe.datasets
    entry.path = path
    return entry


@pytest.mark.parametrize("name", LAYOUTS)
def test_recipe_of_a_layout_maps_its_rows(name, tmp_path):
    given, expected, left_out = LAYOUTS[name]
    rows, bad = load_preferences([of_layout(name, write(tmp_path / "mine.jsonl", given))], seed=0)
    assert rows.features == FEATURES
    assert rows.to_list() == expected
    assert {row["row_id"].removeprefix("mine.jsonl:"): row["reason"] for row in bad} == left_out
    assert {row["source"] for row in bad} <= {"mine.jsonl"}


def test_own_pairs_may_be_messages(tmp_path):
    rows = [{"prompt": TALK, "chosen": [assistant("2")], "rejected": [assistant("3")]}]
    read, _ = load_preferences([of_layout("own-pairs", write(tmp_path / "mine.jsonl", rows))], seed=0)
    assert read.to_list() == [pair("0", TALK, "2", "3")]


def test_answers_of_one_row_each_may_be_text(tmp_path):
    """KTO's rows as plain strings, and the answers that an SFT stage learns of them."""
    rows = [{"prompt": "p", "completion": c, "label": c == "good"} for c in ("good", "bad")]
    entry = of_layout("kto", write(tmp_path / "mine.jsonl", rows))
    assert load_preferences([entry], seed=0)[0].to_list() == [pair("0+1", "p", "good", "bad")]
    assert load_conversations([entry], seed=0).to_list() == [{"messages": [user("p"), assistant("good")]}]


GRADES = (True, False)


def test_a_part_of_the_pairs_is_drawn_with_both_answers(tmp_path):
    rows = [
        {"prompt": f"p{n}", "completion": f"{good}{n}", "label": good} for n in range(20) for good in (True, False)
    ]
    entry = of_layout("kto", write(tmp_path / "mine.jsonl", rows))
    entry.fraction = 0.5
    drawn = load_preferences([entry], seed=0)[0].to_list()
    assert len(drawn) == 10
    for row in drawn:
        number = row["chosen"].removeprefix("True")
        assert row["rejected"] == f"False{number}" and row["prompt"] == [user(f"p{number}")]
        assert row["row_id"] == f"mine.jsonl:{2 * int(number)}+{2 * int(number) + 1}"


UNPAIRED = {"prompt": "prompt", "response": "completion"}
ROW = {"prompt": "p", "completion": "c", "label": True, "score": 1.0}
REFUSED = {
    "no grade": (UNPAIRED, [ROW], "needs columns.prompt and one of columns.label, score and rank"),
    "two grades": (UNPAIRED | {"label": "label", "score": "score"}, [ROW], "one of columns.label, score and rank"),
    "a pair too": (UNPAIRED | {"label": "label", "chosen": "completion"}, [ROW], "columns.chosen exclude each other"),
    "a grade alone": ({"prompt": "prompt", "chosen": "c", "rejected": "c", "rank": "r"}, [ROW],
                      "columns.rank goes with columns.response"),
    "no pair at all": (UNPAIRED | {"label": "label"}, [ROW, ROW | {"prompt": "q"}],
                       "no two of 2 answers make a pair .*no partner.*: 2"),
    "a score that is none": (UNPAIRED | {"score": "score"}, [ROW, ROW | {"score": None}],
                             "1 of 2 rows can't be used .*`score` is not a finite number: row 1"),
    "nothing to unfold": (UNPAIRED | {"score": "score", "unfold": "label"}, [ROW],
                          "columns.unfold names 'label', which is no column of lists"),
    "a label of its own code": (UNPAIRED | {"label": "label"}, [ROW | {"label": "up"}, ROW | {"label": "down"}],
                                "columns.label names 'label', whose values are a code of their own"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_pairs_is_refused(case, tmp_path):
    columns, rows, words = REFUSED[case]
    entry = DatasetEntry(path=write(tmp_path / "mine.jsonl", rows), columns=Columns(**columns))
    with pytest.raises(RecipeError, match=words):
        load_preferences([entry], seed=0)


def test_tools_beside_the_messages_of_a_struct_are_refused(tmp_path):
    """As they are beside a prompt that is a column of its own."""
    row = LAYOUTS["openai"][0][0]
    tools = [{"type": "function", "function": {"name": "add"}}]
    entry = of_layout("openai", write(tmp_path / "mine.jsonl", [row | {"input": row["input"] | {"tools": tools}}]))
    with pytest.raises(RecipeError, match=r"1 rows have something in the column 'input.tools'.*leave_out"):
        load_preferences([entry], seed=0)
    entry.columns.leave_out = ["input.tools"]
    assert len(load_preferences([entry], seed=0)[0]) == 1


# --------------------------------------------------------------------------------------------- what check.py proposes
def proposed(monkeypatch, capsys, path: str) -> tuple[str, str]:
    """What is printed of a file, and the one line that ends it."""
    monkeypatch.setattr(sys, "argv", ["check.py", "--data", path])
    with pytest.raises(RecipeError) as ended:
        check.main.__wrapped__()  # without the wrapper that would end this process, with exit code 2
    return capsys.readouterr().out, str(ended.value)


def test_a_layout_is_recognised_and_its_lines_can_be_pasted(tmp_path, monkeypatch, capsys):
    """Every layout by its own rows. Of the two that read the same columns as another, both are told."""
    wrong = {}
    for name, (rows, pairs, _) in LAYOUTS.items():
        path = write(tmp_path / f"{name}.jsonl", rows)
        out, told = proposed(monkeypatch, capsys, path)
        first = out.split(" would read it")[0].splitlines()[-1]
        if first != f"recipes/layouts/{name}.yaml":
            wrong[name] = first
        assert "is a guess" in told and "\n" not in told
        text = out[out.index("\ndatasets:\n") :].split("\n\n")[0]
        [entry] = yaml.safe_load(text)["datasets"]
        entry.pop("bad_rows", None)
        assert entry.pop("path") == path
        recipe = yaml.safe_load((ROOT / f"recipes/layouts/{name}.yaml").read_text())
        assert entry == {"columns": recipe["datasets"][0]["columns"]}
        assert f"{len(pairs):,} pairs of the first {len(rows):,} rows" in out
    assert wrong == {}


def test_a_pair_is_guessed_by_words_and_an_ambiguous_one_is_not(tmp_path, monkeypatch, capsys):
    row = {"user_question": "Two?", "good_answer": "2", "bad_answer": "3"}
    out, told = proposed(monkeypatch, capsys, write(tmp_path / "a.jsonl", [row]))
    assert "is a guess" in told
    assert '      prompt: "user_question"\n      chosen: "good_answer"\n      rejected: "bad_answer"\n' in out
    row["better_answer"] = "two"
    out, told = proposed(monkeypatch, capsys, write(tmp_path / "b.jsonl", [row]))
    assert "no layout" in told
    assert "datasets:" not in out and "more than one column could be chosen: good_answer, better_answer" in out


@pytest.mark.parametrize(
    "options, words",
    [
        (["--data", "x.jsonl", "--config", "y.yaml"], "--data stands alone; remove config"),
        (["--data", "x.jsonl", "--beta", "1"], "--data stands alone; remove --beta"),
        ([], "required: --config, --accelerate_config"),
    ],
)
def test_check_is_asked_for_one_thing(options, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", *options])
    with pytest.raises(SystemExit) as ended:
        check.parse_options()
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_file_that_is_not_there(monkeypatch, capsys):
    assert proposed(monkeypatch, capsys, "nowhere.jsonl")[1] == "nowhere.jsonl: no such file or folder; correct --data"


def test_every_layout_has_a_recipe():
    found = {path.stem for path in (ROOT / "recipes/layouts").glob("*.yaml")}
    assert found == {*LAYOUTS, *PUBLISHED, "mixture"}
