"""Recipes as text: what a file and a command line may look like, where each value stands, and what dump writes."""

from itertools import pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.config.reading import dump, load, read
from core.runtime.errors import RecipeError

TEXT = """\
output_dir: runs/out
datasets:
  - path: task.jsonl
  - path: buffer.jsonl
    columns: {chosen: c}
margin:
  preset: bfpo
"""
COMMAND_LINES = [
    (["--config"], "--config has no value"),
    (["--beta", "1"], "--config RECIPE.yaml is missing"),
    (["my.yaml"], "write --config my.yaml"),
    (["--config", "FILE", "--beta"], "--beta has no value"),
    (["--config", "FILE", "--bf16", "--fp16"], "--bf16 has no value"),
    (["--config", "FILE", "beta=1"], "'beta=1' belongs to no key"),
    (["--config", "FILE", "-b", "1"], "'-b' belongs to no key"),
    (["--config", "FILE", "--beta", "1", "--beta=2"], "--beta is given twice"),
    (["--config", "FILE", "--config", "FILE"], "--config is given twice"),
    (["--config", "FILE", "--save_strategy", "[no"], "--save_strategy line 1: not valid YAML"),
    (["--config", "FILE", "--datasets.2.path", "x"], "datasets has 2 entries, numbered from 0; no '2'"),
    (["--config", "FILE", "--datasets.x.path", "x"], "datasets has 2 entries, numbered from 0; no 'x'"),
    (["--config", "FILE", "--output_dir.x", "x"], 'output_dir is "runs/out", which has no keys'),
]
FILES = [
    ("", "expected `key: value` lines, found nothing"),
    ("# only a comment\n", "found nothing"),
    ("- a\n- b\n", 'found ["a", "b"]'),
    ("beta\n", 'found "beta"'),
    ("a: [1\n", "line 2: not valid YAML"),
    ("a: 1\n\tb: 2\n", "line 2: not valid YAML"),
    ("a: b: c\n", "line 1: not valid YAML"),
    (f"{TEXT}beta: 0.1\nseed: 1\nbeta: 0.2\n", "my.yaml line 10: beta is given twice, first in", "line 8"),
    (f"{TEXT}  a: 1\n  a: 2\n", "line 9: margin.a is given twice"),
    (TEXT.replace("columns: {chosen: c}", "path: other"), "line 5: datasets.1.path is given twice"),
    (TEXT.replace("{chosen: c}", "{row_id: [x, {y: 1, y: 2}]}"), "datasets.1.columns.row_id.1.y is given twice"),
    ("1: a\n", "line 1: the key 1 is not a string"),
    ("a: !!python/object:os.system x\n", "line 1: a: the tag"),
    ("a: !!int x\n", "line 1: a: 'x' is not a int"),
    ("a: &x [*x]\n", "within the value that it names"),
    ("a: " + "[" * 250 + "]" * 250 + "\n", "more than 20 levels"),
    ("a: " + "[" * 5000 + "]" * 5000 + "\n", "levels"),
    (
        "a: &a [1, 1]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 20)}]\n" for x, y in pairwise("abcdefghi")),
        "more than 100,000 values",
    ),
    ('a: "\\ud800"\n', 'a: "\\\\ud800" is no text'),
    ('"\\udfff": 1\n', "is no text"),
    ("a: " + "9" * 5000 + "\n", "is not a int"),
]


def refusal(argv: list[str]) -> str:
    with pytest.raises(RecipeError) as caught:
        read(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_command_lines_of_a_stranger(tmp_path):
    (tmp_path / "my.yaml").write_text(TEXT)
    start = ["--config", str(tmp_path / "my.yaml")]
    assert "no '9999" in (line := refusal([*start, "--datasets." + "9" * 5000 + ".path=x"])) and len(line) < 400
    assert "no key has such a name" in refusal([*start, "--a\udc80b=1"])
    assert "special characters" in refusal([*start, "--beta=\udc80"])


@pytest.mark.parametrize(("argv", "words"), COMMAND_LINES)
def test_bad_command_lines(tmp_path, argv, words):
    (tmp_path / "my.yaml").write_text(TEXT)
    assert words in refusal([str(tmp_path / "my.yaml") if part == "FILE" else part for part in argv])


@pytest.mark.parametrize(("text", "words"), [(row[0], row[1:]) for row in FILES])
def test_bad_files(tmp_path, text, words):
    (tmp_path / "my.yaml").write_text(text)
    message = refusal(["--config", str(tmp_path / "my.yaml")])
    for word in words:
        assert word in message


def test_unreadable_files(tmp_path):
    (tmp_path / "align.yaml").write_text(TEXT)
    assert "no such recipe; did you mean align.yaml?" in refusal(["--config", str(tmp_path / "alin.yaml")])
    assert "cannot be read: Is a directory" in refusal(["--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9t\xe9\n")
    assert "not UTF-8 text (byte 3)" in refusal(["--config", str(tmp_path / "latin.yaml")])


def test_overrides(tmp_path):
    (tmp_path / "my.yaml").write_text(TEXT)
    argv = ["--config=" + str(tmp_path / "my.yaml"), "--beta=0.2", "--margin.c", "-0.25", "--datasets.1.path", "other"]
    argv += ["--selection.score", "{signal: length_ratio}", "--system_message", "", "--max_length", "null"]
    document = read(argv)
    assert document.values == {
        "output_dir": "runs/out", "beta": 0.2, "margin": {"preset": "bfpo", "c": -0.25},
        "datasets": [{"path": "task.jsonl"}, {"path": "other", "columns": {"chosen": "c"}}],
        "selection": {"score": {"signal": "length_ratio"}}, "system_message": "", "max_length": None,
    }  # fmt: skip
    assert document.place(("datasets", 1, "path")) == document.place(("selection", "score")) == "command line"
    assert document.place(("margin", "preset")).endswith("my.yaml line 7")
    assert document.overrides[:2] == ["--beta=0.2", "--margin.c=-0.25"]


def test_values_are_read_as_yaml_1_2():
    """PyYAML alone reads 5e-7 as a string, no as false, 010 as 8 and 1:30 as 90."""
    values, places = load(
        "a: 5e-7\nb: no\nc: 010\nd: 1:30\ne: 2024-01-01\nf: ~\ng: True\nh: -1\ni: 1.\nj: {k: [.5]}\n", "x"
    )
    assert values == {
        "a": 5e-7, "b": "no", "c": 10, "d": "1:30", "e": "2024-01-01", "f": None, "g": True, "h": -1, "i": 1.0,
        "j": {"k": [0.5]},
    }  # fmt: skip
    assert places["h",] == "x line 8" and places["j", "k", 0] == "x line 10"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), plain, max_size=4))
def test_dump_is_read_back_by_every_reader(values):
    text = dump(values)
    assert load(text, "x")[0] == values
    assert yaml.safe_load(text) == values


@pytest.mark.parametrize(
    "word",
    ["no", "on", "5e-7", "010", "1:30", "2024-01-01", "~", "null", "0x1f", "1_000", "<<", "", "=", ".5", "a\x85b"],
)
def test_words_that_look_like_something_else_stay_words(word):
    text = dump({"a": word})
    assert load(text, "x")[0] == yaml.safe_load(text) == {"a": word}
