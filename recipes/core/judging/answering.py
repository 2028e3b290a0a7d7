"""A model's answers to every set of prompts, and what every judge says of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from core.config.schema import EvaluateRecipe, PromptSet
from core.data.tokens import with_system_message
from core.judging.model_judges import model_judge
from core.judging.prompt_sets import read_prompts
from core.judging.verdicts import PATTERN_JUDGES, Conversation, Verdict
from core.modeling.generation import answer_all
from core.runtime.errors import RecipeError
from core.runtime.ranks import rank

Sets = list[tuple[PromptSet, list[Conversation]]]
Judged = dict[str, dict[str, Sequence[Verdict]]]  # set → judge → its verdict on each answer


def read_sets(recipe: EvaluateRecipe) -> Sets:
    """
    The prompts of every set, led by the recipe's system message, before a model is loaded.

    Raises:
        RecipeError: a file that holds no such prompts, or a name given twice.
    """
    entries = list(recipe.prompt_sets)
    if recipe.prompts is not None:
        entries.append(PromptSet(name=Path(recipe.prompts).stem, path=recipe.prompts))
    for what, names in (
        ("prompt_sets", [entry.name for entry in entries]),
        ("judges", [*PATTERN_JUDGES, *(judge.name for judge in recipe.judges)]),
    ):
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecipeError(f"{what}: {twice[0]!r} is the name of two; give each its own")
    sets = []
    for entry in entries:
        prompts = read_prompts(entry.path, entry.column, entry.where)
        sets.append((entry, [with_system_message(turns, recipe.system_message) for turns in prompts]))
    return sets


def judge_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sets,
    recipe: EvaluateRecipe,
    args: TrainingArguments,
    name: str,
) -> Judged:
    """Answer, judge, and add to `output_dir`/answers.jsonl a line for each answer; on every rank."""
    prompts = [turns for _, conversations in sets for turns in conversations]
    answers = answer_all(model, tokenizer, prompts, recipe.max_new_tokens, args, recipe.temperature)
    judges = PATTERN_JUDGES | {
        entry.name: model_judge(entry, args.device, args.per_device_eval_batch_size) for entry in recipe.judges
    }
    verdicts = {judge: of(prompts, answers) for judge, of in judges.items()}
    judged, start = {}, 0
    for entry, conversations in sets:
        part = slice(start, start + len(conversations))
        judged[entry.name] = {judge: given[part] for judge, given in verdicts.items()}
        if rank() == 0:
            _write_answers(Path(args.output_dir), name, entry, conversations, answers[part], judged[entry.name])
        start = part.stop
    return judged


def _write_answers(
    folder: Path,
    model: str,
    entry: PromptSet,
    prompts: Sequence[Conversation],
    answers: Sequence[str],
    judged: dict[str, Sequence[Verdict]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "answers.jsonl").open("a", encoding="utf-8") as file:
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            verdicts = {judge: given[index].label for judge, given in judged.items()}
            scores = {judge: given[index].score for judge, given in judged.items() if given[index].score is not None}
            row = {"model": model, "set": entry.name, "messages": prompt, "answer": answer, "verdicts": verdicts}
            file.write(json.dumps(row | ({"scores": scores} if scores else {}), ensure_ascii=False) + "\n")
