"""What the bench trains on: rows of public sources' lengths, models of random weights, or the user's own of either."""

import copy
import json
import tempfile
import uuid
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
from core.data.tokens import load_tokenizer, token_lengths, with_system_message
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


@dataclass(frozen=True)
class Lengths:
    """(median, mean) of the tokens of a source's prompts and answers; the generated ones are log-normal with these."""

    prompt: tuple[float, float]
    chosen: tuple[float, float]
    rejected: tuple[float, float]


# Measured with a byte-level BPE of 8,192 tokens trained on the rows themselves, without the chat template's tokens.
LENGTHS = {
    # Anthropic/hh-rlhf, harmless-base, the first 1,000 rows of the test split
    "hh-rlhf": Lengths(prompt=(88, 118), chosen=(28, 41), rejected=(37, 52)),
    # UltraFeedback in HuggingFaceH4's layout, 700 rows
    "UltraFeedback": Lengths(prompt=(92, 189), chosen=(228, 311), rejected=(197, 270)),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of Mistral's architecture."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int = VOCABULARY


SHAPES = {
    "4x256": Shape(4, 256, 4, 2, 896),
    "6x384": Shape(6, 384, 6, 2, 1344),
    "0.5b": Shape(24, 896, 14, 2, 4864, 151_936),  # Qwen2.5-0.5B's
    "7b": Shape(32, 4096, 32, 8, 14_336, 32_000),  # Mistral-7B's
}


@dataclass
class Workload:
    """What both trainers are given."""

    title: str
    precision: str  # of the forward: bf16, fp16, or the weights' own
    build_model: Callable[[], PreTrainedModel]  # the same weights at every call
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset  # tokenised, with margin 0 and of one role: plain DPO, whose loss stock TRL has too
    updates: int
    args: DPOConfig
    system_message: str | None
    trained: list[str] | None  # patterns of trainable parameters; None: all
    source_lengths: np.ndarray  # tokens of prompt, chosen and rejected of all rows there are, shuffled. Shape: (n, 3)

    @property
    def rows_per_update(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def settings(self, folder: str) -> DPOConfig:
        """The recipe's settings, without all that is not training: no log, no evaluation, no checkpoint."""
        args = copy.copy(self.args)
        args.output_dir = folder
        args.max_steps, args.num_train_epochs = self.updates, 1
        args.precompute_ref_log_probs = True
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        args.logging_first_step = args.eval_on_start = False
        args.report_to, args.disable_tqdm = [], True
        return args

    def conversations(self) -> Dataset:
        """The rows as stock TRL reads them."""
        rows = [
            {"prompt": with_system_message(row["prompt"], self.system_message)}
            | {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
            for row in self.rows.select_columns(["prompt", "chosen", "rejected"])
        ]
        dataset = Dataset.from_list(rows)
        # TRL keeps reference log-probabilities under the rows' fingerprint: each run is to compute its own.
        return dataset.select(range(len(dataset)), new_fingerprint=uuid.uuid4().hex)


def prepare_workload(resolved: Run, updates: int) -> Workload:
    """
    Load, select and tokenise the recipe's rows, and draw by the seed as many as `updates` updates need.

    A model that is none of `SHAPES` is loaded with its tokenizer; for one of those, with random weights, a tokenizer
    is trained on the rows.

    Raises:
        RecipeError: also where the recipe wants LoRA, or too few rows are left.
    """
    model, args, recipe = resolved.model, resolved.training, resolved.recipe
    if model.use_peft:
        raise RecipeError(f"{resolved.path}: use_peft: the bench trains weights themselves; set it to false")
    shape, dtype = SHAPES.get(model.model_name_or_path), model.dtype or "float32"
    if shape is None:
        check_model_path(model.model_name_or_path, model.model_revision)
    needed = updates * args.per_device_train_batch_size * args.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as folder:
        # Twice as many rows are generated as are needed, since the selection drops some.
        entries = [_made(entry, Path(folder), 2 * needed, args.seed) for entry in recipe.datasets]
        if shape is None:
            build_model = partial(load_model, model)
            tokenizer = load_tokenizer(model, recipe.chat_template_path, recipe.pad_token)
        else:
            build_model = partial(random_model, shape, getattr(torch, dtype), args.seed)
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
    return Workload(
        title=f"{' + '.join(entry.path for entry in recipe.datasets)}, model {model.model_name_or_path}",
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else dtype,
        build_model=build_model,
        tokenizer=tokenizer,
        rows=rows,
        updates=updates,
        args=args,
        system_message=recipe.system_message,
        trained=recipe.trainable_parameters,
        source_lengths=np.random.default_rng(args.seed).permutation(token_lengths(pairs)),
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
            row = {
                name: [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for name, answer in zip(("chosen", "rejected"), answers, strict=True)
            }
            file.write(json.dumps(row) + "\n")
    return replace(entry, path=str(path))


def random_model(shape: Shape, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model of random weights, drawn on the GPU where there is one; the same seed gives the same weights."""
    config = MistralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
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

    parts = (spans(*part) for part in (lengths.prompt, lengths.chosen, lengths.rejected))
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


def token_bound(lengths: np.ndarray, batch_size: int) -> float:
    """
    How many times fewer tokens shared pairs have than padded ones: 2·B·max(k + max(n, m)) for each micro-batch of B
    pairs of k prompt, n chosen and m rejected tokens, against Σ (k + n + m − 1).

    Args:
        lengths: k, n and m of each row, micro-batch after micro-batch; rows that fill none are left out. Shape:
            (rows, 3).
    """
    batches = lengths[: len(lengths) // batch_size * batch_size].reshape(-1, batch_size, 3)
    k, n, m = np.moveaxis(batches, -1, 0)
    padded = 2 * batch_size * (k + np.maximum(n, m)).max(-1).sum()
    return float(padded / (k + n + m - 1).sum())
