"""What a recipe may say: the sections of its YAML, each key with its type, range, default, meaning and an example."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from core.objective.presets import Margin
from core.runtime.described import key

Action = Literal["drop", "error", "keep"]
LabelPolicy = Literal["helpful", "safer", "safe_first", "safedpo_t"]
SaveDtype = Literal["float32", "bfloat16", "float16"]
Fraction = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Texts = Annotated[list[str], Field(min_length=2)]  # columns of text that are read as one
Two = Annotated[list[str], Field(min_length=2, max_length=2)]  # one column for each of a pair's two answers
Severity = Annotated[int, Field(ge=0, le=3)]
TIE = "tie"  # what a value of `columns.better` may mean in `columns.values`, beside 0 and 1


def _one_or_more(given: Any) -> Any:
    """One pattern may stand without brackets: `trainable_parameters: down_proj`."""
    return [given] if isinstance(given, str) and given else given


Patterns = Annotated[list[str], Field(min_length=1), BeforeValidator(_one_or_more)]


@dataclass
class Messages:
    """How a source writes its messages, where it does not write `role` and `content`."""

    role: str = key("role", "the field that names the speaker", "from")
    content: str = key("content", "the field that holds the text", "value")
    roles: dict[str, str] = key(dict, "the source's name of a role → user, assistant or system", "{human: user}")


@dataclass
class Turns:
    """The markers of a plain-text transcript, e.g. Anthropic/hh-rlhf's."""

    user: str = key(..., "what stands before a turn of the user", '"\\n\\nHuman:"')
    assistant: str = key(..., "what stands before a turn of the assistant", '"\\n\\nAssistant:"')
    system: str | None = key(None, "what stands before the system message", '"\\n\\nSystem:"')


@dataclass
class Columns:
    """
    Where a source keeps what a preference row needs. A string names a column (dots reach into structs); a bool or a
    number is a constant, the same for every row.
    """

    prompt: str | Texts | None = key(
        None,
        "a string or a list of messages, or several strings, joined by line breaks; null: what chosen and rejected "
        "share",
        "[instruction, input]",
    )
    system: str | None = key(None, "a string that leads the prompt as its system message; may be empty", "system")
    chosen: str | None = key(None, "a string, a message, or a list of messages that ends in the answer", "chosen")
    rejected: str | None = key(None, "the same of the other answer", "rejected")
    responses: Two | None = key(None, "instead: two answers in no order of merit", "[response_0, response_1]")
    better: str | None = key(None, "with responses: 0 or 1, the better one", "better_response_id")
    preference: str | None = key(None, "with responses: a number; below 0 the first is better", "overall_preference")
    safer: str | None = key(None, "with responses: 0 or 1, for sft.py's `answer: safer`", "safer_response_id")
    values: dict[str, dict[str, bool | float | str | None]] = key(
        dict,
        "by column: what its values mean, where they are not 0 and 1, true and false, or numbers; tie: neither is "
        "better; null: not known",
        "{winner: {model_a: 0, model_b: 1, both_bad: tie}}",
    )
    response: str | None = key(
        None, "instead: one answer a row; the rows of one prompt become pairs, by label, score or rank", "completion"
    )
    label: str | None = key(
        None, "with response: whether it is wanted; each that is goes with one that is not", "label"
    )
    score: str | None = key(None, "with response: a number; the highest goes with the lowest", "helpfulness")
    rank: str | None = key(None, "with response: a number; the lowest is the best", "answers.rank")
    response_safe: str | None = key(None, "with response: whether it is safe", "is_safe")
    unfold: str | None = key(
        None, "with response: a column of lists, each item of which is read as a row; dots reach into it", "answers"
    )
    chosen_safe: str | bool | None = key(None, "whether the chosen answer is safe", "true")
    rejected_safe: str | bool | None = key(None, "whether the rejected answer is safe", "true")
    safe: Two | None = key(None, "with responses: the same of each", "[is_response_0_safe, is_response_1_safe]")
    chosen_severity: str | Severity | None = key(None, "harm of the chosen answer, 0 to 3", "0")
    rejected_severity: str | Severity | None = key(None, "harm of the rejected answer, 0 to 3", "rejected_severity")
    severity: Two | None = key(None, "with responses: the same of each", "[severity_0, severity_1]")
    score_chosen: str | float | None = key(None, "helpfulness of the chosen answer", "score_chosen")
    score_rejected: str | float | None = key(None, "helpfulness of the rejected answer", "score_rejected")
    scores: Two | None = key(None, "with responses: the same of each", "[score_0, score_1]")
    category: str | list[str] | None = key(None, "a string, or booleans of which the true ones are named", "source")
    row_id: str | None = key(None, "what the audit calls the row; null: its number in the source", "id")
    conversation: str | None = key(None, "sft.py only: a list of messages that ends in the answer", "messages")
    messages: Messages = key(Messages, "how messages are written")
    leave_out: list[str] = key(
        list,
        "columns, and fields of messages, that a template or a trainer would read and this run does without",
        "[tools, reasoning_content]",
    )
    turns: Turns | None = key(None, "where prompt, chosen and rejected are transcripts: their markers")
    extra: list[str] = key(list, "numeric columns to keep by name, for selection.score.signal", "[perplexity]")


@dataclass
class DatasetEntry:
    """One source of rows."""

    path: str = key(
        ...,
        "a dataset on the Hub, a folder (also of save_to_disk), or a .json, .jsonl, .csv, .parquet, .arrow, .gz",
        "rows.jsonl",
    )
    name: str | None = key(None, "its configuration on the Hub", "preference")
    data_files: str | list[str] | None = key(None, "files of the folder or of the Hub's dataset", "train.jsonl")
    revision: str | None = key(None, "a branch, tag or commit on the Hub", "ff7ba91")
    split: str = key("train", "the split on the Hub, or in a folder of save_to_disk", "train_prefs")
    role: Literal["task", "buffer"] = key("task", "the set to learn, or the one that is replayed beside it", "buffer")
    fraction: Fraction | None = key(None, "only this part of the rows, drawn by selection.seed", "0.1")
    source: str | None = key(None, "its name in the audit; null: the last part of path", "helpful")
    answer: Literal["chosen", "rejected", "safer"] = key("chosen", "sft.py only: which of a pair to learn", "safer")
    bad_rows: Literal["error", "drop"] = key("error", "a null, a NaN, prompts that differ: stop, or drop", "drop")
    columns: Columns = key(Columns, "where it keeps what a row needs")


@dataclass
class Hygiene:
    """
    Rows that no run should train on: by default those without a signal, or with a false one. `keep` (or null) turns a
    rule off; what a rule that is off would drop is said by check and audit. Lengths are in tokens, an answer's with
    what the template ends it with.
    """

    empty: Action = key("drop", "an empty prompt or answer", "error")
    identical: Action = key("drop", "chosen = rejected", "error")
    identical_tokens: Action = key(
        "drop", "answers that differ as texts, but not in the tokens that max_length leaves", "keep"
    )
    duplicates: Action = key("drop", "the same prompt and answers but for case; the first row stays", "keep")
    contradictions: Action = key("drop", "the same pair labelled both ways; all of them go", "error")
    ties: Action = key("drop", "a preference of 0, or equal scores of answers that nothing else puts in order", "keep")
    unrenderable: Literal["drop", "error"] = key(
        "error", "the chat template refuses the conversation, or leaves no answer to a prompt", "drop"
    )
    min_answer_tokens: Count | None = key(16, "room that the prompt must leave under max_length", "64")
    eval_ngram: Count | None = key(
        13,
        "this many words in a row (letters, where words are not spaced) shared with an evaluation prompt",
        "null",
    )
    min_tokens: Count | None = key(None, "of the shorter answer", "5")
    max_length_ratio: Annotated[float, Field(ge=1)] | None = key(None, "of the longer answer to the shorter", "3")
    max_similarity: Fraction | None = key(
        None, "of the two answers' tokens (rapidfuzz's normalised Indel similarity)", "0.9"
    )


@dataclass
class Score:
    """
    Which rows of a ranked set stay. A score's gap tells clear pairs from doubtful ones as well as the scores do. The
    reference's gap is a sum over tokens and so ranks mostly by which answer is longer; per token it does not. A ratio
    of lengths says nothing of which answer is better.
    """

    signal: str = key(
        ...,
        "score_gap, severity_gap, length_ratio, reference_gap, reference_gap_per_token, or a column of extra",
        "score_gap",
    )
    keep: Fraction | None = key(None, "this part of the rows", "0.5")
    band: Annotated[list[float], Field(min_length=2, max_length=2)] | None = key(
        None, "instead: those between two quantiles", "[0.25, 0.75]"
    )
    direction: Literal["easy", "hard", "middle"] = key("easy", "easy: the largest signal; hard: the smallest", "hard")
    role: Literal["task", "buffer", "all"] = key("all", "the rows that are ranked; the others stay", "buffer")


@dataclass
class Quotas:
    """At most so many rows of a group."""

    by: Literal["pair_class", "category", "source"] = key(..., "what makes a group", "pair_class")
    limits: dict[str, Annotated[int, Field(ge=0)] | Fraction] = key(
        ..., "of each group an integer of rows, or a fraction of all", "{safe/safe: 0.5, unsafe/unsafe: 1000}"
    )


@dataclass
class Replay:
    """Task and buffer rows in every micro-batch."""

    task: Count = key(1, "so many task rows …", "3")
    buffer: Count = key(1, "… to so many of the buffer", "3")
    weight: NotNegative = key(1.0, "how often the buffer's mean loss counts", "0.5")


@dataclass
class Selection:
    """The selective buffer: which rows are trained on, in which order its stages run."""

    seed: Annotated[int, Field(ge=0)] | None = key(None, "of every draw; null: the run's seed", "7")
    hygiene: Hygiene = key(Hygiene, "rows that no run should train on")
    labels: LabelPolicy | None = key(
        None, "which answer of a pair is the chosen one; null: the margin preset's, or helpful", "safer"
    )
    score: Score | None = key(None, "keep a part of the rows by rank; null: all")
    quotas: Quotas | None = key(None, "bound the rows of each group; null: no bounds")
    replay: Replay = key(Replay, "how buffer rows stand beside task rows")


@dataclass
class PreferenceRecipe:
    """The keys of this project in a recipe for `dpo.py`, beside those of TRL's DPOConfig and ModelConfig."""

    datasets: list[DatasetEntry] = key(..., "the sources of training rows")
    eval_datasets: list[DatasetEntry] = key(list, "sources of held-out rows")
    selection: Selection = key(Selection, "which rows are trained on")
    margin: Margin = key(Margin, "the loss")
    trainable_parameters: Patterns | None = key(
        None, "patterns of the weights to train; null: all; with LoRA its target modules", "down_proj"
    )
    prefix_sharing: bool = key(True, "compute a pair's prompt once for both answers", "false")
    chat_template_path: str | None = key(None, "a .jinja file; null: the model's own template", "chat.jinja")
    chat_template_kwargs: dict[str, Any] = key(
        dict, "variables that the template reads, written into it as defaults", "{enable_thinking: false}"
    )
    system_message: str | None = key(None, "put before conversations that have none; may be empty", "Be safe.")
    pad_token: str | None = key(None, "one of the tokenizer's, where it has not said which it pads with", "<unk>")
    save_dtype: SaveDtype | None = key(
        None,
        "of the final model; null: as the model that training began with, or float32 if that would undo the training",
        "bfloat16",
    )
    pairs_per_update: Count | None = key(None, "on all devices; sets gradient_accumulation_steps", "32")
    num_processes: Count | None = key(None, "refuse to start on any other number", "8")
    reference_cache: str | None = key(
        None, "folder of reference log-probabilities; null: under HF_HOME", "runs/reference"
    )


@dataclass
class SFTRecipe:
    """The keys of this project in a recipe for `sft.py`, beside those of TRL's SFTConfig and ModelConfig."""

    datasets: list[DatasetEntry] = key(..., "the sources of training rows")
    eval_datasets: list[DatasetEntry] = key(list, "sources of held-out rows")
    trainable_parameters: Patterns | None = key(
        None, "patterns of the weights to train; null: all; with LoRA its target modules", "down_proj"
    )
    chat_template_path: str | None = key(None, "a .jinja file; null: the model's own template", "chat.jinja")
    chat_template_kwargs: dict[str, Any] = key(
        dict, "variables that the template reads, written into it as defaults", "{enable_thinking: false}"
    )
    system_message: str | None = key(None, "put before conversations that have none; may be empty", "Be safe.")
    pad_token: str | None = key(None, "one of the tokenizer's, where it has not said which it pads with", "<unk>")
    save_dtype: SaveDtype | None = key(
        None,
        "of the final model; null: as the model that training began with, or float32 if that would undo the training",
        "bfloat16",
    )
    padding_free: bool = key(
        True, "lay the conversations of a micro-batch end to end, none seeing another, where that is exact", "false"
    )
    conversations_per_update: Count | None = key(None, "on all devices; sets gradient_accumulation_steps", "32")
    num_processes: Count | None = key(None, "refuse to start on any other number", "8")


@dataclass
class PromptSet:
    """Prompts to answer, of one kind."""

    name: str = key(..., "what tables call it", "xstest-safe")
    path: str = key(..., "a .txt (a prompt per line), a .csv, or a .jsonl (the column, or `messages`)", "xstest.csv")
    column: str = key("prompt", "the column of a .csv or .jsonl that holds the prompts", "Behavior")
    where: dict[str, str] = key(dict, "only rows that have these values, as text", "{label: safe}")
    measure: Literal["harmful_compliance", "over_refusal"] | None = key(
        None, "what an answer counts for: complying with what is harmful, or refusing what is not", "over_refusal"
    )


@dataclass
class ModelJudge:
    """A model that judges each answer."""

    name: str = key(..., "what tables call it", "harmbench")
    model: str = key(..., "a path, or a name on the Hub", "cais/HarmBench-Llama-2-13b-cls")
    kind: Literal["classifier", "chat"] = key(
        ..., "a sequence classifier (a reward or cost model too), or a causal model that answers by a word", "chat"
    )
    template: str | None = key(
        None, "a .jinja file over `prompt` and `answer`; null: the judge's own chat template", "harmbench.jinja"
    )
    labels: dict[str, str] = key(
        dict, "chat: the word that its answer begins with, in small letters → label", "{yes: harmful, no: harmless}"
    )
    threshold: float | None = key(None, "classifier of one score: `high` from here on, else `low`", "0")


@dataclass
class EvaluateRecipe(PreferenceRecipe):
    """A preference recipe (a run's own recipe.yaml will do) and what `evaluate.py` needs besides."""

    datasets: list[DatasetEntry] = key(list, "the sources of rows, where there are no eval_datasets")
    models: dict[str, str] = key(
        dict, "name → path of each model to compare, the start first; empty: model_name_or_path", "{base: runs/sft}"
    )
    prompt_sets: list[PromptSet] = key(list, "prompts to answer and judge")
    judges: list[ModelJudge] = key(list, "models that judge answers, beside the patterns of refusal and garbling")
    prompts: str | None = key(None, "one more set of prompts, by its file alone", "prompts.txt")
    max_new_tokens: Count = key(256, "of each answer", "64")
    temperature: NotNegative = key(0.0, "of the answers; 0: the likeliest", "1.0")
    require: list[str] = key(list, "what must hold of the last model, or the exit code is 3", "[over_refusal <= 0.05]")
    reference_model: str | None = key(None, "null: rewards without a reference", "runs/sft")


Kind = Literal["dpo", "sft", "evaluate"]
RECIPES: dict[Kind, type] = {"dpo": PreferenceRecipe, "sft": SFTRecipe, "evaluate": EvaluateRecipe}
