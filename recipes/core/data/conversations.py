"""Conversations of a batch as flat Arrow columns: read, split and compared without a Python object per message."""

import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.config.schema import Messages, Turns

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Conversations(NamedTuple):
    """N conversations of M messages in all, laid end to end."""

    lengths: np.ndarray  # messages of each conversation; 0 where it is null. Shape: (N,).
    roles: pa.Array  # Shape: (M,).
    contents: pa.Array  # Shape: (M,).

    @property
    def ends(self) -> np.ndarray:
        """One past the last message of each conversation. Shape: (N,)."""
        return np.cumsum(self.lengths)


def from_texts(texts: pa.Array, role: str) -> Conversations:
    """Each text as the one message of a conversation."""
    n = len(texts)
    return Conversations(np.ones(n, dtype=np.int64), pa.array([role] * n, pa.string()), texts.cast(pa.string()))


def from_messages(array: pa.Array, spec: Messages) -> Conversations:
    """A column of messages (structs) or of lists of messages, with the source's role names turned into ours."""
    if pa.types.is_struct(array.type):
        lengths, flat = np.ones(len(array), dtype=np.int64), array
    else:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = pc.list_flatten(array)
    roles = pc.struct_field(flat, [spec.role]).cast(pa.string())
    if spec.roles:
        encoded = roles.dictionary_encode()
        names = pa.array([spec.roles.get(name, name) for name in encoded.dictionary.to_pylist()], pa.string())
        roles = names.take(encoded.indices)
    return Conversations(lengths, roles, pc.struct_field(flat, [spec.content]).cast(pa.string()))


def from_transcripts(array: pa.Array, turns: Turns) -> tuple[Conversations, np.ndarray]:
    """
    Plain-text transcripts, cut at their markers. White space around a turn belongs to the markers, not to the turn.

    Returns:
        The conversations, and whether text stands before the first marker. Shape: (N,).
    """
    markers = {turns.user: "user", turns.assistant: "assistant"}
    if turns.system is not None:
        markers[turns.system] = "system"
    # An empty turn may have lost the space that ends its marker: match without it.
    roles_of = {marker.rstrip(): role for marker, role in markers.items()}
    pattern = re.compile("(" + "|".join(re.escape(marker) for marker in sorted(roles_of, key=len, reverse=True)) + ")")
    lengths, roles, contents, preamble = [], [], [], []
    for text in array.to_pylist():
        before, *parts = pattern.split(text or "")
        preamble.append(bool(before.strip()))
        lengths.append(len(parts) // 2)
        roles += [roles_of[marker] for marker in parts[::2]]
        contents += [turn.strip() for turn in parts[1::2]]
    flat = Conversations(
        np.array(lengths, dtype=np.int64), pa.array(roles, pa.string()), pa.array(contents, pa.string())
    )
    return flat, np.array(preamble, dtype=bool)


def split_last(conversations: Conversations) -> tuple[Conversations, pa.Array, pa.Array]:
    """The conversations without their last message, and its role and text, null where there is none."""
    lengths = conversations.lengths
    last = conversations.ends - 1
    index = pa.array(last, mask=lengths == 0)
    keep = np.ones(len(conversations.roles), dtype=bool)
    keep[last[lengths > 0]] = False
    head = Conversations(
        np.maximum(lengths - 1, 0),
        conversations.roles.filter(pa.array(keep)),
        conversations.contents.filter(pa.array(keep)),
    )
    return head, conversations.roles.take(index), conversations.contents.take(index)


def any_message(lengths: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Whether any message of each conversation has its flag set. Shapes: (N,), (M,) → (N,)."""
    ends = np.cumsum(lengths)
    total = np.concatenate([[0], np.cumsum(flags)])
    return total[ends] > total[ends - lengths]


def equal(left: Conversations, right: Conversations) -> np.ndarray:
    """Whether two conversations hold the same messages; a null text equals no other. Shape: (N,)."""
    same_length = left.lengths == right.lengths
    differs = ~same_length
    # Among the pairs of one length the messages of both sides lie in step.
    left_flat, right_flat = (
        [column.filter(pa.array(np.repeat(same_length, side.lengths))) for column in (side.roles, side.contents)]
        for side in (left, right)
    )
    unequal = np.zeros(len(left_flat[0]), dtype=bool)
    for ours, theirs in zip(left_flat, right_flat, strict=True):
        unequal |= ~flags(pc.equal(ours, theirs))
    differs[same_length] = any_message(left.lengths[same_length], unequal)
    return ~differs


def contains(conversations: Conversations, texts: pa.Array) -> np.ndarray:
    """Whether some message of each conversation is exactly the text. Shape: (N,)."""
    wanted = texts.take(pa.array(np.repeat(np.arange(len(texts)), conversations.lengths)))
    return any_message(conversations.lengths, flags(pc.equal(conversations.contents, wanted)))


def append(conversations: Conversations, answers: pa.Array) -> Conversations:
    """The conversations with an answer of the assistant at the end of each."""
    n, messages = len(answers), len(conversations.roles)
    order = pa.array(np.insert(np.arange(messages), conversations.ends, messages + np.arange(n)))
    roles = pa.concat_arrays([conversations.roles, pa.array(["assistant"] * n, pa.string())])
    contents = pa.concat_arrays([conversations.contents, answers])
    return Conversations(conversations.lengths + 1, roles.take(order), contents.take(order))


def to_lists(conversations: Conversations) -> pa.Array:
    """A column of lists of {role, content}."""
    messages = pa.StructArray.from_arrays(
        [conversations.roles, conversations.contents], fields=list(MESSAGES.value_type)
    )
    offsets = np.concatenate([[0], conversations.ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), messages)


def flags(array: pa.Array) -> np.ndarray:
    """An Arrow column of booleans as numpy's, null as False."""
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False).astype(bool)
