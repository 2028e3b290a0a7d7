"""A source's columns by name: checked before any row is read, then read in batches that note bad rows."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.config.schema import Columns, Messages
from core.data.conversations import Conversations, any_message, flags, from_messages, from_texts, from_transcripts
from core.runtime.errors import RecipeError
from core.runtime.text import did_you_mean

ROLES = ("system", "user", "assistant")
TEXT, MESSAGE, MESSAGES = "text", "a message", "a list of messages"
NUMBER, BOOLEAN, FLAGS, NULL = "a number", "a boolean", "a struct of booleans", "nothing but null"
SPOKEN = (TEXT, MESSAGE, MESSAGES)
# What the column may hold that a key of `columns` names.
ALLOWED = {
    "prompt": SPOKEN,
    "chosen": SPOKEN,
    "rejected": SPOKEN,
    "responses": SPOKEN,
    "conversation": (MESSAGES, TEXT),
    "better": (NUMBER, BOOLEAN),
    "preference": (NUMBER,),
    "safer": (NUMBER, BOOLEAN),
    "chosen_safe": (BOOLEAN, NUMBER),
    "rejected_safe": (BOOLEAN, NUMBER),
    "safe": (BOOLEAN, NUMBER),
    "chosen_severity": (NUMBER,),
    "rejected_severity": (NUMBER,),
    "severity": (NUMBER,),
    "score_chosen": (NUMBER,),
    "score_rejected": (NUMBER,),
    "scores": (NUMBER,),
    "category": (TEXT, FLAGS),
    "row_id": (TEXT, NUMBER),
    "extra": (NUMBER,),
}


def named(columns: Columns) -> list[tuple[str, str]]:
    """The keys of a mapping, each with a column that it names; constants name none."""
    pairs = []
    for key in ALLOWED:
        value = getattr(columns, key)
        pairs += [(key, name) for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
    return pairs


def check_columns(rows: pa.Table, columns: Columns, where: str) -> dict[str, str]:
    """
    What each column that a mapping names holds, by the column's name.

    Raises:
        RecipeError: a column that isn't there, or that holds what its key has no use for.
    """
    if columns.turns:
        markers = [marker.strip() for marker in vars(columns.turns).values() if marker is not None]
        if "" in markers or len(set(markers)) < len(markers):
            raise RecipeError(f"{where}: columns.turns needs a marker of its own for each role, more than white space")
    kinds = {}
    for key, name in named(columns):
        path = find(name, rows.schema)
        if path is None:
            names = _paths(rows.schema)
            raise RecipeError(
                f"{where}: columns.{key} names {name!r}, which is none of the columns {', '.join(rows.column_names)}"
                + (did_you_mean(name, names) or "; name one of these")
            )
        kind = _kind(rows, path, columns.messages)
        wanted = (TEXT,) if columns.turns and TEXT in ALLOWED[key] and MESSAGES in ALLOWED[key] else ALLOWED[key]
        if kind not in (*wanted, NULL):
            raise RecipeError(
                f"{where}: columns.{key} names {name!r}, which holds {kind}, not {' or '.join(wanted)}"
                + (" as columns.turns asks" if wanted != ALLOWED[key] else "")
            )
        kinds[name] = kind
    return kinds


def find(name: str, schema: pa.Schema) -> list[str] | None:
    """The path of a column: its name, or the names on the way into a struct. None where there is no such column."""
    if name in schema.names:
        return [name]
    path = name.split(".")
    fields = schema
    for step in path:
        if step not in (fields.names if isinstance(fields, (pa.Schema, pa.StructType)) else []):
            return None
        fields = fields.field(step).type
    return path


def _paths(schema: pa.Schema) -> list[str]:
    """Every name that a mapping could use, those inside structs with dots."""
    paths = list(schema.names)
    for field in schema:
        if pa.types.is_struct(field.type):
            paths += [f"{field.name}.{name}" for name in field.type.names]
    return paths


def _column(table: pa.Table, path: list[str]) -> pa.Array:
    """One column of a table, without its chunks."""
    column = table.column(path[0]).combine_chunks()
    return pc.struct_field(column, path[1:]) if path[1:] else column


def _kind(rows: pa.Table, path: list[str], messages: Messages) -> str:
    type_ = rows.schema.field(path[0]).type
    for step in path[1:]:
        type_ = type_.field(step).type
    if _is_json(type_):  # a JSON file whose rows differ in this column: its first value says what it should hold
        for chunk in rows.select(path[:1]).to_batches(max_chunksize=1000):
            for value in _decoded(_column(pa.Table.from_batches([chunk]), path)):
                if value is not None:
                    return _json_kind(value)
        return NULL
    if pa.types.is_struct(type_):
        if {messages.role, messages.content} <= set(type_.names):
            return MESSAGE
        if all(pa.types.is_boolean(field.type) for field in type_):
            return FLAGS
        return f"a struct of {', '.join(type_.names)} (columns.messages says how messages are written)"
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        if pa.types.is_struct(type_.value_type) and not {messages.role, messages.content} <= set(
            type_.value_type.names
        ):
            names = ", ".join(type_.value_type.names)
            return f"a list of structs of {names} (columns.messages says how messages are written)"
        return MESSAGES if pa.types.is_struct(type_.value_type) else f"a list of {type_.value_type}"
    if pa.types.is_null(type_):
        return NULL
    if pa.types.is_boolean(type_):
        return BOOLEAN
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return NUMBER
    return TEXT if pa.types.is_string(type_) or pa.types.is_large_string(type_) else str(type_)


def join(texts: list[pa.Array]) -> pa.Array:
    """The texts of each row that aren't null, with commas between them; null where all are."""
    joined = texts[0]
    for text in texts[1:]:
        # Arrow's own way to skip nulls leaves out the rows in which all are null.
        joined = pc.coalesce(pc.binary_join_element_wise(joined, text, ", "), joined, text)
    return joined


class Batch:
    """
    A batch of a source's rows, read column by column.

    Attributes:
        faults: what is wrong with each row, None where nothing is; the first fault noted stays. Shape: (N,).
    """

    def __init__(self, table: pa.Table, columns: Columns, kinds: dict[str, str]) -> None:
        self.table, self.columns, self.kinds = table, columns, kinds
        self.faults = np.full(len(table), None, dtype=object)

    def note(self, mask: np.ndarray, fault: str) -> None:
        """Note a fault of the rows under the mask. Shape: (N,)."""
        if mask.any():
            self.faults[mask & np.equal(self.faults, None)] = fault

    def conversation(self, name: str, role: str) -> Conversations:
        """A column of text (one message of `role`, or a transcript), of messages or of lists of messages."""
        column = self._read(name)
        self.note(flags(column.is_null()), f"`{name}` is null")
        if self.kinds[name] == NULL:
            return Conversations(
                np.zeros(len(column), dtype=np.int64), pa.array([], pa.string()), pa.array([], pa.string())
            )
        if self.kinds[name] != TEXT:
            conversations = from_messages(column, self.columns.messages)
        elif self.columns.turns:
            conversations, preamble = from_transcripts(column, self.columns.turns)
            self.note(preamble, f"`{name}` does not begin with a marker of columns.turns")
        else:
            return from_texts(column, role)
        lengths, roles, contents = conversations
        self.note(lengths == 0, f"`{name}` holds no message")
        if not pc.all(pc.is_in(roles, pa.array(ROLES))).as_py():
            for other in roles.unique().to_pylist():
                if other not in ROLES:
                    says = flags(roles.is_null() if other is None else pc.equal(roles, other))
                    fault = (
                        f"`{name}` has a message of the role {other!r}, none of {', '.join(ROLES)} (map it with "
                        "columns.messages.roles)"
                    )
                    self.note(any_message(lengths, says), fault)
        self.note(any_message(lengths, flags(contents.is_null())), f"`{name}` has a message without text")
        return conversations

    def number(self, name: str) -> np.ndarray:
        """A column of numbers or booleans, as float64 with NaN for null. Shape: (N,)."""
        return self._read(name).cast(pa.float64()).to_numpy(zero_copy_only=False)

    def score(self, name: str) -> pa.Array:
        """A column of finite numbers, float64. A null is a fault: JSON has no NaN, and some readers make it null."""
        values = self.number(name)
        finite = np.isfinite(values)
        self.note(~finite, f"`{name}` is not a finite number")
        return pa.array(values, mask=~finite)

    def choice(self, name: str) -> np.ndarray:
        """A column that names one of two answers, as whether it is the second. Shape: (N,)."""
        values = self.number(name)
        self.note(~np.isin(values, (0, 1)), f"`{name}` is neither 0 nor 1")
        return values == 1

    def safe(self, name: str) -> pa.Array:
        """A column of safety labels, boolean; null where a row has none."""
        return self._labels(name, (0, 1)).cast(pa.bool_())

    def severity(self, name: str) -> pa.Array:
        """A column of severities, int64; null where a row has none."""
        return self._labels(name, (0, 1, 2, 3))

    def text(self, name: str) -> pa.Array:
        """A column of text, or of numbers as text."""
        return self._read(name).cast(pa.string())

    def flag_names(self, names: list[str]) -> pa.Array:
        """The true fields of one or more structs of booleans in the order of the fields; null where none is true."""
        true: dict[str, np.ndarray] = {}
        for name in names:
            column = self._read(name)
            for field in column.type.names:
                mask = flags(pc.struct_field(column, [field]))
                true[field] = true[field] | mask if field in true else mask
        words = [pc.if_else(pa.array(mask), field, pa.scalar(None, pa.string())) for field, mask in true.items()]
        return join(words)

    def _labels(self, name: str, values: tuple[int, ...]) -> pa.Array:
        numbers, missing = self.number(name), flags(self._read(name).is_null())
        valid = np.isin(numbers, values)
        self.note(~valid & ~missing, f"`{name}` is none of {', '.join(map(str, values))}")
        return pa.array(np.where(valid, numbers, 0).astype(np.int64), mask=~valid)

    def _read(self, name: str) -> pa.Array:
        column = _column(self.table, find(name, self.table.schema))
        if not _is_json(column.type):
            return column
        kind, spec, values = self.kinds[name], self.columns.messages, []
        for row, value in enumerate(_decoded(column)):
            if value is not None and _json_kind(value) != kind:
                self.faults[row] = self.faults[row] or (
                    f"rows of mixed layouts: `{name}` holds {_json_kind(value)} where the first row holds {kind} "
                    "(give each layout a file and an entry of its own)"
                )
                value = None
            if kind in (MESSAGE, MESSAGES) and value is not None:
                messages = [_json_message(message, spec) for message in (value if kind == MESSAGES else [value])]
                value = messages if kind == MESSAGES else messages[0]
            values.append(value)
        message = pa.struct([(spec.role, pa.string()), (spec.content, pa.string())])
        types = {TEXT: pa.string(), NUMBER: pa.float64(), BOOLEAN: pa.bool_(), MESSAGE: message}
        return pa.array(values, types.get(kind, pa.list_(message)))


# datasets keeps a column whose JSON values differ in type as Arrow's JSON type: text to decode.
def _is_json(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return any(_is_json(field.type) for field in type_)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return _is_json(type_.value_type)
    return isinstance(type_, pa.JsonType)


def _decoded(column: pa.Array) -> list:
    def decode(value: object, type_: pa.DataType) -> object:
        if value is None:
            return None
        if isinstance(type_, pa.JsonType):
            return json.loads(value)
        if pa.types.is_struct(type_):
            return {field.name: decode(value[field.name], field.type) for field in type_}
        return [decode(item, type_.value_type) for item in value] if hasattr(type_, "value_type") else value

    return [decode(value, column.type) for value in column.to_pylist()]


def _json_kind(value: object) -> str:
    if isinstance(value, list):
        return MESSAGES
    kinds = {str: TEXT, bool: BOOLEAN, int: NUMBER, float: NUMBER, dict: MESSAGE}
    return kinds[type(value)]


def _json_message(message: object, spec: Messages) -> dict[str, str | None]:
    fields = message if isinstance(message, dict) else {}
    return {key: fields.get(key) if isinstance(fields.get(key), str) else None for key in (spec.role, spec.content)}
