"""
A source's rows through the recipe's mapping, one plain dict after another: preference pairs, the one answer of a pair
that is learned, or whole conversations.
"""

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features

from core.config.entries import PAIRED
from core.config.schema import TIE, Columns, Turns
from core.data.columns import MESSAGES, TEXT, BadRow, Found, Row, is_empty

ROLES = ("system", "user", "assistant")
# What templates and trainers read of a message beside its role and text.
SEEN_BESIDE = (
    "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "tool_call_id", "image", "images",
    "audio", "video",
)  # fmt: skip

Message = dict[str, str]  # {role, content}


def map_batch(
    batch: dict[str, list],
    positions: list[int],
    read: Callable[..., dict],
    numbers: np.ndarray,
    columns: Columns,
    found: dict[str, Found],
    constants: dict[str, str],
    features: Features,
    others: Dataset | None = None,
) -> pa.Table:
    """
    Rows through `read`, with their `row_id`; of a bad one nothing but that and its `fault`.

    Args:
        batch: values by column.
        positions: of the rows among those that are mapped.
        read: one of the functions below.
        numbers: the rows' numbers in their source, by position. Shape: (rows,).
        found: the columns that the mapping names, by the name.
        constants: what is the same in all rows: `source` and `role`.
        features: of the rows that come out.
        others: the rows of the rejected answers, by position, where each answer has a row.
    """
    source, mapped = constants["source"], []
    rows = [Row(values, columns, found) for values in _by_row(batch)]
    if others is not None:
        for row, values in zip(rows, _by_row(others[positions]), strict=True):
            row.other = Row(values, columns, found)
    for number, row in zip(numbers[positions].tolist(), rows, strict=True):
        values = {"row_id": f"{source}:null"}
        try:
            values["row_id"] = f"{source}:{row.row_id(number)}"
            values |= read(row) | constants
        except BadRow as bad:
            values["fault"] = str(bad)
        mapped.append(values)
    return pa.Table.from_pylist(mapped, schema=features.arrow_schema)


def _by_row(batch: dict[str, list]) -> list[dict]:
    return [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]


# How the facts of `entries.PAIRED` are read, by the key that goes with `responses`.
READERS = {
    "safe": lambda row, name: row.code(name, "safe"),
    "severity": lambda row, name: row.code(name, "severity"),
    "scores": Row.score,
}


def read_pair(row: Row) -> dict:
    """The columns of `preferences.FEATURES` that differ from row to row, and the `extra` ones."""
    columns = row.columns
    first, second = columns.responses or (columns.chosen, columns.rejected)
    (head, first_answer), (other_head, second_answer) = _split_answer(row, first), _split_answer(row.other, second)
    if head != other_head:
        raise BadRow(f"`{first}` and `{second}` have different prompts")
    prompt = _led_by_system(row, _prompt(row, head, first))

    swap = tie = False
    if columns.better is not None:
        choice = row.choice(columns.better)
        swap, tie = choice == 1, choice == TIE
    elif columns.preference is not None:
        preference = row.score(columns.preference)
        swap, tie = preference > 0, preference == 0

    chosen, rejected = _in_order([first_answer, second_answer], swap)
    values = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for both, *keys in PAIRED:
        names = getattr(columns, both)
        sides = names or [getattr(columns, key) for key in keys]
        pair = [
            READERS[both](row_of, side) if isinstance(side, str) else side
            for row_of, side in zip((row, row.other), sides, strict=True)
        ]
        values |= zip(keys, _in_order(pair, swap) if names else pair, strict=True)
    if columns.better is None and columns.preference is None:  # else these put the answers in order, not their scores
        tie = values["score_chosen"] is not None and values["score_chosen"] == values["score_rejected"]
    values["tie"] = tie
    values["category"] = row.category()
    return values | {name: row.score(name) for name in columns.extra}


def _in_order(pair: list, swap: bool) -> list:
    return pair[::-1] if swap else pair


def read_answer(row: Row, answer: str) -> dict:
    """The prompt and one answer of a pair, as the conversation `messages`."""
    pair = read_pair(row)
    rejected = answer == "rejected" or (answer == "safer" and _rejected_is_safer(pair))
    text = pair["rejected" if rejected else "chosen"]
    if not text.strip():
        raise BadRow("the answer to learn is empty")
    return {"messages": [*pair["prompt"], {"role": "assistant", "content": text}]}


def _rejected_is_safer(pair: dict) -> bool:
    """Labels come first, severities break their ties; equal in both, the chosen answer stays."""
    labels = pair["chosen_safe"], pair["rejected_safe"]
    severities = pair["chosen_severity"], pair["rejected_severity"]
    if None in labels and None in severities:
        raise BadRow("no safety label or severity of both answers")
    if None not in labels and labels[0] != labels[1]:
        return labels[1]
    return None not in severities and severities[1] < severities[0]


def read_conversation(row: Row) -> dict:
    """A whole conversation, as `messages`."""
    name = row.columns.conversation
    head, answer = _split_answer(row, name)
    if not answer.strip():
        raise BadRow(f"`{name}` ends in an empty answer")
    return {"messages": [*_led_by_system(row, head), {"role": "assistant", "content": answer}]}


def _conversation(row: Row, name: str, role: str) -> list[Message]:
    """A column of text (one message of `role`, or a transcript), of messages or of lists of messages."""
    value, kind, turns = row.value(name), row.found[name].kind, row.columns.turns
    if value is None:
        raise BadRow(f"`{name}` is null")
    if kind == TEXT and (not turns or name == row.columns.response):
        return [{"role": role, "content": value}]
    if kind == TEXT:
        preamble, messages = _cut_transcript(value, turns)
        if preamble:
            raise BadRow(f"`{name}` does not begin with a marker of columns.turns")
    else:
        messages = [_message(message, row.columns, name) for message in (value if kind == MESSAGES else [value])]
    if not messages:
        raise BadRow(f"`{name}` holds no message")
    for message in messages:
        if message["role"] not in ROLES:
            raise BadRow(
                f"`{name}` has a message of the role {message['role']!r}, none of {', '.join(ROLES)} (map it with "
                "columns.messages.roles)"
            )
    return messages


def _message(message: object, columns: Columns, name: str) -> Message:
    """
    A message under our names, with the source's role turned into ours. What a template would read beside that is a
    fault; what else it holds, such as an id, is left out.
    """
    spec, fields = columns.messages, message if isinstance(message, dict) else {}
    for field in SEEN_BESIDE:
        if field != spec.content:
            _refuse_beside(field, fields.get(field), columns, f"`{name}` has a message with `{field}`")
    role = fields.get(spec.role)
    return {"role": spec.roles.get(str(role), role), "content": _text(fields.get(spec.content), columns, name)}


def _refuse_beside(field: str, value: object, columns: Columns, what: str) -> None:
    if field not in columns.leave_out and not is_empty(value):
        raise BadRow(f"{what}, and only text is read (leave it out on purpose with columns.leave_out: [{field}])")


def _text(content: object, columns: Columns, name: str) -> str:
    """The text of a message, which may come as parts: [{type: text, text: …}], a list of texts, or {text: …}."""
    parts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict):
            kind = part.get("type")
            if kind in columns.leave_out:
                continue
            if kind not in (None, "text"):
                raise BadRow(
                    f"`{name}` has a message with a part of the type {kind!r}, and only text is read (leave it out on "
                    f"purpose with columns.leave_out: [{kind}])"
                )
            for field in part.keys() - {"type", "text"}:
                _refuse_beside(field, part[field], columns, f"`{name}` has a part of a message with `{field}`")
            part = part.get("text")
        if not isinstance(part, str):
            raise BadRow(f"`{name}` has a message without text")
        parts.append(part)
    if not parts:
        raise BadRow(f"`{name}` has a message without text")
    return "".join(parts)


def _split_answer(row: Row, name: str) -> tuple[list[Message], str]:
    """What comes before the answer in a column, and the answer: the text of its last message, an assistant's."""
    *head, last = _conversation(row, name, "assistant")
    if last["role"] != "assistant":
        raise BadRow(f"`{name}` does not end in a message of the assistant")
    return head, last["content"]


def _prompt(row: Row, head: list[Message], answer_name: str) -> list[Message]:
    """The prompt that a column names, or what comes before the answer; where both exist they must agree."""
    name = row.columns.prompt
    if name is None:
        if not head:
            raise BadRow(f"`{answer_name}` has no prompt before its answer")
        return head
    if isinstance(name, list):
        texts = [row.value(part) or "" for part in name]
        return [{"role": "user", "content": "\n".join(filter(None, texts))}]
    prompt = _conversation(row, name, "user")
    if row.columns.turns and prompt[-1] == {"role": "assistant", "content": ""}:
        prompt.pop()  # the marker that asks for the answer
    if row.found[name].kind == TEXT and not row.columns.turns:
        agree = prompt[0]["content"] in [message["content"] for message in head]
    else:
        agree = prompt == head
    if head and not agree:
        raise BadRow(f"`{name}` is not the prompt that `{answer_name}` begins with")
    return head or prompt


def _led_by_system(row: Row, prompt: list[Message]) -> list[Message]:
    """The prompt behind the text of `columns.system`, where that is not empty."""
    name = row.columns.system
    text = None if name is None else row.value(name)
    if not (text or "").strip():
        return prompt
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"] == text:
            return prompt
        raise BadRow(f"`{name}` is not the system message that the prompt begins with")
    return [{"role": "system", "content": text}, *prompt]


def _cut_transcript(text: str, turns: Turns) -> tuple[str, list[Message]]:
    """
    A plain-text transcript, cut at its markers. White space around a turn belongs to the markers, not to the turn.

    Returns:
        What stands before the first marker, and the messages.
    """
    pattern, roles = _markers(turns.user, turns.assistant, turns.system)
    before, *parts = pattern.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return before.strip(), [{"role": roles[marker], "content": turn.strip()} for marker, turn in pairs]


@cache
def _markers(user: str, assistant: str, system: str | None) -> tuple[re.Pattern, dict[str, str]]:
    """A pattern of the markers, and the role of each."""
    markers = {user: "user", assistant: "assistant"} | ({} if system is None else {system: "system"})
    # An empty turn may have lost the space that ends its marker: match without it.
    roles = {marker.rstrip(): role for marker, role in markers.items()}
    longest_first = sorted(roles, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")"), roles
