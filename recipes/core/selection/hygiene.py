"""
The rules that a training row must meet. `read_facts` reads the rows' text once, a batch at a time, and leaves a few
numbers per row, the facts; every decision here and in `buffer.py` is made from those.
"""

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from datasets.utils import tqdm
from rapidfuzz.distance import Indel
from xxhash import xxh3_64_intdigest

from core.config.schema import Hygiene, LabelPolicy
from core.data.tokens import token_lengths
from core.objective.margins import number_column
from core.objective.presets import Margin

# In the order in which they are tried: a row goes by the first rule that it breaks. Each is a key of `Hygiene`.
RULES = (
    "empty",
    "identical",
    "min_tokens",
    "max_length_ratio",
    "max_similarity",
    "duplicates",
    "contradictions",
    "ties",
    "min_answer_tokens",
    "eval_ngram",
    "unrenderable",
    "identical_tokens",
)
CODES = {rule: code for code, rule in enumerate(RULES, start=1)}  # 0: no rule is broken
# At what a rule that is off is tried, to say what it would drop.
TRIED = {
    "min_tokens": 5,
    "max_length_ratio": 3.0,
    "max_similarity": 0.9,
    "min_answer_tokens": 16,
    "eval_ngram": 13,
}
NUMBERS = ("chosen_safe", "rejected_safe", "chosen_severity", "rejected_severity", "score_chosen", "score_rejected")
BATCH = 2_000  # rows that are held as Python objects, or as arrays of tokens, at a time
PROBE = 6  # words; see `Ngrams`
# Punctuation as in ASCII, and that of scripts written without spaces.
SEPARATORS = str.maketrans(
    dict.fromkeys(string.punctuation + "、。・「」『』【】〈〉《》〔〕！？，．：；（）～…—“”‘’", " ")
)
# Scripts that are written without spaces, where each letter (with the marks on it) is a unit, and what part of a word
# it counts as: Chinese, Japanese syllables, then Thai, Lao, Burmese and Khmer.
LETTERS = {
    "[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]": 2 / 3,
    "[\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f][\u3099\u309a]*": 1 / 2,
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
    "[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b4-\u17d3]*": 1 / 3,
}
UNSPACED = re.compile("|".join(f"({letter})" for letter in LETTERS))

Facts = dict[str, np.ndarray]  # each of shape (rows,)


# ---------------------------------------------------------------------------------------------- what a row is
def read_facts(rows: Dataset, settings: Hygiene, seed: int, eval_prompts: Iterable[list[dict]] | None = None) -> Facts:
    """
    All that the selection needs to know of each row, but for its names:

    `empty`, `identical` (bool): the rules of that name.
    `pair` (uint64): a digest of the prompt and its two answers, whichever is chosen, after case folding; `side`
    (int8): which of the two is chosen, −1 or 1; 0 where they fold to the same text.
    `overlap` (bool): the prompt shares an n-gram with one of `eval_prompts`.
    `order` (uint64): a digest of seed and row id, the order of every seeded choice.
    `chosen_length`, `rejected_length`: in tokens, before any was cut; in characters where the rows have no tokens.
    `tie`, `buffer` (bool), and the columns of `NUMBERS` as float64, null as NaN.
    """
    ngrams = None
    if eval_prompts is not None:
        ngrams = Ngrams(eval_prompts, settings.eval_ngram or TRIED["eval_ngram"])
    text = rows.select_columns(["row_id", "prompt", "chosen", "rejected"])
    batches = tqdm(text.iter(BATCH), total=-(-len(rows) // BATCH), desc="reading rows", unit=" batches", leave=False)
    parts = [_read_batch(batch, seed, ngrams) for batch in batches]
    facts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    facts |= {name: number_column(rows, name) for name in NUMBERS}
    if "prompt_ids" in rows.column_names:
        lengths = token_lengths(rows).T[1:]
        for name, length in zip(("chosen", "rejected"), lengths, strict=True):
            facts[f"{name}_length"] = length + number_column(rows, f"{name}_cut").astype(np.int64)
    return facts | {"tie": number_column(rows, "tie") == 1, "buffer": has_role(rows, "buffer")}


def has_role(rows: Dataset, role: str) -> np.ndarray:
    """Shape: (rows,), bool."""
    return pc.equal(rows.with_format("arrow")["role"], role).to_numpy()


def _read_batch(batch: dict[str, list], seed: int, ngrams: "Ngrams | None") -> Facts:
    prompts, chosen, rejected = batch["prompt"], batch["chosen"], batch["rejected"]
    folded = [[(turn["role"], turn["content"].casefold()) for turn in prompt] for prompt in prompts]
    overlap = np.zeros(len(prompts), bool)
    if ngrams is not None:
        overlap[:] = [ngrams.shared_with(_users_text(turns)) for turns in folded]
    rows = list(zip(prompts, chosen, rejected, strict=True))
    return {
        "empty": np.array([not (p and p[-1]["content"].strip() and c.strip() and r.strip()) for p, c, r in rows]),
        "identical": np.array([c == r for _, c, r in rows]),
        **_pair_keys(folded, chosen, rejected),
        "overlap": overlap,
        "order": _digests(f"{seed}:{row_id}" for row_id in batch["row_id"]),
        "chosen_length": np.array([len(text) for text in chosen]),
        "rejected_length": np.array([len(text) for text in rejected]),
    }


def _pair_keys(folded: list[list[tuple[str, str]]], chosen: list[str], rejected: list[str]) -> Facts:
    prompt = _digests("\0".join(f"{role}\0{content}" for role, content in turns) for turns in folded)
    chosen, rejected = (_digests(text.casefold() for text in answers) for answers in (chosen, rejected))
    low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    # Odd multipliers modulo 2^64 (xxHash's primes) keep the three digests' places apart.
    pair = (
        prompt * np.uint64(0x9E3779B185EBCA87)
        + low * np.uint64(0xC2B2AE3D27D4EB4F)
        + high * np.uint64(0x165667B19E3779F9)
    )
    return {"pair": pair, "side": (chosen > rejected).astype(np.int8) - (chosen < rejected).astype(np.int8)}


def _digests(texts: Iterable[str]) -> np.ndarray:
    # 64 bits: among ten million rows the chance that any two different ones meet is 3 in a million.
    return np.array([xxh3_64_intdigest(text.encode()) for text in texts], np.uint64)


# ---------------------------------------------------------------------------------------------- the verdict
def first_broken(
    rows: Dataset, facts: Facts, settings: Hygiene, max_length: int | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    The rules on tokens are left out where the rows have none, and `min_answer_tokens` where `max_length` is None.

    Returns:
        The code (`CODES`, 0 for none) of the first rule that each row breaks, shape (rows,), uint8; and of each rule
        that is off which of the rows that break none it would drop (`TRIED`), shape (rows,), bool.
    """
    broken, values = np.zeros(len(rows), np.uint8), {rule: getattr(settings, rule) for rule in RULES}
    on = [rule for rule in RULES if values[rule] not in (None, "keep")]
    for rule in on:
        broken[_breaks(rule, values[rule], rows, facts, max_length, broken == 0)] = CODES[rule]
    off = {
        rule: _breaks(rule, TRIED.get(rule), rows, facts, max_length, broken == 0) for rule in RULES if rule not in on
    }
    return broken, off


def _breaks(
    rule: str, value: Any, rows: Dataset, facts: Facts, max_length: int | None, among: np.ndarray
) -> np.ndarray:
    """Which of the rows `among` break a rule. Shape: (rows,), bool."""
    if rule in ("empty", "identical"):
        return among & facts[rule]
    if rule == "duplicates":
        return _seen_before(facts["pair"] + facts["side"].astype(np.uint64), among)
    if rule == "contradictions":
        return _both_ways(facts["pair"], facts["side"], among)
    if rule == "ties":
        return among & facts["tie"]
    if rule == "eval_ngram":
        return among & facts["overlap"]
    if "prompt_ids" not in rows.column_names:
        return np.zeros(len(rows), bool)
    if rule == "unrenderable":
        return among & pc.is_valid(rows.with_format("arrow")["fault"]).to_numpy()
    if rule == "min_answer_tokens":
        return among & (max_length is not None) & (token_lengths(rows)[:, 0] + value > (max_length or 0))
    if rule == "identical_tokens":
        return _same_tokens(rows, among)
    shorter, longer = np.sort([facts["chosen_length"], facts["rejected_length"]], axis=0)
    among = among & (shorter > 0)  # a row that could not be tokenised has no lengths
    if rule == "min_tokens":
        return among & (shorter < value)
    if rule == "max_length_ratio":
        return among & (longer > value * shorter)
    # The Indel similarity is 2·LCS / (sum of lengths), and the LCS is at most the shorter text: most pairs are settled
    # by their lengths. Below the cutoff 0 is returned, and most of the work is saved.
    shorter, longer = np.sort(token_lengths(rows)[:, 1:].T, axis=0)
    found = among & (2 * shorter > value * (shorter + longer))
    columns = rows.select_columns(["chosen_ids", "rejected_ids"])
    for part in np.array_split(places := np.flatnonzero(found), len(places) // BATCH + 1):
        pairs = columns.select(part)[:]
        found[part] = [
            Indel.normalized_similarity(*pair, score_cutoff=value) > value
            for pair in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
        ]
    return found


def open_ties(facts: Facts, labels: LabelPolicy, margin: Margin) -> np.ndarray:
    """
    Rows that are to be put in order by what is equal: ties, and equal scores where the margin takes their logarithm;
    but not task rows of one safe and one unsafe answer where safety decides, by the labels or by the margin.
    """
    if margin.k and margin.phi == "log":
        return facts["tie"] | (facts["score_chosen"] == facts["score_rejected"])
    decided = np.zeros(len(facts["tie"]), bool)
    if labels != "helpful" or margin.a or margin.b:
        decided = (np.abs(facts["chosen_safe"] - facts["rejected_safe"]) == 1) & ~facts["buffer"]
    return facts["tie"] & ~decided


def _seen_before(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    places = np.flatnonzero(among)
    found = among.copy()
    found[places[np.unique(keys[places], return_index=True)[1]]] = False
    return found


def _both_ways(pair: np.ndarray, side: np.ndarray, among: np.ndarray) -> np.ndarray:
    one, other = (pair[among & (side == way)] for way in (-1, 1))
    return among & np.isin(pair, np.intersect1d(one, other)) & (side != 0)


def _same_tokens(rows: Dataset, among: np.ndarray) -> np.ndarray:
    """Whether the answers of a row differ as texts and have the same tokens, at least one. Shape: (rows,), bool."""
    _, chosen, rejected = token_lengths(rows).T
    among = among & (chosen == rejected) & (chosen > 0)
    places = np.flatnonzero(among)
    found = np.zeros(len(rows), bool)
    columns = rows.select_columns(["chosen", "rejected", "chosen_ids", "rejected_ids"]).with_format("arrow")
    for start in range(0, len(places), BATCH):
        part = places[start : start + BATCH]
        table = columns.select(part)[:].combine_chunks()
        # Both answers of each row are of one length, so the tokens of all the rows stand beside each other.
        ids = (table[name].combine_chunks().flatten().to_numpy() for name in ("chosen_ids", "rejected_ids"))
        alike = np.logical_and.reduceat(np.equal(*ids), np.cumsum(chosen[part]) - chosen[part])
        texts = table["chosen"].to_numpy() != table["rejected"].to_numpy()
        found[part] = alike & texts
    return found


# ---------------------------------------------------------------------------------------------- evaluation prompts
class Ngrams:
    """
    Runs of n words that occur in the evaluation prompts. Words are what white space and punctuation separate, after
    case folding, and letters of scripts without spaces, each a part of a word (`LETTERS`); a prompt's user turns count
    as one text. A prompt shorter than n words matches as a whole only; of n or more letters, also within another.

    Exact and cheap: any run of n words holds exactly one run of `PROBE` words that starts at a multiple of
    n − PROBE + 1. A prompt of w words is asked about those, w/8 questions with n = 13, and compared word by word only
    around one that is answered yes.
    """

    def __init__(self, prompts: Iterable[list[dict]], n: int):
        self.n, self.probe = n, min(PROBE, n)
        self.whole, self.within, self.runs, self.probes = set(), set(), set(), set()
        for prompt in prompts:
            words = words_of(_users_text([(turn["role"], turn["content"].casefold()) for turn in prompt]))
            if len(words) < n:
                self.whole.add(" ".join(words))
            elif count_words(words) < n:
                self.within.add(f" {' '.join(words)} ")
            self.runs.update(_runs(words, n))
            self.probes.update(_runs(words, self.probe) if len(words) >= n else ())
        self.whole.discard("")

    def shared_with(self, folded: str) -> bool:
        """Whether a case-folded prompt shares a run of n words, or all of its words, with an evaluation prompt."""
        words, stride = words_of(folded), self.n - self.probe + 1
        if len(words) < self.n:
            return " ".join(words) in self.whole
        return any(
            self._is_run(words, start) and self._is_long(words, start)
            for place in range(0, len(words) - self.probe + 1, stride)
            if " ".join(words[place : place + self.probe]) in self.probes
            for start in range(max(0, place - stride + 1), min(place, len(words) - self.n) + 1)
        )

    def _is_run(self, words: list[str], start: int) -> bool:
        return " ".join(words[start : start + self.n]) in self.runs

    def _is_long(self, words: list[str], start: int) -> bool:
        """Whether what is shared around a run makes n words, or holds a whole prompt."""
        if count_words(words[start : start + self.n]) >= self.n:
            return True
        end = start + 1
        while start and self._is_run(words, start - 1):
            start -= 1
        while end + self.n <= len(words) and self._is_run(words, end):
            end += 1
        shared = words[start : end + self.n - 1]
        text = f" {' '.join(shared)} "
        return count_words(shared) >= self.n or any(prompt in text for prompt in self.within)


def words_of(folded: str) -> list[str]:
    text = folded.translate(SEPARATORS)
    return (text if text.isascii() else UNSPACED.sub(r" \g<0> ", text)).split()


def count_words(words: list[str]) -> float:
    kinds, parts = (UNSPACED.fullmatch(word) for word in words), list(LETTERS.values())
    return round(sum(1 if kind is None else parts[kind.lastindex - 1] for kind in kinds), 6)


def _users_text(turns: Sequence[tuple[str, str]]) -> str:
    return " ".join(content for role, content in turns if role == "user")


def _runs(words: list[str], length: int) -> list[str]:
    return [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]
