"""Models that judge answers: a sequence classifier by its score or label, a causal model by the word that it says."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from core.config.schema import ModelJudge
from core.judging.verdicts import Conversation, Judge, Verdict
from core.modeling.generation import generate_texts
from core.runtime import loading
from core.runtime.errors import RecipeError

UNCLEAR = "unclear"  # of a chat judge whose answer begins with none of its words


def model_judge(entry: ModelJudge, device: torch.device, batch_size: int) -> Judge:
    """
    Raises:
        RecipeError: the model or the template cannot be loaded, or the entry does not say how to read its answer.
    """
    tokenizer = loading.tokenizer(entry.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    write = _writer(entry, tokenizer)
    if entry.kind == "chat":
        if not entry.labels:
            raise RecipeError(f"judges: {entry.name}: a chat judge needs labels, e.g. {{yes: harmful, no: harmless}}")
        model = loading.causal_lm(entry.model, dtype="auto").to(device).eval()

        def ask(conversations: Sequence[Conversation], answers: Sequence[str]) -> list[Verdict]:
            texts = [write(*item) for item in zip(conversations, answers, strict=True)]
            said = generate_texts(model, tokenizer, texts, max_new_tokens=4, batch_size=batch_size)
            return [Verdict(_label(word, entry.labels)) for word in said]

        return ask
    model = loading.classifier(entry.model, dtype="auto").to(device).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.num_labels == 1 and entry.threshold is None:
        raise RecipeError(
            f"judges: {entry.name}: {entry.model} gives one score; say by threshold from where on it is high"
        )

    @torch.no_grad()
    def score(conversations: Sequence[Conversation], answers: Sequence[str]) -> list[Verdict]:
        texts, verdicts = [write(*item) for item in zip(conversations, answers, strict=True)], []
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                texts[start : start + batch_size], return_tensors="pt", padding=True, truncation=True,
                add_special_tokens=False,
            ).to(device)  # fmt: skip
            for logits in model(**inputs).logits.float():
                if len(logits) == 1:
                    verdicts.append(Verdict("high" if logits[0] >= entry.threshold else "low", logits[0].item()))
                else:
                    best = int(logits.argmax())
                    verdicts.append(Verdict(model.config.id2label[best], logits.softmax(0)[best].item()))
        return verdicts

    return score


def _label(said: str, labels: dict[str, str]) -> str:
    words = said.lower().split()
    first = words[0].strip(".,:;!*\"'") if words else ""
    return labels.get(first, UNCLEAR)


def _writer(entry: ModelJudge, tokenizer: PreTrainedTokenizerBase) -> Callable[[Conversation, str], str]:
    """How a judge is shown a conversation and its answer: by its template file, or as its own chat."""
    if entry.template is None:
        if tokenizer.chat_template is None:
            raise RecipeError(f"judges: {entry.name}: {entry.model} has no chat template; give one by `template`")
        asks = entry.kind == "chat"
        return lambda turns, answer: tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer}], tokenize=False, add_generation_prompt=asks
        )
    try:
        text = Path(entry.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"judges: {entry.name}: template {entry.template}: {error}") from error

    def write(turns: Conversation, answer: str) -> str:
        # transformers' own sandbox for templates of strangers.
        rendered, _ = render_jinja_template(
            conversations=[turns], chat_template=text, prompt=turns[-1]["content"], answer=answer
        )
        return rendered[0]

    return write
