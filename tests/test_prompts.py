"""Files of prompts for evaluate.py, of each kind, and what is wrong with one."""

import pytest

from core.judging.prompt_sets import read_prompts
from core.runtime.errors import RecipeError


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


FILES = {
    "a.txt": ("one\n\ntwo\n", [user("one"), user("two")]),
    "b.jsonl": ('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n', [user("one"), user("two")]),
    "c.csv": (
        'id,prompt\n1,"one, and\nmore"\n2,007\n3,None\n4,\n',
        [user("one, and\nmore"), user("007"), user("None")],
    ),
    "d.csv": ("id;prompt\n1;one, two\n", [user("one, two")]),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_file(name, tmp_path):
    text, expected = FILES[name]
    (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", b"", "none of .txt"),
        ("a.csv", b"id,Behavior\n1,x\n", "has the columns id, Behavior; .prompt. is none of them"),
        ("a.csv", b"", "No columns to parse"),
        ("a.csv", b"prompt\n\n", "holds no prompt"),
        ("a.txt", b"caf\xe9\n", "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_what_is_no_file_of_prompts(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_prompts(str(tmp_path / name))
