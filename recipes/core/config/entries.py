"""What the entries of `datasets` say of their sources, checked before any row is loaded: names and mappings."""

import dataclasses
from pathlib import Path

from core.config.schema import DatasetEntry
from core.runtime.errors import RecipeError

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# Columns of mapped rows (`preferences.FEATURES`), whose names no extra column may take.
ROW_COLUMNS = (
    "prompt", "chosen", "rejected", "chosen_safe", "rejected_safe", "chosen_severity", "rejected_severity",
    "score_chosen", "score_rejected", "tie", "category", "source", "row_id", "role",
)  # fmt: skip
# Three facts that come as a pair: the key that goes with `responses`, and those that go with chosen and rejected.
PAIRED = (
    ("safe", "chosen_safe", "rejected_safe"),
    ("severity", "chosen_severity", "rejected_severity"),
    ("scores", "score_chosen", "score_rejected"),
)

SINGLE = {"label", "score", "rank", "response_safe", "unfold"}  # keys that go with `response`


def place(entry: DatasetEntry) -> str:
    """How messages name the source: the path and, where there are some, its configuration and files."""
    details = ([entry.name] if entry.name else []) + files_of(entry)
    return f"{entry.path} ({', '.join(details)})" if details else entry.path


def files_of(entry: DatasetEntry) -> list[str]:
    """The entry's `data_files`, none or one or several."""
    return [entry.data_files] if isinstance(entry.data_files, str) else entry.data_files or []


def source_names(entries: list[DatasetEntry]) -> list[str]:
    """The name of each source in row ids and in the audit; two entries of one name would share their row ids."""
    names = []
    for entry in entries:
        by_builder = entry.path in BUILDERS.values() and files_of(entry)  # e.g. path: json, data_files: pairs.jsonl
        names.append(entry.source or Path(files_of(entry)[0] if by_builder else entry.path).name)
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"datasets: {names.count(name)} entries are called {name!r}; name each with `source:`")
    return names


def check_preferences(entries: list[DatasetEntry]) -> None:
    """
    Refuse entries of preference rows whose mappings contradict themselves or leave out what a pair needs.

    Raises:
        RecipeError: which entry, which key and what to do.
    """
    source_names(entries)
    for entry in entries:
        if entry.columns.conversation or entry.columns.safer or entry.answer != "chosen":
            raise RecipeError(
                f"{place(entry)}: columns.conversation, columns.safer and `answer` choose what the SFT stage learns; "
                "remove them from an entry of preference pairs"
            )
        _check_pairs(entry)


def check_conversations(entries: list[DatasetEntry]) -> None:
    """
    The same of the entries of an SFT stage.

    Raises:
        RecipeError: as `check_preferences`; or `answer: safer` without a `safer` column, safety labels or severities.
    """
    source_names(entries)
    for entry in entries:
        if entry.columns.conversation is None:
            _check_pairs(with_answer(entry))
            continue
        used = ("conversation", "leave_out", "messages", "row_id", "system", "turns")
        given = [key for key, value in vars(entry.columns).items() if value not in (None, [], {}) and key not in used]
        if given or entry.answer != "chosen":
            other = f"columns.{given[0]}" if given else "`answer`"
            raise RecipeError(f"{place(entry)}: columns.conversation holds whole conversations; remove {other}")


def with_answer(entry: DatasetEntry) -> DatasetEntry:
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
        getattr(columns, key) is None
        for key in ("safe", "severity", "chosen_safe", "chosen_severity", "response_safe")
    ):
        raise RecipeError(
            f"{place(entry)}: `answer: safer` needs columns.safer, safety labels or severities; name one of them, or "
            "set `answer: chosen`"
        )
    return entry


def _check_single(given: set[str], where: str) -> None:
    """The same of a mapping of single answers, which pairs are made of."""
    pair_keys = {"chosen", "rejected", "responses", "better", "preference", *(key for keys in PAIRED for key in keys)}
    if other := given & pair_keys:
        raise RecipeError(
            f"{where}: columns.response and columns.{min(other)} exclude each other; with response use label, score "
            "or rank, and response_safe"
        )
    if len(given & {"label", "score", "rank"}) != 1 or "prompt" not in given:
        raise RecipeError(f"{where}: columns.response needs columns.prompt and one of columns.label, score and rank")


def _check_pairs(entry: DatasetEntry) -> None:
    """Refuse a mapping that contradicts itself, or leaves out what a pair needs."""
    columns, where = entry.columns, place(entry)
    given = {key for key, value in vars(columns).items() if value is not None}
    if columns.response is not None:
        _check_single(given, where)
    elif alone := given & SINGLE:
        raise RecipeError(f"{where}: columns.{min(alone)} goes with columns.response, which isn't set; remove it")
    elif columns.responses is not None:
        sides = {key for _, *keys in PAIRED for key in keys if isinstance(getattr(columns, key), str)}
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
    for both, chosen, rejected in PAIRED:
        if (chosen in given) != (rejected in given):
            raise RecipeError(f"{where}: columns.{chosen} and columns.{rejected} go together; set both or neither")
        if both in given and chosen in given:
            raise RecipeError(f"{where}: columns.{both} and columns.{chosen} exclude each other; remove one")
    for name in columns.extra:
        if name in ROW_COLUMNS:
            raise RecipeError(
                f"{where}: columns.extra names {name!r}, which is a name of the rows' own; rename the column"
            )
