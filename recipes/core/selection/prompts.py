"""What a prompt may not do: share a run of words with an evaluation prompt, or leave no room for an answer."""

import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np
from datasets import Dataset

from core.selection.scanning import BATCH, read_at

CountTokens = Callable[[list[list[dict]]], list[int]]  # of conversations, with the template, up to the answer

PROBE = 6  # words; see `Ngrams`
SEPARATORS = str.maketrans(string.punctuation, " " * len(string.punctuation))
SAMPLE = 20_000  # rows whose long prompts `TokenBound` takes its words from
COMMON = 10_000  # words whose tokens it knows


class Ngrams:
    """
    Runs of n words that occur in the evaluation prompts. Words are what white space and ASCII punctuation separate,
    after case folding; a prompt's user turns count as one text. A prompt shorter than n words matches as a whole only.

    Exact and cheap: any run of n words holds exactly one run of `PROBE` words that starts at a multiple of
    n − PROBE + 1. A prompt of w words is asked about those, w/8 questions with n = 13, and compared word by word only
    around one that is answered yes.
    """

    def __init__(self, prompts: Sequence[list[dict]], n: int):
        self.n, self.probe = n, min(PROBE, n)
        self.whole, self.runs, self.probes = set(), set(), set()
        for prompt in prompts:
            words = words_of(" ".join(turn["content"] for turn in prompt if turn["role"] == "user").casefold())
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


def _runs(words: list[str], length: int) -> list[str]:
    return [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]


class TokenBound:
    """
    At least and at most how many tokens a prompt's contents make, found without tokenising them.

    A byte-level tokenizer makes at most one token of a byte (and SentencePiece one more per message, for the space it
    puts in front), which settles most prompts. In those of more bytes than `room`, a common word counts by its tokens
    instead, and where that is still too many, any other word by one token at least: a tokenizer that merges nothing
    across the space before a word spends on it what it spends on it alone. That this holds of the tokenizer at hand
    is checked by `too_long`.

    Args:
        prompts: a sample; none: bytes alone count.
        room: tokens that a prompt may have.
    """

    def __init__(self, prompts: Sequence[list[dict]], room: int, count_prompt_tokens: CountTokens):
        self.room = room
        self.savings: dict[str, int] = {}  # by how much a word's bytes, and the space before it, exceed its tokens
        texts = [turn["content"] for prompt in prompts if _bytes(prompt) > room for turn in prompt]
        seen = Counter(word for text in texts for word in text.split(" ")[1:] if word)
        if seen:
            words = [word for word, _ in seen.most_common(COMMON)]
            contents = ["a", *(f"a {word}" for word in words)]
            bare, *counts = count_prompt_tokens([[{"role": "user", "content": content}] for content in contents])
            for word, count in zip(words, counts, strict=True):
                self.savings[word] = max(0, len(word.encode()) + 1 - (count - bare))

    def of(self, contents: Sequence[str]) -> tuple[int, int]:
        size, least = sum(len(content.encode()) for content in contents), 0
        if size > self.room and self.savings:
            words = [word for text in contents for word in text.split(" ")[1:]]
            saved = sum(map(self.savings.get, words, repeat(0)))
            if size - saved > self.room:
                known = [word for word in words if word in self.savings]
                least = sum(len(word.encode()) + 1 for word in known) - saved
                least += sum(map(bool, words)) - len(known)
            size -= saved
        return least, size


def too_long(
    rows: Dataset,
    among: np.ndarray,
    least: np.ndarray,
    most: np.ndarray,
    frames: np.ndarray,
    bound: TokenBound,
    count_prompt_tokens: CountTokens,
    num_proc: int | None = None,
) -> np.ndarray:
    """
    Prompts of more tokens than there is room for, in their template. Shape: (rows,), bool.

    Only prompts that their bounds do not settle are tokenised. Where words were counted by their tokens, those that
    are settled by the least are too; if any makes fewer or more tokens than its bounds, every prompt is tokenised.

    Args:
        among: the rows in question. Shape: (rows,), bool.
        least, most: `TokenBound.of` each prompt. Shape: (rows,).
        frames: a digest of each prompt's roles: what the template adds depends on these alone. Shape: (rows,).
    """
    found = np.zeros(len(rows), bool)
    places = np.flatnonzero(among)
    if not len(places):
        return found
    prompts = rows.select_columns(["prompt"])
    # What the template adds is measured on one-letter contents, since a template may leave out an empty turn, and
    # widened by two tokens a message.
    _, firsts, kinds = np.unique(frames[places], return_index=True, return_inverse=True)
    bare = [[turn | {"content": "a"} for turn in prompt] for prompt in prompts.select(places[firsts])[:]["prompt"]]
    overhead = np.array(count_prompt_tokens(bare)) + [2 * len(prompt) for prompt in bare]
    least, most = least[places], most[places] + overhead[kinds]
    found[places] = least > bound.room
    # By how much a prompt is settled; below 0 it is not.
    ranked = np.argsort(np.maximum(least - bound.room - 1, bound.room - most), kind="stable")
    asked = np.sum((least <= bound.room) & (most > bound.room)) + (BATCH if bound.savings else 0)

    def count(chosen: np.ndarray) -> bool:
        if not len(chosen):
            return True
        chosen = np.sort(chosen)
        tokens = read_at(
            prompts, places[chosen], lambda columns: np.array(count_prompt_tokens(columns["prompt"])), num_proc
        )
        found[places[chosen]] = tokens > bound.room
        return bool(((least[chosen] <= tokens) & (tokens <= most[chosen])).all())

    if not count(ranked[:asked]):
        count(ranked[asked:])
    return found


def _bytes(prompt: list[dict]) -> int:
    return sum(len(turn["content"].encode()) for turn in prompt)
