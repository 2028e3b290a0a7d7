"""
The selection once more, row by row and as plainly as it can be said: what tests hold `select_rows` against. Slow on
purpose; nothing in it is shared with recipes/.
"""

import math
import string
from fractions import Fraction

import xxhash

CLASSES = {(1, 1): "safe/safe", (1, 0): "safe/unsafe", (0, 1): "unsafe/safe", (0, 0): "unsafe/unsafe"}
SWAPPED = [("chosen", "rejected"), ("chosen_safe", "rejected_safe"), ("chosen_severity", "rejected_severity")]
SWAPPED += [("score_chosen", "score_rejected")]


def select(rows, settings, seed, room=None, count=None, eval_prompts=None):
    """
    Each row's fate: None if it stays, else (stage, reason), and the ids of the rows whose answers are swapped.

    Args:
        rows: a list of dicts; they are left as they are.
        settings: `schema.Selection`.
        room: tokens of prompt and answer; `count` gives a prompt's, and an answer has a token a byte.
    """
    rows = [dict(row) for row in rows]
    fates = {row["row_id"]: None for row in rows}
    alive = list(rows)

    def drop(stage, reason, gone):
        gone = {row["row_id"] for row in gone}
        fates.update(dict.fromkeys(gone, (stage, reason)))
        alive[:] = [row for row in alive if row["row_id"] not in gone]

    for row in rows:  # where safety decides, equal scores leave nothing open
        if settings.labels not in (None, "helpful") and row["role"] == "task":
            row["tie"] &= row["chosen_safe"] is row["rejected_safe"]

    hygiene = settings.hygiene
    for rule in RULES:
        value = getattr(hygiene, rule)
        if value not in (None, "keep"):
            drop("hygiene", rule, RULES[rule](alive, value, room, count, eval_prompts))

    relabelled = set()
    policy = settings.labels or "helpful"
    for row in list(alive):
        if row["role"] == "task" and policy != "helpful":
            verdict = relabel(row, policy)
            if verdict == "drop":
                drop("labels", "both_unsafe", [row])
            elif verdict == "swap":
                relabelled.add(row["row_id"])
                for one, other in SWAPPED:
                    row[one], row[other] = row[other], row[one]

    score = settings.score
    if score is not None:
        ranked = [row for row in alive if score.role in ("all", row["role"])]
        ranked.sort(key=lambda row: (signal(row, score.signal), order(row, seed)))
        first, end = bounds(score, len(ranked))
        drop("score", score.signal, ranked[:first] + ranked[end:])

    if settings.quotas is not None:
        for group, limit in settings.quotas.limits.items():
            members = [row for row in alive if group_of(row, settings.quotas.by) == group]
            members.sort(key=lambda row: order(row, seed))
            if isinstance(limit, float):
                limit = math.floor(Fraction(str(limit)) * len(members))
            drop("quotas", settings.quotas.by, members[limit:])
    gone = {row_id for row_id, fate in fates.items() if fate is not None}
    return fates, relabelled - gone


def lcs(a, b):
    """Length of the longest common subsequence."""
    above = [0] * (len(b) + 1)
    for x in a:
        line = [0]
        for j, y in enumerate(b):
            line.append(above[j] + 1 if x == y else max(above[j + 1], line[j]))
        above = line
    return above[-1]


def folded(row):
    """The prompt, and the answers in the order of their letters; then whether chosen is the first of them."""
    chosen, rejected = row["chosen"].casefold(), row["rejected"].casefold()
    prompt = tuple((turn["role"], turn["content"].casefold()) for turn in row["prompt"])
    return (prompt, *sorted((chosen, rejected))), chosen < rejected


def duplicates(rows, *_):
    seen, gone = set(), []
    for row in rows:
        if folded(row) in seen:
            gone.append(row)
        seen.add(folded(row))
    return gone


def contradictions(rows, *_):
    ways = {}
    for row in rows:
        pair, first = folded(row)
        ways.setdefault(pair, set()).add(first)
    return [row for row in rows if len(ways[folded(row)[0]]) == 2]


def words(prompt):
    text = " ".join(turn["content"] for turn in prompt if turn["role"] == "user").casefold()
    return tuple("".join(" " if letter in string.punctuation else letter for letter in text).split())


def shares_ngram(prompt, others, n):
    mine = words(prompt)
    for other in map(words, others):
        if min(len(mine), len(other)) < n:
            if mine == other and mine:
                return True
        elif {mine[i : i + n] for i in range(len(mine) - n + 1)} & {
            other[i : i + n] for i in range(len(other) - n + 1)
        }:
            return True
    return False


def lengths(row):
    """Tokens of the answers, which are bytes."""
    return sorted((len(row["chosen"].encode()), len(row["rejected"].encode())))


def rendered(row, length, count, _):
    """Whether the prompt leaves room; where it does not, the row has no tokens that a rule could count."""
    return length is not None and count(row["prompt"]) < length and lengths(row)[0] > 0


def similar(row, limit, length, count, _):
    room = length - count(row["prompt"])
    chosen, rejected = row["chosen"].encode()[:room], row["rejected"].encode()[:room]
    return 2 * lcs(chosen, rejected) / (len(chosen) + len(rejected)) > limit


def empty(row):
    return not row["prompt"] or not all(
        text.strip() for text in (row["prompt"][-1]["content"], row["chosen"], row["rejected"])
    )


def equal_when_cut(row, room):
    """Whether `room` tokens of two different answers are the same; a token is a byte."""
    texts = row["chosen"].encode(), row["rejected"].encode()
    return room > 0 and len(set(texts)) == 2 and len({text[:room] for text in texts}) == 1


RULES = {
    "empty": lambda rows, *_: [row for row in rows if empty(row)],
    "identical": lambda rows, *_: [row for row in rows if row["chosen"] == row["rejected"]],
    "min_tokens": lambda rows, least, *rest: [row for row in rows if rendered(row, *rest) and lengths(row)[0] < least],
    "max_length_ratio": lambda rows, most, *rest: [
        row for row in rows if rendered(row, *rest) and lengths(row)[1] > most * lengths(row)[0]
    ],
    "max_similarity": lambda rows, limit, *rest: [
        row for row in rows if rendered(row, *rest) and similar(row, limit, *rest)
    ],
    "duplicates": duplicates,
    "contradictions": contradictions,
    "ties": lambda rows, *_: [row for row in rows if row["tie"]],
    "min_answer_tokens": lambda rows, least, length, count, _: [
        row for row in rows if length is not None and count(row["prompt"]) + least > length
    ],
    "eval_ngram": lambda rows, n, length, count, others: [
        row for row in rows if others is not None and shares_ngram(row["prompt"], others, n)
    ],
    "unrenderable": lambda rows, _, *rest: [row for row in rows if rest[0] is not None and not rendered(row, *rest)],
    "identical_tokens": lambda rows, _, length, count, __: [
        row for row in rows if length is not None and equal_when_cut(row, length - count(row["prompt"]))
    ],
}


def relabel(row, policy):
    chosen, rejected = row["chosen_safe"], row["rejected_safe"]
    if policy == "safedpo_t":
        return "keep" if chosen else "swap" if rejected else "drop"
    if policy == "safe_first" and chosen and rejected:
        return "keep"
    if chosen != rejected:
        return "swap" if rejected else "keep"
    severities = row["chosen_severity"], row["rejected_severity"]
    return "swap" if None not in severities and severities[1] < severities[0] else "keep"


def signal(row, name):
    if name == "score_gap":
        return row["score_chosen"] - row["score_rejected"]
    if name == "severity_gap":
        return row["rejected_severity"] - row["chosen_severity"]
    if name == "length_ratio":
        shorter, longer = lengths(row)
        return longer / max(shorter, 1)
    return row[name]


def bounds(score, count):
    """First and one past the last rank that stays, the smallest signal first."""
    if score.band:
        return tuple(math.floor(Fraction(str(quantile)) * count) for quantile in score.band)
    size = min(count, max(1, math.floor(Fraction(str(score.keep)) * count)))
    first = {"hard": 0, "middle": (count - size) // 2, "easy": count - size}[score.direction]
    return first, first + size


def group_of(row, by):
    if by == "pair_class":
        return CLASSES.get((row["chosen_safe"], row["rejected_safe"]), "unlabelled")
    return row[by] if row[by] is not None else "none"


def order(row, seed):
    return xxhash.xxh3_64_intdigest(f"{seed}:{row['row_id']}".encode())
