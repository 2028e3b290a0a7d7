"""What a recipe may say: the sections of its YAML, with the range of each value. `parsing.py` fills them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from core.objective.presets import Margin

Action = Literal["drop", "error", "keep"]
LabelPolicy = Literal["helpful", "safer", "safe_first", "safedpo_t"]
Fraction = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Two = Annotated[list[str], Field(min_length=2, max_length=2)]  # one column for each of a pair's two answers
Severity = Annotated[int, Field(ge=0, le=3)]
Patterns = Annotated[list[str], Field(min_length=1)]


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
    responses: Two | None = None  # two answers in no order of merit, instead of chosen and rejected
    better: str | None = None  # with responses: 0 or 1, the better one
    preference: str | None = None  # with responses: a number, below 0 the first is better, above 0 the second
    safer: str | None = None  # with responses: 0 or 1, the safer one (the SFT stage's `answer: safer`)
    chosen_safe: str | bool | None = None
    rejected_safe: str | bool | None = None
    safe: Two | None = None  # with responses
    chosen_severity: str | Severity | None = None
    rejected_severity: str | Severity | None = None
    severity: Two | None = None  # with responses: 0 to 3
    score_chosen: str | float | None = None
    score_rejected: str | float | None = None
    scores: Two | None = None  # with responses
    category: str | list[str] | None = None  # a string, or a struct of booleans whose true fields are named
    row_id: str | None = None  # None: the row's number in the source
    conversation: str | None = None  # SFT only: a list of messages that ends in the answer
    messages: Messages = field(default_factory=Messages)
    turns: Turns | None = None  # chosen and rejected (and prompt) are transcripts with these markers
    extra: list[str] = field(default_factory=list)  # numeric columns kept by name, for `selection.score.signal`


@dataclass
class DatasetEntry:
    """One source of rows."""

    path: str  # a dataset on the Hub, a folder (also of save_to_disk), or a .json, .jsonl, .csv, .parquet, .arrow, .gz
    name: str | None = None  # configuration on the Hub
    data_files: str | list[str] | None = None
    revision: str | None = None
    split: str = "train"
    role: Literal["task", "buffer"] = "task"
    fraction: Fraction | None = None  # this part of the rows, drawn by the selection's seed
    source: str | None = None  # the name of the source in the audit; None: the path's last part
    answer: Literal["chosen", "rejected", "safer"] = "chosen"  # SFT only: which answer of a pair to learn
    bad_rows: Literal["error", "drop"] = "error"  # a null, a NaN, prompts that differ: stop, or drop and count
    columns: Columns = field(default_factory=Columns)


@dataclass
class Hygiene:
    """Rows that no run should train on. `keep` (or None) turns a rule off."""

    empty: Action = "error"  # an empty prompt or answer
    identical: Action = "drop"  # chosen = rejected
    identical_tokens: Action = "drop"  # answers that differ as texts, but not in the tokens that max_length leaves
    max_similarity: Fraction | None = 0.9  # of the two answers, 0 to 1 (rapidfuzz's normalised Indel similarity)
    min_characters: Count | None = 10  # of the shorter answer
    max_length_ratio: Annotated[float, Field(ge=1)] | None = 3.0  # of the longer answer to the shorter, in characters
    duplicates: Action = "drop"  # the same prompt and answers after case folding; the first row stays
    contradictions: Action = "drop"  # the same pair labelled both ways; all of them go
    ties: Action = "drop"  # equal scores, or a preference of 0
    min_answer_tokens: Count | None = 16  # room that the prompt must leave under max_length
    eval_ngram: Count | None = 13  # words shared with an evaluation prompt


@dataclass
class Score:
    """Which rows of a ranked set stay."""

    signal: str  # score_gap, severity_gap, length_ratio, reference_gap, or a numeric column
    keep: Fraction | None = None  # this fraction
    band: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None  # instead: two quantiles
    direction: Literal["easy", "hard", "middle"] = "easy"  # easy: the largest signal; hard: the smallest
    role: Literal["task", "buffer", "all"] = "all"


@dataclass
class Quotas:
    """At most this many rows (an integer) or this part of the rows (a fraction) of a group."""

    by: Literal["pair_class", "category", "source"]
    limits: dict[str, Annotated[int, Field(ge=0)] | Fraction]


@dataclass
class Replay:
    """Task and buffer rows in every micro-batch: `task` to `buffer`; the buffer's mean loss counts `weight` times."""

    task: Count = 1
    buffer: Count = 1
    weight: NotNegative = 1.0


@dataclass
class Selection:
    """The selective buffer: which rows are trained on, in which order its stages run."""

    seed: Annotated[int, Field(ge=0)] | None = None  # None: the run's seed
    hygiene: Hygiene = field(default_factory=Hygiene)
    labels: LabelPolicy | None = None  # None: the margin preset's, or helpful
    score: Score | None = None
    quotas: Quotas | None = None
    replay: Replay = field(default_factory=Replay)


@dataclass
class PreferenceRecipe:
    """The keys of this project in a recipe for `dpo.py`, beside those of TRL's DPOConfig and ModelConfig."""

    datasets: list[DatasetEntry]
    eval_datasets: list[DatasetEntry] = field(default_factory=list)
    selection: Selection = field(default_factory=Selection)
    margin: Margin = field(default_factory=Margin)
    trainable_parameters: Patterns | None = None  # None: all; with LoRA these are its target modules
    prefix_sharing: bool = True  # compute a pair's prompt once for both answers
    chat_template_path: str | None = None  # a .jinja file; None: the model's own template
    system_message: str | None = None  # put before conversations that have none; may be empty
    pad_token: str | None = None  # one of the tokenizer's, where it has not said which it pads with
    pairs_per_update: Count | None = None  # task and buffer pairs on all devices; sets gradient_accumulation_steps
    num_processes: Count | None = None  # refuse to start on any other number
    reference_cache: str | None = None  # folder of reference log-probabilities; None: under HF_HOME


@dataclass
class SFTRecipe:
    """The keys of this project in a recipe for `sft.py`, beside those of TRL's SFTConfig and ModelConfig."""

    datasets: list[DatasetEntry]
    eval_datasets: list[DatasetEntry] = field(default_factory=list)
    trainable_parameters: Patterns | None = None
    chat_template_path: str | None = None
    system_message: str | None = None
    pad_token: str | None = None
    conversations_per_update: Count | None = None  # on all devices; sets gradient_accumulation_steps
    num_processes: Count | None = None


@dataclass
class EvaluateRecipe(PreferenceRecipe):
    """A preference recipe (a run's own recipe.yaml will do) and what `evaluate.py` needs besides."""

    datasets: list[DatasetEntry] = field(default_factory=list)
    prompts: str | None = None  # a .txt (a prompt per line) or .jsonl (`prompt`, or `messages`) to answer
    max_new_tokens: Count = 256
    reference_model: str | None = None  # None: rewards without a reference
