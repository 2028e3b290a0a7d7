"""A model's answers to prompts from a file."""

import io
import json
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from core.modeling.precision import HALF
from core.runtime.errors import RecipeError


def read_prompts(path: str) -> list[list[dict[str, str]]]:
    """
    Conversations to answer: a .txt file with a prompt per line, a .csv file with a column `prompt`, or a .jsonl file
    whose lines have `prompt` (a string) or `messages`.

    Raises:
        RecipeError: the file, or one of its lines, is not that; it names the line.
    """
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl", ".csv"):
        raise RecipeError(f"prompts: {path} is none of .txt (a prompt per line), .jsonl and .csv (a column `prompt`)")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"prompts: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"prompts: {path} is not UTF-8 text; save it as UTF-8") from error
    prompts = []
    lines = text.splitlines()
    if file.suffix == ".csv":
        lines, prompts = [], _prompts_of_csv(text, path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix == ".txt":
            prompts.append([{"role": "user", "content": line}])
            continue
        try:
            prompts.append(_conversation(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:  # JSONDecodeError is a ValueError
            raise RecipeError(
                f'prompts: {path}, line {number}: not an object with "prompt" (text) or "messages" (a list of objects '
                f'with "role" and "content") ({error})'
            ) from error
    if not prompts:
        raise RecipeError(f"prompts: {path} holds no prompt")
    return prompts


def _prompts_of_csv(text: str, path: str) -> list[list[dict[str, str]]]:
    mark = max(",;\t|", key=text.partition("\n")[0].count)
    try:
        # As text, each field: a prompt of digits, or one that reads "None", is a prompt.
        rows = pd.read_csv(io.StringIO(text), sep=mark, dtype=str, keep_default_na=False, index_col=False)
    except ValueError as error:
        raise RecipeError(f"prompts: {path}: {' '.join(str(error).split())}") from error
    if "prompt" not in rows:
        raise RecipeError(f"prompts: {path} has the columns {', '.join(rows)}; call the one of prompts `prompt`")
    return [[{"role": "user", "content": prompt}] for prompt in rows["prompt"] if prompt.strip()]


def _conversation(row: dict) -> list[dict[str, str]]:
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    for message in messages:
        if not (isinstance(message["role"], str) and isinstance(message["content"], str)):
            raise TypeError("a role or content is no text")
    return messages


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    max_new_tokens: int,
    batch_size: int,
    **sampling: float | bool,
) -> list[str]:
    """The model's answer to each conversation, greedy unless `sampling` says otherwise, in their order."""
    answers: list[str] = [""] * len(conversations)
    # A template may end a turn with a token of its own; the model's generation_config then names it.
    stops = model.generation_config.eos_token_id or []
    stops = sorted({tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])})
    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in conversations
    ]
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


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    max_new_tokens: int,
    args: TrainingArguments,
) -> None:
    """Write `output_dir`/generations.jsonl: a line per prompt with `messages` and `answer`, in their order."""
    model = model.to(args.device).eval()
    state, mixed = PartialState(), HALF.get(args.mixed_precision)  # weights may be of several dtypes
    autocast = torch.autocast(args.device.type, dtype=mixed, enabled=mixed is not None)
    with state.split_between_processes(prompts) as mine, autocast:
        answers = gather_object(generate(model, tokenizer, mine, max_new_tokens, args.per_device_eval_batch_size))
    if state.is_main_process:
        path = Path(args.output_dir) / "generations.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for prompt, answer in zip(prompts, answers, strict=True):
                file.write(json.dumps({"messages": prompt, "answer": answer}, ensure_ascii=False) + "\n")
        print(f"{len(answers):,} answers are in {path}", flush=True)
