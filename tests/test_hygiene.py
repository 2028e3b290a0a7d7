"""Each rule of the hygiene on rows made for it, and the n-gram search against the comparison of all with all."""

import copy

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import slow_selection
from conftest import FEATURES
from core.config.schema import Hygiene
from core.data.tokens import tokenize_rows
from core.selection.hygiene import CODES, RULES, Ngrams, count_words, first_broken, read_facts, words_of

SCHEMA = {name: feature for name, feature in FEATURES.items() if name != "relabelled"}
GOOD = ("Bake bread slowly, and wait for it.", "Buy it at the shop around the corner.")


def make_row(row_id="a:0", prompt="How do I bake bread?", chosen=GOOD[0], rejected=GOOD[1], **columns):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    row = dict.fromkeys(SCHEMA) | {"tie": False, "source": row_id.split(":")[0], "role": "task"}
    return row | {"row_id": row_id, "prompt": messages, "chosen": chosen, "rejected": rejected} | columns


def make_rows(rows):
    return Dataset.from_list(rows, features=type(FEATURES)(SCHEMA))


def codes(rows, settings=None, eval_prompts=None, tokenizer=None, max_length=None):
    """The rule that each row breaks, None where it breaks none; with a tokenizer, the rows have tokens."""
    settings = settings or Hygiene()
    rows = make_rows(rows)
    if tokenizer is not None:
        rows = tokenize_rows(rows, tokenizer, max_length)
    found, _ = first_broken(rows, read_facts(rows, settings, 0, eval_prompts), settings, max_length)
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
        # Right answers, and a short refusal against a long compliance: nobody has asked for their loss.
        ({"chosen": "No.", "rejected": "Yes."}, None),
        ({"chosen": "No.", "rejected": GOOD[1] * 9}, None),
        ({"chosen": GOOD[0], "rejected": GOOD[0] + "!"}, None),
        ({"tie": True}, "ties"),
    ],
)
def test_a_row_that_breaks_one_rule(row, rule):
    assert codes([make_row(**row)]) == [rule]


@pytest.mark.parametrize(
    "chosen, rejected, settings, rule",
    [
        # Letters that no merge joins are a token each; the template adds its two at the end, </s> and a line break.
        ("XYZ", "XYZWVU", {"min_tokens": 6}, "min_tokens"),  # 3 + 2
        ("XYZ", "XYZWVU", {"min_tokens": 5}, None),
        ("XYZQ", "XYZQ" + "W" * 13, {"max_length_ratio": 3}, "max_length_ratio"),  # 6 and 19
        ("XYZQ", "XYZQ" + "W" * 12, {"max_length_ratio": 3}, None),  # 6 and 18: 3 is allowed
        # 10 tokens each, 9 of them in common: 18/20 = 0.9, which is not over 0.9; 11 and 10: 20/21.
        ("QXZQXZQX", "QXZQXZQY", {"max_similarity": 0.9}, None),
        ("QXZQXZQX", "QXZQXZQXZ", {"max_similarity": 0.9}, "max_similarity"),
        ("QXZQXZQX", "QXZQXZQY", {"max_similarity": 0.89}, "max_similarity"),
        # One letter of these differs, and so does the whole of the short answer's sense; a ratio is no likeness.
        ("Completion A", "Completion B", {"max_similarity": 0.95}, None),
    ],
)
def test_rules_on_the_length_and_likeness_of_answers_are_choices_and_count_tokens(
    chosen, rejected, settings, rule, tokenizer
):
    row = make_row(chosen=chosen, rejected=rejected)
    assert codes([row], Hygiene(**settings), None, tokenizer) == [rule]
    assert codes([row], Hygiene(), None, tokenizer) == [None]


def test_a_ratio_is_of_the_answers_before_they_are_cut(tokenizer):
    """Both fill the room that is left, and one of them is four times as long; a faulty row is not judged by it."""
    row = make_row(prompt="X", chosen="XYZQ" * 10, rejected="QZYX" * 40)
    settings = Hygiene(max_length_ratio=3)
    room = len(tokenize_rows(make_rows([row]), tokenizer, None)[0]["prompt_ids"]) + 40
    ids = tokenize_rows(make_rows([row]), tokenizer, room)[0]
    assert len(ids["chosen_ids"]) == len(ids["rejected_ids"]) == 40
    assert (ids["chosen_cut"], ids["rejected_cut"]) == (2, 122)  # of 40 + 2 and 160 + 2
    assert codes([row], settings, None, tokenizer, room) == ["max_length_ratio"]
    settings.min_answer_tokens = None
    assert codes([row], settings, None, tokenizer, 8) == ["unrenderable"]


def test_what_a_rule_that_is_off_would_drop_is_counted_among_the_rows_that_stay(tokenizer):
    rows = [
        make_row("a:0", chosen="No.", rejected="Yes."),
        make_row("a:1", chosen="No.", rejected=GOOD[1] * 3),
        make_row("a:2", chosen=GOOD[0] * 4, rejected=GOOD[0] * 4 + "!"),
        make_row("a:3", tie=True),
        make_row("a:4", tie=True, rejected=" "),  # goes as empty, whatever else is on
        make_row("a:5"),
        make_row("a:6", prompt="another"),
    ]
    rows = tokenize_rows(make_rows(rows), tokenizer, 400)
    settings = Hygiene(ties="keep", duplicates="keep", min_answer_tokens=None)
    _, off = first_broken(rows, read_facts(rows, settings, 0), settings, 400)
    assert {rule: np.flatnonzero(found).tolist() for rule, found in off.items()} == {
        "min_tokens": [], "max_length_ratio": [1], "max_similarity": [2], "duplicates": [5], "ties": [3],
        "min_answer_tokens": [],
    }  # fmt: skip


def test_every_rule_can_be_turned_off():
    """Rows that break each rule; with a rule off, its row stays."""
    rows = {
        "empty": make_row(prompt=" "),
        "identical": make_row(chosen=GOOD[0], rejected=GOOD[0]),
        "ties": make_row(tie=True),
    }
    for rule, row in rows.items():
        assert codes([row]) == [rule]
        assert codes([row], Hygiene(**{rule: "keep"})) == [None]
    pair = [make_row("a:0"), make_row("a:1")]
    assert codes(pair) == [None, "duplicates"]
    assert codes(pair, Hygiene(duplicates="keep")) == [None, None]
    pair[1] |= {"chosen": GOOD[1], "rejected": GOOD[0]}
    assert codes(pair) == ["contradictions"] * 2
    assert codes(pair, Hygiene(contradictions="keep")) == [None, None]


def test_the_first_rule_wins(tokenizer):
    """A row that breaks everything goes by the first rule that is on, in the order of `RULES`."""
    text = "one two three"
    prompts = [[{"role": "user", "content": text}]]
    row = make_row(prompt=text, chosen="", rejected="", tie=True)
    settings = Hygiene(eval_ngram=2, unrenderable="drop")
    expected = ["empty", "identical", "ties", "min_answer_tokens", "eval_ngram", "unrenderable"]
    off = {"empty": "keep", "identical": "keep", "ties": "keep"}
    for rule in expected:
        assert codes([row], settings, prompts, tokenizer, max_length=24) == [rule]
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


def test_a_duplicate_of_a_dropped_row_is_none(tokenizer):
    """The first row is too short by its tokens: capitals, which no merge joins, are the first that stay."""
    rows = [make_row("a:0", chosen="bake bread", rejected="Q" * 99)]
    rows += [rows[0] | {"row_id": "a:1", "chosen": "BAKE BREAD"}]
    settings = Hygiene(min_tokens=12)  # 10 letters and two that end the turn
    assert codes(rows, settings, None, tokenizer) == ["min_tokens", None]
    assert codes(rows, Hygiene(), None, tokenizer) == [None, "duplicates"]


def test_contradictions_take_all_rows_of_the_pair_and_no_other():
    one, other = GOOD
    rows = [
        make_row("a:0", chosen=one, rejected=other),
        make_row("a:1", chosen=other.upper(), rejected=one),
        make_row("a:2", chosen=one.upper(), rejected=other),  # a duplicate of the first
        make_row("a:3", prompt="Another question", chosen=other, rejected=one),
        make_row("a:4", prompt="Yet another", chosen=one, rejected=one.upper()),  # folds to one text: no order
    ]
    settings = Hygiene()
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


# ---------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("sixteen", [16, 1])
def test_the_prompt_must_leave_room(tokenizer, sixteen):
    """Around the limit, one token apart, with whatever the template puts around one turn or three."""
    rows = [make_row(f"a:{i}", prompt="é" * i + "x", chosen=f"{GOOD[0]} {i}") for i in range(60)]
    rows += [make_row("a:60", prompt=[{"role": "system", "content": "é" * 30}, {"role": "user", "content": "x"}])]
    turns = [{"role": role, "content": "ü€😀"} for role in ("user", "assistant", "user")]
    rows += [make_row("a:61", prompt=turns)]
    exact = [
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]) for row in rows
    ]
    settings = Hygiene(min_answer_tokens=sixteen, identical_tokens="keep")
    for max_length in (exact[0] + 15, exact[30] + 16, exact[30] + 15, exact[60] + 16, exact[60] + 15, exact[61]):
        found = codes(rows, settings, None, tokenizer, max_length)
        assert found == ["min_answer_tokens" if tokens + sixteen > max_length else None for tokens in exact]
        settings.min_answer_tokens = None
        found = codes(rows, settings, None, tokenizer, max_length)
        assert found == ["unrenderable" if tokens >= max_length else None for tokens in exact]
        settings.min_answer_tokens = sixteen


def test_answers_that_max_length_makes_equal_are_no_pair(tokenizer):
    """
    Both answers begin with a common text, and one token more of either tells them apart. Rows of one length share the
    batch with others, whose own tokens differ, and with one whose answers have no common token.
    """
    common, prompt = "I bake bread with water and salt. ", "How do I bake bread?"
    rows = [
        make_row(
            "a:0", prompt=prompt, chosen=common + "Then wait for it.", rejected=common + "yeast, flour, and salt"
        ),
        make_row("a:1", prompt=prompt, chosen=GOOD[0] * 3, rejected=GOOD[1] * 3),
        make_row("a:2", prompt=prompt, chosen="x" * 60, rejected="y" * 60),
        make_row("a:3", prompt=prompt, chosen="brief, and whole", rejected="brief, and whole"),
    ]
    off = {"identical": "keep"}
    ids = tokenize_rows(make_rows(rows), tokenizer, None)[0]
    chosen, rejected = ids["chosen_ids"], ids["rejected_ids"]
    shared = next(i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if len(set(pair)) > 1)
    room = len(ids["prompt_ids"]) + shared
    assert shared > 16
    settings = Hygiene(**off)
    assert codes(rows, settings, None, tokenizer, room) == ["identical_tokens", None, None, None]
    assert codes(rows, settings, None, tokenizer, room + 1) == [None] * 4
    assert codes(rows, settings, None, tokenizer, None) == [None] * 4
    assert codes(rows, Hygiene(**off, identical_tokens="keep"), None, tokenizer, room) == [None] * 4
    # Identical texts are the rule `identical`'s, and it is the last that may speak.
    assert codes(rows, Hygiene(), None, tokenizer, room)[3] == "identical"
    rows[0]["tie"] = True
    assert codes(rows, settings, None, tokenizer, room)[0] == "ties"


def test_answers_that_the_template_makes_equal_are_no_pair(tokenizer):
    """Without any limit: a template that trims leaves nothing of a difference in white space."""
    trimming = copy.deepcopy(tokenizer)
    trimming.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    row = make_row(chosen=GOOD[0], rejected=GOOD[0] + "  ")
    assert codes([row], Hygiene(), None, trimming) == ["identical_tokens"]
    assert codes([row], Hygiene(), None, tokenizer) == [None]


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


# Prompts of an evaluation set as people write them, and what a training set makes of each: other punctuation, a frame.
LEAKED = [
    "请比较太阳能和风能在城市里的优点和缺点，并给出三个例子。",
    "为什么古代的罗马人要修建那么多的道路和水渠？请说明原因。",
    "日本の伝統的な家屋がなぜ木で作られているのか、理由を三つ挙げてください。",
    "古いパソコンを速くするために、家でできることを順番に教えてください。",
    "ช่วยอธิบายว่าทำไมน้ำทะเลถึงเค็ม และเกลือมาจากไหน",
    "ฉันควรทำอย่างไรถ้าแมวของฉันไม่ยอมกินอาหารมาสามวันแล้ว",
]
UNLIKE = [  # the same turns of phrase, of something else
    "请比较火车和飞机在旅行中的优点和缺点，并给出两个建议。",
    "为什么现代的人要保护那么多的森林和河流？请说明理由。",
    "日本の現代的な音楽がなぜ世界で聞かれているのか、詳しく説明してください。",
    "新しいスマホを安く買うために、店で聞くべきことを順番に教えてください。",
    "ช่วยอธิบายว่าทำไมท้องฟ้าถึงเป็นสีฟ้า และเมฆมาจากไหน",
    "ฉันควรทำอย่างไรถ้ารถของฉันไม่ยอมสตาร์ทมาสองวันแล้ว",
]


def test_prompts_in_languages_without_spaces_are_caught_as_in_english():
    ngrams = Ngrams([[{"role": "user", "content": text}] for text in LEAKED], 13)
    for text in LEAKED:
        other = text.replace("，", ",").replace("。", ".").replace("？", "?").replace("、", "")
        for frame in ("{}", "你好。{} Thank you.", "質問です：{}お願いします", "คำถาม {} ขอบคุณ"):
            assert ngrams.shared_with(frame.format(text)) and ngrams.shared_with(frame.format(other)), (frame, text)
    assert not any(ngrams.shared_with(text.casefold()) for text in UNLIKE)


def test_letters_count_as_parts_of_words():
    """Thirteen words are 20 letters of Chinese (2/3 each), 26 of kana, 39 of Khmer; marks stay with their letters."""
    assert count_words(words_of("日本語 word, กำ が")) == pytest.approx(2 + 1 + 2 / 3 + 1 / 2)
    for first, enough in ((0x4E00, 20), (0x30A1, 26), (0x1780, 39)):
        script = "".join(map(chr, range(first, first + 52)))
        ngrams = Ngrams([[{"role": "user", "content": script}]], 13)
        assert ngrams.shared_with("x " + script[3 : 3 + enough] + " y")
        assert not ngrams.shared_with("x " + script[3 : 3 + enough - 1] + " y")


def test_a_prompt_without_words_matches_nothing():
    assert not Ngrams([[{"role": "user", "content": "?!"}]], 13).shared_with("...")


WORDS = st.lists(st.sampled_from(["a", "B", "b,", "c.", "d"]), max_size=14).map(" ".join)


@given(st.lists(WORDS, max_size=3), WORDS, st.integers(1, 9))
def test_ngrams_against_all_with_all(others, text, n):
    others = [[{"role": "user", "content": other}] for other in others]
    expected = slow_selection.shares_ngram([{"role": "user", "content": text}], others, n)
    assert Ngrams(others, n).shared_with(text.casefold()) == expected
