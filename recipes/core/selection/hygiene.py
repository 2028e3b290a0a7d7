"""
The rules that a training row must meet. `read_facts` reads the rows' text once and leaves a few numbers per row, the
facts; every decision here and in `buffer.py` is made from those.
"""

import operator
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from rapidfuzz.distance import Indel
from rapidfuzz.process import cpdist
from xxhash import xxh3_64_intdigest

from core.config.schema import Hygiene
from core.selection.prompts import CountTokens, Ngrams, TokenBound, too_long

Facts = dict[str, np.ndarray]

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
)
CODES = {rule: code for code, rule in enumerate(RULES, start=1)}  # 0: no rule is broken
NUMBERS = ("chosen_safe", "rejected_safe", "chosen_severity", "rejected_severity", "score_chosen", "score_rejected")


# ---------------------------------------------------------------------------------------------- what a row is
def _digests(texts: Sequence[str]) -> np.ndarray:
    # 64 bits: among ten million rows the chance that any two different ones meet is 3 in a million.
    return np.fromiter((xxh3_64_intdigest(text.encode()) for text in texts), np.uint64, len(texts))


def _messages(prompts: pa.ListArray) -> tuple[list[tuple[int, int]], list[str], list[str]]:
    """Each prompt's first message and the one after its last, and the roles and contents of all messages."""
    starts = (prompts.offsets.to_numpy() - prompts.offsets[0].as_py()).tolist()
    messages = prompts.flatten()
    roles, contents = (pc.struct_field(messages, name).to_pylist() for name in ("role", "content"))
    return list(zip(starts[:-1], starts[1:], strict=True)), roles, contents


def _pair_keys(prompts: list[str], chosen: list[str], rejected: list[str]) -> Facts:
    """
    `pair`: the prompt and its two answers, whichever is chosen, after case folding; `side`: which of the two is
    chosen (−1 or 1; 0 where they fold to the same text).
    """
    prompt = _digests(prompts)
    chosen, rejected = (_digests([text.casefold() for text in texts]) for texts in (chosen, rejected))
    low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    # Odd multipliers modulo 2^64 (xxHash's primes) keep the three digests' places apart.
    pair = (
        prompt * np.uint64(0x9E3779B185EBCA87)
        + low * np.uint64(0xC2B2AE3D27D4EB4F)
        + high * np.uint64(0x165667B19E3779F9)
    )
    return {"pair": pair, "side": (chosen > rejected).astype(np.int8) - (chosen < rejected).astype(np.int8)}


def _one_text(spans: list[tuple[int, int]], roles: list[str], contents: list[str]) -> list[str]:
    turns = [f"{role}\0{content}" for role, content in zip(roles, contents, strict=True)]
    return ["\0".join(turns[a:b]) for a, b in spans]


def _numbers(column: pa.Array) -> np.ndarray:
    """A numeric or boolean column as float64, null as NaN."""
    return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)


def read_pairs(batch: pa.RecordBatch) -> Facts:
    """`pair` and `side` of each row, for comparing two sets."""
    spans, roles, contents = _messages(batch["prompt"])
    prompts = _one_text(spans, roles, [content.casefold() for content in contents])
    return _pair_keys(prompts, batch["chosen"].to_pylist(), batch["rejected"].to_pylist())


def read_facts(
    batch: pa.RecordBatch,
    settings: Hygiene,
    seed: int,
    ngrams: Ngrams | None = None,
    bound: TokenBound | None = None,
    extra: str | None = None,
) -> dict:
    """
    All that the selection needs to know of each row:
    `broken` (uint8): the first broken rule of those that a row breaks by itself and that stand before `duplicates`;
    `overlap` (bool); `pair`, `side`; `order` (uint64): a digest of seed and row id, the order of every seeded choice;
    `prompt_least`, `prompt_most` (`TokenBound.of`); `frame` (uint64): a digest of the prompt's roles; `chosen_length`
    and `rejected_length` in characters; the columns of `NUMBERS`, and the column that `extra` names under the name
    `extra`, as float64; `tie`, `buffer` (bool); `row_id`, `source`, `category` (Arrow).
    """
    size = batch.num_rows
    spans, roles, contents = _messages(batch["prompt"])
    folded = [content.casefold() for content in contents]
    chosen, rejected = batch["chosen"].to_pylist(), batch["rejected"].to_pylist()
    lengths = [np.fromiter(map(len, answers), np.int32, size) for answers in (chosen, rejected)]
    shorter, longer = np.minimum(*lengths), np.maximum(*lengths)

    broken = np.zeros(size, np.uint8)

    def mark(rule: str, found: np.ndarray) -> None:
        broken[(broken == 0) & found] = CODES[rule]

    if settings.empty != "keep":
        blank = (a == b or not contents[b - 1].strip() for a, b in spans)
        answers = (not (c.strip() and r.strip()) for c, r in zip(chosen, rejected, strict=True))
        mark("empty", np.fromiter(map(operator.or_, blank, answers), bool, size))
    if settings.identical != "keep":
        mark("identical", np.fromiter(map(operator.eq, chosen, rejected), bool, size))
    if settings.min_characters is not None:
        mark("min_characters", shorter < settings.min_characters)
    if settings.max_length_ratio is not None:
        mark("max_length_ratio", longer > settings.max_length_ratio * shorter)
    if settings.max_similarity is not None:
        # The Indel similarity is 2·LCS / (sum of lengths), and the LCS is at most the shorter text.
        near = np.flatnonzero((broken == 0) & (2 * shorter > settings.max_similarity * (shorter + longer)))
        similarity = cpdist(
            [chosen[i] for i in near],
            [rejected[i] for i in near],
            scorer=Indel.normalized_similarity,
            score_cutoff=settings.max_similarity,  # below it 0 is returned, and most of the work is saved
            dtype=np.float64,
        )
        mark("max_similarity", np.isin(np.arange(size), near[similarity > settings.max_similarity]))

    overlap = np.zeros(size, bool)
    if ngrams is not None:
        users = (" ".join(folded[i] for i in range(a, b) if roles[i] == "user") for a, b in spans)
        overlap = np.fromiter(map(ngrams.shared_with, users), bool, size)

    bounds = np.zeros((size, 2), np.int32)
    if bound is not None:
        bounds = np.fromiter((bound.of(contents[a:b]) for a, b in spans), np.dtype((np.int32, 2)), size)
    row_ids = batch["row_id"].to_pylist()
    return {
        "broken": broken,
        "overlap": overlap,
        **_pair_keys(_one_text(spans, roles, folded), chosen, rejected),
        "order": _digests([f"{seed}:{row_id}" for row_id in row_ids]),
        "prompt_least": bounds[:, 0],
        "prompt_most": bounds[:, 1],
        "frame": _digests([" ".join(roles[a:b]) for a, b in spans]),
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
        "tie": _numbers(batch["tie"]) == 1,
        "buffer": np.fromiter((role == "buffer" for role in batch["role"].to_pylist()), bool, size),
        **{name: _numbers(batch[name]) for name in NUMBERS},
        **({"extra": _numbers(batch[extra])} if extra else {}),
        **{name: batch[name] for name in ("row_id", "source", "category")},
    }


# ---------------------------------------------------------------------------------------------- the verdict
def first_broken(
    rows: Dataset,
    facts: Facts,
    settings: Hygiene,
    bound: TokenBound | None,
    count_prompt_tokens: CountTokens | None,
    num_proc: int | None = None,
) -> np.ndarray:
    """The code (`CODES`, 0 for none) of the first rule that each row breaks. Shape: (rows,), uint8."""
    broken = facts["broken"].copy()

    def mark(rule: str, found: np.ndarray) -> None:
        broken[(broken == 0) & found] = CODES[rule]

    if settings.duplicates != "keep":
        mark("duplicates", _seen_before(facts["pair"] + facts["side"].astype(np.uint64), broken == 0))
    if settings.contradictions != "keep":
        mark("contradictions", _both_ways(facts["pair"], facts["side"], broken == 0))
    if settings.ties != "keep":
        mark("ties", facts["tie"])
    if bound is not None:
        bounds = facts["prompt_least"], facts["prompt_most"]
        found = too_long(rows, broken == 0, *bounds, facts["frame"], bound, count_prompt_tokens, num_proc)
        mark("min_answer_tokens", found)
    if settings.eval_ngram is not None:
        mark("eval_ngram", facts["overlap"])
    return broken


def _seen_before(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    places = np.flatnonzero(among)
    found = among.copy()
    found[places[np.unique(keys[places], return_index=True)[1]]] = False
    return found


def _both_ways(pair: np.ndarray, side: np.ndarray, among: np.ndarray) -> np.ndarray:
    one, other = (pair[among & (side == way)] for way in (-1, 1))
    return among & np.isin(pair, np.intersect1d(one, other)) & (side != 0)
