"""Rows into token ids, exactly as the model will see them: chat template, prefix check, counted truncation."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from core.runtime.errors import RecipeError


def load_tokenizer(
    model: ModelConfig, chat_template_path: str | None = None, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, with the recipe's chat template and pad token where it names them.

    Raises:
        RecipeError: no tokenizer there, no pad token, no chat template, or no end-of-text token.
    """
    path = model.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model.model_revision, padding_side="left")
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {path}: its tokenizer cannot be loaded: {' '.join(str(error).split())}") from error
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


def template_digest(tokenizer: PreTrainedTokenizerBase, system_message: str | None) -> str:
    """What the token ids of a conversation depend on: vocabulary, merges, template, system message."""
    parts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), repr(system_message))
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


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


def _tokenize_batch(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    system_message: str | None,
) -> dict[str, list[Any]]:
    prompts = [with_system_message(messages, system_message) for messages in batch["prompt"]]
    prompt_ids = render(tokenizer, prompts, open_turn=True)
    output: dict[str, list[Any]] = {"prompt_ids": prompt_ids}
    for answer in ("chosen", "rejected"):
        turns = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, batch[answer], strict=True)
        ]
        ids, cut = [], []
        for row_id, start, whole in zip(
            batch["row_id"], prompt_ids, render(tokenizer, turns, open_turn=False), strict=True
        ):
            if whole[: len(start)] != start:
                common = next((i for i, (x, y) in enumerate(zip(start, whole, strict=False)) if x != y), len(whole))
                raise RecipeError(
                    f"row {row_id}: the prompt's tokens are not the beginning of the prompt and {answer} answer's: "
                    f"from {tokenizer.decode(start[common:])!r} on they differ, so the model would be trained on "
                    "another context than it meets in use; give a chat template that renders both alike "
                    "(chat_template_path)"
                )
            room = None if max_length is None else max_length - len(start)
            if room is not None and room < 1:
                raise RecipeError(
                    f"row {row_id}: the prompt has {len(start)} tokens and leaves no room for an answer under "
                    f"max_length {max_length}; raise max_length, or set selection.hygiene.min_answer_tokens to 1 or "
                    "more to drop and count such rows"
                )
            tokens = whole[len(start) :]
            ids.append(tokens[:room])
            cut.append(room is not None and len(tokens) > room)
        output[f"{answer}_ids"], output[f"{answer}_cut"] = ids, cut
    return output


def tokenize_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    system_message: str | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """
    Add `prompt_ids`, `chosen_ids` and `rejected_ids` to preference rows.

    An answer is cut where prompt and answer together pass `max_length` tokens, and counted.

    Returns:
        The rows with their token ids, and the counts `rows`, `chosen_cut` and `rejected_cut`.

    Raises:
        RecipeError: a prompt that is no prefix of prompt + answer, or that fills `max_length` alone.
    """
    tokenized = rows.map(
        _tokenize_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "system_message": system_message},
        num_proc=num_proc if len(rows) >= 10_000 else None,
        desc="Tokenising pairs",
    )
    counts = {"rows": len(tokenized)} | {
        f"{answer}_cut": sum(tokenized.data.column(f"{answer}_cut").to_pylist()) for answer in ("chosen", "rejected")
    }
    return tokenized.remove_columns(["chosen_cut", "rejected_cut"]), counts


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
