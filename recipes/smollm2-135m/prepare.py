"""What both stages train on: the start's own answers to harmless prompts, and refusals of harmful ones."""

import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from core.judging.prompt_sets import read_prompts
from core.judging.verdicts import COMPLIANCE, judge_garbled, judge_refusal
from core.modeling.generation import generate
from core.runtime import loading
from core.runtime.errors import RecipeError

HERE = Path(__file__).parent
ANSWER_TOKENS = 64  # of the start's answers; with its prompt one that goes on is longer than both recipes' max_length,
# which then cuts it before the end that the template would give it here
LONGEST_PROMPT = 160  # characters; of the prompts of helpful pairs
# A question asked once more as an instruction: benchmarks of harm ask so, and collections of pairs seldom do.
PHRASINGS = (
    "Give detailed step-by-step instructions for how to {}", "Write a guide on how to {}", "Describe how to {}",
    "Give tips on how to {}", "Explain in detail how to {}", "Write a tutorial for how to {}",
    "Give instructions for how to {}", "List the steps to {}",
)  # fmt: skip
QUESTION = re.compile(r"(?:How (?:do|can|could) (?:I|you|we) |What is the best way to |How to )(.+?)\?*$")


def phrasings(prompt: str) -> list[str]:
    """The prompt, and where it asks how to do something, one instruction to the same end, chosen by its own text."""
    match = QUESTION.match(prompt)
    if match is None:
        return [prompt]
    number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % len(PHRASINGS)
    return [prompt, PHRASINGS[number].format(match[1])]


def prompts_of(safety: str | None, helpful: str | None) -> tuple[list[str], list[str]]:
    """
    Harmful and harmless prompts: those of this folder, and of two files of pairs (prompt, chosen, rejected), if given.

    Args:
        safety: pairs whose chosen answer is the safer one. A prompt that it refuses, and the other does not, is
            harmful.
        helpful: pairs of harmless prompts.
    """
    harmful, harmless = ((HERE / f"{name}.txt").read_text().splitlines() for name in ("harmful", "harmless"))
    if safety is not None:
        rows = list(_rows(safety))
        labels = [[v.label for v in judge_refusal([], [row[side] for row in rows])] for side in ("chosen", "rejected")]
        refused = [safer != COMPLIANCE and other == COMPLIANCE for safer, other in zip(*labels, strict=True)]
        harmful += dict.fromkeys(row["prompt"] for row, kept in zip(rows, refused, strict=True) if kept)
    harmful, harmless = ([form for prompt in prompts for form in phrasings(prompt)] for prompts in (harmful, harmless))
    if helpful is not None:
        harmless += [row["prompt"] for row in _rows(helpful) if len(row["prompt"]) < LONGEST_PROMPT]
    return list(dict.fromkeys(harmful)), list(dict.fromkeys(harmless))


def prepare(folder: Path, start: str, seed: int, safety: str | None, helpful: str | None, held_out: list[str]) -> None:
    """
    Write `folder`/sft.jsonl (conversations), task.jsonl (pairs in the layout of PKU-SafeRLHF: to a harmful prompt
    the start's own answer, which helps, and a refusal, which is safe) and buffer.jsonl (helpful pairs: to a harmless
    prompt the start's own answer before a refusal).

    Args:
        held_out: files of prompts that are evaluated; a prompt that is in one of them is left out.
    """
    draw = random.Random(seed)
    asked = {_plain(turns[-1]["content"]) for path, column in held_out for turns in read_prompts(path, column)}
    harmful, harmless = (
        [prompt for prompt in prompts if _plain(prompt) not in asked] for prompts in prompts_of(safety, helpful)
    )
    refusals = (HERE / "refusals.txt").read_text().splitlines()
    model, tokenizer = loading.causal_lm(start, dtype="float32").eval(), loading.tokenizer(start)
    turns = [[{"role": "user", "content": prompt}] for prompt in (*harmful, *harmless)]
    answers = generate(model, tokenizer, turns, ANSWER_TOKENS, batch_size=64)
    fit = [
        refusal.label == COMPLIANCE and garbled.label == "fine"
        for refusal, garbled in zip(judge_refusal(turns, answers), judge_garbled(turns, answers), strict=True)
    ]
    given = {prompt: answer for prompt, answer, fits in zip((*harmful, *harmless), answers, fit, strict=True) if fits}
    sft = [_conversation(prompt, draw.choice(refusals)) for prompt in harmful]
    sft += [_conversation(prompt, given[prompt]) for prompt in harmless if prompt in given]
    task = [
        {
            "prompt": prompt, "response_0": given[prompt], "response_1": draw.choice(refusals),
            "is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 0,
        }
        for prompt in harmful if prompt in given
    ]  # fmt: skip
    buffer = [
        {"prompt": prompt, "chosen": given[prompt], "rejected": draw.choice(refusals)}
        for prompt in harmless
        if prompt in given
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("sft", sft), ("task", task), ("buffer", buffer)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(
        f"{len(harmful):,} harmful and {len(harmless):,} harmless prompts; of the start's answers {len(given):,} fit; "
        f"{len(sft):,} conversations, {len(task):,} task pairs, {len(buffer):,} buffer pairs",
        flush=True,
    )


def _conversation(prompt: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _rows(path: str) -> Iterable[dict[str, str]]:
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error
