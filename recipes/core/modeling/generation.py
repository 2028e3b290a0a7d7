"""A model's answers to conversations."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from core.modeling.precision import HALF


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    max_new_tokens: int,
    batch_size: int,
    **sampling: float | bool,
) -> list[str]:
    """The model's answer to each conversation, greedy unless `sampling` says otherwise, in their order."""
    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in conversations
    ]
    return generate_texts(model, tokenizer, texts, max_new_tokens, batch_size, **sampling)


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_new_tokens: int,
    batch_size: int,
    **sampling: float | bool,
) -> list[str]:
    """How the model goes on from each text, which is tokenised as it stands."""
    answers: list[str] = [""] * len(texts)
    # A template may end a turn with a token of its own; the model's generation_config then names it.
    stops = model.generation_config.eos_token_id or []
    stops = sorted({tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])})
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", disable=len(order) <= batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[index] for index in batch], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stops,
            **({"do_sample": False} | sampling),
        )
        for index, answer in zip(batch, ids[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[index] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return answers


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    max_new_tokens: int,
    args: TrainingArguments,
    temperature: float = 0.0,
) -> list[str]:
    """`generate` with each process answering its part, at the run's precision; a `temperature` of 0 is greedy."""
    model = model.to(args.device).eval()
    state, mixed = PartialState(), HALF.get(args.mixed_precision)  # weights may be of several dtypes
    autocast = torch.autocast(args.device.type, dtype=mixed, enabled=mixed is not None)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    with state.split_between_processes(conversations) as mine, autocast:
        size = args.per_device_eval_batch_size
        return gather_object(generate(model, tokenizer, mine, max_new_tokens, size, **sampling))
