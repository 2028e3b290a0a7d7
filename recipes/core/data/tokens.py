"""Rows into token ids, exactly as the model will see them: chat template, prefix check, counted truncation."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from core.runtime import loading
from core.runtime.environment import code_digest
from core.runtime.errors import RecipeError

TOKENS = {  # what `tokenize_rows` adds
    "prompt_ids": List(Value("int32")),
    "chosen_ids": List(Value("int32")),
    "rejected_ids": List(Value("int32")),
    "chosen_cut": Value("bool"),
    "rejected_cut": Value("bool"),
    "fault": Value("string"),
}
CODE = code_digest("data/tokens")  # part of the cache's key, so that what other code has made is never read back


def load_tokenizer(
    model: ModelConfig, chat_template_path: str | None = None, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, with the recipe's chat template and pad token where it names them.

    Raises:
        RecipeError: no tokenizer there, no pad token, no chat template, or no end-of-text token.
    """
    path = model.model_name_or_path
    tokenizer = loading.tokenizer(path, model.model_revision)
    if chat_template_path is not None:
        template = Path(chat_template_path)
        if not template.is_file():
            raise RecipeError(f"chat_template_path: {template} is not a file; name a .jinja file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise RecipeError(f"pad_token: the tokenizer of {path} has no token {pad_token!r}; name one that it has")
        tokenizer.pad_token = pad_token
    check_tokenizer(tokenizer, path)
    return tokenizer


def token_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row's prompt, chosen and rejected answer. Shape: (N, 3)."""
    columns = rows.with_format("arrow")
    parts = (pc.list_value_length(columns[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
    return np.stack([part.to_numpy().astype(np.int64) for part in parts], axis=1)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """
    Refuse a tokenizer that cannot pad a batch or write a chat.

    Raises:
        RecipeError: no pad token, no end token or no chat template.
    """
    if tokenizer.pad_token is None:
        raise RecipeError(f"tokenizer of {path} has no pad token; set one, e.g. pad_token: <unk>, in the recipe")
    if tokenizer.eos_token is None:
        raise RecipeError(f"tokenizer of {path} has no end token (eos_token); save one with the tokenizer")
    if not tokenizer.chat_template:
        raise RecipeError(
            f"tokenizer of {path} has no chat template; start from a model that has one, or set chat_template_path"
        )


def with_system_message(messages: list[dict[str, str]], system_message: str | None) -> list[dict[str, str]]:
    """The conversation led by the recipe's system message, unless it has one of its own."""
    if system_message is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system_message}, *messages]


def lead_with(system_message: str | None, conversations: Dataset) -> Dataset:
    """`with_system_message` of each row's `messages`."""
    if system_message is None:
        return conversations
    return conversations.map(
        lambda row, message: {"messages": with_system_message(row["messages"], message)},
        fn_kwargs={"message": system_message},
        desc="System message",
    )


@contextlib.contextmanager
def template_errors() -> Iterator[None]:
    """What a chat template has against its own syntax or a conversation, as a `RecipeError`."""
    try:
        yield
    except TemplateError as error:
        raise RecipeError(
            f"chat template: {error}; give one that takes these conversations (chat_template_path), or leave out what "
            "it refuses, e.g. a system_message"
        ) from error


def render(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], open_turn: bool) -> list[list[int]]:
    """Token ids of each conversation; `open_turn` ends it with the header of the assistant's next turn."""
    # Text first, then one batched call: the same ids as apply_chat_template(tokenize=True), several times sooner.
    with template_errors():
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
            for messages in conversations
        ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def tokenize_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    system_message: str | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """
    Add the columns of `TOKENS` to preference rows: `prompt_ids`, whole; `chosen_ids` and `rejected_ids`, cut where
    prompt and answer together pass `max_length` tokens; `chosen_cut` and `rejected_cut`, whether that was done; and
    `fault`, why a row cannot be trained on (its answers then have no ids), null where it can. A faulty row ends no
    run: hygiene may drop it, and `trainable_rows` refuses it where it does not.
    """
    tokenizer("")  # takes off padding and truncation that were saved with it: the cache is to know one state of it
    settings = {"tokenizer": tokenizer, "max_length": max_length, "system_message": system_message}
    return rows.map(
        _tokenize_batch,
        batched=True,
        features=Features({**rows.features, **TOKENS}),
        fn_kwargs=settings,
        num_proc=num_proc if len(rows) >= 10_000 else None,
        new_fingerprint=Hasher.hash([rows._fingerprint, CODE, settings]),
        desc="Tokenising pairs",
    )


def _tokenize_batch(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    system_message: str | None,
) -> dict[str, list[Any]]:
    prompts = [with_system_message(messages, system_message) for messages in batch["prompt"]]
    prompt_ids, faults = _render_each(tokenizer, prompts, open_turn=True)
    output = {"prompt_ids": prompt_ids, "fault": faults}
    for answer in ("chosen", "rejected"):
        turns = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, batch[answer], strict=True)
        ]
        whole_ids, refusals = _render_each(tokenizer, turns, open_turn=False)
        ids, cut = [], []
        for row, (row_id, start, whole) in enumerate(zip(batch["row_id"], prompt_ids, whole_ids, strict=True)):
            room = None if max_length is None else max_length - len(start)
            faults[row] = faults[row] or refusals[row] or _fault(row_id, answer, start, whole, room, tokenizer)
            tokens = [] if faults[row] else whole[len(start) :]
            ids.append(tokens[:room])
            cut.append(len(ids[-1]) < len(tokens))
        output[f"{answer}_ids"], output[f"{answer}_cut"] = ids, cut
    for row in (row for row, fault in enumerate(faults) if fault):
        output["chosen_ids"][row], output["chosen_cut"][row] = [], False  # where the rejected answer has the fault
    return output


def _render_each(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], open_turn: bool
) -> tuple[list[list[int]], list[str | None]]:
    """`render`, and beside the ids why the template refuses a conversation, which then has none."""
    try:
        return render(tokenizer, conversations, open_turn), [None] * len(conversations)
    except RecipeError as error:
        if len(conversations) == 1:
            return [[]], [str(error)]
    each = [_render_each(tokenizer, [messages], open_turn) for messages in conversations]
    return [ids for (ids,), _ in each], [fault for _, (fault,) in each]


def _fault(
    row_id: str, answer: str, start: list[int], whole: list[int], room: int | None, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Why a prompt of the ids `start` and an answer do not go together; `whole` are the ids of both."""
    if whole[: len(start)] != start:
        common = next((i for i, (x, y) in enumerate(zip(start, whole, strict=False)) if x != y), len(whole))
        return (
            f"row {row_id}: the prompt's tokens are not the beginning of the prompt and {answer} answer's: "
            f"from {tokenizer.decode(start[common:])!r} on they differ, so the model would be trained on "
            "another context than it meets in use; give a chat template that renders both alike "
            "(chat_template_path)"
        )
    if room is not None and room < 1:
        return (
            f"row {row_id}: the prompt has {len(start)} tokens and leaves no room for an answer under "
            f"max_length {len(start) + room}; raise max_length, or set selection.hygiene.min_answer_tokens to 1 or "
            "more to drop and count such rows"
        )
    return None


def refuse_faults(rows: Dataset) -> None:
    """
    Raises:
        RecipeError: a row could not be tokenised (`tokenize_rows`); the first says why.
    """
    faults = rows.with_format("arrow")["fault"].drop_null()
    if len(faults):
        raise RecipeError(faults[0].as_py(), everywhere=True)


def trainable_rows(rows: Dataset) -> tuple[Dataset, dict[str, int]]:
    """
    Tokenised rows without what is only said about them, and the counts `rows`, `chosen_cut` and `rejected_cut`.

    Raises:
        RecipeError: see `refuse_faults`.
    """
    refuse_faults(rows)
    cut = ["chosen_cut", "rejected_cut"]
    columns = rows.with_format("arrow")
    counts = {"rows": len(rows)} | {name: pc.sum(columns[name]).as_py() or 0 for name in cut}
    return rows.remove_columns([*cut, "fault"]), counts


def ids_digest(rows: Dataset, columns: list[str]) -> str:
    """A digest of the token ids of some columns, row by row in their order: what ranks compare."""
    digest = xxhash.xxh3_128()
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=4096):
        for name in columns:
            ids = table[name].combine_chunks()
            for part in (ids.value_lengths(), ids.flatten()):
                digest.update(part.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def end_token_notice(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> str | None:
    """A warning where the template ends an answer with no end-of-text token, or with several; else None."""
    for row in rows:
        if max_length is None or len(row["prompt_ids"]) + len(row["chosen_ids"]) < max_length:
            break
    else:
        return None  # every answer fills the length: none can show its end
    found = row["chosen_ids"].count(tokenizer.eos_token_id)
    if found == 1:
        return None
    what = "without" if found == 0 else f"with {found} times"
    return (
        f"the chat template ends an answer {what} the end-of-text token {tokenizer.eos_token!r}: generation may not "
        "stop where training did"
    )
