"""Pairs whose lengths are those of public preference data, a tokenizer trained on any rows, and random models."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

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
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


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


def write_pairs(path: Path, count: int, lengths: Lengths, seed: int) -> None:
    """Generated pairs as a file of `chosen` and `rejected` lists of messages."""
    with path.open("w", encoding="utf-8") as file:
        for prompt, *answers in generate_pairs(count, lengths, seed):
            row = {
                name: [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for name, answer in zip(("chosen", "rejected"), answers, strict=True)
            }
            file.write(json.dumps(row) + "\n")
