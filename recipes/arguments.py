"""What a recipe may say: the sections of its YAML as dataclasses, and the strict parser that fills them."""

from dataclasses import dataclass, field
from typing import Literal

from losses import Link

Action = Literal["drop", "error", "keep"]
LabelPolicy = Literal["helpful", "safer", "safe_first", "safedpo_t"]


@dataclass
class Messages:
    """How a source writes its messages, where it does not write `role` and `content`."""

    role: str = "role"
    content: str = "content"
    roles: dict[str, str] = field(default_factory=dict)  # the source's role name → ours, e.g. {human: user}


@dataclass
class Turns:
    """The markers of a plain-text transcript, e.g. Anthropic/hh-rlhf's."""

    user: str
    assistant: str
    system: str | None = None


@dataclass
class Columns:
    """
    Where a source keeps what a preference row needs. A string names a column (dots reach into structs); a bool or a
    number is a constant, the same for every row.
    """

    prompt: str | None = None  # a string or a list of messages; None: what chosen and rejected share
    chosen: str | None = None  # a string, a message, or a list of messages that ends in the answer
    rejected: str | None = None
    responses: list[str] | None = None  # two answers in no order of merit, instead of chosen and rejected
    better: str | None = None  # with responses: 0 or 1, the better one
    preference: str | None = None  # with responses: a number, below 0 the first is better, above 0 the second
    safer: str | None = None  # with responses: 0 or 1, the safer one (the SFT stage's `answer: safer`)
    chosen_safe: str | bool | None = None
    rejected_safe: str | bool | None = None
    safe: list[str] | None = None  # with responses
    chosen_severity: str | int | None = None
    rejected_severity: str | int | None = None
    severity: list[str] | None = None  # with responses: 0 to 3
    score_chosen: str | float | None = None
    score_rejected: str | float | None = None
    scores: list[str] | None = None  # with responses
    category: str | list[str] | None = None  # a string, or a struct of booleans whose true fields are named
    row_id: str | None = None  # None: the row's number in the source
    conversation: str | None = None  # SFT only: a list of messages that ends in the answer
    messages: Messages = field(default_factory=Messages)
    turns: Turns | None = None  # chosen and rejected (and prompt) are transcripts with these markers
    extra: list[str] = field(default_factory=list)  # numeric columns kept by name, for `selection.score.signal`


@dataclass
class DatasetEntry:
    """One source of rows."""

    path: str  # a dataset on the Hub, a folder, or a file (.json, .jsonl, .csv, .parquet, .arrow; also .gz)
    name: str | None = None  # configuration on the Hub
    data_files: str | list[str] | None = None
    revision: str | None = None
    split: str = "train"
    role: Literal["task", "buffer"] = "task"
    fraction: float | None = None  # in (0, 1]: this part of the rows, drawn by the selection's seed
    source: str | None = None  # the name of the source in the audit; None: the path's last part
    answer: Literal["chosen", "rejected", "safer"] = "chosen"  # SFT only: which answer of a pair to learn
    bad_rows: Literal["error", "drop"] = "error"  # a null, a NaN, prompts that differ: stop, or drop and count
    columns: Columns = field(default_factory=Columns)


@dataclass
class Hygiene:
    """Rows that no run should train on. `keep` (or None) turns a rule off."""

    empty: Action = "error"  # an empty prompt or answer
    identical: Action = "drop"  # chosen = rejected
    max_similarity: float | None = 0.9  # of the two answers, 0 to 1 (rapidfuzz's normalised Indel similarity)
    min_characters: int | None = 10  # of the shorter answer
    max_length_ratio: float | None = 3.0  # of the longer answer to the shorter, in characters
    duplicates: Action = "drop"  # the same prompt and answers after case folding; the first row stays
    contradictions: Action = "drop"  # the same pair labelled both ways; all of them go
    ties: Action = "drop"  # equal scores, or a preference of 0
    min_answer_tokens: int | None = 16  # room that the prompt must leave under max_length
    eval_ngram: int | None = 13  # words shared with an evaluation prompt


@dataclass
class Score:
    """Which rows of a ranked set stay."""

    signal: str  # score_gap, severity_gap, length_ratio, reference_gap, or a numeric column
    keep: float | None = None  # in (0, 1]: this fraction
    band: list[float] | None = None  # instead of keep: two quantiles of the signal
    direction: Literal["easy", "hard", "middle"] = "easy"  # easy: the largest signal; hard: the smallest
    role: Literal["task", "buffer", "all"] = "all"


@dataclass
class Quotas:
    """At most this many rows (an integer) or this part of the rows (a fraction) of a group."""

    by: Literal["pair_class", "category", "source"]
    limits: dict[str, int | float]


@dataclass
class Replay:
    """Task and buffer rows in every micro-batch: `task` to `buffer`; the buffer's mean loss counts `weight` times."""

    task: int = 1
    buffer: int = 1
    weight: float = 1.0


@dataclass
class Selection:
    """The selective buffer: which rows are trained on, in which order its stages run."""

    seed: int | None = None  # None: the run's seed
    hygiene: Hygiene = field(default_factory=Hygiene)
    labels: LabelPolicy | None = None  # None: the margin preset's, or helpful
    score: Score | None = None
    quotas: Quotas | None = None
    replay: Replay = field(default_factory=Replay)


@dataclass
class Margin:
    """The shifted reward margin m = a·I_w − b·I_l + k·φ(score_w − score_l) + c and its link; see `losses.py`."""

    preset: str | None = None
    a: float = 0.0
    b: float = 0.0
    k: float = 0.0
    c: float = 0.0
    phi: Literal["identity", "log"] = "identity"
    indicator: Literal["safe", "severity"] = "safe"  # I: the safety label, or 1 − severity/3
    link: Link = "logistic"
    scaled: bool = False
    p: float = 1.0
    epsilon: float = 0.01
    length_normalized: bool = False
    reference_free: bool = False
