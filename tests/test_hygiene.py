"""Each rule of the hygiene on rows made for it, and the n-gram search against the comparison of all with all."""

import random

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import slow_selection
from conftest import FEATURES
from core.config.schema import Hygiene
from core.selection.hygiene import CODES, RULES, first_broken, read_facts
from core.selection.prompts import Ngrams, TokenBound
from core.selection.scanning import scan

SCHEMA = {name: feature for name, feature in FEATURES.items() if name != "relabelled"}
GOOD = ("Bake bread slowly, and wait for it.", "Buy it at the shop around the corner.")


def make_row(row_id="a:0", prompt="How do I bake bread?", chosen=GOOD[0], rejected=GOOD[1], **columns):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    row = dict.fromkeys(SCHEMA) | {"tie": False, "source": row_id.split(":")[0], "role": "task"}
    return row | {"row_id": row_id, "prompt": messages, "chosen": chosen, "rejected": rejected} | columns


def make_rows(rows):
    return Dataset.from_list(rows, features=type(FEATURES)(SCHEMA))


def codes(rows, settings=None, eval_prompts=None, max_length=None, count=None, sample=()):
    settings = settings or Hygiene(empty="drop")
    ngrams = Ngrams(eval_prompts, settings.eval_ngram) if eval_prompts and settings.eval_ngram else None
    bound = None
    if max_length and settings.min_answer_tokens is not None:
        bound = TokenBound(sample, max_length - settings.min_answer_tokens, count)
    facts = scan(make_rows(rows), lambda batch: read_facts(batch, settings, 0, ngrams, bound))
    found = first_broken(make_rows(rows), facts, settings, bound, count)
    names = {code: rule for rule, code in CODES.items()}
    return [names.get(int(code)) for code in found]


@pytest.mark.parametrize(
    "row, rule",
    [
        ({}, None),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "\t"}]}, "empty"),
        # An empty system message is no empty prompt: BFPO's own template has one.
        ({"prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]}, None),
        ({"chosen": "\u2003 \n"}, "empty"),
        ({"rejected": ""}, "empty"),
        ({"rejected": GOOD[0]}, "identical"),
        ({"chosen": "Too short", "rejected": "Ten chars."}, "min_characters"),  # 9 and 10
        ({"chosen": "Ten chars.", "rejected": "Another one it is"}, None),
        ({"chosen": "ten chars.", "rejected": "Wait for it, and then wait more"}, "max_length_ratio"),  # 10 and 31
        ({"chosen": "ten chars.", "rejected": "Wait for it, and then wait mor"}, None),  # 10 and 30: 3 is allowed
        # 21 letters and 19 of them: 2·19/40 = 0.95. Without three: 2·18/39 = 0.923; 17: 0.895.
        ({"chosen": "abcdefghijklmnopqrstu", "rejected": "abcdefghijklmnopqrs"}, "max_similarity"),
        ({"chosen": "abcdefghijklmnopqrstu", "rejected": "abcdefghijklmnopqr"}, "max_similarity"),
        ({"chosen": "abcdefghijklmnopqrstu", "rejected": "abcdefghijklmnopq"}, None),
        # 9 of 10 letters in common: 18/20 = 0.9, which is not over 0.9.
        ({"chosen": "abcdefghij", "rejected": "abcdefghiX"}, None),
        ({"tie": True}, "ties"),
    ],
)
def test_a_row_that_breaks_one_rule(row, rule):
    assert codes([make_row(**row)]) == [rule]


def test_every_rule_can_be_turned_off():
    """Rows that break each rule; with a rule off, its row stays, unless a later rule stands behind it."""
    rows = {
        "empty": make_row(prompt=" "),
        "identical": make_row(chosen=GOOD[0], rejected=GOOD[0]),
        "min_characters": make_row(chosen="brief", rejected="words"),
        "max_length_ratio": make_row(chosen="x" * 10, rejected="y" * 31),
        "max_similarity": make_row(chosen=GOOD[0], rejected=GOOD[0] + "!"),
        "ties": make_row(tie=True),
    }
    off = {"empty": "keep", "identical": "keep", "ties": "keep"}
    for rule, row in rows.items():
        assert codes([row]) == [rule]
        others = {"max_similarity": None} if rule == "identical" else {}
        assert codes([row], Hygiene(**{rule: off.get(rule)}, **others)) == [None]
    pair = [make_row("a:0"), make_row("a:1")]
    assert codes(pair) == [None, "duplicates"]
    assert codes(pair, Hygiene(duplicates="keep")) == [None, None]
    pair[1] |= {"chosen": GOOD[1], "rejected": GOOD[0]}
    assert codes(pair) == ["contradictions"] * 2
    assert codes(pair, Hygiene(contradictions="keep")) == [None, None]


def test_the_first_rule_wins():
    """A row that breaks everything goes by the first rule that is on, in the order of `RULES`."""
    text = "one two three"
    prompts = [[{"role": "user", "content": text}]]
    row = make_row(prompt=text, chosen="", rejected="", tie=True)
    settings = Hygiene(empty="drop", eval_ngram=2)
    expected = ["empty", "identical", "min_characters", "ties", "min_answer_tokens", "eval_ngram", None]
    off = {"empty": "keep", "identical": "keep", "ties": "keep"}
    for rule in expected:
        assert codes([row], settings, prompts, max_length=16, count=lambda batch: [9] * len(batch)) == [rule]
        if rule:
            setattr(settings, rule, off.get(rule))
    assert list(RULES) == list(slow_selection.RULES)


def test_duplicates_are_told_after_case_folding():
    rows = [
        make_row("a:0", prompt="Straße?", chosen="Die Straße ist lang.", rejected=GOOD[1]),
        make_row("a:1", prompt="STRASSE?", chosen="Die STRASSE ist lang.", rejected=GOOD[1].upper()),
        make_row("a:2", prompt="Strasse!", chosen="Die Straße ist lang.", rejected=GOOD[1]),  # another prompt
        make_row("a:3", prompt=[{"role": "system", "content": "Straße?"}], chosen="Die Straße ist lang."),
    ]
    assert codes(rows) == [None, "duplicates", None, None]


def test_a_duplicate_of_a_dropped_row_is_none():
    """The first row is too short by a letter (ß folds to two), so that the second is the first that stays."""
    settings = Hygiene(min_characters=8, max_length_ratio=None)
    rows = [make_row("a:0", chosen="ßabcdef"), make_row("a:1", chosen="SSabcdef")]
    assert codes([rows[0]], settings) == ["min_characters"]
    assert codes(rows, settings) == ["min_characters", None]


def test_contradictions_take_all_rows_of_the_pair_and_no_other():
    one, other = GOOD
    rows = [
        make_row("a:0", chosen=one, rejected=other),
        make_row("a:1", chosen=other.upper(), rejected=one),
        make_row("a:2", chosen=one.upper(), rejected=other),  # a duplicate of the first
        make_row("a:3", prompt="Another question", chosen=other, rejected=one),
        make_row("a:4", prompt="Yet another", chosen=one, rejected=one.upper()),  # folds to one text: no order
    ]
    settings = Hygiene(max_similarity=None)
    assert codes(rows, settings) == ["contradictions", "contradictions", "duplicates", None, None]
    settings.duplicates = "keep"
    assert codes(rows, settings) == ["contradictions", "contradictions", "contradictions", None, None]


def test_separators_within_texts_do_not_merge_turns():
    """Roles and contents that join to the same letters are still different prompts."""
    rows = [
        make_row("a:0", prompt=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]),
        make_row("a:1", prompt="a user b"),
        make_row("a:2", prompt="ab"),
    ]
    assert codes(rows) == [None, None, None]


# ---------------------------------------------------------------------------------------------- room for an answer
def test_the_prompt_must_leave_room(tokenizer):
    """Around the limit, one token apart; the texts are of the tokenizer's own bytes, one to three tokens a word."""

    def count(prompts):
        counts.append(len(prompts))
        return [
            len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) for prompt in prompts
        ]

    counts = []
    rows = [make_row(f"a:{i}", prompt="é" * i + "x", chosen=f"{GOOD[0]} {i}") for i in range(60)]
    rows += [make_row("a:60", prompt=[{"role": "system", "content": "é" * 30}, {"role": "user", "content": "x"}])]
    exact = count([row["prompt"] for row in rows])
    for max_length in (exact[0] + 15, exact[30] + 16, exact[30] + 15, exact[60] + 16, exact[60] + 15):
        counts.clear()
        found = codes(rows, Hygiene(), max_length=max_length, count=count)
        assert found == ["min_answer_tokens" if tokens + 16 > max_length else None for tokens in exact]
    assert sum(counts) < len(rows)  # the short prompts were never tokenised


def test_the_room_is_checked_against_the_slow_count_for_any_text(tokenizer):
    def count(prompts):
        return [
            len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) for prompt in prompts
        ]

    draw = random.Random(0)
    letters = "abc \nüß€😀<|user|>"
    rows = []
    for i in range(300):
        turns = [
            {"role": role, "content": "".join(draw.choices(letters, k=draw.randint(0, 25)))}
            for role in draw.choice([["user"], ["system", "user"], ["user", "assistant", "user"]])
        ]
        rows.append(make_row(f"a:{i}", prompt=turns))
    settings = Hygiene(empty="keep", duplicates="keep", contradictions="keep")
    exact = count([row["prompt"] for row in rows])
    for max_length in range(30, 120, 9):
        found = codes(rows, settings, max_length=max_length, count=count)
        assert found == ["min_answer_tokens" if tokens + 16 > max_length else None for tokens in exact]


def test_words_of_known_tokens_spare_the_tokenizer_most_prompts(tokenizer):
    """Prompts of the tokenizer's own words: the same verdicts, and most of those over the limit in bytes not asked."""

    def count(prompts):
        asked.append(len(prompts))
        return [
            len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) for prompt in prompts
        ]

    asked = []
    draw = random.Random(0)
    vocabulary = ["bread", "capital", "yeast,", "is", "über", "France?\nParis", "", "x" * 9]
    prompts = [" ".join(draw.choices(vocabulary, k=draw.randint(1, 80))) for _ in range(6000)]
    rows = [make_row(f"a:{i}", prompt=prompt) for i, prompt in enumerate(prompts)]
    settings = Hygiene(duplicates="keep", empty="keep")
    exact = count([row["prompt"] for row in rows])
    max_length = sorted(exact)[5700]  # room for 95 of 100
    expected = ["min_answer_tokens" if tokens + 16 > max_length else None for tokens in exact]
    for sample, most in (([], 6000), ([row["prompt"] for row in rows[:500]], 4000)):
        asked.clear()
        assert codes(rows, settings, max_length=max_length, count=count, sample=sample) == expected
        assert sum(asked) <= most


def test_a_tokenizer_that_breaks_the_bound_is_asked_about_every_prompt():
    """A tokenizer of one token per letter, but for texts of one word after "a ": the bound is far too low for it."""

    def count(prompts):
        texts = [turns[-1]["content"] for turns in prompts]
        return [5 + (2 if text.startswith("a ") else len(text)) for text in texts]

    rows = [make_row(f"a:{i}", prompt="word " * (i % 100) + str(i)) for i in range(5000)]
    exact = count([row["prompt"] for row in rows])
    expected = ["min_answer_tokens" if tokens + 16 > 250 else None for tokens in exact]
    found = codes(rows, max_length=250, count=count, sample=[row["prompt"] for row in rows[:100]])
    assert found == expected and 1000 < sum(map(bool, found)) < 4000


def test_a_prompt_of_too_many_words_is_too_long_unasked(tokenizer):
    """Of 2,500 prompts at the limit's edge and 5,000 of far too many words, the tokenizer meets the first alone."""

    def count(prompts):
        asked.append(len(prompts))
        return [len(tokenizer.apply_chat_template(turns)["input_ids"]) for turns in prompts]

    asked = []
    prompts = ["bread yeast " * 20 + "is"] * 2500 + ["bread unheard-of " * 200] * 5000
    rows = [make_row(f"a:{i}", prompt=prompt) for i, prompt in enumerate(prompts)]
    settings = Hygiene(duplicates="keep", empty="keep")
    found = codes(rows, settings, max_length=150, count=count, sample=[row["prompt"] for row in rows[2400:2600]])
    assert found == [None] * 2500 + ["min_answer_tokens"] * 5000
    assert sum(asked) < 3000


def test_a_tokenizer_that_merges_words_is_asked_about_every_prompt():
    """A token for three words: there are more words than tokens, so that words prove nothing."""

    def count(prompts):
        words = [turns[-1]["content"].split(" ") for turns in prompts]
        return [5 + (2 if first == "a" else 1 + (1 + len(rest)) // 3) for first, *rest in words]

    rows = [make_row(f"a:{i}", prompt="word " * (i % 100) + str(i)) for i in range(5000)]
    exact = count([row["prompt"] for row in rows])
    expected = ["min_answer_tokens" if tokens + 16 > 45 else None for tokens in exact]
    found = codes(rows, max_length=45, count=count, sample=[row["prompt"] for row in rows[:100]])
    assert found == expected and 1000 < sum(map(bool, found)) < 4000


# ---------------------------------------------------------------------------------------------- evaluation prompts
def test_an_ngram_is_found_wherever_it_stands():
    """A run of 13 words at every place of a prompt; with 12 of them nothing is found."""
    run = [f"w{i}" for i in range(13)]
    ngrams = Ngrams([[{"role": "user", "content": "before " + " ".join(run) + " after"}]], 13)
    for place in range(40):
        around = [f"x{i}" for i in range(40)]
        assert ngrams.shared_with(" ".join(around[:place] + run + around[place:]))
        assert not ngrams.shared_with(" ".join(around[:place] + run[1:] + around[place:]))


def test_words_are_compared_without_case_and_punctuation():
    prompts = [[{"role": "user", "content": "What IS the capital, of FRANCE?"}]]
    long = Ngrams(prompts, 4)
    assert long.shared_with("tell me: is the capital-of spain?")
    assert not long.shared_with("the capital of spain")  # a shared run of three
    whole = Ngrams(prompts, 13)
    assert whole.shared_with('"what is the capital of france"')
    assert not whole.shared_with("what is the capital of france today")  # short prompts match as a whole only


def test_only_the_users_turns_count():
    eval_prompts = [[{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Sing me a song"}]]
    rows = [
        make_row("a:0", prompt="you are kind"),
        make_row("a:1", prompt=[{"role": "system", "content": "sing me a song"}, {"role": "user", "content": "Why?"}]),
        make_row("a:2", prompt=[{"role": "system", "content": "x"}, {"role": "user", "content": "sing me a song!"}]),
    ]
    assert codes(rows, eval_prompts=eval_prompts) == [None, None, "eval_ngram"]


def test_a_prompt_without_words_matches_nothing():
    assert not Ngrams([[{"role": "user", "content": "?!"}]], 13).shared_with("...")


WORDS = st.lists(st.sampled_from(["a", "B", "b,", "c.", "d"]), max_size=14).map(" ".join)


@given(st.lists(WORDS, max_size=3), WORDS, st.integers(1, 9))
def test_ngrams_against_all_with_all(others, text, n):
    others = [[{"role": "user", "content": other}] for other in others]
    expected = slow_selection.shares_ngram([{"role": "user", "content": text}], others, n)
    assert Ngrams(others, n).shared_with(text.casefold()) == expected


# ---------------------------------------------------------------------------------------------- reading
def test_facts_of_slices_of_a_mapped_file(tmp_path):
    """Rows read from the middle of a file, in batches that start within its own, are the rows themselves."""
    prompts = [[{"role": "user", "content": f"turn {i}"}] * (i % 3 + 1) for i in range(10)]
    make_rows([make_row(f"a:{i}", prompt=prompts[i], chosen="x" * i) for i in range(10)]).save_to_disk(tmp_path)
    rows = Dataset.load_from_disk(tmp_path)
    bound = TokenBound([], 100, len)
    for part, first in ((rows.select(range(3, 8)), 3), (rows.select([3, 4, 5, 6, 7]), 3), (rows, 0)):
        facts = scan(part, lambda batch: read_facts(batch, Hygiene(), 0, bound=bound))
        numbers = range(first, first + len(part))
        assert facts["row_id"].to_pylist() == [f"a:{i}" for i in numbers]
        assert facts["chosen_length"].tolist() == list(numbers)
        assert facts["prompt_most"].tolist() == [6 * (i % 3 + 1) for i in numbers]
        assert np.isnan(facts["score_chosen"]).all()
        assert isinstance(facts["category"], pa.Array) and facts["category"].null_count == len(part)
