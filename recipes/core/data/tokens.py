"""Rows into token ids, exactly as the model will see them: chat template, prefix check, counted truncation."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from core.config.schema import PreferenceRecipe, SFTRecipe
from core.data.chat_template import Endless, end_of_turn, prepare_template, render_texts
from core.runtime import loading
from core.runtime.environment import code_digest
from core.runtime.errors import RecipeError

TOKENS = {  # what `tokenize_rows` adds
    "prompt_ids": List(Value("int32")),
    "chosen_ids": List(Value("int32")),
    "rejected_ids": List(Value("int32")),
    "chosen_cut": Value("int32"),  # tokens
    "rejected_cut": Value("int32"),
    "fault": Value("string"),
}
CODE = code_digest(
    "data/tokens", "data/chat_template"
)  # part of the cache's key, so that what other code has made is never read back


def load_tokenizer(model: ModelConfig, recipe: PreferenceRecipe | SFTRecipe) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, with the recipe's chat template and pad token where it names them, and the template
    prepared (`chat_template.prepare_template`).

    Raises:
        RecipeError: no tokenizer there, no pad token, no chat template, or no end-of-text token.
    """
    path = model.model_name_or_path
    tokenizer = loading.tokenizer(path, model.model_revision)
    if recipe.chat_template_path is not None:
        template = Path(recipe.chat_template_path)
        if not template.is_file():
            raise RecipeError(f"chat_template_path: {template} is not a file; name a .jinja file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    elif isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise RecipeError(
                f"pad_token: the tokenizer of {path} has no token {recipe.pad_token!r}; name one that it has"
            )
        tokenizer.pad_token = recipe.pad_token
    check_tokenizer(tokenizer, path)
    prepare_template(tokenizer, recipe.chat_template_kwargs, path)
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


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that a chat template made: it has put all special tokens itself."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def render(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], open_turn: bool) -> list[list[int]]:
    """Token ids of each conversation; `open_turn` ends it with the header of the assistant's next turn."""
    # Text first, then one batched call: the same ids as apply_chat_template(tokenize=True), several times sooner.
    return encode(tokenizer, render_texts(tokenizer, conversations, open_turn))


def tokenize_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    system_message: str | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """
    Add the columns of `TOKENS` to preference rows: `prompt_ids`, whole; `chosen_ids` and `rejected_ids`, cut where
    prompt and answer together pass `max_length` tokens; `chosen_cut` and `rejected_cut`, the tokens that this took;
    and `fault`, why a row cannot be trained on (its answers then have no ids), null where it can. A faulty row ends no
    run: the rules of the hygiene judge it.
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
    starts, faults = _render_each(tokenizer, prompts, open_turn=True)
    prompt_ids = encode(tokenizer, starts)
    for row, (row_id, prompt) in enumerate(zip(batch["row_id"], prompts, strict=True)):
        if prompt and prompt[-1]["role"] == "assistant":
            faults[row] = faults[row] or (
                f"row {row_id}: the prompt ends in a turn of the assistant, so that the answer would be its second in "
                "a row; put that text before both answers, or take it out of the prompt"
            )
    output = {"prompt_ids": prompt_ids, "fault": faults}
    for answer in ("chosen", "rejected"):
        turns = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, batch[answer], strict=True)
        ]
        texts, refusals = _render_each(tokenizer, turns, open_turn=False)
        ids, cut = [], []
        for row, (text, whole) in enumerate(zip(texts, encode(tokenizer, texts), strict=True)):
            start = prompt_ids[row]
            if not refusals[row]:
                whole = _as_generated(starts[row], start, text, whole, tokenizer)
            room = None if max_length is None else max_length - len(start)
            faults[row] = (
                faults[row] or refusals[row] or _fault(batch["row_id"][row], answer, start, whole, room, tokenizer)
            )
            tokens = [] if faults[row] else whole[len(start) :]
            ids.append(tokens[:room])
            cut.append(len(tokens) - len(ids[-1]))
        output[f"{answer}_ids"], output[f"{answer}_cut"] = ids, cut
    for row in (row for row, fault in enumerate(faults) if fault):
        output["chosen_ids"][row], output["chosen_cut"][row] = [], 0  # where the rejected answer has the fault
    return output


def _render_each(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], open_turn: bool
) -> tuple[list[str], list[str | None]]:
    """`render_texts`, and beside the texts why the template refuses a conversation, which then has none."""
    try:
        return render_texts(tokenizer, conversations, open_turn), [None] * len(conversations)
    except Endless:
        raise
    except RecipeError as error:
        if len(conversations) == 1:
            return [""], [str(error)]
    each = [_render_each(tokenizer, [messages], open_turn) for messages in conversations]
    return [text for (text,), _ in each], [fault for _, (fault,) in each]


def _as_generated(
    start_text: str, start: list[int], text: str, whole: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """
    The ids of prompt and answer as generation would meet them. Where the tokenizer joins the prompt's last letters and
    the answer's first ones in one token (two line breaks), the prompt keeps its own ids and the answer has the rest.
    """
    if whole[: len(start)] == start or not text.startswith(start_text):
        return whole
    parted = start + encode(tokenizer, [text[len(start_text) :]])[0]
    return parted if tokenizer.decode(parted) == tokenizer.decode(whole) else whole


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
    if len(whole) == len(start):
        return f"row {row_id}: the chat template leaves nothing of the {answer} answer; give another"
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
    counts = {"rows": len(rows)} | {name: pc.sum(pc.greater(columns[name], 0)).as_py() or 0 for name in cut}
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


def token_notices(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Warnings about how the template ends an answer, and about special tokens in the answers of tokenised rows."""
    special = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    special = np.array(sorted(special | set(tokenizer.all_special_ids)))
    notices, ending = [], end_of_turn(tokenizer)
    ends = ending.count(tokenizer.eos_token_id)
    # A template may end a turn with a token of its own (Gemma's <end_of_turn>), which generation knows as well.
    if ending and (ends > 1 or not np.isin(ending, special).any()):
        what = f"with {ends} times" if ends else "without"
        notices.append(
            f"the chat template ends an answer {what} the end-of-text token {tokenizer.eos_token!r}: generation may "
            "not stop where training did"
        )
    own, found = np.isin(ending, special).sum(), {"chosen": [], "rejected": []}
    names = ["row_id", *(f"{answer}_{what}" for answer in found for what in ("ids", "cut"))]
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=4096) if ending else ():
        for answer, named in found.items():
            ids = table[f"{answer}_ids"].combine_chunks()
            stops = np.cumsum(np.concatenate([[0], ids.value_lengths().to_numpy()]))
            counts = np.diff(np.cumsum(np.concatenate([[0], np.isin(ids.flatten().to_numpy(), special)]))[stops])
            whole = table[f"{answer}_cut"].to_numpy() == 0  # a cut answer has lost the template's own
            named += table["row_id"].filter(counts > np.where(whole, own, 0)).to_pylist()
    notices += [
        f"{len(named):,} {answer} answers have special tokens of the tokenizer in their own text, e.g. row {named[0]}"
        ": the model reads them as real ones, an end of text too"
        for answer, named in found.items()
        if named
    ]
    return notices
