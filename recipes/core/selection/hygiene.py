"""
The rules that a training row must meet. `read_facts` reads the rows' text once, a batch at a time, and leaves a few
numbers per row, the facts; every decision here and in `buffer.py` is made from those.
"""

import string
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from datasets.utils import tqdm
from rapidfuzz.distance import Indel
from xxhash import xxh3_64_intdigest

from core.config.schema import Hygiene
from core.data.tokens import refuse_faults, token_lengths
from core.objective.margins import number_column

# In the order in which they are tried: a row goes by the first rule that it breaks. Each is a key of `Hygiene`.
RULES = (
    "empty",
    "identical",
    "min_characters",
    "max_length_ratio",
    "max_similarity",
    "duplicates",
    "contradictions",
    "ties",
    "min_answer_tokens",
    "eval_ngram",
    "identical_tokens",
)
CODES = {rule: code for code, rule in enumerate(RULES, start=1)}  # 0: no rule is broken
NUMBERS = ("chosen_safe", "rejected_safe", "chosen_severity", "rejected_severity", "score_chosen", "score_rejected")
BATCH = 2_000  # rows that are held as Python objects, or as arrays of tokens, at a time
PROBE = 6  # words; see `Ngrams`
SEPARATORS = str.maketrans(string.punctuation, " " * len(string.punctuation))

Facts = dict[str, np.ndarray]  # each of shape (rows,)


# ---------------------------------------------------------------------------------------------- what a row is
def read_facts(rows: Dataset, settings: Hygiene, seed: int, eval_prompts: Iterable[list[dict]] | None = None) -> Facts:
    """
    All that the selection needs to know of each row, but for its names:

    `broken` (uint8): the code of its `own_fault`.
    `pair` (uint64): a digest of the prompt and its two answers, whichever is chosen, after case folding; `side`
    (int8): which of the two is chosen, −1 or 1; 0 where they fold to the same text.
    `overlap` (bool): the prompt shares an n-gram with one of `eval_prompts`.
    `order` (uint64): a digest of seed and row id, the order of every seeded choice.
    `chosen_length`, `rejected_length`: in characters.
    `tie`, `buffer` (bool), and the columns of `NUMBERS` as float64, null as NaN.
    """
    ngrams = None
    if eval_prompts is not None and settings.eval_ngram is not None:
        ngrams = Ngrams(eval_prompts, settings.eval_ngram)
    text = rows.select_columns(["row_id", "prompt", "chosen", "rejected"])
    batches = tqdm(text.iter(BATCH), total=-(-len(rows) // BATCH), desc="reading rows", unit=" batches", leave=False)
    parts = [_read_batch(batch, settings, seed, ngrams) for batch in batches]
    facts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    facts |= {name: number_column(rows, name) for name in NUMBERS}
    return facts | {"tie": number_column(rows, "tie") == 1, "buffer": has_role(rows, "buffer")}


def has_role(rows: Dataset, role: str) -> np.ndarray:
    """Shape: (rows,), bool."""
    return pc.equal(rows.with_format("arrow")["role"], role).to_numpy()


def _read_batch(batch: dict[str, list], settings: Hygiene, seed: int, ngrams: "Ngrams | None") -> Facts:
    prompts, chosen, rejected = batch["prompt"], batch["chosen"], batch["rejected"]
    folded = [[(turn["role"], turn["content"].casefold()) for turn in prompt] for prompt in prompts]
    overlap = np.zeros(len(prompts), bool)
    if ngrams is not None:
        overlap[:] = [ngrams.shared_with(_users_text(turns)) for turns in folded]
    faults = (own_fault(*row, settings) for row in zip(prompts, chosen, rejected, strict=True))
    return {
        "broken": np.array([0 if rule is None else CODES[rule] for rule in faults], np.uint8),
        **_pair_keys(folded, chosen, rejected),
        "overlap": overlap,
        "order": _digests(f"{seed}:{row_id}" for row_id in batch["row_id"]),
        "chosen_length": np.array([len(text) for text in chosen]),
        "rejected_length": np.array([len(text) for text in rejected]),
    }


def own_fault(prompt: list[dict], chosen: str, rejected: str, settings: Hygiene) -> str | None:
    """The first rule that a row breaks by itself, of those before `duplicates`; None if it breaks none."""
    shorter, longer = sorted((len(chosen), len(rejected)))
    if settings.empty != "keep":
        if not (prompt and prompt[-1]["content"].strip() and chosen.strip() and rejected.strip()):
            return "empty"
    if settings.identical != "keep" and chosen == rejected:
        return "identical"
    if settings.min_characters is not None and shorter < settings.min_characters:
        return "min_characters"
    if settings.max_length_ratio is not None and longer > settings.max_length_ratio * shorter:
        return "max_length_ratio"
    limit = settings.max_similarity
    # The Indel similarity is 2·LCS / (sum of lengths), and the LCS is at most the shorter text: most pairs are settled
    # by their lengths. Below the cutoff 0 is returned, and most of the work is saved.
    if limit is not None and 2 * shorter > limit * (shorter + longer):
        if Indel.normalized_similarity(chosen, rejected, score_cutoff=limit) > limit:
            return "max_similarity"
    return None


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
def first_broken(rows: Dataset, facts: Facts, settings: Hygiene, max_length: int | None) -> np.ndarray:
    """
    The code (`CODES`, 0 for none) of the first rule that each row breaks. Shape: (rows,), uint8. The rules on tokens
    are left out where the rows have none, and `min_answer_tokens` where `max_length` is None.

    Raises:
        RecipeError: the chat template refuses a prompt, so that its tokens cannot be counted.
    """
    broken = facts["broken"].copy()
    tokenised = "prompt_ids" in rows.column_names

    def mark(rule: str, found: np.ndarray) -> None:
        broken[(broken == 0) & found] = CODES[rule]

    if settings.duplicates != "keep":
        mark("duplicates", _seen_before(facts["pair"] + facts["side"].astype(np.uint64), broken == 0))
    if settings.contradictions != "keep":
        mark("contradictions", _both_ways(facts["pair"], facts["side"], broken == 0))
    if settings.ties != "keep":
        mark("ties", facts["tie"])
    if tokenised and None not in (settings.min_answer_tokens, max_length):
        tokens = token_lengths(rows)[:, 0]
        refuse_faults(rows.select(np.flatnonzero((broken == 0) & (tokens == 0))))
        mark("min_answer_tokens", tokens + settings.min_answer_tokens > max_length)
    if settings.eval_ngram is not None:
        mark("eval_ngram", facts["overlap"])
    if tokenised and settings.identical_tokens != "keep":
        mark("identical_tokens", _same_tokens(rows, broken == 0))
    return broken


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
    Runs of n words that occur in the evaluation prompts. Words are what white space and ASCII punctuation separate,
    after case folding; a prompt's user turns count as one text. A prompt shorter than n words matches as a whole only.

    Exact and cheap: any run of n words holds exactly one run of `PROBE` words that starts at a multiple of
    n − PROBE + 1. A prompt of w words is asked about those, w/8 questions with n = 13, and compared word by word only
    around one that is answered yes.
    """

    def __init__(self, prompts: Iterable[list[dict]], n: int):
        self.n, self.probe = n, min(PROBE, n)
        self.whole, self.runs, self.probes = set(), set(), set()
        for prompt in prompts:
            words = words_of(_users_text([(turn["role"], turn["content"].casefold()) for turn in prompt]))
            if len(words) < n:
                self.whole.add(" ".join(words))
            self.runs.update(_runs(words, n))
            self.probes.update(_runs(words, self.probe) if len(words) >= n else ())
        self.whole.discard("")

    def shared_with(self, folded: str) -> bool:
        """Whether a case-folded prompt shares a run of n words, or all of its words, with an evaluation prompt."""
        words, stride = words_of(folded), self.n - self.probe + 1
        if len(words) < self.n:
            return " ".join(words) in self.whole
        return any(
            " ".join(words[start : start + self.n]) in self.runs
            for place in range(0, len(words) - self.probe + 1, stride)
            if " ".join(words[place : place + self.probe]) in self.probes
            for start in range(max(0, place - stride + 1), min(place, len(words) - self.n) + 1)
        )


def words_of(folded: str) -> list[str]:
    return folded.translate(SEPARATORS).split()


def _users_text(turns: Sequence[tuple[str, str]]) -> str:
    return " ".join(content for role, content in turns if role == "user")


def _runs(words: list[str], length: int) -> list[str]:
    return [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]
