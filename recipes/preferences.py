"""Rows of one schema from sources of any layout: the recipe's mapping is applied, and every bad row is named."""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from arguments import Columns, DatasetEntry
from columns import FLAGS, MESSAGE, NULL, TEXT, Batch, check_columns, find, join, named
from conversations import Conversations, append, contains, equal, flags, split_last, to_lists
from errors import RecipeError
from sources import draw_fraction, load_rows, place, source_names

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "prompt": MESSAGES,
        "chosen": Value("string"),
        "rejected": Value("string"),
        "chosen_safe": Value("bool"),
        "rejected_safe": Value("bool"),
        "chosen_severity": Value("int64"),
        "rejected_severity": Value("int64"),
        "score_chosen": Value("float64"),
        "score_rejected": Value("float64"),
        "tie": Value("bool"),
        "category": Value("string"),
        "source": Value("string"),
        "row_id": Value("string"),
        "role": Value("string"),
    }
)
# Three facts that come as a pair: the key that goes with `responses`, the keys that go with chosen and rejected, and
# how they are read.
PAIRED = (
    ("safe", "chosen_safe", "rejected_safe", Batch.safe, pa.bool_()),
    ("severity", "chosen_severity", "rejected_severity", Batch.severity, pa.int64()),
    ("scores", "score_chosen", "score_rejected", Batch.score, pa.float64()),
)

BadRows = list[dict[str, str]]  # row_id, source and reason of each row that `bad_rows: drop` left out

ROWS_NAMED = 5  # rows that a message names before it only counts
WORKER_ROWS = 10_000  # rows that are worth a process of their own
# Part of every cache key, so that rows which other code has mapped are never read back.
CODE = hashlib.sha256(
    b"".join(
        Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("preferences", "columns", "conversations")
    )
).hexdigest()


def load_preferences(entries: list[DatasetEntry], seed: int, num_proc: int | None = None) -> tuple[Dataset, BadRows]:
    """
    The preference rows of all entries, one entry after the other: `FEATURES` and the entries' `extra` columns
    (float64, null in the rows of an entry that doesn't name them).

    Args:
        entries: the recipe's `datasets` or `eval_datasets`.
        seed: draws each entry's `fraction`.
        num_proc: processes that map the rows; None: one.

    Raises:
        RecipeError: an entry that can't be loaded, a mapping that doesn't fit its columns, or bad rows under
            `bad_rows: error`.
    """
    extra = sorted({name for entry in entries for name in entry.columns.extra})
    parts, bad = [], []
    for entry, source in zip(entries, source_names(entries), strict=True):
        if entry.columns.conversation or entry.columns.safer or entry.answer != "chosen":
            raise RecipeError(
                f"{place(entry)}: columns.conversation, columns.safer and `answer` choose what the SFT stage learns; "
                "remove them from an entry of preference pairs"
            )
        _check_pairs(entry)
        fixed = {"source": source, "role": entry.role, "extra": extra}
        features = Features({**FEATURES, **{name: Value("float64") for name in extra}})
        rows, dropped = _map(entry, source, seed, num_proc, _read_pairs, features, fixed)
        parts.append(rows)
        bad += dropped
    return datasets.concatenate_datasets(parts), bad


def load_conversations(entries: list[DatasetEntry], seed: int, num_proc: int | None = None) -> Dataset:
    """
    Conversations that end in the answer to learn, in the column `messages`: an entry's `columns.conversation`, or the
    chosen, rejected or safer answer of its preference rows. An empty answer is a bad row here, since no selection
    follows; rows left out by `bad_rows: drop` are counted in a warning.

    Raises:
        RecipeError: as `load_preferences`; or `answer: safer` without a `safer` column, safety labels or severities.
    """
    parts = []
    for entry, source in zip(entries, source_names(entries), strict=True):
        if entry.columns.conversation is not None:
            read, fixed = _read_conversations, {"source": source}
            others = [f"columns.{key}" for key, _ in named(entry.columns) if key not in ("conversation", "row_id")]
            if others or entry.answer != "chosen":
                raise RecipeError(
                    f"{place(entry)}: columns.conversation holds whole conversations; remove "
                    + (others or ["`answer`"])[0]
                )
        else:
            entry = _with_answer(entry)
            read, fixed = _read_answers, {"source": source, "role": entry.role, "extra": [], "answer": entry.answer}
            _check_pairs(entry)
        features = Features({"messages": MESSAGES, "row_id": Value("string")})
        rows, bad = _map(entry, source, seed, num_proc, read, features, fixed)
        for reason, count in Counter(row["reason"] for row in bad).items():
            logging.getLogger(__name__).warning("%s: %d rows dropped: %s", place(entry), count, reason)
        parts.append(rows.select_columns("messages"))
    return datasets.concatenate_datasets(parts)


def _with_answer(entry: DatasetEntry) -> DatasetEntry:
    """The entry of an SFT stage whose pairs are in the order that `answer` asks for, if its labels can tell."""
    columns = entry.columns
    if columns.safer is not None:
        if entry.answer != "safer" or not columns.responses:
            raise RecipeError(
                f"{place(entry)}: columns.safer goes with `answer: safer` and columns.responses; set both"
            )
        # The safer response takes the better one's place, and is then the chosen one.
        columns = dataclasses.replace(columns, better=columns.safer, preference=None, safer=None)
        return dataclasses.replace(entry, columns=columns, answer="chosen")
    if entry.answer == "safer" and all(
        getattr(columns, key) is None for key in ("safe", "severity", "chosen_safe", "chosen_severity")
    ):
        raise RecipeError(
            f"{place(entry)}: `answer: safer` needs columns.safer, safety labels or severities; name one of them, or "
            "set `answer: chosen`"
        )
    return entry


def _check_pairs(entry: DatasetEntry) -> None:
    """Refuse a mapping that contradicts itself, or leaves out what a pair needs."""
    columns, where = entry.columns, place(entry)
    given = {key for key, value in vars(columns).items() if value is not None}
    if columns.responses is not None:
        sides = {key for _, *keys, _, _ in PAIRED for key in keys if isinstance(getattr(columns, key), str)}
        sides |= given & {"chosen", "rejected"}
        if sides:
            raise RecipeError(
                f"{where}: columns.responses and columns.{min(sides)} exclude each other; with responses use better "
                "or preference, safe, severity and scores"
            )
        if len(given & {"better", "preference"}) != 1:
            raise RecipeError(f"{where}: columns.responses needs columns.better or columns.preference, and not both")
    else:
        if not {"chosen", "rejected"} <= given:
            raise RecipeError(
                f"{where}: the mapping names no pair; set columns.chosen and columns.rejected, or columns.responses "
                "with better or preference"
            )
        if alone := given & {"better", "preference", "safe", "severity", "scores"}:
            raise RecipeError(f"{where}: columns.{min(alone)} goes with columns.responses, which isn't set; remove it")
    for both, chosen, rejected, _, _ in PAIRED:
        if (chosen in given) != (rejected in given):
            raise RecipeError(f"{where}: columns.{chosen} and columns.{rejected} go together; set both or neither")
        if both in given and chosen in given:
            raise RecipeError(f"{where}: columns.{both} and columns.{chosen} exclude each other; remove one")
    for name in columns.extra:
        if name in FEATURES:
            raise RecipeError(
                f"{where}: columns.extra names {name!r}, which is a name of the rows' own; rename the column"
            )


def _map(
    entry: DatasetEntry,
    source: str,
    seed: int,
    num_proc: int | None,
    read: Callable[..., dict[str, pa.Array]],
    features: Features,
    fixed: dict,
) -> tuple[Dataset, BadRows]:
    """An entry's rows through `read`, cached on disk; bad rows are refused, or dropped and listed."""
    where, columns = place(entry), entry.columns
    rows = load_rows(entry)
    kinds = check_columns(rows.data.table, columns, where)
    _check_answers(columns, kinds, where)
    total, kept = len(rows), np.arange(len(rows))
    needed = {find(name, rows.data.table.schema)[0] for name in kinds}
    rows = rows.select_columns(sorted(needed))
    if entry.fraction is not None and entry.fraction < 1:
        kept = draw_fraction(total, entry.fraction, seed, source)
        if not len(kept):
            raise RecipeError(f"{where}: `fraction: {entry.fraction}` of {total} rows leaves none; raise it")
        rows = rows.select(kept)
    workers = min(num_proc or 1, max(1, len(rows) // WORKER_ROWS))
    mapped = rows.with_format("arrow").map(
        _read_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features({**features, "fault": Value("string")}),
        fn_kwargs={"read": read, "numbers": kept, "columns": columns, "kinds": kinds, "fixed": fixed},
        num_proc=workers if workers > 1 else None,
        # What is read decides, not how Python happens to pickle it.
        new_fingerprint=Hasher.hash(
            [rows._fingerprint, CODE, read.__name__, dataclasses.asdict(columns), kinds, fixed]
        ),
        desc=f"rows of {source}",
    )
    mapped = mapped.with_format(None)
    if columns.row_id is not None:
        _check_row_ids(mapped.data.column("row_id"), columns.row_id, where)
    faults = mapped.data.column("fault").combine_chunks()
    mapped = mapped.remove_columns("fault")
    bad = np.flatnonzero(flags(faults.is_valid()))
    if not len(bad):
        return mapped, []
    reasons = faults.take(pa.array(bad)).to_pylist()
    if entry.bad_rows == "error" or len(bad) == len(mapped):
        raise RecipeError(f"{where}: {_summary(reasons, kept[bad], len(mapped))}")
    dropped = [
        {"row_id": row_id, "source": source, "reason": reason}
        for row_id, reason in zip(mapped.select(bad)["row_id"], reasons, strict=True)
    ]
    return mapped.select(np.flatnonzero(flags(faults.is_null()))), dropped


def _check_answers(columns: Columns, kinds: dict[str, str], where: str) -> None:
    """Refuse two answers of different layouts, and answers of plain text that no prompt goes with."""
    if columns.conversation is not None:
        return
    first, second = columns.responses or (columns.chosen, columns.rejected)
    if kinds[first] != kinds[second] and NULL not in (kinds[first], kinds[second]):
        raise RecipeError(
            f"{where}: {first!r} holds {kinds[first]} and {second!r} {kinds[second]}; both need one layout"
        )
    if kinds[first] in (TEXT, MESSAGE) and columns.prompt is None and columns.turns is None:
        raise RecipeError(
            f"{where}: {first!r} holds {kinds[first]}, so the prompt is elsewhere; set columns.prompt, or "
            "columns.turns if it is a transcript"
        )


def _check_row_ids(ids: pa.ChunkedArray, name: str, where: str) -> None:
    counts = pc.value_counts(ids.drop_null())
    shared = counts.filter(pc.greater(pc.struct_field(counts, [1]), 1))
    if len(shared):
        examples = ", ".join(shared.field(0)[:ROWS_NAMED].to_pylist())
        raise RecipeError(
            f"{where}: columns.row_id names {name!r}, but several rows share an id ({examples}); name a column of "
            "unique ids, or remove columns.row_id to number the rows"
        )


def _summary(reasons: list[str], numbers: np.ndarray, total: int) -> str:
    """One line on all bad rows: each fault with its first rows."""
    rows_of: dict[str, list[int]] = {}
    for reason, number in zip(reasons, numbers.tolist(), strict=True):
        rows_of.setdefault(reason, []).append(number)
    faults = []
    for reason, rows in rows_of.items():
        more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        faults.append(f"{reason}: row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:ROWS_NAMED]))}{more}")
    way_out = (
        "mend the source" if len(reasons) == total else "mend them, or set `bad_rows: drop` to go on without them"
    )
    return f"{len(reasons)} of {total} rows can't be used (rows count from 0): {'; '.join(faults)}; {way_out}"


# ---------------------------------------------------------------------------------------------------------------------
# Batches: plain functions with explicit arguments, so that a second run finds their result in the cache
# ---------------------------------------------------------------------------------------------------------------------
def _read_batch(
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


def _read_pairs(batch: Batch, source: str, role: str, extra: list[str]) -> dict[str, pa.Array]:
    """The columns of `FEATURES` and the `extra` ones."""
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

    for both, chosen, rejected, read, type_ in PAIRED:
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


def _read_answers(batch: Batch, source: str, role: str, extra: list[str], answer: str) -> dict[str, pa.Array]:
    """The prompt and one answer of each pair, as a conversation."""
    pairs = _read_pairs(batch, source, role, extra)
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


def _read_conversations(batch: Batch, source: str) -> dict[str, pa.Array]:
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
