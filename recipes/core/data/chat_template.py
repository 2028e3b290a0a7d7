"""
A chat template made fit for use (its keyword arguments, the tokenizer's beginning of text), and rendered so that
whatever it does ends in a line: it is a program, and often somebody else's.
"""

import contextlib
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from core.runtime.errors import RecipeError
from core.runtime.ranks import rank
from core.runtime.text import did_you_mean

SECONDS = 5.0  # of the CPU, for one conversation: a template writes one in well under a millisecond
CHARACTERS = 2**26  # of one conversation as the template writes it
PROBE = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes-it-is-so."}]
WAY_OUT = (
    "give one that takes these conversations (chat_template_path), or leave out what it refuses, e.g. a system_message"
)


class Endless(RecipeError):
    """A template that does not come to its end: no other row is tried."""


@contextlib.contextmanager
def template_errors() -> Iterator[None]:
    """Whatever a chat template raises against its own syntax or a conversation, as a `RecipeError`."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = any(frame.filename == "<template>" or "/jinja2/" in frame.filename for frame in frames)
        if not (inside or isinstance(error, TemplateError)):
            raise
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        told = " ".join(f"{kind}{error}".split())[:300]
        raise RecipeError(f"chat template: {told}; {WAY_OUT}") from error


def check_answer_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        RecipeError: neither the template nor TRL says which tokens are the assistant's, as `assistant_only_loss` asks.
    """
    try:
        get_training_chat_template(tokenizer)
    except ValueError as error:
        raise RecipeError(
            "assistant_only_loss: the chat template does not mark the assistant's answers ({% generation %} … "
            "{% endgeneration %}), and TRL knows no other form of it; give one that does by chat_template_path, or "
            "set assistant_only_loss: false"
        ) from error


def render_texts(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], open_turn: bool) -> list[str]:
    """
    Each conversation as the template writes it; `open_turn` ends it with the header of the assistant's next turn.

    Raises:
        RecipeError: the template refuses a conversation, or fails, or takes more than `SECONDS` (`Endless`).
    """
    texts = []
    with template_errors(), _time_limit() as start_clock:
        for messages in conversations:
            start_clock()
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))
            if len(texts[-1]) > CHARACTERS:
                raise Endless(f"chat template: it makes {len(texts[-1]):,} characters of a conversation; {WAY_OUT}")
    return texts


@contextlib.contextmanager
def _time_limit() -> Iterator[Any]:
    """A function that gives the code after its call `SECONDS` of the CPU. Only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def ring(*_: object) -> None:
        raise Endless(f"chat template: not at its end after {SECONDS:g} s of one conversation; {WAY_OUT}")

    # Time of the CPU: a busy machine, or a process that was stopped for a while, is no endless template.
    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def prepare_template(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], path: str) -> None:
    """
    Write into the tokenizer's template what every conversation is to have, so that training, evaluation, generation
    and whoever serves the saved model render alike: the keyword `arguments` as defaults, and the beginning-of-text
    token where the tokenizer puts it before plain texts and the template does not.

    Raises:
        RecipeError: the template reads no such argument, never ends, or leaves out what the assistant says.
    """
    template = tokenizer.chat_template
    words = set(re.findall(r"[A-Za-z_]\w*", template)) - {"messages", "add_generation_prompt", "tools", "documents"}
    words -= set(tokenizer.special_tokens_map)
    for name, value in reversed(arguments.items()):
        if name not in words:
            raise RecipeError(
                f"chat_template_kwargs: the chat template of {path} reads no {name!r}"
                f"{did_you_mean(name, words)}; correct or remove it"
            )
        template = f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}{template}"
    tokenizer.chat_template = template
    try:
        text = render_texts(tokenizer, [PROBE], open_turn=False)[0]
    except Endless:
        raise
    except RecipeError:
        return  # what it refuses here it may take of the rows, and if not, they tell
    if PROBE[1]["content"] not in text:
        raise RecipeError(
            f"chat template of {path}: what the assistant says is not in the text that it makes; give one that writes "
            "the content of every message (chat_template_path)"
        )
    bos = tokenizer.bos_token
    if bos is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id] or text.startswith(bos):
        return
    tokenizer.chat_template = "{{ bos_token }}" + template
    if rank() == 0:
        print(
            f"note: the tokenizer of {path} begins texts with {bos!r} and the chat template does not: it is put "
            "before the template, in training, evaluation, generation and what is saved",
            flush=True,
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the template writes after an answer, as ids; empty where it does not take `PROBE`."""
    try:
        text = render_texts(tokenizer, [PROBE], open_turn=False)[0]
    except RecipeError:
        return []
    return tokenizer(text.rpartition(PROBE[1]["content"])[2], add_special_tokens=False)["input_ids"]
