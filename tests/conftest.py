"""A tiny tokenizer and Mistral-architecture model, built in code: every test runs offline and on them."""

import os
import random

# Before the first import of transformers: no call to the Hub, no telemetry, no thread pool per worker.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "How do I bake bread? Mix flour, water, salt and yeast, then wait.",
    "I can't help with that. Here is a safe way to do it instead.",
    "<|user|>\n<|assistant|>\n<|system|>\n What is the capital of France? Paris is the capital of France.",
] * 4
FEATURES = Features(
    {
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "chosen": Value("string"),
        "rejected": Value("string"),
        "chosen_safe": Value("bool"),
        "rejected_safe": Value("bool"),
        "chosen_severity": Value("int64"),
        "rejected_severity": Value("int64"),
        "score_chosen": Value("float64"),
        "score_rejected": Value("float64"),
        "tie": Value("bool"),
        "category": Value("string"),
        "source": Value("string"),
        "row_id": Value("string"),
        "role": Value("string"),
        "relabelled": Value("bool"),
    }
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with a zephyr-like chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> MistralForCausalLM:
    """A Mistral of two layers, width 32, four heads and two key-value heads; the same seed gives the same weights."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "initializer_range": 0.2,  # wide enough that two answers differ by nats and not by their lengths alone
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**(settings | overrides))).to(dtype)


WORDS = "bake bread flour water salt yeast mix wait capital France Paris help safe instead way here".split()


def words(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def preference_rows(count: int, seed: int = 0) -> Dataset:
    """Rows of the schema of `preferences.FEATURES`, of random words, all labelled; every fourth is the buffer's."""
    draw = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": words(draw, 2, 8)}],
                "chosen": words(draw, 3, 12),
                "rejected": words(draw, 3, 12),
                "chosen_safe": buffered or draw.random() < 0.5,
                "rejected_safe": buffered or draw.random() < 0.5,
                "chosen_severity": None,
                "rejected_severity": None,
                "score_chosen": draw.uniform(5, 9),
                "score_rejected": draw.uniform(1, 5),
                "tie": False,
                "category": None,
                "source": "tiny",
                "row_id": f"tiny:{index}",
                "role": "buffer" if buffered else "task",
                "relabelled": False,
            }
            for index in range(count)
            for buffered in [index % 4 == 3]
        ],
        features=FEATURES,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> str:
    """A saved tiny model with its tokenizer, as a user's local checkpoint would be."""
    folder = tmp_path_factory.mktemp("tiny-mistral")
    build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    The quickstart first: it takes longest, and met last it would leave one of the suite's processes idle. The torture
    only where it is asked for.
    """
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")
    if "torture" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("torture") is None]
