"""
The selective buffer: hygiene, label policy, score filter and quotas over preference rows, and the audit of what went
and why. The same rows, settings and seed keep the same rows on every machine; the order in which the rows come decides
nothing but which of two duplicates stays.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from decimal import Decimal

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher

from core.config.schema import LabelPolicy, Quotas, Score, Selection
from core.objective.margins import number_column, pair_classes
from core.objective.presets import PAIR_CLASSES, Margin
from core.runtime.errors import RecipeError
from core.selection.audit import Audit, groups_of, summarise, would_drop
from core.selection.hygiene import CODES, NUMBERS, RULES, Facts, first_broken, open_ties, read_facts

PER_TOKEN = "reference_gap_per_token"
REFERENCE_GAPS = ("reference_gap", PER_TOKEN)
SIGNALS = ("score_gap", "severity_gap", "length_ratio", *REFERENCE_GAPS)  # computed; any other names a column
SWAPPED = [
    ("chosen", "rejected"),
    ("chosen_safe", "rejected_safe"),
    ("chosen_severity", "rejected_severity"),
    ("score_chosen", "score_rejected"),
    ("chosen_ids", "rejected_ids"),
    ("chosen_cut", "rejected_cut"),
]
MIRRORED = np.array([0, 2, 1, 3, 4])  # the place in PAIR_CLASSES of a pair whose answers are swapped

ReferenceGap = Callable[[Dataset], np.ndarray]


def select_rows(
    rows: Dataset,
    settings: Selection,
    *,
    seed: int,
    max_length: int | None = None,
    eval_prompts: Iterable[list[dict]] | None = None,
    reference_gap: ReferenceGap | None = None,
    hygiene_only: bool = False,
    bad_rows: Sequence[dict] = (),
    margin: Margin | None = None,
) -> tuple[Dataset, Audit]:
    """
    Choose the rows to train on: hygiene, label policy, score filter, quotas, in this order.

    Args:
        rows: preference rows with tokens (`tokens.tokenize_rows`); without them, the rules on tokens are left out.
        seed: of every choice that is not forced by the settings, together with the row's id.
        max_length: what the rows were cut at.
        eval_prompts: what no training prompt may share an n-gram with.
        reference_gap: log π_ref(chosen) − log π_ref(rejected) in nats (or per token) of each row it is given,
            shape (rows,).
        hygiene_only: for evaluation sets: no relabelling, no filter, no quotas.
        bad_rows: what was dropped while the rows were read (row_id, source, reason); it only enters the audit.
        margin: says with `labels` which ties lack a strict label (`open_ties`); None: plain DPO's.

    Returns:
        The kept rows in their order, with a column `relabelled`, and the audit.

    Raises:
        RecipeError: a rule set to `error` is broken; labels or scores are missing where a setting needs them;
            a quota names no group; nothing, or no task row, is left.
    """
    if not len(rows):
        raise _refusal("the selection was given no rows: look at the datasets' splits and fractions")
    if not hygiene_only and settings.score is not None:
        _check_signal(rows, settings.score.signal)
    facts = read_facts(rows, settings.hygiene, seed, eval_prompts)
    assert len(rows.unique("row_id")) == len(rows), "row ids must be unique"

    reasons = _reasons(settings)
    labels = "helpful" if hygiene_only else settings.labels or "helpful"
    facts["tie"] = open_ties(facts, labels, margin or Margin())
    codes, off = first_broken(rows, facts, settings.hygiene, max_length)
    _refuse_broken(rows, codes, settings)
    relabelled = np.zeros(len(rows), bool)
    before = classes = pair_classes(rows)
    if not hygiene_only:
        relabelled, unusable = _relabel(rows, facts, labels, codes == 0)
        codes[unusable] = reasons.index(("labels", "both_unsafe")) + 1
        _swap(facts, relabelled)
        classes = np.where(relabelled, MIRRORED[before], before)
        if settings.score is not None:
            outside = _outside(rows, facts, settings.score, codes == 0, relabelled, reference_gap)
            codes[outside] = reasons.index(("score", settings.score.signal)) + 1
        if settings.quotas is not None:
            codes[_over_quota(rows, facts, classes, settings.quotas, codes == 0)] = len(reasons)

    relabelled &= codes == 0
    summary = summarise(rows, facts["buffer"], codes, relabelled, before, classes, reasons, bad_rows)
    summary["counts"]["off"] = would_drop(off, before)
    summary |= {"seed": seed, "hygiene_only": hygiene_only, "settings": asdict(settings)}
    _refuse_nothing(summary, hygiene_only)
    kept = with_labels(rows, relabelled, np.flatnonzero(codes == 0))
    return kept, Audit(rows, codes, relabelled, classes, facts["pair"], reasons, bad_rows, summary)


def refuse_overlap(train: Audit, held_out: Audit) -> None:
    """
    Raises:
        RecipeError: a pair of the evaluation rows that were kept (prompt and both answers after case folding,
            whichever is chosen) is among the training rows too, those included that hygiene dropped.
    """
    shared = np.flatnonzero(np.isin(held_out.pairs, train.pairs) & (held_out.codes == 0))
    if len(shared):
        raise _refusal(
            f"{len(shared)} evaluation rows are training rows too, e.g. "
            f"{', '.join(held_out.rows.select(shared[:5])['row_id'])}: "
            "take another split, or remove them from one of the two sets"
        )


def with_labels(rows: Dataset, relabelled: np.ndarray, places: np.ndarray) -> Dataset:
    """
    The rows at `places`, with the answers (and what belongs to either) of the relabelled ones swapped. No text of a
    file is copied: the rows are laid twice over it, once with the columns renamed, and picked from either.
    """
    fingerprint = Hasher.hash([rows._fingerprint, relabelled, places])
    layers = [rows.add_column("relabelled", np.zeros(len(rows), bool))]
    if relabelled.any():
        pairs = [pair for pair in SWAPPED if pair[0] in rows.column_names]
        names = dict(pairs) | {rejected: chosen for chosen, rejected in pairs}
        swapped = rows.rename_columns(names).select_columns(rows.column_names)
        layers.append(swapped.add_column("relabelled", np.ones(len(rows), bool)))
        places = places + len(rows) * relabelled[places]
    return concatenate_datasets(layers).select(places, new_fingerprint=fingerprint)


# ---------------------------------------------------------------------------------------------- the stages
def _relabel(rows: Dataset, facts: Facts, policy: LabelPolicy, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    missing = among & np.isnan([facts["chosen_safe"], facts["rejected_safe"]]).any(axis=0)
    need = f"the label policy {policy} needs safety labels"
    _refuse_missing(rows, missing, need, "chosen_safe and rejected_safe", "labels: helpful")
    chosen, rejected = facts["chosen_safe"] == 1, facts["rejected_safe"] == 1
    if policy == "safedpo_t":
        return among & ~chosen & rejected, among & ~chosen & ~rejected
    # NaN (an unknown severity) compares false, so the label stays.
    milder = (chosen == rejected) & (facts["rejected_severity"] < facts["chosen_severity"])
    if policy == "safe_first":
        milder &= ~chosen
    return among & ((~chosen & rejected) | milder), np.zeros(len(among), bool)


def _swap(facts: Facts, relabelled: np.ndarray) -> None:
    for one, other in [*SWAPPED, ("chosen_length", "rejected_length")]:
        if one in facts:
            ours, theirs = facts[one], facts[other]
            facts[one], facts[other] = np.where(relabelled, theirs, ours), np.where(relabelled, ours, theirs)


def _outside(
    rows: Dataset,
    facts: Facts,
    score: Score,
    among: np.ndarray,
    relabelled: np.ndarray,
    reference_gap: ReferenceGap | None,
) -> np.ndarray:
    """
    Rows that the score filter drops. Rows of one signal rank by their seeded digests. A fraction keeps ⌊keep·n⌋ rows,
    at least one; a band keeps the ranks from ⌊low·n⌋ up to ⌊high·n⌋, counted from the smallest signal.
    """
    if score.role != "all":
        among = among & (facts["buffer"] == (score.role == "buffer"))
    places = np.flatnonzero(among)
    if score.signal in REFERENCE_GAPS:
        assert reference_gap is not None, "selection.score.signal is a reference gap, and the caller gave no reference"
        signal = np.zeros(0)
        if len(places):
            signal = np.asarray(reference_gap(with_labels(rows, relabelled, places)), np.float64)
        assert signal.shape == places.shape, (signal.shape, places.shape)
    else:
        signal = _signal(rows, facts, score.signal)[places]
    unknown = places[np.isnan(signal)]
    if len(unknown):
        if score.signal == "severity_gap":
            missing, severities = np.isin(np.arange(len(rows)), unknown), "chosen_severity and rejected_severity"
            need = "the signal severity_gap needs severities"
            _refuse_missing(rows, missing, need, severities, "another selection.score.signal")
        raise _refusal(
            f"selection.score: {score.signal} is unknown (null or NaN) in {len(unknown)} rows, e.g. "
            f"{_names(rows, unknown)}: fill it in, choose another signal, or set selection.score.role"
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


def _signal(rows: Dataset, facts: Facts, name: str) -> np.ndarray:
    """
    Of each row, shape (rows,), NaN where it is unknown; larger is easier. score_gap = score_chosen − score_rejected;
    severity_gap = rejected − chosen severity; length_ratio = longer/shorter answer in tokens; or a numeric column.
    """
    if name == "score_gap":
        return facts["score_chosen"] - facts["score_rejected"]
    if name == "severity_gap":
        return facts["rejected_severity"] - facts["chosen_severity"]
    if name == "length_ratio":
        shorter = np.minimum(facts["chosen_length"], facts["rejected_length"])
        return np.maximum(facts["chosen_length"], facts["rejected_length"]) / np.maximum(shorter, 1)
    return facts[name] if name in NUMBERS else number_column(rows, name)


def _over_quota(rows: Dataset, facts: Facts, classes: np.ndarray, quotas: Quotas, among: np.ndarray) -> np.ndarray:
    """Rows beyond their group's limit, in the order of their seeded digests; a group without a limit is left whole."""
    if quotas.by == "pair_class":
        groups, kinds = list(PAIR_CLASSES), classes
    else:
        groups, kinds = groups_of(rows, quotas.by)
    over = np.zeros(len(among), bool)
    for group, limit in quotas.limits.items():
        if group not in groups:
            near = difflib.get_close_matches(group, groups, 3, 0) or groups[:3]
            raise _refusal(
                f"selection.quotas.limits: no row has the {quotas.by} {group!r}; there are e.g. {', '.join(near)}"
            )
        members = np.flatnonzero(among & (kinds == groups.index(group)))
        members = members[np.argsort(facts["order"][members], kind="stable")]
        over[members[limit if isinstance(limit, int) else _part(limit, len(members)) :]] = True
    return over


def _part(fraction: float, count: int) -> int:
    """⌊fraction·count⌋ of the fraction as it is written: 0.1 of 30 is 3, and not the 3.0000000000000004 of floats."""
    return int(Decimal(str(fraction)) * count)


# ---------------------------------------------------------------------------------------------- refusals
def _refusal(message: str) -> RecipeError:
    return RecipeError(message, everywhere=True)  # every rank selects the same rows


def _names(rows: Dataset, places: np.ndarray) -> str:
    return ", ".join(rows.select(places[:5])["row_id"]) + (", …" if len(places) > 5 else "")


def _check_signal(rows: Dataset, name: str) -> None:
    numeric = [
        column
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float"))
    ]
    if name in (*SIGNALS, *NUMBERS, *numeric):
        return
    names = [*SIGNALS, *numeric]
    near = difflib.get_close_matches(name, names, 1)
    raise _refusal(
        f"selection.score.signal: {name} is neither a signal nor a numeric column"
        + (f"; did you mean {near[0]}?" if near else "")
        + f" (there are {', '.join(names)}; further columns are kept by columns.extra)"
    )


def _refuse_broken(rows: Dataset, codes: np.ndarray, settings: Selection) -> None:
    for rule in RULES:
        places = np.flatnonzero(codes == CODES[rule])
        if getattr(settings.hygiene, rule) == "error" and len(places):
            if rule == "unrenderable":
                fault, count = rows[int(places[0])]["fault"], len(places)
                raise _refusal(f"{fault}; or set selection.hygiene.unrenderable: drop, for all {count:,} such rows")
            raise _refusal(
                f"selection.hygiene.{rule}: broken by {len(places)} rows, e.g. {_names(rows, places)}; "
                f"mend them, or set selection.hygiene.{rule}: drop to drop and count them"
            )


def _refuse_missing(rows: Dataset, missing: np.ndarray, need: str, columns: str, way_out: str) -> None:
    places = np.flatnonzero(missing)
    if len(places):
        sources = sorted(set(rows.select(places)["source"]))
        raise _refusal(
            f"{need}, and {len(places)} rows of {', '.join(sources)} have none, e.g. {_names(rows, places)}: map "
            f"{columns} in the source's columns, or choose {way_out}"
        )


def _refuse_nothing(summary: dict, hygiene_only: bool) -> None:
    counts = summary["counts"]
    if counts["kept"] if hygiene_only else counts["by_role"]["after"].get("task"):
        return
    raise _refusal(
        f"the selection leaves no {'task row (role: task)' if counts['kept'] else 'row'} of {counts['rows']}; "
        "dropped: "
        + ", ".join(f"{entry['dropped']} by {entry['stage']}.{entry['reason']}" for entry in counts["stages"])
        + "; loosen the stage that drops them"
    )


def _reasons(settings: Selection) -> list[tuple[str, str]]:
    """What a code means, counted from 1: the hygiene rules' own codes come first, the quotas last."""
    return [
        *(("hygiene", rule) for rule in RULES),
        ("labels", "both_unsafe"),
        ("score", settings.score.signal if settings.score else "score"),
        ("quotas", settings.quotas.by if settings.quotas else "quotas"),
    ]
