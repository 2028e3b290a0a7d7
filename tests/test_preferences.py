"""Rows of every layout against rows written out by hand; every kind of bad input against its message."""

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from core.config.parsing import resolve
from core.config.schema import Columns, DatasetEntry, Messages, Turns
from core.data import caches, preferences, sources
from core.data.preferences import FEATURES, load_conversations, load_preferences
from core.runtime import network
from core.runtime.errors import RecipeError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text: str | list | dict) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | list | dict | None) -> dict:
    return {"role": "assistant", "content": text}


def row(**known) -> dict:
    """A row of the schema in which everything not given is unknown."""
    return dict.fromkeys(FEATURES) | {"tie": False, "role": "task"} | known


PAIR = {"chosen": "chosen", "rejected": "rejected"}
GOOD = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}

# ------------------------------------------------------------------------------------------- one layout after another
HARMS = ["Violence", "Privacy Violation", "Drugs"]
SAFE = dict.fromkeys(HARMS, False)


def pku(better, safe, severity=None, harms=None, responses=("first", "second")):
    text = {"prompt": "ask", "response_0": responses[0], "response_1": responses[1]}
    labels = {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
    new = {}
    if severity:
        new |= {f"response_{n}_severity_level": severity[n] for n in (0, 1)}
        new |= {f"response_{n}_harm_category": SAFE | dict.fromkeys(harms[n], True) for n in (0, 1)}
    return text | labels | {"better_response_id": better, "safer_response_id": 1 - better} | new


PKU_OLD = Columns(
    prompt="prompt",
    responses=["response_0", "response_1"],
    better="better_response_id",
    safe=["is_response_0_safe", "is_response_1_safe"],
)
ASK = [user("ask")]

LAYOUTS = {
    "pku-saferlhf": (
        [
            pku(0, (True, False), (0, 3), ([], ["Drugs", "Privacy Violation"])),
            pku(1, (False, True), (2, 0), (["Violence"], [])),
            pku(1, (False, False), (1, 2), (["Violence"], ["Violence", "Drugs"])),
            pku(0, (True, True), (0, 0), ([], [])),
        ],
        [
            row(
                prompt=ASK, chosen="first", rejected="second", chosen_safe=True, rejected_safe=False,
                chosen_severity=0, rejected_severity=3, category="Privacy Violation, Drugs",
            ),
            row(
                prompt=ASK, chosen="second", rejected="first", chosen_safe=True, rejected_safe=False,
                chosen_severity=0, rejected_severity=2, category="Violence",
            ),
            row(
                prompt=ASK, chosen="second", rejected="first", chosen_safe=False, rejected_safe=False,
                chosen_severity=2, rejected_severity=1, category="Violence, Drugs",
            ),
            row(
                prompt=ASK, chosen="first", rejected="second", chosen_safe=True, rejected_safe=True, chosen_severity=0,
                rejected_severity=0,
            ),
        ],
    ),
    "ultrafeedback": (
        [
            {
                "prompt": "ask", "prompt_id": "x", "messages": [user("ask"), assistant("yes")],
                "chosen": [user("ask"), assistant("yes")], "rejected": [user("ask"), assistant("")],
                "score_chosen": 8.5, "score_rejected": 4,
            },
            {
                "prompt": "ask", "prompt_id": "y", "messages": [user("ask"), assistant("yes")],
                "chosen": [user("ask"), assistant("yes")], "rejected": [user("ask"), assistant("no")],
                "score_chosen": 7, "score_rejected": 7,
            },
        ],
        [
            row(prompt=ASK, chosen="yes", rejected="", score_chosen=8.5, score_rejected=4.0),
            row(prompt=ASK, chosen="yes", rejected="no", score_chosen=7.0, score_rejected=7.0, tie=True),
        ],
    ),
    "pku-saferlhf-30k": (
        [pku(1, (1, 0)), pku(0, (0, 1))],  # some copies write the labels as numbers
        [
            row(prompt=ASK, chosen="second", rejected="first", chosen_safe=False, rejected_safe=True),
            row(prompt=ASK, chosen="first", rejected="second", chosen_safe=False, rejected_safe=True),
        ],
    ),
    "ultrafeedback-argilla": (
        [
            {"source": "x", "prompt": "ask", "chosen": [user("ask"), assistant("yes")], "chosen-rating": 5.0,
             "rejected": [user("ask"), assistant("no")], "rejected-rating": 3}
        ],
        [row(prompt=ASK, chosen="yes", rejected="no", score_chosen=5.0, score_rejected=3.0)],
    ),
    "hh-rlhf": (
        [
            {
                "chosen": "\n\nHuman: Hi.\n\nWho are you?\n\nAssistant: A Human: no.\n\nHuman: ok\n\nAssistant: Bye. ",
                "rejected": "\n\nHuman: Hi.\n\nWho are you?\n\nAssistant: A Human: no.\n\nHuman: ok\n\nAssistant:",
            }
        ],
        [
            row(
                prompt=[user("Hi.\n\nWho are you?"), assistant("A Human: no."), user("ok")],
                chosen="Bye.",
                rejected="",
            )
        ],
    ),
    "sharegpt": (
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "one"},
                    {"from": "gpt", "value": "1"}, {"from": "human", "value": "two"},
                ],
                "chosen": {"from": "gpt", "value": "2"},
                "rejected": {"from": "gpt", "value": "3"},
            }
        ],
        [
            row(
                prompt=[{"role": "system", "content": "Be brief."}, user("one"), assistant("1"), user("two")],
                chosen="2",
                rejected="3",
            )
        ],
    ),
    "helpsteer3": (
        [
            {"domain": "code", "context": [user("a"), assistant("b"), user("c")], "response1": "r1", "response2": "r2",
             "overall_preference": preference}
            for preference in (-3, 2, 0)
        ],
        [
            row(
                prompt=[user("a"), assistant("b"), user("c")], chosen=chosen, rejected=rejected, tie=tie,
                category="code",
            )
            for chosen, rejected, tie in (("r1", "r2", False), ("r2", "r1", False), ("r1", "r2", True))
        ],
    ),
    "skywork": (
        [{"chosen": [user("ask"), assistant("yes")], "rejected": [user("ask"), assistant("no")], "source": "magpie"}],
        [row(prompt=ASK, chosen="yes", rejected="no")],
    ),
    "tulu": (
        [
            {"id": "7", "prompt": "ask", "source": "wildchat", "chosen": [user("ask"), assistant("yes")],
             "rejected": [user("ask"), assistant("no")]}
        ],
        [row(prompt=ASK, chosen="yes", rejected="no", category="wildchat")],
    ),
}  # fmt: skip


def with_path(entry: DatasetEntry, path: str) -> DatasetEntry:
    entry.path = path
    return entry


@pytest.mark.parametrize("name", LAYOUTS)
def test_recipe_of_a_layout_maps_its_rows(name, tmp_path):
    """The shipped recipe with another path, and nothing else, gives the rows that were written out by hand."""
    given_rows, expected = LAYOUTS[name]
    [entry] = resolve("dpo", ["--config", str(ROOT / f"recipes/layouts/{name}.yaml")]).recipe.datasets
    rows, bad = load_preferences([with_path(entry, write(tmp_path / "mine.jsonl", given_rows))], seed=0)
    assert rows.features == FEATURES
    assert bad == []
    names = [{"source": "mine.jsonl", "row_id": f"mine.jsonl:{n}"} for n in range(len(expected))]
    assert rows.to_list() == [wanted | extra for wanted, extra in zip(expected, names, strict=True)]


def test_recipe_of_the_mixture_maps_both_sources(tmp_path):
    task, buffer = resolve("dpo", ["--config", str(ROOT / "recipes/layouts/mixture.yaml")]).recipe.datasets
    task = with_path(task, write(tmp_path / "p.jsonl", [pku(1, (False, True))]))
    buffer = with_path(buffer, write(tmp_path / "u.jsonl", LAYOUTS["ultrafeedback"][0][:1]))
    rows, _ = load_preferences([task, buffer], seed=0)
    assert rows.to_list() == [
        row(
            prompt=ASK, chosen="second", rejected="first", chosen_safe=True, rejected_safe=False, source="p.jsonl",
            row_id="p.jsonl:0",
        ),
        row(
            prompt=ASK, chosen="yes", rejected="", chosen_safe=True, rejected_safe=True, score_chosen=8.5,
            score_rejected=4.0, source="u.jsonl", row_id="u.jsonl:0", role="buffer",
        ),
    ]  # fmt: skip


OTHERS = {
    "trl-lib, the prompt inside chosen and rejected": (
        Columns(**PAIR, score_chosen="score_chosen", score_rejected="score_rejected"),
        [{**GOOD, "score_chosen": 5.0, "score_rejected": 3.5}],
        [row(prompt=[user("q")], chosen="good", rejected="bad", score_chosen=5.0, score_rejected=3.5)],
    ),
    "plain strings": (
        Columns(prompt="prompt", **PAIR),
        [{"prompt": "q", "chosen": "good", "rejected": "bad"}],
        [row(prompt=[user("q")], chosen="good", rejected="bad")],
    ),
    "prompt and answers as lists of messages": (
        Columns(prompt="prompt", **PAIR),
        [{"prompt": [user("a")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}],
        [row(prompt=[user("a")], chosen="good", rejected="bad")],
    ),
    "a system message before the prompt": (
        Columns(prompt="prompt", **PAIR),
        [{"prompt": "q", **{side: [{"role": "system", "content": "s"}, *GOOD[side]] for side in PAIR}}],
        [row(prompt=[{"role": "system", "content": "s"}, user("q")], chosen="good", rejected="bad")],
    ),
    "columns inside structs, constants, and numbers as labels": (
        Columns(
            prompt="in.prompt", chosen="out.w", rejected="out.l", chosen_safe="safe.w", rejected_safe=False,
            chosen_severity=0, rejected_severity="severity", score_chosen=1.0, score_rejected=0.0,
        ),
        [{"in": {"prompt": "q"}, "out": {"w": "good", "l": "bad"}, "safe": {"w": 1}, "severity": 2.0}],
        [
            row(
                prompt=[user("q")], chosen="good", rejected="bad", chosen_safe=True, rejected_safe=False,
                chosen_severity=0, rejected_severity=2, score_chosen=1.0, score_rejected=0.0,
            )
        ],
    ),
    "scores of two responses, and constants as labels": (
        Columns(
            prompt="p", responses=["a", "b"], better="better", scores=["x", "y"], chosen_safe=True, rejected_safe=True
        ),
        [{"p": "q", "a": "A", "b": "B", "better": True, "x": 1.0, "y": 9.0}],
        [
            row(
                prompt=[user("q")], chosen="B", rejected="A", chosen_safe=True, rejected_safe=True, score_chosen=9.0,
                score_rejected=1.0,
            )
        ],
    ),
    "a label that is missing stays unknown": (
        PKU_OLD,
        [pku(0, (None, True)), pku(0, (True, False))],
        [
            row(prompt=ASK, chosen="first", rejected="second", chosen_safe=None, rejected_safe=True),
            row(prompt=ASK, chosen="first", rejected="second", chosen_safe=True, rejected_safe=False),
        ],
    ),
    "a marker that another begins with": (
        Columns(**PAIR, turns=Turns("Q", "QA")),
        [{"chosen": "Q hi QA yes", "rejected": "Q hi QA no"}],
        [row(prompt=[user("hi")], chosen="yes", rejected="no")],
    ),
    "an unused key in some of the messages": (
        Columns(**PAIR),
        [GOOD, {**GOOD, "chosen": [{**user("q"), "name": 3}, assistant("good")]}],
        [row(prompt=[user("q")], chosen="good", rejected="bad")] * 2,
    ),
    "texts and flags as a category, with nulls before and among them": (
        Columns(prompt="p", **PAIR, category=["x.kind", "flags"]),
        [
            {"p": "q", "chosen": "a", "rejected": "b", "x": x, "flags": flags}
            for x, flags in ((None, None), ({"kind": "k"}, {"A": None, "B": True}), ({"kind": None}, {"A": None}))
        ],
        [row(prompt=[user("q")], chosen="a", rejected="b", category=category) for category in (None, "k, B", None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_mapping(name, tmp_path):
    columns, given_rows, expected = OTHERS[name]
    rows, bad = load_preferences([DatasetEntry(write(tmp_path / "f.jsonl", given_rows), columns=columns)], seed=0)
    assert bad == []
    names = [{"source": "f.jsonl", "row_id": f"f.jsonl:{n}"} for n in range(len(expected))]
    assert rows.to_list() == [wanted | extra for wanted, extra in zip(expected, names, strict=True)]


TEXT_PARTS = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]


@pytest.mark.parametrize("where", ["in every row", "in the second"])
@pytest.mark.parametrize(
    ("content", "text"),
    [(TEXT_PARTS, "two parts"), (["Hi"], "Hi"), ({"text": "Hi"}, "Hi")],
    ids=["parts", "list", "dict"],
)
def test_content_as_parts(content, text, where, tmp_path):
    """Pairs and conversations alike; Arrow stores them otherwise where some rows hold plain text."""
    talk, plain = [user(content), assistant(content)], [user("q"), assistant("a")]
    rows = [{"chosen": talk, "rejected": [user(content), assistant(["no"])]}]
    told = [row(prompt=[user(text)], chosen=text, rejected="no")]
    if where == "in the second":
        rows.insert(0, {"chosen": plain, "rejected": [user("q"), assistant("b")]})
        told.insert(0, row(prompt=[user("q")], chosen="a", rejected="b"))
    elif isinstance(content, dict):
        rows[0]["rejected"][1] = assistant({"text": "no"})
    path = write(tmp_path / "f.jsonl", rows)
    loaded, bad = load_preferences([DatasetEntry(path, columns=Columns(**PAIR))], seed=0)
    assert bad == []
    names = [{"source": "f.jsonl", "row_id": f"f.jsonl:{n}"} for n in range(len(told))]
    assert loaded.to_list() == [wanted | extra for wanted, extra in zip(told, names, strict=True)]
    learned = load_conversations([DatasetEntry(path, columns=Columns(conversation="chosen"))], seed=0)
    assert learned["messages"][-1] == [user(text), assistant(text)]


def test_what_a_template_would_read_is_left_out_on_purpose_alone(tmp_path):
    """Of messages and of rows: refused by name, where it says something; `leave_out` lets it go."""
    talk = {side: [user("q"), assistant(side) | {"reasoning_content": "r"}] for side in PAIR}
    path = write(tmp_path / "f.jsonl", [{**talk, "tools": [{"name": "t"}], "system": ""}, {**talk, "tools": []}])
    columns = Columns(**PAIR)
    with pytest.raises(RecipeError, match=r"1 rows have something in the column 'tools', .*leave_out: \[tools\]"):
        load_preferences([DatasetEntry(path, columns=columns)], seed=0)
    columns.leave_out = ["tools"]
    with pytest.raises(RecipeError, match="2 of 2 rows .*`reasoning_content`"):
        load_preferences([DatasetEntry(path, columns=columns)], seed=0)
    columns.leave_out = ["tools", "reasoning_content"]
    rows, _ = load_preferences([DatasetEntry(path, columns=columns)], seed=0)
    assert rows["chosen"][:] == ["chosen", "chosen"]


def test_a_column_of_system_messages(tmp_path):
    """It leads the prompt where it says something; unnamed it is refused, for the model would not see it."""
    given = [{"system": "Be brief.", **PLAIN}, {"system": "", **PLAIN}, {"system": None, **PLAIN}]
    path, led = write(tmp_path / "f.jsonl", given), [{"role": "system", "content": "Be brief."}, user("q")]
    with pytest.raises(RecipeError, match="1 rows have something in the column 'system', .*columns.system"):
        load_preferences([DatasetEntry(path, columns=TEXT)], seed=0)
    rows, _ = load_preferences([DatasetEntry(path, columns=Columns(prompt="prompt", system="system", **PAIR))], seed=0)
    assert rows["prompt"][:] == [led, [user("q")], [user("q")]]
    talks = [{"system": "Be brief.", "talk": [user("q"), assistant("a")]}]
    columns = Columns(conversation="talk", system="system")
    assert learn(tmp_path, talks, columns=columns) == [[*led, assistant("a")]]


def test_ids_source_and_extra_columns(tmp_path):
    """An id column names the rows, and a numeric column stays by its name, null where an entry doesn't name it."""
    path = write(tmp_path / "f.jsonl", [{**GOOD, "id": "a", "length": 3}, {**GOOD, "id": "b", "length": 4}])
    first = DatasetEntry(path, source="one", columns=Columns(**PAIR, row_id="id", extra=["length"]))
    second = DatasetEntry(path, columns=Columns(**PAIR))
    load_preferences([second], seed=0)  # now in the cache without the column
    rows, _ = load_preferences([first, second], seed=0)
    assert rows["row_id"][:] == ["one:a", "one:b", "f.jsonl:0", "f.jsonl:1"]
    assert rows["source"][:] == ["one", "one", "f.jsonl", "f.jsonl"]
    assert rows["length"][:] == [3.0, 4.0, None, None]


def test_numbers_as_ids(tmp_path):
    """Whole numbers in a column that has become one of floats are written as whole numbers."""
    path = write(tmp_path / "f.jsonl", [{**GOOD, "id": 3}, {**GOOD, "id": 4.5}])
    rows, _ = load_preferences([DatasetEntry(path, columns=Columns(**PAIR, row_id="id"))], seed=0)
    assert rows["row_id"][:] == ["f.jsonl:3", "f.jsonl:4.5"]


def test_kinds_of_file(tmp_path):
    """The same two rows from each kind of file, from a folder, and by the name of the file's kind."""
    plain = [{"prompt": "q", "chosen": "N/A", "rejected": "b"}, {"prompt": "p", "chosen": "None", "rejected": "d"}]
    table = pa.Table.from_pylist(plain)
    write(tmp_path / "f.jsonl", plain)
    (tmp_path / "f.json").write_text(json.dumps(plain))
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write((tmp_path / "f.jsonl").read_text())
    (tmp_path / "f.csv").write_text("prompt,chosen,rejected\nq,N/A,b\np,None,d\n")
    pq.write_table(table, tmp_path / "f.parquet")
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    columns = Columns(prompt="prompt", **PAIR)
    suffixes = ("jsonl", "json", "jsonl.gz", "csv", "parquet", "arrow")
    entries = [DatasetEntry(str(tmp_path / f"f.{suffix}"), columns=columns) for suffix in suffixes]
    entries.append(DatasetEntry(str(tmp_path), data_files="f.jsonl", columns=columns, source="folder"))
    entries.append(DatasetEntry("json", data_files=[str(tmp_path / "f.json")], columns=columns, source="kind"))
    # A file is the split and the configuration that the entry names.
    entries.append(
        DatasetEntry(str(tmp_path / "f.jsonl"), split="test[:2]", name="c", columns=columns, source="split")
    )
    for entry in entries:
        rows, _ = load_preferences([entry], seed=0)
        assert [(r["prompt"][0]["content"], r["chosen"], r["rejected"]) for r in rows] == [
            ("q", "N/A", "b"),
            ("p", "None", "d"),
        ], entry.path


def test_a_path_is_that_file_and_no_pattern(tmp_path, monkeypatch):
    """datasets takes the names of these files for patterns, which other files match."""
    for name in ("pairs1.jsonl", "p*.jsonl", "p?.jsonl", "pairs[1].jsonl"):
        write(tmp_path / name, [{**PLAIN, "chosen": name}])
    (tmp_path / "run[1]").mkdir()
    write(tmp_path / "run[1]" / "f.jsonl", [{**PLAIN, "chosen": "below"}])
    monkeypatch.chdir(tmp_path)

    def chosen(**keys) -> list[str]:
        return load_preferences([DatasetEntry(**keys, columns=TEXT)], seed=0)[0]["chosen"][:]

    for name in ("pairs[1].jsonl", "p*.jsonl", "p?.jsonl"):
        assert chosen(path=name) == [name]
        assert chosen(path=".", data_files=name) == [name]
        assert chosen(path="json", data_files=[name]) == [name]
    assert chosen(path="run[1]/f.jsonl") == ["below"]
    assert chosen(path=".", data_files="pairs*.jsonl") == ["pairs1.jsonl", "pairs[1].jsonl"]
    with pytest.raises(RecipeError, match=r"run\[1\]: datasets takes .* pattern; rename it"):
        chosen(path="run[1]")


@pytest.mark.parametrize("kind", ["file", "folder", "kind", "saved", "large file"])
def test_edited_data_is_read_again(kind, tmp_path, monkeypatch):
    """Though size and time are as they were, which is all that datasets looks at."""
    path = tmp_path / "f.jsonl"
    if kind == "saved":
        datasets.Dataset.from_list([{**PLAIN, "chosen": "old"}]).save_to_disk(tmp_path / "saved")
        [path] = (tmp_path / "saved").glob("*.arrow")
    else:
        write(path, [{**PLAIN, "chosen": "old"}])
    keys = {"path": str(tmp_path if kind == "folder" else tmp_path / "saved" if kind == "saved" else path)}
    if kind == "kind":
        keys = {"path": "json", "data_files": [str(path)]}
    if kind == "large file":
        monkeypatch.setattr(caches, "HASHED", 1)
    entry = DatasetEntry(**keys, columns=TEXT)
    before = path.stat()
    assert load_preferences([entry], seed=0)[0]["chosen"][:] == ["old"]
    path.write_bytes(path.read_bytes().replace(b"old", b"new"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert load_preferences([entry], seed=0)[0]["chosen"][:] == ["new"]


def test_a_damaged_cache_is_made_again(tmp_path, caplog):
    """The files of datasets' cache, cut in half: named and made again, and the user's own file is not blamed."""
    entry = DatasetEntry(write(tmp_path / "f.jsonl", [PLAIN] * 50), columns=TEXT)
    rows = load_preferences([entry], seed=0)[0].to_list()
    [made] = Path(datasets.config.HF_DATASETS_CACHE).rglob("json-train.arrow")
    [mapped_to] = made.parent.glob("cache-*.arrow")
    for file in (mapped_to, made):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        caplog.clear()
        assert load_preferences([entry], seed=0)[0].to_list() == rows
        assert f"f.jsonl: the cache {made.parent} is damaged (" in caplog.text
    other = datasets.Dataset.from_file(str(made)).select([0])
    with pa.OSFile(str(tmp_path / "short"), "wb") as sink, pa.ipc.new_stream(sink, other.data.schema) as writer:
        writer.write_table(other.data.table.slice(0, 1))
    made.write_bytes((tmp_path / "short").read_bytes())
    assert load_preferences([entry], seed=0)[0].to_list() == rows
    assert "1 of 50 rows are left" in caplog.text


def test_csv_is_text_by_any_delimiter(tmp_path):
    """Answers of digits stay as they are written, and what is read as a number is one; an unnamed index is no harm."""
    columns = Columns(
        prompt="prompt", **PAIR, score_chosen="w", score_rejected="l", chosen_safe="s", rejected_safe="s"
    )
    for mark in ",;\t|":
        text = '|prompt|chosen|rejected|w|l|s\n0|1+1|02|3,0|7.5|-1|True\n1|p|None|"a\nb"|1|0|false\n'
        quoted = text.replace("3,0", '"3,0"').replace("|", mark)
        (tmp_path / "f.csv").write_text(quoted)
        for entry in (
            DatasetEntry(str(tmp_path / "f.csv"), columns=columns),
            DatasetEntry(str(tmp_path), columns=columns),
        ):
            rows, _ = load_preferences([entry], seed=0)
            assert rows["chosen"][:] == ["02", "None"]
            assert rows["rejected"][:] == ["3,0", "a\nb"]
            assert rows["score_chosen"][:] == [7.5, 1.0]
            assert rows["chosen_safe"][:] == [True, False]


@pytest.mark.parametrize("layout", ["parts", "named split", "saved", "saved splits"])
def test_kinds_of_folder(layout, tmp_path):
    """
    Files that name no split are the one that the entry names, and so is a single set that was saved by
    `save_to_disk`; where there are several, it is the one of that name.
    """
    plain = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "c", "rejected": "d"}]
    folder, rows = tmp_path / "rows", datasets.Dataset.from_list(plain)
    folder.mkdir()
    if layout == "parts":
        for part in (0, 1):
            write(folder / f"part-{part}.jsonl", plain[part : part + 1])
    elif layout == "named split":
        (folder / "data").mkdir()
        rows.to_parquet(folder / "data" / "train_prefs-00000-of-00001.parquet")
        rows.select([0]).to_parquet(folder / "data" / "test_prefs-00000-of-00001.parquet")
    elif layout == "saved":
        rows.save_to_disk(folder)
    else:
        datasets.DatasetDict(train_prefs=rows, test_prefs=rows.select([0])).save_to_disk(folder)
    columns = Columns(prompt="prompt", **PAIR)
    entry = DatasetEntry(str(folder), name="preference", split="train_prefs", columns=columns)
    assert load_preferences([entry], seed=0)[0]["chosen"][:] == ["a", "c"]
    if layout in ("named split", "saved splits"):
        with pytest.raises(RecipeError, match="no split 'test'; set `split` to one of t.*_prefs, t.*_prefs"):
            load_preferences([DatasetEntry(str(folder), split="test", columns=columns)], seed=0)


def test_a_folder_of_training_rows_is_no_test_split(tmp_path):
    write(tmp_path / "train-0.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    entry = DatasetEntry(str(tmp_path), split="test", columns=Columns(prompt="prompt", **PAIR))
    with pytest.raises(RecipeError, match="no split 'test'; set `split` to one of train"):
        load_preferences([entry], seed=0)


def test_no_module_knows_a_source_by_name():
    """Every difference between sources stands in YAML."""
    names = ["pku", "saferlhf", "ultrafeedback", "argilla", "trl-lib", "hh-rlhf", "anthropic", "helpsteer", "nvidia"]
    names += ["tulu", "allenai", "skywork", "sharegpt", "ultrachat"]
    modules = list((ROOT / "recipes/core/data").glob("*.py"))
    assert len(modules) >= 5
    for module in modules:
        text = module.read_text().lower()
        assert not [name for name in names if name in text], module


# ------------------------------------------------------------------------------------------------- fraction and cache
def numbered(tmp_path: Path, count: int) -> str:
    return write(tmp_path / "f.jsonl", [{"p": f"p{n}", "chosen": f"c{n}", "rejected": "r"} for n in range(count)])


FIVE_OF_29 = [1, 6, 9, 11, 28]


def test_fraction_is_drawn_by_the_seed(tmp_path):
    """
    20 % of 29 rows are 5.8: 5 rows, the same on every machine (the literal list), not the first, in their order, under
    the ids that they have without a fraction.
    """
    entry = DatasetEntry(numbered(tmp_path, 29), fraction=0.2, columns=Columns(prompt="p", **PAIR))
    rows, _ = load_preferences([entry], seed=42)
    assert rows["row_id"][:] == [f"f.jsonl:{n}" for n in FIVE_OF_29]
    assert rows["chosen"][:] == [f"c{n}" for n in FIVE_OF_29]
    assert load_preferences([entry], seed=43)[0]["row_id"][:] != rows["row_id"][:]
    entry.source = "another"
    assert load_preferences([entry], seed=42)[0]["chosen"][:] != rows["chosen"][:]


def test_a_bad_row_of_a_fraction_keeps_its_number(tmp_path):
    rows = [{"p": "p", "chosen": None if n == 9 else "c", "rejected": "r"} for n in range(29)]
    entry = DatasetEntry(write(tmp_path / "f.jsonl", rows), fraction=0.2, columns=Columns(prompt="p", **PAIR))
    with pytest.raises(RecipeError, match=r"1 of 5 rows can't be used .*: `chosen` is null: row 9;"):
        load_preferences([entry], seed=42)


@pytest.mark.parametrize(
    ("rows", "fraction", "kept"), [(297_394, 0.2, 59_478), (100, 0.29, 29), (7, 1.0, 7), (3, 0.3, 0)]
)
def test_size_of_a_fraction(rows, fraction, kept):
    drawn = sources.draw_fraction(rows, fraction, 0, "s")
    assert len(drawn) == len(set(drawn.tolist())) == kept
    assert (np.diff(drawn) > 0).all()


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    """Also in another process with another hash seed; another seed, mapping or version of the code maps again."""
    path = numbered(tmp_path, 40)
    entry = DatasetEntry(path, fraction=0.5, columns=Columns(prompt="p", **PAIR))
    script = (
        "import datasets, sys; datasets.config.HF_DATASETS_CACHE = sys.argv[1]\n"
        "from core.config.schema import *; from core.data.preferences import load_preferences\n"
        "columns = Columns(prompt='p', chosen='chosen', rejected='rejected')\n"
        "load_preferences([DatasetEntry(sys.argv[2], fraction=0.5, columns=columns)], 1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes"), "PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", script, str(datasets.config.HF_DATASETS_CACHE), path]
    subprocess.run(command, check=True, env=environment, capture_output=True)

    def unreachable(*args, **kwargs):
        raise AssertionError("mapped again")

    monkeypatch.setattr(preferences, "map_batch", unreachable)
    rows, _ = load_preferences([entry], seed=1)
    assert len(rows) == 20
    with pytest.raises(AssertionError, match="mapped again"):
        load_preferences([entry], seed=2)
    monkeypatch.setattr(preferences, "CODE", "other")
    with pytest.raises(AssertionError, match="mapped again"):
        load_preferences([entry], seed=1)


def test_batches_and_processes_make_no_difference(tmp_path, monkeypatch):
    """2,500 rows are three batches; two processes read 1,250 each. The faulty row keeps its number."""
    rows = [{"p": f"p{n}", "chosen": f"c{n}", "rejected": "r"} for n in range(2_500)]
    rows[2_100]["chosen"] = None
    path = write(tmp_path / "f.jsonl", rows)
    monkeypatch.setattr(preferences, "WORKER_ROWS", 1_000)
    entry = DatasetEntry(path, bad_rows="drop", columns=Columns(prompt="p", **PAIR))
    for num_proc in (None, 2):
        loaded, bad = load_preferences([entry], seed=0, num_proc=num_proc)
        assert bad == [{"row_id": "f.jsonl:2100", "source": "f.jsonl", "reason": "`chosen` is null"}]
        kept = [n for n in range(2_500) if n != 2_100]
        assert loaded["row_id"][:] == [f"f.jsonl:{n}" for n in kept]
        assert loaded["chosen"][:] == [f"c{n}" for n in kept]
        assert [prompt[0]["content"] for prompt in loaded["prompt"]] == [f"p{n}" for n in kept]


# ---------------------------------------------------------------------------------------------------------- bad input
PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}
TEXT = Columns(prompt="prompt", **PAIR)
CHAT = Columns(**PAIR)
SCORED = {**PLAIN, "w": 1.0, "l": 2.0}
SCORES = Columns(prompt="prompt", **PAIR, score_chosen="w", score_rejected="l")
TWO = {"prompt": "q", "a": "A", "b": "B", "n": 0, "s": 1}
HH = Columns(**PAIR, turns=Turns("\n\nHuman: ", "\n\nAssistant: "))


def two(**more) -> Columns:
    return Columns(prompt="prompt", responses=["a", "b"], **more)


SEVERE = two(better="n", severity=["s", "n"])
# name: (rows of which the second is bad, mapping, words of the message)
BAD_ROWS = {
    "null answer": ([PLAIN, {**PLAIN, "chosen": None}], TEXT, "`chosen` is null: row 1; mend .*bad_rows: drop"),
    "null prompt": ([PLAIN, {**PLAIN, "prompt": None}], TEXT, "`prompt` is null: row 1"),
    "message without text": (
        [GOOD, {**GOOD, "rejected": [user("q"), assistant(None)]}], CHAT,
        "`rejected` has a message without text: row 1",
    ),
    "an image among the parts of a message": (
        [GOOD, {**GOOD, "chosen": [user("q"), assistant([{"type": "image", "image": "x.png"}, {"text": "x"}])]}], CHAT,
        "`chosen` has a message with a part of the type 'image', .*leave_out: .image.*: row 1",
    ),
    "an image in a part of text": (
        [GOOD, {**GOOD, "chosen": [user("q"), assistant([{"text": "x", "image_url": "y"}])]}], CHAT,
        "`chosen` has a part of a message with `image_url`, .*: row 1",
    ),
    "no part": ([GOOD, {**GOOD, "chosen": [user("q"), assistant([])]}], CHAT, "`chosen` has a message without text"),
    "reasoning": (
        [GOOD, {**GOOD, "chosen": [user("q"), assistant("good") | {"reasoning_content": "why"}]}], CHAT,
        "`chosen` has a message with `reasoning_content`, .*columns.leave_out: .reasoning_content.*: row 1",
    ),
    "a call of a tool beside text": (
        [GOOD, {**GOOD, "rejected": [user("q"), assistant("bad") | {"tool_calls": [{"id": "1"}]}]}], CHAT,
        "`rejected` has a message with `tool_calls`, .*: row 1",
    ),
    "two system messages": (
        [{"sys": "s", **GOOD},
         {"sys": "s", **{side: [{"role": "system", "content": "t"}, *GOOD[side]] for side in PAIR}}],
        Columns(**PAIR, system="sys"), "`sys` is not the system message that the prompt begins with: row 1",
    ),
    "empty list": ([GOOD, {**GOOD, "chosen": []}], CHAT, "`chosen` holds no message: row 1"),
    "string rows after conversational ones": (
        [GOOD, {"chosen": "a", "rejected": "b"}], CHAT, "rows of mixed layouts: `chosen` holds text .*: row 1",
    ),
    "conversational rows after string ones": (
        [PLAIN, {"prompt": "q", **GOOD}], TEXT, "rows of mixed layouts: `chosen` holds a list of messages .*: row 1",
    ),
    "NaN score": ([SCORED, {**SCORED, "l": float("nan")}], SCORES, "`l` is not a finite number: row 1"),
    "infinite score": ([SCORED, {**SCORED, "w": float("inf")}], SCORES, "`w` is not a finite number: row 1"),
    "null score": ([SCORED, {**SCORED, "l": None}], SCORES, "`l` is not a finite number: row 1"),
    "text for a score": ([SCORED, {**SCORED, "l": "high"}], SCORES, "`l` holds text .*: row 1"),
    "NaN in an extra column": (
        [{**PLAIN, "x": 1.0}, {**PLAIN, "x": float("nan")}], Columns(prompt="prompt", **PAIR, extra=["x"]),
        "`x` is not a finite number: row 1",
    ),
    "unknown role": (
        [GOOD, {side: [{"role": "tool", "content": "t"}, *GOOD[side]] for side in PAIR}], CHAT,
        "`chosen` has a message of the role 'tool', none of system, user, assistant .*roles.*: row 1",
    ),
    "prompts that differ": (
        [GOOD, {**GOOD, "chosen": [user("other"), assistant("good")]}], CHAT,
        "`chosen` and `rejected` have different prompts: row 1",
    ),
    "prompt column that contradicts the conversation": (
        [{**GOOD, "prompt": "q"}, {**GOOD, "prompt": "other"}], TEXT,
        "`prompt` is not the prompt that `chosen` begins with: row 1",
    ),
    "answer alone": (
        [GOOD, {side: [assistant("x")] for side in PAIR}], CHAT, "`chosen` has no prompt before its answer: row 1",
    ),
    "last message of the user": (
        [GOOD, {**GOOD, "rejected": [user("q"), assistant("x"), user("and?")]}], CHAT,
        "`rejected` does not end in a message of the assistant: row 1",
    ),
    "text before the first marker": (
        [dict.fromkeys(PAIR, "\n\nHuman: q\n\nAssistant: a"),
         dict.fromkeys(PAIR, "Note.\n\nHuman: q\n\nAssistant: a")], HH,
        "`chosen` does not begin with a marker of columns.turns: row 1",
    ),
    "better of null": ([TWO, {**TWO, "n": None}], two(better="n"), "`n` is neither 0 nor 1: row 1"),
    "preference of null": ([TWO, {**TWO, "n": None}], two(preference="n"), "`n` is not a finite number: row 1"),
    "better that values call unknown": (
        [TWO, {**TWO, "n": 2}], two(better="n", values={"n": {"0": 0, "2": None}}), "`n` is neither 0 nor 1: row 1",
    ),
    "several faults, of which the first is told": (
        [TWO, {**TWO, "a": None, "n": None, "s": None}], SEVERE, "`a` is null: row 1",
    ),
    "text among flags": (
        [{**PLAIN, "f": {"A": None}}, {**PLAIN, "f": {"A": "text"}}], Columns(prompt="prompt", **PAIR, category="f"),
        "`f` holds more than booleans: row 1",
    ),
    "text for flags": (
        [{**PLAIN, "f": {"A": True}}, {**PLAIN, "f": "A"}], Columns(prompt="prompt", **PAIR, category="f"),
        "rows of mixed layouts: `f` holds text where the first row holds a struct of booleans .*: row 1",
    ),
    "null id": ([{**PLAIN, "id": "x"}, {**PLAIN, "id": None}], Columns(prompt="prompt", **PAIR, row_id="id"),
                "`id` is null: row 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(name, tmp_path):
    """Row 1 is refused with file, column, number and the way out; dropped on demand, it is listed and row 0 stays."""
    given_rows, columns, message = BAD_ROWS[name]
    entry = DatasetEntry(write(tmp_path / "f.jsonl", given_rows), columns=columns)
    with pytest.raises(RecipeError, match=message) as error:
        load_preferences([entry], seed=0)
    assert str(error.value).startswith(f"{tmp_path}/f.jsonl: 1 of 2 rows can't be used (rows count from 0): ")
    assert "\n" not in str(error.value)
    entry.bad_rows = "drop"
    rows, bad = load_preferences([entry], seed=0)
    assert len(rows) == 1
    assert not rows[0]["row_id"].endswith(("1", "null"))
    assert len(bad) == 1
    assert bad[0]["source"] == "f.jsonl"
    assert bad[0]["row_id"] == ("f.jsonl:null" if name == "null id" else "f.jsonl:1")
    assert f"{bad[0]['reason']}: row 1" in str(error.value)


ARENA = ["model_a", "model_b", "tie", "winner_tie", "both_bad"]
TO_PASTE = 'e.g. values: {"n": {"model_a": 0, "model_b": 1, "tie": "tie", "winner_tie": "tie", "both_bad": "tie"}}'
LABELS = two(better="s", safe=["n", "n"])
# name: (values of the column `n`, mapping, the end of the message)
CODES = {
    "1 and 2": ([1, 2], two(better="n"), 'e.g. values: {"n": {"1": 0, "2": 1}}'),
    "1 and 2 as text": (["1", "2"], two(better="n"), 'e.g. values: {"n": {"1": 0, "2": 1}}'),
    "columns by their names": (["a", "b"], two(better="n"), 'e.g. values: {"n": {"a": 0, "b": 1}}'),
    "names with numbers": (["response_0", "response_1"], two(better="n"), '{"response_0": 0, "response_1": 1}}'),
    "an arena's": (ARENA, two(better="n"), TO_PASTE),
    "0 and 2": ([0, 2], two(better="n"), '{"n": {"0": "?", "2": "?"}}, with a meaning for each ?'),
    "booleans beside numbers": ([True, 0, 1], two(better="n"), '{"n": {"true": 1, "0": 0, "1": 1}}'),
    "safe and unsafe": (["Safe", "unsafe"], LABELS, 'e.g. values: {"n": {"safe": true, "unsafe": false}}'),
    "labels of 2": ([1, 2], LABELS, '{"n": {"1": "?", "2": "?"}}, with a meaning for each ?'),
    "severities of 4": ([1, 4], two(better="s", severity=["n", "n"]), '"4": "?"}}, with a meaning for each ?'),
    "severities of 1.5": ([1, 1.5], two(better="s", severity=["n", "n"]), '"1.5": "?"}}, with a meaning for each ?'),
    "severities in words": (["None", "Severe"], two(better="s", severity=["n", "n"]), '{"none": 0, "severe": 3}}'),
    "words for a preference": (["A", "B"], two(preference="n"), '{"a": "?", "b": "?"}}, with a meaning for each ?'),
    "a preference on one side": ([1, 2], two(preference="n"), '{"1": "?", "2": "?"}}, with a number for each ?'),
}  # fmt: skip


@pytest.mark.parametrize("name", CODES)
def test_a_code_of_its_own_is_no_bad_row(name, tmp_path):
    """Whatever `bad_rows` says, it is refused over the whole column, with the line that would say what it means."""
    values, columns, end = CODES[name]
    path = write(tmp_path / "f.jsonl", [{**TWO, "n": value} for value in values])
    for bad_rows in ("error", "drop"):
        with pytest.raises(RecipeError, match="columns.* names 'n', wh") as error:
            load_preferences([DatasetEntry(path, bad_rows=bad_rows, columns=columns)], seed=0)
        assert str(error.value).endswith(end)
        assert "\n" not in str(error.value)


# name: (values of the column `n`, mapping, what the rows then hold under the key)
MEANINGS = {
    "1 and 2": ([1, 2], two(better="n", values={"n": {"1": 0, "2": 1}}), "chosen", ["A", "B"]),
    "0 and 1 as text": (["0", "1"], two(better="n"), "chosen", ["A", "B"]),
    "an arena's winner": (
        ARENA, two(better="n", values={"n": dict(zip(ARENA, [0, 1, "tie", "tie", "tie"], strict=True))}),
        "chosen", ["A", "B", "A", "A", "A"],
    ),
    "an arena's ties": (
        ARENA, two(better="n", values={"n": dict(zip(ARENA, [0, 1, "tie", "tie", "tie"], strict=True))}),
        "tie", [False, False, True, True, True],
    ),
    "true and false as text": (["True", "false"], LABELS, "chosen_safe", [True, False]),
    "safe, unsafe and what is neither": (
        ["Safe", " unsafe", "disputed", "", None],
        two(better="s", safe=["n", "n"], values={"n": {"safe": True, "unsafe": False, "disputed": None}}),
        "chosen_safe", [True, False, None, None, None],
    ),
    "severities as text": (["2", "0"], two(better="s", severity=["n", "n"]), "chosen_severity", [2, 0]),
    "scores as text": (["7.5", "-1e1"], two(better="s", scores=["n", "n"]), "score_chosen", [7.5, -10.0]),
    "a preference in words": (
        ["A", "B", "C"], two(preference="n", values={"n": {"A": -1, "B": 1, "c": 0}}), "chosen", ["A", "B", "A"],
    ),
    "one column as two codes": (
        [1, 0], two(better="n", safe=["n", "n"], values={}), "chosen_safe", [True, False],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANINGS)
def test_what_a_code_means(name, tmp_path):
    values, columns, key, expected = MEANINGS[name]
    path = write(tmp_path / "f.jsonl", [{**TWO, "n": value} for value in values])
    rows, bad = load_preferences([DatasetEntry(path, columns=columns)], seed=0)
    assert (rows[key][:], bad) == (expected, [])


def test_class_labels_count_by_their_names(tmp_path):
    """Stored as 0 and 1 in the order of their names, which a reader of numbers would take for false and true."""
    features = datasets.Features(
        dict.fromkeys(("prompt", "a", "b"), datasets.Value("string"))
        | {"n": datasets.ClassLabel(names=["safe", "unsafe"]), "s": datasets.Value("int64")}
    )
    rows = datasets.Dataset.from_list([{**TWO, "n": 0}, {**TWO, "n": 1}], features=features)
    rows.to_parquet(tmp_path / "f.parquet")
    entry = DatasetEntry(str(tmp_path / "f.parquet"), columns=LABELS)
    with pytest.raises(RecipeError, match='"safe", "unsafe".*values: {"n": {"safe": true, "unsafe": false}}'):
        load_preferences([entry], seed=0)
    entry.columns = two(better="s", safe=["n", "n"], values={"n": {"safe": True, "unsafe": False}})
    assert load_preferences([entry], seed=0)[0]["chosen_safe"][:] == [True, False]


def test_values_of_a_recipe(tmp_path):
    """The line that a message says to paste, in a recipe's YAML: numbers are read as what the rows hold."""
    rows = [{**TWO, "n": "model_b", "s": "low"}, {**TWO, "n": "tie", "s": "none"}]
    (tmp_path / "r.yaml").write_text(
        f"""
model_name_or_path: m
output_dir: o
datasets:
  - path: {write(tmp_path / "f.jsonl", rows)}
    columns:
      prompt: prompt
      responses: [a, b]
      better: n
      severity: [s, s]
      values: {{"n": {{"model_b": 1, "tie": "tie"}}, s: {{none: 0, low: 1}}}}
"""
    )
    [entry] = resolve("dpo", ["--config", str(tmp_path / "r.yaml")]).recipe.datasets
    [first, second] = load_preferences([entry], seed=0)[0]
    assert (first["chosen"], first["tie"], first["chosen_severity"]) == ("B", False, 1)
    assert (second["chosen"], second["tie"], second["chosen_severity"]) == ("A", True, 0)


def test_values_that_say_nothing_of_use(tmp_path):
    path = write(tmp_path / "f.jsonl", [TWO, {**TWO, "n": 1}])
    for values, message in (
        ({"n": {"0": 0}}, 'columns.values.n does not say what "1" means .*; add it'),
        ({"n": {"0": 0, "1": 2}}, "columns.values.n.1: 2 is no meaning here .0: the first answer"),
        ({"n": {"0": 0, "1": 1, "A": 0, "a ": 1}}, "columns.values.n: 'a ' is there twice"),
        ({"m": {"0": 0}}, "columns.values names 'm', which no key of `columns` reads as a code"),
        ({"prompt": {"q": 0}}, "columns.values names 'prompt', which no key of `columns` reads as a code; remove it"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_preferences([DatasetEntry(path, columns=two(better="n", values=values))], seed=0)


def test_many_bad_rows_are_counted(tmp_path):
    rows = [PLAIN, *[{**PLAIN, "chosen": None}] * 8, {**PLAIN, "rejected": None}]
    entry = DatasetEntry(write(tmp_path / "f.jsonl", rows), columns=TEXT)
    message = (
        r"9 of 10 rows can't be used \(rows count from 0\): `chosen` is null: rows 1, 2, 3, 4, 5 and 3 more; "
        "`rejected` is null: row 9; mend them"
    )
    with pytest.raises(RecipeError, match=message):
        load_preferences([entry], seed=0)


def test_a_source_of_bad_rows_alone_is_refused(tmp_path):
    """Also where every content is a list of parts, which Arrow stores as such."""
    parts = [user("q"), assistant([{"type": "image", "image": "x.png"}])]
    for columns, bad_row in ((TEXT, {**PLAIN, "chosen": None}), (CHAT, dict.fromkeys(PAIR, parts))):
        entry = DatasetEntry(write(tmp_path / "f.jsonl", [bad_row]), columns=columns, bad_rows="drop")
        with pytest.raises(RecipeError, match="1 of 1 rows can't be used .*; mend the source"):
            load_preferences([entry], seed=0)


# name: (rows, mapping, words of the message)
BAD_MAPPINGS = {
    "missing column": (
        [PLAIN], Columns(prompt="prompt", chosen="chsen", rejected="rejected"),
        "columns.chosen names 'chsen', which is none of the columns prompt, chosen, rejected; did you mean chosen",
    ),
    "missing column without a near one": (
        [PLAIN], Columns(prompt="prompt", **PAIR, category="kind"), "'kind'.* prompt, chosen, rejected; name one",
    ),
    "missing field of a struct": (
        [{"prompt": "q", "out": {"good": "a", "bad": "b"}}],
        Columns(prompt="prompt", chosen="out.goood", rejected="out.bad"), "'out.goood'.*; did you mean out.good",
    ),
    "no pair": ([PLAIN], Columns(prompt="prompt"), "names no pair; set columns.chosen and columns.rejected, or"),
    "half a pair": ([PLAIN], Columns(prompt="prompt", chosen="chosen"), "names no pair"),
    "responses and chosen": (
        [TWO], two(better="n", chosen="a"), "columns.responses and columns.chosen exclude each other",
    ),
    "responses and chosen_safe": (
        [TWO], two(better="n", chosen_safe="n", rejected_safe="n"),
        "columns.responses and columns.chosen_safe exclude each other",
    ),
    "responses without order": ([TWO], two(), "needs columns.better or columns.preference"),
    "responses with two orders": ([TWO], two(better="n", preference="n"), "needs columns.better or .*, and not both"),
    "better without responses": (
        [PLAIN], Columns(prompt="prompt", **PAIR, better="n"), "columns.better goes with columns.responses",
    ),
    "one score": ([PLAIN], Columns(prompt="prompt", **PAIR, score_chosen=1.0), "columns.score_rejected go together"),
    "labels twice": (
        [TWO], two(better="n", safe=["n", "n"], chosen_safe=True, rejected_safe=True),
        "columns.safe and columns.chosen_safe exclude each other",
    ),
    "an SFT key": ([PLAIN], Columns(prompt="prompt", **PAIR, safer="n"), "columns.safer .*SFT stage"),
    "text without prompt": (
        [PLAIN], CHAT, "'chosen' holds text, so the prompt is elsewhere; set columns.prompt, or columns.turns",
    ),
    "answers of two layouts": (
        [{**GOOD, "rejected": "b"}], CHAT, "'chosen' holds a list of messages and 'rejected' text",
    ),
    "messages of other names": (
        [{side: [{"from": "human", "value": "q"}] for side in PAIR}], CHAT,
        "which holds a list of structs of from, value .*columns.messages",
    ),
    "turns on messages": (
        [GOOD], Columns(**PAIR, turns=Turns("Human:", "Assistant:")), "a list of messages, not text as columns.turns",
    ),
    "empty marker": ([PLAIN], Columns(**PAIR, turns=Turns("\n", "A:")), "columns.turns needs a marker"),
    "score of text": (
        [PLAIN], Columns(prompt="prompt", **PAIR, score_chosen="chosen", score_rejected="rejected"),
        "columns.score_chosen names 'chosen', which holds text, not a number",
    ),
    "list of strings": ([{**PLAIN, "chosen": ["a"]}], TEXT, "'chosen', which holds a list of str, not text or"),
    "extra of a taken name": ([PLAIN], Columns(prompt="prompt", **PAIR, extra=["prompt"]), "columns.extra .*'prompt'"),
    "ids that rows share": (
        [{**PLAIN, "id": 1}, {**PLAIN, "id": 1}], Columns(prompt="prompt", **PAIR, row_id="id"),
        r"several rows share an id \(f.jsonl:1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MAPPINGS)
def test_bad_mapping(name, tmp_path):
    given_rows, columns, message = BAD_MAPPINGS[name]
    with pytest.raises(RecipeError, match=message) as error:
        load_preferences([DatasetEntry(write(tmp_path / "f.jsonl", given_rows), columns=columns)], seed=0)
    assert str(error.value).startswith(f"{tmp_path}/f.jsonl: ")


# name: (name of a file, its content, keys of the entry, words of the message)
BAD_SOURCES = {
    "missing file": ("pairs.jsonl", "", {"path": "pair.jsonl"}, "pair.jsonl: no such file; .*mean pairs.jsonl"),
    "missing folder": ("f.jsonl", "", {"path": "a/b/c"}, "a/b/c: no such file or folder"),
    "missing data_files": ("f.jsonl", "", {"path": ".", "data_files": "g.jsonl"}, "no such file; .*`data_files`"),
    "other kind of file": ("f.txt", "x", {"path": "f.txt"}, "unknown kind of file; `path` reads .json,"),
    "revision of a file": ("f.jsonl", json.dumps(PLAIN), {"path": "f.jsonl", "revision": "x"}, "`revision` has no"),
    "no byte": ("f.jsonl", "", {"path": "f.jsonl"}, "f.jsonl: no rows"),
    "no row": ("f.json", "[]", {"path": "f.json"}, "f.json: no rows"),
    "corrupt line": (
        "f.jsonl", f'{json.dumps(PLAIN)}\n\n{{"prompt": "q", "chosen\n{json.dumps(PLAIN)}\n', {"path": "f.jsonl"},
        r"f.jsonl: line 3 is not JSON \(.* at column 24\); mend or remove it",
    ),
    "cut line": ("f.jsonl", f'{json.dumps(PLAIN)}\n{{"prompt": "q", "cho', {"path": "f.jsonl"}, "line 2 is not JSON"),
    "corrupt array": ("f.json", '[\n{"prompt" "q"}]', {"path": "f.json"}, "line 2 is not JSON"),
    "a number for a row": ("f.jsonl", "3\n", {"path": "f.jsonl"}, "line 1 is a number, not a JSON object"),
    "corrupt gzip": ("f.jsonl.gz", "not gzip", {"path": "f.jsonl.gz"}, "f.jsonl.gz: "),
    "corrupt line in a folder": (
        "f.jsonl", f"{json.dumps(PLAIN)}\n{{", {"path": ".", "data_files": "f.jsonl"}, "f.jsonl: line 2 is not JSON",
    ),
    "JSON in latin-1": (
        "f.jsonl", b'{"prompt":"q","chosen":"\xe9","rejected":"b"}', {"path": "f.jsonl"}, "`chosen` is not UTF-8 text",
    ),
    "an array in latin-1": ("f.json", b'[{"p":"\xe9"}]', {"path": "f.json"}, "not UTF-8 text .byte 0xe9.; save it"),
    "CSV in latin-1": ("f.csv", b"prompt,chosen\nq,\xe9\n", {"path": "f.csv"}, "not UTF-8 text; save it as"),
    "a header in latin-1": ("f.csv", b"prompt,chos\xe9n\nq,a\n", {"path": "f.csv"}, "not UTF-8 text; save it as"),
    "more fields than the header": (
        "f.csv", "prompt,chosen\nq,a,b\n", {"path": "f.csv"}, "more fields than the header; quote the texts",
    ),
    "a cut gzip": ("f.jsonl.gz", gzip.compress(b'{"p":"q"}' * 99)[:-20], {"path": "f.jsonl.gz"}, "fetch the file"),
    "JSON nested deep": (
        "f.jsonl", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", {"path": "f.jsonl"},
        "line 1 of f.jsonl is nested more than 50 levels deep; flatten it",
    ),
    "half a surrogate pair": (
        "f.jsonl", '{"prompt":"q","chosen":"\\ud800","rejected":"b"}', {"path": "f.jsonl"},
        r"line 1 holds half a surrogate pair \(\\ud800\)",
    ),
    "what save_to_disk left": ("state.json", "[]", {"path": "."}, "what save_to_disk left cannot be read .*; save it"),
    "nothing on the Hub": ("f.jsonl", "", {"path": "nobody/nothing"}, "nobody/nothing: .*the Hub can't be reached"),
    "no row by the fraction": (
        "f.jsonl", json.dumps(PLAIN), {"path": "f.jsonl", "fraction": 0.5}, "`fraction: 0.5` of 1 rows leaves none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source(name, tmp_path, monkeypatch):
    file, content, keys, message = BAD_SOURCES[name]
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.monotonic()
    with pytest.raises(RecipeError, match=message) as error:
        load_preferences([DatasetEntry(**keys, columns=TEXT)], seed=0)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5


def test_depth_counts_brackets_outside_of_texts(tmp_path):
    path = write(tmp_path / "f.jsonl", [{**PLAIN, "chosen": '[{"' * 60}])
    assert load_preferences([DatasetEntry(path, columns=TEXT)], seed=0)[0]["chosen"][:] == ['[{"' * 60]


# name: (a column of one answer, what the message calls it; None: it is read)
TYPES = {
    "string_view": (pa.array(["a"], pa.string_view()), None),
    "large string": (pa.array(["a"], pa.large_string()), None),
    "bytes that are no text": (
        pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]),
        "`chosen` is not UTF-8 text in row 0",
    ),
    "binary": (pa.array([b"a"]), "holds binary data, not text .*; write it as text"),
    "date": (pa.array([date(2020, 1, 2)]), "holds a date, not text .*; write it as text"),
    "time": (pa.array([datetime(2020, 1, 2)]), "holds a time, not text .*; write it as text"),
    "decimal": (pa.array([Decimal("2.50")]), "holds a number, not text .*; write it as text"),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_of_answers(name, tmp_path):
    answers, message = TYPES[name]
    pq.write_table(pa.table({"prompt": ["q"], "chosen": answers, "rejected": ["b"]}), tmp_path / "f.parquet")
    entry = DatasetEntry(str(tmp_path / "f.parquet"), columns=TEXT)
    if message is None:
        assert load_preferences([entry], seed=0)[0]["chosen"][:] == ["a"]
        return
    with pytest.raises(RecipeError, match=message):
        load_preferences([entry], seed=0)


def test_decimal_scores(tmp_path):
    table = pa.table(
        {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"], "w": [Decimal("2.50")], "l": [Decimal("1")]}
    )
    pq.write_table(table, tmp_path / "f.parquet")
    rows, _ = load_preferences([DatasetEntry(str(tmp_path / "f.parquet"), columns=SCORES)], seed=0)
    assert (rows["score_chosen"][:], rows["score_rejected"][:]) == ([2.5], [1.0])


def test_layouts_that_differ_from_file_to_file(tmp_path):
    write(tmp_path / "a.jsonl", [GOOD])
    write(tmp_path / "b.jsonl", [{"chosen": "a", "rejected": "b"}])
    entry = DatasetEntry(str(tmp_path), data_files=["a.jsonl", "b.jsonl"], columns=CHAT)
    with pytest.raises(
        RecipeError, match="b.jsonl: rows of mixed layouts: `chosen` is text on line 1 and a list before"
    ):
        load_preferences([entry], seed=0)


def test_two_sources_of_one_name_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    entries = [DatasetEntry(write(tmp_path / name, [PLAIN]), columns=TEXT) for name in ("f.jsonl", "a/f.jsonl")]
    with pytest.raises(RecipeError, match="2 entries are called 'f.jsonl'; name each with `source:`"):
        load_preferences(entries, seed=0)


def test_a_hub_that_does_not_answer_is_left_alone(monkeypatch):
    """A server that takes the connection and never answers: after one timeout the process goes on offline."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(network, "PROBE_SECONDS", 0.3)
        sources._leave_the_hub_if_unreachable.cache_clear()
        started = time.monotonic()
        with pytest.raises(RecipeError, match="nobody/nothing: .*the Hub can't be reached"):
            load_preferences([DatasetEntry("nobody/nothing", columns=TEXT)], seed=0)
        assert time.monotonic() - started < 5


def test_oddities_are_counted(tmp_path):
    """Messages dumped as text, by JSON or by Python, in any row; other JSON in most rows; scores against labels."""
    talk = [user("hi")]
    given = [
        {"prompt": json.dumps(talk), "chosen": '{"answer": 42}', "rejected": "b", "w": 1.0, "l": 2.0},
        {"prompt": str(talk), "chosen": "[a] plain {text}", "rejected": '["b"]', "w": 2.0, "l": 2.0},
        {"prompt": "[1] is a reference", "chosen": "a", "rejected": "[2]", "w": 3.0, "l": 2.0},
    ]
    rows, _ = load_preferences([DatasetEntry(write(tmp_path / "f.jsonl", given), columns=SCORES)], seed=0)
    scores, rejected, prompt = preferences.oddities(rows)
    assert scores.startswith("in 1 of 3 rows with scores the rejected answer has the higher one (f.jsonl:0);")
    assert rejected.startswith("2 of 3 rows hold JSON dumped as text in rejected, which")
    assert prompt.startswith("2 of 3 rows hold messages dumped as text in prompt, which")
    rows, _ = load_preferences([DatasetEntry(write(tmp_path / "g.jsonl", [PLAIN]), columns=TEXT)], seed=0)
    assert preferences.oddities(rows) == []
    tie = two(better="x", scores=["n", "s"], values={"x": {"draw": "tie"}})
    rows, _ = load_preferences(
        [DatasetEntry(write(tmp_path / "t.jsonl", [{**TWO, "x": "draw"}]), columns=tie)], seed=0
    )
    assert rows["tie"][:] == [True] and preferences.oddities(rows) == []
    path = write(
        tmp_path / "h.jsonl",
        [{"m": [user("q"), assistant("a")]}, {"m": [user("q"), assistant('[{"role": "x", "content": "y"}]')]}],
    )
    talks = load_conversations([DatasetEntry(path, columns=Columns(conversation="m"))], seed=0)
    assert preferences.oddities(talks)[0].startswith("1 of 2 rows hold messages dumped as text in messages")


# ---------------------------------------------------------------------------------------------- conversations to learn
def learn(tmp_path: Path, rows: list[dict], **keys) -> list:
    entry = DatasetEntry(write(tmp_path / "f.jsonl", rows), **keys)
    loaded = load_conversations([entry], seed=0)
    assert loaded.column_names == ["messages"]
    return loaded["messages"][:]


def test_whole_conversations(tmp_path):
    talk = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    columns = Columns(conversation="messages")
    assert learn(tmp_path, [{"messages": talk, "prompt": "a"}], columns=columns) == [talk]


def test_whole_conversations_with_other_names(tmp_path):
    columns = Columns(conversation="talk", messages=Messages("from", "value", {"human": "user", "gpt": "assistant"}))
    rows = [{"talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    assert learn(tmp_path, rows, columns=columns) == [[user("a"), assistant("b")]]


def test_one_answer_of_a_pair(tmp_path):
    """Of one file: what is learned of the other answer isn't read back from the cache."""
    path = write(tmp_path / "f.jsonl", [{side: [user("a"), assistant("b"), *GOOD[side]] for side in PAIR}])
    for answer, text in (("chosen", "good"), ("rejected", "bad")):
        rows = load_conversations([DatasetEntry(path, columns=CHAT, answer=answer)], seed=0)
        assert rows["messages"][:] == [[user("a"), assistant("b"), user("q"), assistant(text)]]


@pytest.mark.parametrize("labels", [{}, {"safe": PKU_OLD.safe}], ids=["no labels", "labels that contradict it"])
def test_the_safer_answer_by_its_column(labels, tmp_path):
    """`pku` sets safer_response_id to the response that isn't better; the column's word counts, with labels or not."""
    columns = Columns(**{**vars(PKU_OLD), "safe": None, "safer": "safer_response_id", **labels})
    rows = [pku(0, (True, False)), pku(1, (False, True))]
    wanted = [[*ASK, assistant("second")], [*ASK, assistant("first")]]
    assert learn(tmp_path, rows, columns=columns, answer="safer") == wanted


def test_equal_scores_are_a_tie_where_nothing_else_puts_the_answers_in_order(tmp_path):
    rows = [
        {"p": "a?", "r": "yes", "s": "no", "b": 0, "v": -2, "x": 7, "y": 7},
        {"p": "b?", "r": "yes", "s": "no", "b": 1, "v": 0, "x": 7, "y": 7},
        {"p": "c?", "r": "yes", "s": "no", "b": 1, "v": 1, "x": 7, "y": 8},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"prompt": "p", "responses": ["r", "s"], "scores": ["x", "y"]}
    for columns, ties in (
        (Columns(prompt="p", chosen="r", rejected="s", score_chosen="x", score_rejected="y"), [True, True, False]),
        (Columns(**both, better="b"), [False, False, False]),
        (Columns(**both, preference="v"), [False, True, False]),
    ):
        found, _ = load_preferences([DatasetEntry(path=str(tmp_path / "rows.jsonl"), columns=columns)], 0)
        assert found["tie"][:] == ties


def test_the_safer_answer_by_labels_and_severities(tmp_path):
    """Label first, then severity; equal in both: the better one stays."""
    columns = Columns(**{**vars(PKU_OLD), "severity": ["response_0_severity_level", "response_1_severity_level"]})
    none = ([], [])
    rows = [
        pku(0, (False, True), (0, 3), none),  # the label speaks for the second, though its severity is higher
        pku(0, (False, False), (2, 1), none),  # both unsafe: the lower severity
        pku(1, (False, False), (2, 2), none),  # equal: the better one
        pku(1, (True, False), (0, 1), none),
    ]
    wanted = ["second", "second", "second", "first"]
    assert learn(tmp_path, rows, columns=columns, answer="safer") == [[*ASK, assistant(text)] for text in wanted]


def test_rows_without_an_answer_to_learn(tmp_path, caplog):
    """No selection follows in the SFT stage, so an empty answer is a bad row; what is dropped is counted."""
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": [user("a"), assistant(" ")]}]
    columns = Columns(conversation="messages")
    with pytest.raises(RecipeError, match="`messages` ends in an empty answer: row 1"):
        learn(tmp_path, rows, columns=columns)
    assert learn(tmp_path, rows, columns=columns, bad_rows="drop") == [rows[0]["messages"]]
    assert "f.jsonl: 1 rows dropped: `messages` ends in an empty answer" in caplog.text
    with pytest.raises(RecipeError, match="the answer to learn is empty: row 0"):
        learn(tmp_path, [{**PLAIN, "chosen": ""}], columns=TEXT)


SFT_ERRORS = {
    "safer without labels": (TEXT, "safer", "`answer: safer` needs columns.safer, safety labels or severities"),
    "safer column, other answer": (
        Columns(prompt="prompt", responses=["chosen", "rejected"], better="n", safer="n"), "chosen",
        "columns.safer goes with `answer: safer`",
    ),
    "conversation and pair": (Columns(conversation="prompt", **PAIR), "chosen", "remove columns.chosen"),
    "conversation and answer": (Columns(conversation="prompt"), "rejected", "whole conversations; remove `answer`"),
}  # fmt: skip


@pytest.mark.parametrize("name", SFT_ERRORS)
def test_bad_sft_mapping(name, tmp_path):
    columns, answer, message = SFT_ERRORS[name]
    with pytest.raises(RecipeError, match=message):
        learn(tmp_path, [PLAIN], columns=columns, answer=answer)
