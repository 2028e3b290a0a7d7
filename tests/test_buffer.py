"""The pipeline against the slow selection, its refusals, its audit, and what it must not depend on."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import slow_selection
from core.config.schema import Hygiene, Quotas, Score, Selection
from core.data.tokens import TOKENS
from core.objective.presets import PAIR_CLASSES, Margin
from core.runtime.errors import RecipeError
from core.selection.buffer import refuse_overlap, select_rows
from test_hygiene import GOOD, make_row, make_rows

ANSWERS = ["", " ", "brief", "I bake bread.", "i bake BREAD.", "I bake bread!", "Straße 9 it is", "STRASSE 9 IT IS"]
ANSWERS += [
    "No, I will not help with that.",
    "Yes: mix flour, water and salt. " * 2,
    "日本語で答えます。はい、そうです。",
]
PROMPTS = ["", "How?", "how?", "a b c d e", "B c. D", "é" * 9, "x y a b c z"]
SWAPPED = [*slow_selection.SWAPPED, ("chosen_ids", "rejected_ids"), ("chosen_cut", "rejected_cut")]
EVAL_PROMPTS = [[{"role": "user", "content": text}] for text in ("A, b c", "HOW")]


def count_bytes(prompt):
    """A byte-level tokenizer whose template puts two tokens around a message and one at the end."""
    return sum(len(turn["content"].encode()) + 2 for turn in prompt) + 1


def with_tokens(rows, max_length=24):
    """Rows as `tokenize_rows` would leave them with that tokenizer."""
    tokenised = []
    for row in rows:
        prompt, both = count_bytes(row["prompt"]), (row["chosen"].encode(), row["rejected"].encode())
        room = max(0, max_length - prompt)
        ids = {f"{name}_ids": list(text[:room]) for name, text in zip(("chosen", "rejected"), both, strict=True)}
        cut = {
            f"{name}_cut": max(0, len(text) - room) for name, text in zip(("chosen", "rejected"), both, strict=True)
        }
        fault = None if room and all(both) else "leaves no room"
        if fault:
            ids, cut = {name: [] for name in ids}, dict.fromkeys(cut, 0)
        tokenised.append(row | {"prompt_ids": [0] * prompt, **ids, **cut, "fault": fault})
    return Dataset.from_list(tokenised, features=datasets.Features({**make_rows([make_row()]).features, **TOKENS}))


def random_rows(count, seed=0, labelled=True):
    """Rows that meet every rule: few texts, so that pairs repeat in all ways."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        turns = [{"role": "user", "content": draw.choice(PROMPTS) + draw.choice(["", f" {draw.randint(0, 20)}"])}]
        if draw.random() < 0.2:
            turns.insert(0, {"role": "system", "content": draw.choice(["", "Be kind."])})
        source = draw.choice(["pku", "ultrafeedback"])
        scores = [float(draw.randint(1, 5)) for _ in range(2)]
        rows.append(
            make_row(
                f"{source}:{i}",
                prompt=turns,
                chosen=draw.choice(ANSWERS) + draw.choice(["", " Then wait."]),
                rejected=draw.choice(ANSWERS),
                chosen_safe=draw.random() < 0.5 if labelled else None,
                rejected_safe=draw.random() < 0.5 if labelled else None,
                chosen_severity=draw.choice([None, 0, 1, 2, 3]),
                rejected_severity=draw.choice([None, 0, 1, 2, 3]),
                score_chosen=scores[0],
                score_rejected=scores[1],
                tie=scores[0] == scores[1] and draw.random() < 0.2,
                category=draw.choice([None, "violence", "fraud"]),
                role="buffer" if source == "ultrafeedback" else "task",
            )
        )
    return rows


SELECTION = Selection(
    hygiene=Hygiene(eval_ngram=3, min_answer_tokens=4, unrenderable="drop", max_similarity=0.9, max_length_ratio=3),
    labels="safer",
    score=Score("score_gap", keep=0.7),
    quotas=Quotas("pair_class", {"safe/safe": 0.5, "unsafe/unsafe": 3}),
)


ARGUMENTS = {"max_length": 24, "eval_prompts": EVAL_PROMPTS}


def check_against_slow(rows, selection, seed=0):
    """The fate of every row, and each kept row's columns, are those of the slow selection."""
    fates, relabelled = slow_selection.select(rows, selection, seed, 24, count_bytes, EVAL_PROMPTS)
    given = with_tokens(rows)
    if not any(fates[row["row_id"]] is None and row["role"] == "task" for row in rows):
        with pytest.raises(RecipeError, match="leaves no"):
            select_rows(given, selection, seed=seed, **ARGUMENTS)
        return None
    kept, audit = select_rows(given, selection, seed=seed, **ARGUMENTS)
    found = [audit.reasons[code - 1] if code else None for code in audit.codes]
    assert dict(zip([row["row_id"] for row in rows], found, strict=True)) == fates
    expected = []
    for row in given:
        if fates[row["row_id"]] is None:
            swap = row["row_id"] in relabelled
            names = dict(SWAPPED) | {other: one for one, other in SWAPPED} if swap else {}
            expected.append({name: row[names.get(name, name)] for name in row} | {"relabelled": swap})
    assert kept.to_list() == expected
    classes = [PAIR_CLASSES.index(pair_class(row)) for row in expected]
    assert audit.classes[audit.codes == 0].tolist() == classes
    return kept, audit


# ---------------------------------------------------------------------------------------------- against the slow one
@st.composite
def selections(draw):
    action = st.sampled_from(["drop", "keep"])
    hygiene = Hygiene(
        empty=draw(action),
        identical=draw(action),
        max_similarity=draw(st.sampled_from([None, 0.5, 0.9])),
        min_tokens=draw(st.sampled_from([None, 6])),
        max_length_ratio=draw(st.sampled_from([None, 1.5, 4.0])),
        duplicates=draw(action),
        contradictions=draw(action),
        ties=draw(action),
        min_answer_tokens=draw(st.sampled_from([None, 4])),
        unrenderable="drop",
        eval_ngram=draw(st.sampled_from([None, 1, 3])),
        identical_tokens=draw(action),
    )
    signal = draw(st.sampled_from(["score_gap", "length_ratio", "score_chosen", None]))
    score = None
    if signal:
        kept = draw(st.sampled_from([{"keep": 0.1}, {"keep": 0.75}, {"keep": 1.0}, {"band": [0.2, 0.9]}]))
        direction = draw(st.sampled_from(["easy", "hard", "middle"]))
        score = Score(signal, **kept, direction=direction, role=draw(st.sampled_from(["all", "task", "buffer"])))
    limits = {
        "pair_class": {"safe/unsafe": 0.5, "unsafe/safe": 2},
        "source": {"pku": 0.8},
        "category": {"none": 1, "fraud": 0.3},
    }
    by = draw(st.sampled_from([None, "pair_class"]))
    quotas = Quotas(by, limits[by]) if by else None
    labels = draw(st.sampled_from(["helpful", "safer", "safe_first", "safedpo_t"]))
    return Selection(hygiene=hygiene, labels=labels, score=score, quotas=quotas)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(selections(), st.integers(1, 60), st.integers(0, 10**6))
def test_the_fate_of_every_row(selection, count, seed):
    check_against_slow(random_rows(count, seed), selection, seed)


@pytest.mark.parametrize("by, limits", [("source", {"pku": 0.8}), ("category", {"none": 1, "fraud": 0.3})])
def test_quotas_by_other_columns(by, limits):
    _, audit = check_against_slow(
        random_rows(400), Selection(SELECTION.seed, SELECTION.hygiene, quotas=Quotas(by, limits))
    )
    assert ("quotas", by) in {entry[:2] for entry in audit.table()}


@pytest.mark.slow
def test_a_hundred_thousand_rows(monkeypatch):
    """All stages on. rapidfuzz's plain call stands in for the slow LCS."""
    from rapidfuzz.distance import LCSseq

    monkeypatch.setattr(slow_selection, "lcs", LCSseq.similarity)
    rows = random_rows(100_000)
    for i, row in enumerate(rows):  # a number of its own in most prompts, or all would be duplicates
        if i % 3:
            row["prompt"][-1]["content"] += f" {i}"
    quotas = Quotas("pair_class", {"safe/safe": 0.5, "unsafe/unsafe": 1000})
    kept, audit = check_against_slow(rows, replace(SELECTION, quotas=quotas))
    assert len(audit.table()) >= 10  # of the eleven rules two or three are rare among these rows


# ---------------------------------------------------------------------------------------------- the label policies
@pytest.mark.parametrize(
    # safe and severity of chosen, then of rejected; whether each policy swaps (1), keeps (0) or drops (None)
    "chosen, rejected, safer, safe_first, safedpo_t",
    [
        ((True, 0), (True, 0), 0, 0, 0),
        ((True, 1), (True, 0), 1, 0, 0),  # both safe: only safer looks at severities
        ((True, 0), (False, 3), 0, 0, 0),
        ((True, 3), (False, 0), 0, 0, 0),  # the label stands above the severity
        ((False, 1), (True, 0), 1, 1, 1),
        ((False, None), (True, None), 1, 1, 1),
        ((False, 2), (False, 1), 1, 1, None),
        ((False, 1), (False, 2), 0, 0, None),
        ((False, 2), (False, 2), 0, 0, None),
        ((False, None), (False, 0), 0, 0, None),  # unknown: the label stays
    ],
)
def test_label_policies(chosen, rejected, safer, safe_first, safedpo_t):
    columns = ("chosen_safe", "chosen_severity", "rejected_safe", "rejected_severity")
    row = make_row(**dict(zip(columns, chosen + rejected, strict=True)), score_chosen=7.0, score_rejected=3.0)
    other = make_row("a:1", prompt="Another one?", chosen_safe=True, rejected_safe=True)
    for policy, swap in (("helpful", 0), ("safer", safer), ("safe_first", safe_first), ("safedpo_t", safedpo_t)):
        kept, audit = select_rows(make_rows([row, other]), Selection(labels=policy), seed=0)
        if swap is None:
            assert kept["row_id"][:] == ["a:1"]
            assert audit.table() == [("labels", "both_unsafe", 1), ("kept", "", 1)]
            continue
        first = kept[0]
        assert first["relabelled"] == bool(swap)
        sides = ("rejected", "chosen") if swap else ("chosen", "rejected")
        for side, name in zip(("chosen", "rejected"), sides, strict=True):
            assert first[side] == row[name]
            assert first[f"{side}_safe"] == row[f"{name}_safe"]
            assert first[f"{side}_severity"] == row[f"{name}_severity"]
            assert first[f"score_{side}"] == row[f"score_{name}"]


def test_the_buffer_keeps_its_labels():
    """A buffer without safety labels stands beside task rows that a policy needs them of."""
    rows = [
        make_row("a:0", chosen_safe=False, rejected_safe=True),
        make_row("b:0", prompt="Another one?", role="buffer"),
        make_row("b:1", prompt="A third one?", role="buffer", chosen_safe=False, rejected_safe=True),
    ]
    for policy in ("safer", "safe_first", "safedpo_t"):
        kept, _ = select_rows(make_rows(rows), Selection(labels=policy), seed=0)
        assert kept["relabelled"][:] == [True, False, False]


def test_an_evaluation_set_is_selected_for_hygiene_only():
    rows = random_rows(200)
    kept, audit = select_rows(make_rows(rows), SELECTION, seed=0, hygiene_only=True)
    expected, _ = select_rows(make_rows(rows), Selection(hygiene=SELECTION.hygiene), seed=0)
    assert kept.to_list() == expected.to_list() and not any(kept["relabelled"])
    assert {stage for stage, *_ in audit.table()} == {"hygiene", "kept"}
    # A set of buffer rows alone is fine here, and nothing to train on elsewhere.
    alone = make_rows([row for row in rows if row["role"] == "buffer"])
    assert len(select_rows(alone, SELECTION, seed=0, hygiene_only=True)[0])
    with pytest.raises(RecipeError, match="leaves no task row"):
        select_rows(alone, SELECTION, seed=0)


# ---------------------------------------------------------------------------------------------- score and quotas
def scored(gaps, **columns):
    return [
        make_row(f"a:{i}", prompt=f"Question {i}?", score_chosen=float(gap), score_rejected=0.0, **columns)
        for i, gap in enumerate(gaps)
    ]


@pytest.mark.parametrize(
    "score, kept",
    [
        ({"keep": 0.3}, [7, 8, 9]),
        ({"keep": 0.3, "direction": "hard"}, [0, 1, 2]),
        ({"keep": 0.3, "direction": "middle"}, [3, 4, 5]),  # (10 − 3)//2 = 3 below, 4 above
        ({"keep": 0.01}, [9]),  # at least one
        ({"band": [0.25, 0.5]}, [2, 3, 4]),  # ⌊2.5⌋ to ⌊5⌋
        ({"band": [0.0, 1.0]}, list(range(10))),
    ],
)
def test_what_the_score_filter_keeps(score, kept):
    gaps = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    rows, _ = select_rows(make_rows(scored(gaps)), Selection(score=Score("score_gap", **score)), seed=0)
    assert sorted(rows["score_chosen"]) == kept


def test_a_fraction_is_taken_as_it_is_written():
    """0.29·100 is 28.999999999999996 in floats, and 29 rows."""
    rows, _ = select_rows(make_rows(scored(range(100))), Selection(score=Score("score_gap", keep=0.29)), seed=0)
    assert len(rows) == 29
    quotas = Quotas("source", {"a": 0.29})
    assert len(select_rows(make_rows(scored(range(100))), Selection(quotas=quotas), seed=0)[0]) == 29


def test_signals():
    """Each signal's largest row of three; the gap of the reference is asked of the rows as they are relabelled."""
    rows = scored([2, 1, 3])
    for row, severities, extra in zip(rows, [(0, 3), (0, 1), (1, 2)], [0.0, 5.0, -1.0], strict=True):
        row |= {"chosen_severity": severities[0], "rejected_severity": severities[1], "order": extra}
    rows[2]["rejected"] += " Long answer, longer than the others."
    features = datasets.Features(make_rows([make_row()]).features | {"order": datasets.Value("float64")})
    dataset = Dataset.from_list(rows, features=features)

    def best(signal):
        return select_rows(dataset, Selection(score=Score(signal, keep=0.4)), seed=0)[0]["row_id"][:]

    assert best("score_gap") == ["a:2"]
    assert best("severity_gap") == ["a:0"]
    assert best("length_ratio") == ["a:2"]
    assert best("order") == ["a:1"]  # an extra column, of a name that the facts have too
    assert best("rejected_severity") == ["a:0"]
    asked = []

    def reference_gap(given):
        asked.append((given["row_id"][:], given["chosen"][:]))
        return np.array([len(answer) for answer in given["chosen"]])

    rows[1] |= {"role": "buffer"}
    rows[0] |= {"chosen_safe": False, "rejected_safe": True}
    rows[2] |= {"chosen_safe": True, "rejected_safe": True}
    selection = Selection(labels="safer", score=Score("reference_gap", keep=0.5, role="task"))
    dataset = Dataset.from_list(rows, features=features)
    kept, _ = select_rows(dataset, selection, seed=0, reference_gap=reference_gap)
    assert asked == [(["a:0", "a:2"], [rows[0]["rejected"], rows[2]["chosen"]])]
    assert kept["row_id"][:] == ["a:0", "a:1"]  # 38 letters against 35; the buffer row is not ranked


def test_ties_in_the_ranking_and_quotas_depend_on_the_seed_alone():
    rows = scored([1] * 40)
    for selection in (Selection(score=Score("score_gap", keep=0.5)), Selection(quotas=Quotas("source", {"a": 20}))):
        first, again, other = (
            select_rows(make_rows(given), selection, seed=seed)[0]["row_id"][:]
            for given, seed in ((rows, 0), (random.Random(1).sample(rows, 40), 0), (rows, 1))
        )
        assert len(first) == 20 and set(first) == set(again) != set(other)
    # The very rows, so that another machine or another version is held to them too.
    ids = [row["row_id"] for row in scored([1] * 8)]
    kept, _ = select_rows(make_rows(scored([1] * 8)), Selection(quotas=Quotas("source", {"a": 3})), seed=7)
    assert set(kept["row_id"]) == set(sorted(ids, key=lambda row_id: slow_selection.order({"row_id": row_id}, 7))[:3])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_the_order_of_rows_decides_nothing_but_which_duplicate_stays(seed):
    rows = random_rows(80, seed)
    selection = replace(SELECTION, hygiene=replace(SELECTION.hygiene, duplicates="keep"))
    shuffled = random.Random(seed).sample(rows, len(rows))
    try:
        one, audit = select_rows(make_rows(rows), selection, seed=seed)
    except RecipeError:
        assume(False)
    other, other_audit = select_rows(make_rows(shuffled), selection, seed=seed)
    assert audit.digest == other_audit.digest and audit.counts["left"] == other_audit.counts["left"]
    key = str.lower
    assert sorted(one["row_id"], key=key) == sorted(other["row_id"], key=key)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["helpful", "safer", "safe_first", "safedpo_t"]))
def test_hygiene_and_labels_are_idempotent(seed, policy):
    selection = Selection(hygiene=SELECTION.hygiene, labels=policy)
    try:
        once, _ = select_rows(with_tokens(random_rows(60, seed)), selection, seed=0, **ARGUMENTS)
    except RecipeError:
        assume(False)
    rows = once.remove_columns("relabelled")
    twice, audit = select_rows(rows, selection, seed=0, **ARGUMENTS)
    assert audit.counts["kept"] == len(once) and audit.counts["relabelled"] == 0
    assert twice.remove_columns("relabelled").to_list() == rows.to_list()


# ---------------------------------------------------------------------------------------------- refusals
def refusal(rows, selection, **arguments):
    with pytest.raises(RecipeError) as caught:
        select_rows(make_rows(rows), selection, seed=0, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_rules_set_to_error_name_the_rows_and_the_way_out():
    rows = [make_row(f"a:{i}", prompt=f"Question {i}?") for i in range(9)]
    for i in range(1, 8):
        rows[i]["chosen"] = ""
    message = refusal(rows, Selection(hygiene=Hygiene(empty="error")))
    assert "broken by 7 rows, e.g. a:1, a:2, a:3, a:4, a:5, …" in message
    assert "set selection.hygiene.empty: drop to drop and count them" in message
    for rule, change in (
        ("identical", {"rejected": rows[0]["chosen"]}),
        ("ties", {"tie": True, "prompt": rows[8]["prompt"]}),
        ("duplicates", {}),
    ):
        pair = [rows[0], rows[0] | {"row_id": "a:9"} | change]
        assert f"selection.hygiene.{rule}: broken by 1 rows, e.g. a:9;" in refusal(
            pair, Selection(hygiene=Hygiene(**{rule: "error"}))
        )


def test_missing_labels_and_signals_name_the_source():
    rows = [make_row("a:0", chosen_safe=True, rejected_safe=True), make_row("b:0", prompt="Another one?")]
    message = refusal(rows, Selection(labels="safer"))
    assert "label policy safer needs safety labels" in message and "1 rows of b have none, e.g. b:0" in message
    assert "chosen_safe and rejected_safe" in message and "labels: helpful" in message
    message = refusal(rows, Selection(score=Score("severity_gap", keep=0.5)))
    assert "severity_gap needs severities" in message and "a:0, b:0" in message
    message = refusal(rows, Selection(score=Score("score_gap", keep=0.5)))
    assert "score_gap is unknown (null or NaN) in 2 rows, e.g. a:0, b:0" in message
    rows[0] |= {"score_chosen": 1.0, "score_rejected": 0.0}
    rows[1] |= {"score_chosen": float("nan"), "score_rejected": 0.0}
    assert "unknown (null or NaN) in 1 rows, e.g. b:0" in refusal(rows, Selection(score=Score("score_gap", keep=0.5)))
    message = refusal(rows, Selection(score=Score("scor_gap", keep=0.5)))
    assert "scor_gap is neither a signal nor a numeric column; did you mean score_gap?" in message
    assert "neither a signal nor a numeric column" in refusal(rows, Selection(score=Score("category", keep=0.5)))


def test_a_quota_of_no_group_is_refused():
    message = refusal([make_row()], Selection(quotas=Quotas("source", {"b": 3})))
    assert "selection.quotas.limits: no row has the source 'b'; there are e.g. a" in message
    message = refusal([make_row()], Selection(quotas=Quotas("pair_class", {"safe/unsave": 3})))
    assert "safe/unsafe" in message


def test_nothing_left_gives_the_counts_by_stage():
    rows = [make_row("a:0", rejected="  "), *scored([1, 1, 1])]
    rows[1]["row_id"], rows[2] = "a:9", rows[2] | {"prompt": rows[1]["prompt"]}
    message = refusal(rows, Selection(quotas=Quotas("source", {"a": 0})), bad_rows=[bad_row("a:7")])
    assert "leaves no row of 5" in message
    for part in (
        "1 by rows.null answer",
        "1 by hygiene.empty",
        "1 by hygiene.duplicates",
        "2 by quotas.source",
    ):
        assert part in message
    with pytest.raises(RecipeError, match="no rows"):
        select_rows(make_rows(rows).select([]), Selection(), seed=0)


def bad_row(row_id):
    return {"row_id": row_id, "source": "a", "reason": "null answer"}


def test_overlap_of_training_and_evaluation_rows():
    """Also with a training row that was dropped; an evaluation row that was dropped is none."""
    plain = Selection()

    def overlap(train, held_out):
        refuse_overlap(*(select_rows(make_rows(rows), plain, seed=0)[1] for rows in (train, held_out)))

    train = [make_row(f"a:{i}", prompt=f"Question {i}?") for i in range(5)]
    held_out = [make_row(f"e:{i}", prompt=f"Question {i}!") for i in range(3)]
    overlap(train, held_out)
    held_out[1] |= {"prompt": [{"role": "user", "content": "QUESTION 3?"}]}
    held_out[1] |= {"chosen": train[3]["rejected"].upper(), "rejected": train[3]["chosen"]}  # swapped: the same pair
    for tie in (False, True):
        train[3]["tie"] = tie
        with pytest.raises(RecipeError, match="1 evaluation rows are training rows too, e.g. e:1"):
            overlap(train, held_out)
    held_out[1]["tie"] = True
    overlap(train, held_out)
    held_out[1] |= {"tie": False, "rejected": held_out[1]["rejected"] + " Or not."}
    overlap(train, held_out)


def test_a_row_that_cannot_be_rendered_is_told_with_its_way_out():
    rows = with_tokens([make_row("a:0", prompt="x" * 30), make_row("a:1"), make_row("a:2", prompt="y" * 40)], 30)
    settings = Selection(hygiene=Hygiene(min_answer_tokens=None))
    with pytest.raises(RecipeError, match="^leaves no room; or set .*unrenderable: drop, for all 2 such rows$"):
        select_rows(rows, settings, seed=0, max_length=30)
    settings.hygiene.unrenderable = "drop"
    kept, audit = select_rows(rows, settings, seed=0, max_length=30)
    assert kept["row_id"][:] == ["a:1"] and audit.table()[0] == ("hygiene", "unrenderable", 2)


@pytest.mark.parametrize(
    "row, labels, margin, goes",
    [
        ({}, "helpful", {}, True),
        # A safe answer against an unsafe one, which safety puts in order: by relabelling, or by the margin.
        ({"chosen_safe": True, "rejected_safe": False}, "helpful", {}, True),
        ({"chosen_safe": True, "rejected_safe": False}, "safer", {}, False),
        ({"chosen_safe": True, "rejected_safe": False}, "helpful", {"a": 1.5, "b": 0.5}, False),
        ({"chosen_safe": True, "rejected_safe": True}, "safer", {"a": 1.5, "b": 0.5}, True),
        ({"chosen_safe": True, "rejected_safe": False, "role": "buffer"}, "safer", {}, True),
        # The margin takes the logarithm of the gap: what has put the answers in order does not help there.
        ({"tie": False, "score_chosen": 2.0, "score_rejected": 2.0}, "helpful", {}, False),
        ({"tie": False, "score_chosen": 2.0, "score_rejected": 2.0}, "helpful", {"k": 1.0, "phi": "log"}, True),
    ],
)
def test_a_tie_goes_where_a_strict_label_is_needed(row, labels, margin, goes):
    labelled = {"chosen_safe": True, "rejected_safe": True, "score_chosen": 3.0, "score_rejected": 1.0}
    rows = make_rows([make_row("a:0", **({"tie": True} | row)), make_row("a:1", prompt="Another?", **labelled)])
    _, audit = select_rows(rows, Selection(labels=labels), seed=0, margin=Margin(**margin))
    assert audit.codes.tolist() == [8 if goes else 0, 0] and audit.reasons[7] == ("hygiene", "ties")


def test_the_audit_says_what_rules_that_are_off_would_drop_of_each_pair_class():
    rows = [
        make_row(f"a:{i}", prompt=f"Question {i}?", chosen_safe=safe, rejected_safe=False, rejected=GOOD[1] * times)
        for i, (safe, times) in enumerate([(True, 1), (True, 4), (False, 4), (True, 5), (None, 1)])
    ]
    _, audit = select_rows(with_tokens(rows, 900), Selection(), seed=0, max_length=900)
    off = {entry["rule"]: entry for entry in audit.counts["off"]}
    assert off["max_length_ratio"] == {
        "rule": "max_length_ratio", "at": 3.0, "rows": 3, "by_class": {"safe/unsafe": 2, "unsafe/unsafe": 1}
    }  # fmt: skip
    assert set(off) == {"min_tokens", "max_length_ratio", "max_similarity"} and off["min_tokens"]["rows"] == 0


# ---------------------------------------------------------------------------------------------- audit
def test_the_audit_accounts_for_every_row(tmp_path):
    rows = random_rows(300)
    rows[0]["row_id"] = 'pku:"quoted"\n\\ é'
    bad = [bad_row("a:7"), bad_row("a:8")]
    kept, audit = select_rows(make_rows(rows), SELECTION, seed=5, bad_rows=bad)
    audit.save(tmp_path / "new")
    lines = [json.loads(line) for line in (tmp_path / "new" / "selection.jsonl").read_text("utf-8").splitlines()]
    summary = json.loads((tmp_path / "new" / "selection.json").read_text("utf-8"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["selection.json", "selection.jsonl"]

    fates, relabelled = slow_selection.select(rows, SELECTION, 5)
    expected = [
        {
            "row_id": row["row_id"],
            "source": "a",
            "kept": False,
            "stage": "rows",
            "reason": "null answer",
            "relabelled": False,
        }
        for row in bad
    ]
    for row in rows:
        fate = fates[row["row_id"]]
        expected.append(
            {
                "row_id": row["row_id"],
                "source": row["source"],
                "kept": fate is None,
                "stage": fate and fate[0],
                "reason": fate and fate[1],
                "relabelled": row["row_id"] in relabelled,
            }
        )
    assert lines == expected

    counts = summary["counts"]
    dropped = Counter((line["stage"], line["reason"]) for line in expected if not line["kept"])
    assert {(entry["stage"], entry["reason"]): entry["dropped"] for entry in counts["stages"]} == dict(dropped)
    assert audit.table() == [(*key, count) for key, count in dropped_in_order(dropped, counts)] + [
        ("kept", "", len(kept))
    ]
    assert (counts["rows"], counts["kept"], counts["relabelled"]) == (302, len(kept), len(relabelled))
    left = 302
    for stage in ("rows", "hygiene", "labels", "score", "quotas"):
        left -= sum(count for (of, _), count in dropped.items() if of == stage)
        assert counts["left"][stage] == left
    for name, before, after in (
        ("by_source", [row["source"] for row in rows], kept["source"]),
        ("by_role", [row["role"] for row in rows], kept["role"]),
        ("by_class", list(map(pair_class, rows)), list(map(pair_class, kept))),
    ):
        assert counts[name] == {"before": dict(Counter(before)), "after": dict(Counter(after))}
    digest = "".join(sorted(f"{row['row_id']}\t{row['relabelled']:d}\n" for row in kept))
    assert summary["digest"] == audit.digest == hashlib.sha256(digest.encode()).hexdigest()
    assert summary["seed"] == 5
    assert summary["settings"]["score"]["keep"] == 0.7


def dropped_in_order(dropped, counts):
    return [
        ((entry["stage"], entry["reason"]), dropped[entry["stage"], entry["reason"]]) for entry in counts["stages"]
    ]


def pair_class(row):
    return slow_selection.group_of(row, "pair_class")


def test_the_digest_tells_relabelling_apart():
    row = make_row(chosen_safe=False, rejected_safe=True)
    digests = {
        select_rows(make_rows([row]), Selection(labels=labels), seed=0)[1].digest for labels in ("helpful", "safer")
    }
    assert len(digests) == 2


def test_rows_that_are_a_choice_of_a_file(tmp_path):
    """Rows behind an index (as `fraction` or `bad_rows: drop` leave them) come out as themselves, swapped or not."""
    rows = random_rows(200)
    with_tokens(rows).save_to_disk(tmp_path)
    places = random.Random(0).sample(range(200), 120)
    chosen = [rows[place] for place in places]
    expected, audit = check_against_slow(chosen, SELECTION)
    on_disk, other = select_rows(Dataset.load_from_disk(tmp_path).select(places), SELECTION, seed=0, **ARGUMENTS)
    assert on_disk.to_list() == expected.to_list() and audit.digest == other.digest
    assert any(on_disk["relabelled"]) and on_disk.cache_files  # mapped: no text is held in memory


def test_the_same_choice_has_the_same_name():
    """Under which datasets keeps what is made of it; another choice, or another label, has another."""
    rows = with_tokens(random_rows(120))

    def name(selection, **arguments):
        return select_rows(rows, selection, seed=0, **(ARGUMENTS | arguments))[0]._fingerprint

    first = name(SELECTION)
    assert first == name(SELECTION)
    others = [replace(SELECTION, labels="helpful"), replace(SELECTION, quotas=None)]
    assert len({first, *map(name, others), name(SELECTION, eval_prompts=None)}) == 4
