"""Sets of prompts to answer, from files as their authors publish them."""

import io
import json
from pathlib import Path

import pandas as pd

from core.judging.verdicts import Conversation
from core.runtime.errors import RecipeError


def read_prompts(path: str, column: str = "prompt", where: dict[str, str] | None = None) -> list[Conversation]:
    """
    Conversations to answer: a .txt file with a prompt per line, a .csv file, or a .jsonl file whose lines have the
    column (a string) or `messages`.

    Args:
        where: column → the value that the rows to read have there, as text; not of a .txt file.

    Raises:
        RecipeError: the file, or one of its lines, is not that; it names the line.
    """
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl", ".csv"):
        raise RecipeError(f"prompts: {path} is none of .txt (a prompt per line), .jsonl and .csv (a column `prompt`)")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"prompts: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"prompts: {path} is not UTF-8 text; save it as UTF-8") from error
    prompts = []
    lines = text.splitlines()
    if file.suffix == ".csv":
        lines, prompts = [], _prompts_of_csv(text, path, column, where or {})
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix == ".txt":
            prompts.append([{"role": "user", "content": line}])
            continue
        try:
            row = json.loads(line)
            conversation = _conversation(row, column)
            if all(str(row[key]) == value for key, value in (where or {}).items()):
                prompts.append(conversation)
        except (ValueError, KeyError, TypeError) as error:  # JSONDecodeError is a ValueError
            wants = f'"{column}" (text) or "messages" (a list of objects with "role" and "content")'
            raise RecipeError(
                f"prompts: {path}, line {number}: not an object with {' and '.join([wants, *(where or {})])} ({error})"
            ) from error
    if not prompts:
        chosen = "".join(f" with {key} {value!r}" for key, value in (where or {}).items())
        raise RecipeError(f"prompts: {path} holds no prompt{chosen}")
    return prompts


def _prompts_of_csv(text: str, path: str, column: str, where: dict[str, str]) -> list[Conversation]:
    mark = max(",;\t|", key=text.partition("\n")[0].count)
    try:
        # As text, each field: a prompt of digits, or one that reads "None", is a prompt.
        rows = pd.read_csv(io.StringIO(text), sep=mark, dtype=str, keep_default_na=False, index_col=False)
    except ValueError as error:
        raise RecipeError(f"prompts: {path}: {' '.join(str(error).split())}") from error
    for name in (column, *where):
        if name not in rows:
            raise RecipeError(f"prompts: {path} has the columns {', '.join(rows)}; {name!r} is none of them")
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return [[{"role": "user", "content": prompt}] for prompt in rows[column] if prompt.strip()]


def _conversation(row: dict, column: str) -> Conversation:
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row[column]}]
    for message in messages:
        if not (isinstance(message["role"], str) and isinstance(message["content"], str)):
            raise TypeError("a role or content is no text")
    return messages
