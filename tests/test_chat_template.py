"""What a chat template is given, what it may not do, and where the tokenizer's own beginning of text stands."""

import copy
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import CHAT_TEMPLATE, CORPUS, build_model, build_tokenizer
from core.config.schema import PreferenceRecipe
from core.data import chat_template
from core.data.chat_template import prepare_template, render_texts, template_errors
from core.data.tokens import load_tokenizer, render, token_notices, tokenize_rows
from core.modeling.generation import generate
from core.runtime.errors import RecipeError
from test_hygiene import make_row, make_rows

QUESTION = [{"role": "user", "content": "How do I bake bread?"}]
THINKING = "{% if add_generation_prompt and not enable_thinking %}<think></think>{% endif %}"


def with_template(template, tokenizer=None):
    tokenizer = copy.deepcopy(tokenizer or build_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def llama():
    """A tokenizer as Llama's and Mistral's: words with ▁ before them, and <s> before every plain text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=[chr(code) for code in range(32, 127)],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def load(folder, **keys):
    settings = {"chat_template_path": None, "chat_template_kwargs": {}, "pad_token": None} | keys
    model = SimpleNamespace(model_name_or_path=str(folder), model_revision=None)
    return load_tokenizer(model, PreferenceRecipe(datasets=[], **settings))


@pytest.mark.parametrize("own", ["", "{{ bos_token }}", "{% if messages %}{{- bos_token }}{% endif %}"])
def test_the_beginning_of_text_stands_once_in_training_and_in_what_is_saved(llama, own, tmp_path, capsys):
    """Also in a model that is trained on again; a prompt, an answer and what a server renders, against ids by hand."""
    assert llama("How")["input_ids"][0] == 1
    with_template(own + CHAT_TEMPLATE, llama).save_pretrained(tmp_path / "a")
    for start, again in (("a", "b"), ("b", "c")):
        build_model(vocab_size=500).config.save_pretrained(tmp_path / start)
        tokenizer = load(tmp_path / start)
        told = capsys.readouterr().out
        assert ("begins texts with '<s>' and the chat template does not" in told) == (start == "a" and not own)
        row = tokenize_rows(make_rows([make_row()]), tokenizer, None)[0]
        whole = f"<s><|user|>\nHow do I bake bread?</s>\n<|assistant|>\n{row['chosen']}</s>\n"
        prompt, answer = row["prompt_ids"], row["chosen_ids"]
        assert prompt + answer == llama(whole, add_special_tokens=False)["input_ids"] and row["fault"] is None
        assert (prompt[0], prompt.count(1), prompt.count(2)) == (1, 1, 1)
        assert (answer.count(1), answer.count(2)) == (0, 1) and llama.decode(answer) == f"{row['chosen']}</s>\n"
        tokenizer.save_pretrained(tmp_path / again)
        served = AutoTokenizer.from_pretrained(tmp_path / again)
        assert served.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"] == prompt
    assert served.chat_template.count("bos_token") == 1


def test_a_tokenizer_that_begins_texts_with_nothing_gets_nothing(tokenizer, model_folder, capsys):
    assert tokenizer.bos_token == "<s>" and load(model_folder).chat_template == CHAT_TEMPLATE
    assert not capsys.readouterr().out


def test_arguments_of_the_template_hold_wherever_it_is_rendered(tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path)
    with_template(CHAT_TEMPLATE + THINKING).save_pretrained(tmp_path)
    thinking, not_thinking = (load(tmp_path, chat_template_kwargs={"enable_thinking": way}) for way in (True, False))
    off = "<|user|>\nHow do I bake bread?</s>\n<|assistant|>\n<think></think>"
    assert render_texts(not_thinking, [QUESTION], open_turn=True) == [off]
    assert render_texts(thinking, [QUESTION], open_turn=True) == [off.removesuffix("<think></think>")]
    assert render(not_thinking, [QUESTION], open_turn=True) == [tokenizer(off, add_special_tokens=False)["input_ids"]]
    not_thinking.save_pretrained(tmp_path / "saved")
    served = AutoTokenizer.from_pretrained(tmp_path / "saved")
    shown = {"tokenize": False, "add_generation_prompt": True}
    assert served.apply_chat_template(QUESTION, **shown) == off
    assert served.apply_chat_template(QUESTION, enable_thinking=True, **shown) == off.removesuffix("<think></think>")
    seen = []
    model = build_model()
    model.generate = lambda input_ids, **_: seen.append(input_ids[0].tolist()) or input_ids
    generate(model, not_thinking, [QUESTION], 4, 1)
    assert seen == render(not_thinking, [QUESTION], open_turn=True)
    with pytest.raises(RecipeError, match="reads no 'enable_thinkin'; did you mean enable_thinking"):
        load(tmp_path, chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(RecipeError, match="reads no 'messages'"):
        load(tmp_path, chat_template_kwargs={"messages": []})


@pytest.mark.parametrize(
    "values",
    [{"x": 'it\'s "so" \\ {{ %} ü\n'}, {"x": None}, {"x": [1, 2.5, {"a": True}]}],
    ids=["text", "null", "list"],
)
def test_arguments_are_written_as_they_are(values):
    tokenizer = with_template("{{ x }}" + CHAT_TEMPLATE)
    prepare_template(tokenizer, values, "tiny")
    assert render_texts(tokenizer, [QUESTION], open_turn=False)[0].startswith(f"{values['x']}<|user|>")


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for i in range(1e9 | int) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
        ("{{ raise_exception('not this\nway') }}", "chat template: not this way;"),
        ("{{ messages", "expected token 'end of print statement'"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "not at its end after 0.2 s"),
    ],
)
def test_whatever_a_template_does_ends_in_a_line(template, words, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    tokenizer = with_template(template + CHAT_TEMPLATE)
    with pytest.raises(RecipeError, match=words) as caught:
        render_texts(tokenizer, [QUESTION], open_turn=False)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("chat template: ")
    with pytest.raises(RecipeError, match=words):
        with template_errors():  # as TRL renders, without our clock
            if "range(9999)" in template:
                raise caught.value
            tokenizer.apply_chat_template(QUESTION)
    if "range(9999)" in template:  # at once, and not row by row
        with pytest.raises(RecipeError, match=words):
            prepare_template(tokenizer, {}, "tiny")
        with pytest.raises(RecipeError, match=words):
            tokenize_rows(make_rows([make_row(f"a:{i}") for i in range(99)]), tokenizer, None)


def test_an_error_of_our_own_is_none_of_the_template():
    with pytest.raises(ZeroDivisionError), template_errors():
        1 / 0  # noqa: B018


def test_a_template_that_leaves_the_answer_out_is_refused():
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    for template in (silent, silent + "<|assistant|>"):
        with pytest.raises(RecipeError, match="chat template of tiny: what the assistant says is not in the text"):
            prepare_template(with_template(template), {}, "tiny")
    # Where it does so with some rows only, these have a fault.
    tokenizer = with_template("{% for m in messages if 'mum' not in m.content %}{{ m.content }}|{% endfor %}")
    prepare_template(tokenizer, {}, "tiny")
    rows = tokenize_rows(make_rows([make_row(), make_row("a:1", rejected="mum")]), tokenizer, None)
    assert rows["fault"][0] is None and "leaves nothing of the rejected answer" in rows["fault"][1]


def test_tokens_are_as_generation_meets_them(tokenizer):
    """Two line breaks are one token here, and the template's own ends the prompt: the prompt keeps its ids."""
    joined = copy.deepcopy(tokenizer)
    joined.add_tokens(["\n\n", "\n\n\n"])
    prompt = render(joined, [QUESTION], open_turn=True)[0]
    text = "<|user|>\nHow do I bake bread?</s>\n<|assistant|>\n\n\nSo.</s>\n"
    assert joined(text)["input_ids"][: len(prompt)] != prompt
    rows = [make_row(chosen="\n\nSo.", rejected="\nNo."), make_row("a:1", chosen="So.\n\nNo.", rejected="No.")]
    found = tokenize_rows(make_rows(rows), joined, None)
    assert found["fault"][:] == [None, None]
    assert found[0]["prompt_ids"] == prompt
    assert found[0]["chosen_ids"] == joined("\n\nSo.</s>\n")["input_ids"]
    assert found[0]["rejected_ids"] == joined("\nNo.</s>\n")["input_ids"]
    assert found[1]["chosen_ids"] == joined("So.\n\nNo.</s>\n")["input_ids"]


def test_a_prompt_that_ends_in_the_assistants_turn_is_refused(tokenizer):
    prompt = [*QUESTION, {"role": "assistant", "content": "Well,"}]
    found = tokenize_rows(make_rows([make_row("a:7", prompt=prompt)]), tokenizer, None)[0]
    assert "row a:7: the prompt ends in a turn of the assistant" in found["fault"] and found["chosen_ids"] == []


def test_special_tokens_in_answers_are_counted_over_all_rows(tokenizer):
    rows = [make_row(f"a:{i}", prompt=f"Question {i}?") for i in range(9)]
    rows[4]["chosen"] = "First</s> and second"
    rows[6]["chosen"], rows[7]["rejected"] = "<s>", "<pad> " + "x" * 300
    found = tokenize_rows(make_rows(rows), tokenizer, 200)
    assert found["rejected_cut"][7] > 0
    chosen, rejected = token_notices(found, tokenizer)
    assert chosen.startswith("2 chosen answers have special tokens") and "e.g. row a:4" in chosen
    assert rejected.startswith("1 rejected answers") and "e.g. row a:7" in rejected
    assert token_notices(found.select([0, 1]), tokenizer) == []


@pytest.mark.parametrize(
    "end, told",
    [
        ("{{ eos_token }}", None),
        ("<pad>\n", None),  # as Gemma's <end_of_turn>: special, and not the end of text
        ("\n", "ends an answer without the end-of-text token '</s>'"),
        ("{{ eos_token }}{{ eos_token }}", "ends an answer with 2 times the end-of-text token"),
    ],
)
def test_how_a_template_ends_an_answer(end, told, tokenizer):
    template = CHAT_TEMPLATE.replace("{{ message['content'] + eos_token }}", "{{ message['content'] }}" + end)
    notices = token_notices(
        tokenize_rows(make_rows([make_row()]), with_template(template), None), with_template(template)
    )
    assert [told in notice for notice in notices] == ([True] if told else [])
