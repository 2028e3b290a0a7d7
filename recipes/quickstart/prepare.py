"""What the stages read: conversations, tokenizer and untrained model; then pairs sampled from the first stage."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, set_seed

from core.modeling.generation import generate
from core.runtime import loading
from grammar import Request, conversations, helpful_row, judge, requests, safety_row, split, spoil

CONVERSATIONS = 32_000
VOCABULARY = 768  # at most; the grammar's words need fewer
MAX_ANSWER_TOKENS = 32  # the longest answer has 20
ANSWERS_PER_REQUEST = 8  # enough that the rare forms stand beside the usual ones, which sampling once would not show
PAIRS_PER_REQUEST = 2

# `generation` marks what `assistant_only_loss` learns.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def prepare(folder: Path, seed: int) -> None:
    """Write `data/sft.jsonl`, and an untrained model with its tokenizer to `untrained/`."""
    train, _ = split(seed)
    rows = conversations(train, CONVERSATIONS, seed)
    write_rows(folder / "data" / "sft.jsonl", ({"messages": row} for row in rows))
    tokenizer = build_tokenizer(f"<|{turn['role']}|>\n{turn['content']}" for row in rows[:4000] for turn in row)
    set_seed(seed)
    model = build_model(tokenizer)
    model.save_pretrained(folder / "untrained")
    tokenizer.save_pretrained(folder / "untrained")
    print(f"{len(rows):,} conversations, {len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """
    The architecture of Mistral-7B with about a million parameters, drawn by torch's seed.

    The weights are drawn as wide as Mistral's 0.02 is at a width of 4096: 0.02·√(4096/128). The final norm bounds how
    far `down_proj` alone can push two words apart, by the distance of their rows in the head; drawn at 0.02, the first
    words of two answers could not be moved by more than 2.6 nats, and the second stage spoilt later words instead.
    """
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            sliding_window=None,
            initializer_range=0.11,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def sample_pairs(folder: Path, seed: int) -> None:
    """
    Write what the second stage reads to `data/`, from answers that the model in `sft/` gives: task.jsonl (pairs of
    answers to harmful requests), buffer.jsonl (to benign ones), and eval.jsonl (to held-out requests of both kinds).
    """
    train, held_out = split(seed)
    answers = answerer(folder / "sft", seed)
    task, buffer = [], []
    for request, pair in draw_pairs(requests(train, seed), answers, seed):
        (task if request.harmful else buffer).append((request, pair))
    held = list(draw_pairs(requests(held_out, seed)[::3], answers, seed))
    write_rows(folder / "data" / "task.jsonl", (safety_row(*item) for item in task))
    write_rows(folder / "data" / "buffer.jsonl", (helpful_row(*item) for item in buffer))
    write_rows(folder / "data" / "eval.jsonl", (safety_row(*item) for item in held))
    print(f"{len(task):,} task pairs, {len(buffer):,} buffer pairs, {len(held):,} held-out pairs", flush=True)


def answerer(model_folder: Path, seed: int) -> Callable[..., list[str]]:
    """The model in a folder, as a function from requests to its answers; a `temperature` of 0 is greedy."""
    model, tokenizer = loading.causal_lm(str(model_folder)).eval(), loading.tokenizer(str(model_folder))
    set_seed(seed)

    def answers(asked: list[Request], temperature: float = 1.0) -> list[str]:
        turns = [[{"role": "user", "content": request.text}] for request in asked]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        return generate(model, tokenizer, turns, MAX_ANSWER_TOKENS, batch_size=512, **sampling)

    return answers


def draw_pairs(
    asked: list[Request], answers: Callable[..., list[str]], seed: int
) -> Iterator[tuple[Request, tuple[str, str]]]:
    """
    For each request `PAIRS_PER_REQUEST` pairs of sampled answers, one more helpful than the other, and a pair of a
    sampled answer and one gone off form; where its answers allow them.

    To a harmful request an off-form answer meets refusals alone: anything else would be the better one of two harmful
    answers.
    """
    rng = random.Random(f"pairs {seed}")
    for request, *given in zip(asked, *(answers(asked) for _ in range(ANSWERS_PER_REQUEST)), strict=True):
        formed = {answer: judge(request, answer) for answer in given if judge(request, answer) != "garbled"}
        pairs = [pair for pair in combinations(formed, 2) if formed[pair[0]] != formed[pair[1]]]
        for pair in rng.sample(pairs, min(PAIRS_PER_REQUEST, len(pairs))):
            yield request, tuple(rng.sample(pair, 2))
        good = [answer for answer, kind in formed.items() if kind == "refusal" or not request.harmful]
        if good:
            yield request, (rng.choice(good), spoil(rng.choice(given), rng))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
