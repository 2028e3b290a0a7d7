"""What the bench trains on: rows of public sources' lengths, models of random weights, or the user's own of either."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig

from core.config.parsing import Run
from core.config.schema import DatasetEntry
from core.data.preferences import FEATURES, load_preferences
from core.data.tokens import load_tokenizer
from core.modeling.policy import load_model
from core.runtime.errors import RecipeError
from core.runtime.network import check_model_path
from core.runtime.text import did_you_mean
from core.selection.pairs import prepare_pairs

GENERATED = "generated/"  # before the name of a source in `LENGTHS`: rows of its lengths are made
VOCABULARY = 8192
WORDS = 4000  # of the generated language; nearly all become one token each
POOL = 2**19  # words of the text that generated prompts and answers are cut from
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# (median, mean) of the tokens of a source's prompts, chosen and rejected answers, by a byte-level BPE of 8,192 tokens
# trained on the rows themselves, without the chat template's tokens. The generated ones are log-normal with these.
Lengths = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
LENGTHS: dict[str, Lengths] = {
    "hh-rlhf": ((88, 118), (28, 41), (37, 52)),  # harmless-base, the first 1,000 rows of the test split
    "UltraFeedback": ((92, 189), (228, 311), (197, 270)),  # in HuggingFaceH4's layout, 700 rows
}


# Of a model of Mistral's architecture with random weights.
SIZES = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
MODELS = {
    "4x256": (4, 256, 4, 2, 896, VOCABULARY),
    "6x384": (6, 384, 6, 2, 1344, VOCABULARY),
    "0.5b": (24, 896, 14, 2, 4864, 151_936),  # Qwen2.5-0.5B's
    "7b": (32, 4096, 32, 8, 14_336, 32_000),  # Mistral-7B's
}


def random_model(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model of `SIZES`, drawn on the GPU where there is one; the same seed gives the same weights."""
    config = MistralConfig(
        **dict(zip(SIZES, sizes, strict=True)),
        max_position_embeddings=4096,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCABULARY` tokens with a chat template."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass
class Workload:
    """What both trainers are given."""

    title: str
    precision: str  # of the forward: bf16, fp16, or the weights' own
    build_model: Callable[[], PreTrainedModel]  # the same weights at every call
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset  # tokenised, in the order of training, with margin 0 and of one role: plain DPO, as in stock TRL
    args: DPOConfig
    system_message: str | None
    trained: list[str] | None  # patterns of trainable parameters; None: all

    @property
    def rows_per_update(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps


def prepare_workload(resolved: Run, updates: int) -> Workload:
    """
    Load, tokenise and select the recipe's rows, and draw by the seed as many as `updates` updates need.

    A model that is none of `MODELS` is loaded with its tokenizer; for one of those, with random weights, a tokenizer
    is trained on the rows.

    Raises:
        RecipeError: also where the recipe wants LoRA, or too few rows are left.
    """
    model, args, recipe = resolved.model, resolved.training, resolved.recipe
    if model.use_peft:
        raise RecipeError(f"{resolved.path}: use_peft: the bench trains weights themselves; set it to false")
    sizes, dtype = MODELS.get(model.model_name_or_path), model.dtype or "float32"
    if sizes is None:
        check_model_path(model.model_name_or_path, model.model_revision)
    needed = updates * args.per_device_train_batch_size * args.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as folder:
        # Twice as many rows are generated as are needed, since the selection drops some.
        entries = [_made(entry, Path(folder), 2 * needed, args.seed) for entry in recipe.datasets]
        if sizes is None:
            build_model = partial(load_model, model)
            tokenizer = load_tokenizer(model, recipe)
        else:
            build_model = partial(random_model, sizes, getattr(torch, dtype), args.seed)
            texts, _ = load_preferences(entries, args.seed)
            prompts = (turn["content"] for prompt in texts["prompt"] for turn in prompt)
            tokenizer = train_tokenizer([*prompts, *texts["chosen"], *texts["rejected"]])
        pairs = prepare_pairs(entries, recipe, args, tokenizer).dataset
    if len(pairs) < needed:
        raise RecipeError(
            f"{resolved.path}: {len(pairs):,} rows are left by the selection, and {updates} updates need {needed:,}: "
            "give a larger --dataset, or lower --updates or per_device_train_batch_size"
        )
    rows = pairs.shuffle(seed=args.seed).select(range(needed)).flatten_indices()
    # Stock TRL knows neither margins nor roles.
    own = {"row": np.arange(needed), "margin": np.zeros(needed), "is_buffer": np.zeros(needed, bool)}
    for name, value in own.items():
        rows = rows.remove_columns(name).add_column(name, value)
    # No log, no evaluation, no checkpoint: nothing but training.
    args.max_steps, args.num_train_epochs = updates, 1
    args.precompute_ref_log_probs = True
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.logging_first_step = args.eval_on_start = False
    args.report_to, args.disable_tqdm = [], True
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else dtype
    title = f"{' + '.join(entry.path for entry in recipe.datasets)}, model {model.model_name_or_path}"
    title += f", {args.per_device_train_batch_size} pairs a micro-batch, {precision}"
    trained = recipe.trainable_parameters
    return Workload(
        title=title + (f", {', '.join(trained)} trained" if trained else ""),
        precision=precision,
        build_model=build_model,
        tokenizer=tokenizer,
        rows=rows,
        args=args,
        system_message=recipe.system_message,
        trained=trained,
    )


def _made(entry: DatasetEntry, folder: Path, count: int, seed: int) -> DatasetEntry:
    """The entry itself, or with generated rows on disk in its place."""
    if not entry.path.startswith(GENERATED):
        return entry
    name = entry.path.removeprefix(GENERATED)
    if name not in LENGTHS:
        raise RecipeError(f"datasets: {entry.path}: no such lengths{did_you_mean(name, LENGTHS)}")
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for prompt, *answers in generate_pairs(count, LENGTHS[name], seed):
            question = {"role": "user", "content": prompt}
            chosen, rejected = ([question, {"role": "assistant", "content": answer}] for answer in answers)
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    return replace(entry, path=str(path))


def generate_pairs(count: int, lengths: Lengths, seed: int) -> Iterator[tuple[str, str, str]]:
    """Prompt, chosen and rejected answer of each pair: runs of random words, about a token each."""
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(draw.choice(letters, size)) for size in draw.integers(2, 5, WORDS)]
    frequency = 1 / (np.arange(WORDS) + 10)  # Zipf's, without a few words that are half of the text
    order = draw.choice(WORDS, POOL, p=frequency / frequency.sum())
    pool = " ".join([words[i] for i in order])
    ends = np.cumsum([len(words[i]) + 1 for i in order])
    starts = np.concatenate([[0], ends])

    def spans(median: float, mean: float) -> zip:
        # The mean of a log-normal is median·exp(σ²/2).
        drawn = draw.lognormal(np.log(median), np.sqrt(2 * np.log(mean / median)), count)
        sizes = np.clip(drawn.round().astype(int), 1, POOL // 8)
        first = draw.integers(0, POOL - sizes)
        return zip(starts[first].tolist(), (starts[first + sizes] - 1).tolist(), strict=True)

    parts = [spans(*part) for part in lengths]
    for span in zip(*parts, strict=True):
        yield tuple(pool[start:end] for start, end in span)


def labelled_rows(count: int, lengths: Lengths, seed: int) -> Iterator[dict[str, Any]]:
    """
    Generated pairs as rows of `preferences.FEATURES`, with random labels and scores. Of each 60 the first has two
    equal answers, one repeats the row before it, and one has that row's answers the other way round.
    """
    draw = np.random.default_rng([seed, 1])
    before = None
    for number, (prompt, chosen, rejected) in enumerate(generate_pairs(count, lengths, seed)):
        if number % 60 == 0:
            rejected = chosen
        elif number % 60 == 21:
            prompt, chosen, rejected = before
        elif number % 60 == 41:
            prompt, rejected, chosen = before
        before = prompt, chosen, rejected
        chosen_safe, rejected_safe = (draw.random(2) < 0.6).tolist()
        yield dict.fromkeys(FEATURES) | {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": chosen,
            "rejected": rejected,
            "chosen_safe": chosen_safe,
            "rejected_safe": rejected_safe,
            "score_chosen": draw.uniform(5, 10),
            "score_rejected": draw.uniform(1, 6),
            "tie": draw.random() < 0.005,
            "source": "generated",
            "row_id": f"generated:{number}",
            "role": "task",
        }
