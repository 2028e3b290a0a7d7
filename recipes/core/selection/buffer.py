"""
The selective buffer: hygiene, label policy, score filter and quotas over preference rows, and the audit of what went
and why. The same rows, settings and seed keep the same rows on every machine; the order in which the rows come decides
nothing but which of two duplicates stays.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from decimal import Decimal
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from xxhash import xxh3_128_hexdigest

from core.config.schema import LabelPolicy, Quotas, Score, Selection
from core.objective.presets import PAIR_CLASSES
from core.runtime.environment import code_digest
from core.runtime.errors import RecipeError
from core.selection.audit import Audit, groups_of, pair_class, read_decisions, summarise, write_decisions
from core.selection.hygiene import CODES, NUMBERS, RULES, Facts, first_broken, read_facts, read_pairs
from core.selection.prompts import SAMPLE, CountTokens, Ngrams, TokenBound
from core.selection.scanning import scan

SIGNALS = ("score_gap", "severity_gap", "length_ratio", "reference_gap")  # computed; any other names a column
PAIRED = [
    ("chosen", "rejected"),
    ("chosen_safe", "rejected_safe"),
    ("chosen_severity", "rejected_severity"),
    ("score_chosen", "score_rejected"),
]
# Part of every cache key, so that what other code has decided is never read back.
CODE = code_digest(
    "selection/buffer",
    "selection/hygiene",
    "selection/prompts",
    "selection/scanning",
    "selection/audit",
    "objective/margins",
)


def select_rows(
    rows: Dataset,
    settings: Selection,
    *,
    seed: int,
    max_length: int | None = None,
    count_prompt_tokens: CountTokens | None = None,
    eval_prompts: Sequence[list[dict]] | None = None,
    reference_gap: Callable[[Dataset], np.ndarray] | None = None,
    hygiene_only: bool = False,
    num_proc: int | None = None,
    bad_rows: Sequence[dict] = (),
    cache_key: str | None = None,
) -> tuple[Dataset, Audit]:
    """
    Choose the rows to train on: hygiene, label policy, score filter, quotas, in this order.

    Args:
        rows: preference rows; a file on disk is read in slices, and its text is never held or copied.
        seed: of every choice that is not forced by the settings, together with the row's id.
        max_length, count_prompt_tokens: tokens of a row, and the counter of prompts' tokens with the template; without
            either the rule `min_answer_tokens` has nothing to go by and is left out.
        eval_prompts: what no training prompt may share an n-gram with.
        reference_gap: log π_ref(chosen) − log π_ref(rejected) in nats of each row it is given, shape (rows,).
        hygiene_only: for evaluation sets: no relabelling, no filter, no quotas.
        bad_rows: what was dropped while the rows were read (row_id, source, reason); it only enters the audit.
        cache_key: names what `count_prompt_tokens` and `reference_gap` depend on (tokenizer, template, reference
            weights). With it, or with neither of the two, the decisions are kept under datasets' cache folder.

    Returns:
        The kept rows in their order, with a column `relabelled`, and the audit.

    Raises:
        RecipeError: a rule set to `error` is broken; labels or scores are missing where a setting needs them;
            a quota names no group; nothing, or no task row, is left.
    """
    key = _key(rows, settings, seed, max_length, eval_prompts, hygiene_only, bad_rows, cache_key)
    kept_on_disk = cache_key is not None or (count_prompt_tokens is None and reference_gap is None)
    path = Path(datasets.config.HF_DATASETS_CACHE) / "selections" / f"{key}.npz"
    reasons = _reasons(settings)
    decided = read_decisions(path, len(rows)) if kept_on_disk else None
    if decided is None:
        if not len(rows):
            raise RecipeError("the selection was given no rows: look at the datasets' splits and fractions")
        ngram, answer = settings.hygiene.eval_ngram, settings.hygiene.min_answer_tokens
        ngrams = Ngrams(eval_prompts, ngram) if eval_prompts is not None and ngram is not None else None
        bound = None
        if None not in (answer, max_length, count_prompt_tokens):
            # Few rows are sooner tokenised than their words are counted.
            sample = rows.select_columns(["prompt"])[:SAMPLE]["prompt"] if len(rows) > SAMPLE else []
            bound = TokenBound(sample, max_length - answer, count_prompt_tokens)
        extra = None if hygiene_only or settings.score is None else _extra_column(rows, settings.score)
        read = partial(read_facts, settings=settings.hygiene, seed=seed, ngrams=ngrams, bound=bound, extra=extra)
        facts = scan(rows, read, num_proc)
        assert pc.count_distinct(facts["row_id"]).as_py() == len(rows), "row ids must be unique"
        codes = first_broken(rows, facts, settings.hygiene, bound, count_prompt_tokens, num_proc)
        _refuse_broken(codes, facts["row_id"], settings)
        before, relabelled = pair_class(facts), np.zeros(len(rows), bool)
        if not hygiene_only:
            relabelled, unusable = _relabel(facts, settings.labels or "helpful", codes == 0)
            codes[unusable] = reasons.index(("labels", "both_unsafe")) + 1
            _swap(facts, relabelled)
            if settings.score is not None:
                gap = partial(_reference_gap, rows, relabelled, reference_gap)
                outside = _outside(facts, settings.score, codes == 0, gap)
                codes[outside] = reasons.index(("score", settings.score.signal)) + 1
            if settings.quotas is not None:
                codes[_over_quota(facts, settings.quotas, codes == 0)] = len(reasons)
        relabelled &= codes == 0
        summary = summarise(facts, codes, relabelled, before, reasons, bad_rows)
        summary |= {"seed": seed, "hygiene_only": hygiene_only, "settings": asdict(settings)}
        _refuse_nothing(summary, hygiene_only)
        decided = codes, relabelled, summary
        if kept_on_disk:
            write_decisions(path, decided)
    codes, relabelled, summary = decided
    # Not the key: where decisions are not kept on disk, it does not hold all that they depend on.
    fingerprint = xxh3_128_hexdigest((rows._fingerprint + summary["digest"]).encode())
    kept = with_labels(rows, relabelled, np.flatnonzero(codes == 0), fingerprint)
    return kept, Audit(rows, codes, relabelled, reasons, bad_rows, summary)


def refuse_overlap(train_rows: Dataset, eval_rows: Dataset, num_proc: int | None = None) -> None:
    """
    Raises:
        RecipeError: a pair of the evaluation rows (prompt and both answers after case folding, whichever is chosen)
            is among the training rows too.
    """
    if not len(train_rows) or not len(eval_rows):
        return
    columns = ["prompt", "chosen", "rejected"]
    train, held_out = (
        scan(rows.select_columns(columns), read_pairs, num_proc)["pair"] for rows in (train_rows, eval_rows)
    )
    shared = np.flatnonzero(np.isin(held_out, train))
    if len(shared):
        names = eval_rows.select_columns(["row_id"]).select(shared[:5])[:]["row_id"]
        raise RecipeError(
            f"{len(shared)} evaluation rows are training rows too, e.g. {', '.join(names)}: "
            "take another split, or remove them from one of the two sets"
        )


def with_labels(rows: Dataset, relabelled: np.ndarray, places: np.ndarray, fingerprint: str | None = None) -> Dataset:
    """
    The rows at `places`, with the answers (and their labels and scores) of the relabelled ones swapped. No text is
    copied: the rows are laid twice over the same file, once with the columns renamed, and picked from either.
    """
    # Swapping is one bit per row whatever order the rows stand in, so the file's own order will do.
    file = Dataset(rows._data, info=rows.info.copy(), split=rows.split, fingerprint=rows._fingerprint)
    if rows._indices is not None:
        in_file = rows._indices.column(0).to_numpy()[places]
    else:
        in_file = places
    layers = [file.add_column("relabelled", np.zeros(len(file), bool))]
    if relabelled.any():
        names = dict(PAIRED) | {rejected: chosen for chosen, rejected in PAIRED}
        swapped = file.rename_columns(names).select_columns(file.column_names)
        layers.append(swapped.add_column("relabelled", np.ones(len(file), bool)))
        in_file = in_file + len(file) * relabelled[places]
    return concatenate_datasets(layers).select(in_file, new_fingerprint=fingerprint)


# ---------------------------------------------------------------------------------------------- the stages
def _relabel(facts: Facts, policy: LabelPolicy, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Which rows to swap, and which no label can mend. Task rows only: the buffer is there for helpfulness, and where it
    is labelled at all it is safe/safe.

    helpful: none. safer: prefer the safe answer; if both or neither are, the one of lower severity where both are
    known; else the label stays. safe_first: both safe keep the helpful label, the others go by safer.
    safedpo_t (arXiv 2505.20065): chosen safe stays; unsafe/safe is swapped; both unsafe is dropped.
    """
    if policy == "helpful":
        return np.zeros(len(among), bool), np.zeros(len(among), bool)
    among = among & ~facts["buffer"]
    _refuse_missing(
        facts,
        ("chosen_safe", "rejected_safe"),
        among,
        f"the label policy {policy} needs safety labels",
        "labels: helpful",
    )
    chosen, rejected = facts["chosen_safe"] == 1, facts["rejected_safe"] == 1
    if policy == "safedpo_t":
        return among & ~chosen & rejected, among & ~chosen & ~rejected
    # NaN (an unknown severity) compares false, so the label stays.
    milder = (chosen == rejected) & (facts["rejected_severity"] < facts["chosen_severity"])
    if policy == "safe_first":
        milder &= ~chosen
    return among & ((~chosen & rejected) | milder), np.zeros(len(among), bool)


def _swap(facts: Facts, relabelled: np.ndarray) -> None:
    for one, other in [*PAIRED[1:], ("chosen_length", "rejected_length")]:
        kept = facts[one].copy()
        facts[one] = np.where(relabelled, facts[other], facts[one])
        facts[other] = np.where(relabelled, kept, facts[other])


def _outside(facts: Facts, score: Score, among: np.ndarray, gap: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """
    Rows that the score filter drops. Signals, larger is easier: score_gap = score_chosen − score_rejected;
    severity_gap = rejected − chosen severity; length_ratio = longer/shorter answer in characters; reference_gap in
    nats; or a numeric column. Rows of one signal rank by their seeded digests. A fraction keeps ⌊keep·n⌋ rows, at
    least one; a band keeps the ranks from ⌊low·n⌋ up to ⌊high·n⌋, counted from the smallest signal.
    """
    if score.role != "all":
        among = among & (facts["buffer"] == (score.role == "buffer"))
    places = np.flatnonzero(among)
    if score.signal == "severity_gap":
        needed = ("chosen_severity", "rejected_severity")
        _refuse_missing(
            facts, needed, among, "the signal severity_gap needs severities", "another selection.score.signal"
        )
    signal = _signal(facts, score.signal, places, gap)
    unknown = places[np.isnan(signal)]
    if len(unknown):
        raise RecipeError(
            f"selection.score: {score.signal} is unknown (null or NaN) in {len(unknown)} rows, e.g. "
            f"{_names(facts, unknown)}: fill it in, choose another signal, or set selection.score.role"
        )
    ranked = places[np.lexsort((facts["order"][places], signal))]  # smallest signal first
    count = len(ranked)
    if score.band is not None:
        low, high = (_part(quantile, count) for quantile in score.band)
    else:
        size = max(1, _part(score.keep, count))
        low = {"hard": 0, "middle": (count - size) // 2, "easy": count - size}[score.direction]
        high = low + size
    outside = among.copy()
    outside[ranked[max(low, 0) : high]] = False
    return outside


def _signal(facts: Facts, name: str, places: np.ndarray, gap: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    at = {column: values[places] for column, values in facts.items() if isinstance(values, np.ndarray)}
    if name == "score_gap":
        return at["score_chosen"] - at["score_rejected"]
    if name == "severity_gap":
        return at["rejected_severity"] - at["chosen_severity"]
    if name == "length_ratio":
        shorter = np.minimum(at["chosen_length"], at["rejected_length"])
        return np.maximum(at["chosen_length"], at["rejected_length"]) / np.maximum(shorter, 1)
    if name == "reference_gap":
        return gap(places)
    return at[name] if name in NUMBERS else at["extra"]


def _reference_gap(
    rows: Dataset, relabelled: np.ndarray, reference_gap: Callable[[Dataset], np.ndarray] | None, places: np.ndarray
) -> np.ndarray:
    assert reference_gap is not None, "selection.score.signal is reference_gap, and the caller gave no reference"
    gap = np.asarray(reference_gap(with_labels(rows, relabelled, places)), np.float64)
    assert gap.shape == places.shape, (gap.shape, places.shape)
    return gap


def _over_quota(facts: Facts, quotas: Quotas, among: np.ndarray) -> np.ndarray:
    """Rows beyond their group's limit, in the order of their seeded digests; a group without a limit is left whole."""
    if quotas.by == "pair_class":
        groups, kinds = list(PAIR_CLASSES), pair_class(facts)
    else:
        groups, kinds = groups_of(facts[quotas.by])
    over = np.zeros(len(among), bool)
    for group, limit in quotas.limits.items():
        if group not in groups:
            near = difflib.get_close_matches(group, groups, 3, 0) or groups[:3]
            raise RecipeError(
                f"selection.quotas.limits: no row has the {quotas.by} {group!r}; there are e.g. {', '.join(near)}"
            )
        members = np.flatnonzero(among & (kinds == groups.index(group)))
        members = members[np.argsort(facts["order"][members], kind="stable")]
        over[members[limit if isinstance(limit, int) else _part(limit, len(members)) :]] = True
    return over


def _part(fraction: float, count: int) -> int:
    """⌊fraction·count⌋ of the fraction as it is written: 0.1 of 30 is 3, and not the 3.0000000000000004 of floats."""
    return int(Decimal(str(fraction)) * count)


# ---------------------------------------------------------------------------------------------- what a row is like
def _names(facts: Facts, places: np.ndarray) -> str:
    return ", ".join(facts["row_id"].take(pa.array(places[:5])).to_pylist()) + (", …" if len(places) > 5 else "")


def _extra_column(rows: Dataset, score: Score) -> str | None:
    """The column that the score's signal names, where it is none of those that are read anyway."""
    if score.signal in (*SIGNALS, *NUMBERS):
        return None
    numeric = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float"))
    ]
    if score.signal in numeric:
        return score.signal
    names = [*SIGNALS, *numeric]
    near = difflib.get_close_matches(score.signal, names, 1)
    raise RecipeError(
        f"selection.score.signal: {score.signal} is neither a signal nor a numeric column"
        + (f"; did you mean {near[0]}?" if near else "")
        + f" (there are {', '.join(names)}; further columns are kept by columns.extra)"
    )


# ---------------------------------------------------------------------------------------------- refusals
def _refuse_broken(codes: np.ndarray, row_ids: pa.Array, settings: Selection) -> None:
    for rule in RULES:
        places = np.flatnonzero(codes == CODES[rule])
        if getattr(settings.hygiene, rule) == "error" and len(places):
            raise RecipeError(
                f"selection.hygiene.{rule}: broken by {len(places)} rows, e.g. {_names({'row_id': row_ids}, places)}; "
                f"mend them, or set selection.hygiene.{rule}: drop to drop and count them"
            )


def _refuse_missing(facts: Facts, columns: Sequence[str], among: np.ndarray, need: str, way_out: str) -> None:
    missing = np.flatnonzero(among & np.isnan([facts[name] for name in columns]).any(axis=0))
    if len(missing):
        sources = sorted(set(facts["source"].take(pa.array(missing)).to_pylist()))
        raise RecipeError(
            f"{need}, and {len(missing)} rows of {', '.join(sources)} have none, e.g. {_names(facts, missing)}: map "
            f"{' and '.join(columns)} in the source's columns, or choose {way_out}"
        )


def _refuse_nothing(summary: dict, hygiene_only: bool) -> None:
    counts = summary["counts"]
    if counts["kept"] if hygiene_only else counts["by_role"]["after"].get("task"):
        return
    raise RecipeError(
        f"the selection leaves no {'task row (role: task)' if counts['kept'] else 'row'} of {counts['rows']}; "
        "dropped: "
        + ", ".join(f"{entry['dropped']} by {entry['stage']}.{entry['reason']}" for entry in counts["stages"])
        + "; loosen the stage that drops them"
    )


# ---------------------------------------------------------------------------------------------- keys
def _reasons(settings: Selection) -> list[tuple[str, str]]:
    """What a code means, counted from 1: the hygiene rules' own codes come first, the quotas last."""
    return [
        *(("hygiene", rule) for rule in RULES),
        ("labels", "both_unsafe"),
        ("score", settings.score.signal if settings.score else "score"),
        ("quotas", settings.quotas.by if settings.quotas else "quotas"),
    ]


def _key(rows: Dataset, settings: Selection, *further: object) -> str:
    """A digest of all that the decisions depend on."""
    parts = [CODE, rows._fingerprint, asdict(settings), *further]
    return xxh3_128_hexdigest(json.dumps(parts, default=list).encode())
