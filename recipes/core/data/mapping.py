"""
A batch of a source's rows through the recipe's mapping: pairs, the one answer of a pair that is learned, or whole
conversations. Plain functions with explicit arguments, so that a second run finds their result in the cache.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.config.entries import PAIRED
from core.config.schema import Columns
from core.data.columns import FLAGS, TEXT, Batch, join
from core.data.conversations import Conversations, append, contains, equal, flags, split_last, to_lists

# How the facts of `entries.PAIRED` are read, by the key that goes with `responses`.
READERS = {
    "safe": (Batch.safe, pa.bool_()),
    "severity": (Batch.severity, pa.int64()),
    "scores": (Batch.score, pa.float64()),
}


def read_batch(
    table: pa.Table,
    positions: list[int],
    read: Callable[..., dict[str, pa.Array]],
    numbers: np.ndarray,
    columns: Columns,
    kinds: dict[str, str],
    fixed: dict,
) -> pa.Table:
    """A batch through `read`. `numbers` are the rows' numbers in their source, by position. Shape: (rows,)."""
    batch = Batch(table, columns, kinds)
    ids = batch.text(columns.row_id) if columns.row_id else pa.array(numbers[positions]).cast(pa.string())
    batch.note(flags(ids.is_null()), f"`{columns.row_id}` is null")
    ids = pc.binary_join_element_wise(fixed["source"], pc.fill_null(ids, "null"), ":")
    values = read(batch, **fixed)
    return pa.table({**values, "row_id": ids, "fault": pa.array(batch.faults, pa.string())})


def read_pairs(batch: Batch, source: str, role: str, extra: list[str]) -> dict[str, pa.Array]:
    """The columns of `preferences.FEATURES` and the `extra` ones."""
    columns, n = batch.columns, len(batch.table)
    first, second = columns.responses or (columns.chosen, columns.rejected)
    heads, answers = [], []
    for name in (first, second):
        head, answer = _split_answer(batch, name, batch.conversation(name, "assistant"))
        heads.append(head)
        answers.append(answer)
    batch.note(~equal(*heads), f"`{first}` and `{second}` have different prompts")
    values = {"prompt": _prompt(batch, heads[0], first)}

    swap, tie = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    if columns.better is not None:
        swap = batch.choice(columns.better)
    elif columns.preference is not None:
        preference = batch.score(columns.preference).to_numpy(zero_copy_only=False)
        swap, tie = preference > 0, preference == 0
    in_order = [pa.array(~swap), pa.array(swap)]  # whether the first response is chosen, and whether it is rejected
    values |= {key: pc.if_else(mask, *answers) for key, mask in zip(("chosen", "rejected"), in_order, strict=True)}

    for both, chosen, rejected in PAIRED:
        read, type_ = READERS[both]
        names = getattr(columns, both)
        sides = names or [getattr(columns, chosen), getattr(columns, rejected)]
        pair = [read(batch, side) if isinstance(side, str) else pa.array([side] * n, type_) for side in sides]
        if names:
            pair = [pc.if_else(mask, *pair) for mask in in_order]
        values |= {chosen: pair[0], rejected: pair[1]}

    equal_scores = flags(pc.equal(values["score_chosen"], values["score_rejected"]))
    values["tie"] = pa.array(tie | equal_scores)
    values["category"] = _category(batch)
    values |= {key: pa.array([value] * n, pa.string()) for key, value in (("source", source), ("role", role))}
    for name in extra:
        values[name] = batch.score(name) if name in columns.extra else pa.nulls(n, pa.float64())
    return values


def read_answers(batch: Batch, source: str, role: str, extra: list[str], answer: str) -> dict[str, pa.Array]:
    """The prompt and one answer of each pair, as a conversation."""
    pairs = read_pairs(batch, source, role, extra)
    learn = pairs["rejected" if answer == "rejected" else "chosen"]
    if answer == "safer":
        # Positive: the rejected answer is the safer one. Labels come first, severities break their ties.
        by_label = _gap(pairs["rejected_safe"], pairs["chosen_safe"])
        by_severity = _gap(pairs["chosen_severity"], pairs["rejected_severity"])
        batch.note(np.isnan(by_label) & np.isnan(by_severity), "no safety label or severity of both answers")
        swap = np.where(np.nan_to_num(by_label) != 0, by_label, by_severity) > 0
        learn = pc.if_else(pa.array(swap), pairs["rejected"], pairs["chosen"])
    batch.note(flags(pc.equal(pc.utf8_trim_whitespace(learn), "")), "the answer to learn is empty")
    prompts = pairs["prompt"]
    lengths = pc.list_value_length(prompts).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(prompts)
    prompt = Conversations(lengths, pc.struct_field(flat, ["role"]), pc.struct_field(flat, ["content"]))
    return {"messages": to_lists(append(prompt, learn))}


def read_conversations(batch: Batch, source: str) -> dict[str, pa.Array]:
    """Whole conversations."""
    name = batch.columns.conversation
    conversations = batch.conversation(name, "assistant")
    _, answer = _split_answer(batch, name, conversations)
    batch.note(flags(pc.equal(pc.utf8_trim_whitespace(answer), "")), f"`{name}` ends in an empty answer")
    return {"messages": to_lists(conversations)}


def _gap(left: pa.Array, right: pa.Array) -> np.ndarray:
    left, right = (side.cast(pa.int64()).cast(pa.float64()).to_numpy(zero_copy_only=False) for side in (left, right))
    return left - right


def _split_answer(batch: Batch, name: str, conversations: Conversations) -> tuple[Conversations, pa.Array]:
    """What comes before the answer in a column, and the answer: the text of its last message, an assistant's."""
    head, roles, answer = split_last(conversations)
    batch.note(flags(pc.not_equal(roles, "assistant")), f"`{name}` does not end in a message of the assistant")
    return head, answer


def _prompt(batch: Batch, head: Conversations, answer_name: str) -> pa.Array:
    """The prompt that a column names, or what comes before the answer; where both exist they must agree."""
    name = batch.columns.prompt
    has_head = head.lengths > 0
    if name is None:
        batch.note(~has_head, f"`{answer_name}` has no prompt before its answer")
        return to_lists(head)
    prompt = batch.conversation(name, "user")
    if batch.kinds[name] == TEXT and batch.columns.turns is None:
        agree = contains(head, prompt.contents)
    else:
        agree = equal(head, prompt)
    batch.note(has_head & ~agree, f"`{name}` is not the prompt that `{answer_name}` begins with")
    rows = np.arange(len(has_head))
    both = pa.concat_arrays([to_lists(prompt), to_lists(head)])
    return both.take(pa.array(np.where(has_head, rows + len(rows), rows)))


def _category(batch: Batch) -> pa.Array:
    """One text per row: the texts and the names of the true flags, joined by commas."""
    names = batch.columns.category
    names = [names] if isinstance(names, str) else names or []
    flagged = [name for name in names if batch.kinds[name] == FLAGS]
    texts = [batch.text(name) for name in names if name not in flagged]
    texts += [batch.flag_names(flagged)] if flagged else []
    return join(texts) if texts else pa.nulls(len(batch.table), pa.string())
