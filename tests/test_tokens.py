"""Rows into token ids: what is cut, what cannot be tokenised and when that ends a run, and tokenizers of no use."""

import copy
import json

import pytest

from conftest import build_tokenizer
from core.config.parsing import build, resolve
from core.data.tokens import check_tokenizer, tokenize_rows, trainable_rows
from core.runtime.errors import RecipeError
from core.selection.pairs import prepare_pairs
from test_hygiene import GOOD, make_row, make_rows


@pytest.fixture(scope="module")
def moody():
    """A template that refuses the word "refused", and renders a prompt otherwise where it is answered by "odd"."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages if 'refused' in message['content'] %}{{ raise_exception('no such word') }}"
        "{% endfor %}{% if messages[-1]['content'] == 'odd, and long enough' %}!{% endif %}" + tokenizer.chat_template
    )
    return tokenizer


def test_a_tokenizer_needs_a_chat_template_and_a_pad_token():
    tokenizer = build_tokenizer()
    check_tokenizer(tokenizer, "tiny")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(RecipeError, match="tokenizer of tiny has no chat template"):
        check_tokenizer(tokenizer, "tiny")
    tokenizer.chat_template, tokenizer.pad_token = template, None
    with pytest.raises(RecipeError, match="tokenizer of tiny has no pad token"):
        check_tokenizer(tokenizer, "tiny")


def test_answers_are_cut_and_counted(tokenizer):
    """Prompt and answer against one plain rendering of both; the limit falls into the longer answer alone."""
    row = make_row(rejected=GOOD[1] * 3)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    chosen, rejected = (
        tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": row[name]}])["input_ids"]
        for name in ("chosen", "rejected")
    )
    assert prompt == chosen[: len(prompt)] and len(chosen) < len(rejected)
    rows, counts = trainable_rows(tokenize_rows(make_rows([row]), tokenizer, len(chosen)))
    assert counts == {"rows": 1, "chosen_cut": 0, "rejected_cut": 1}
    assert rows[0]["prompt_ids"] == prompt and rows[0]["chosen_ids"] == chosen[len(prompt) :]
    assert rows[0]["rejected_ids"] == rejected[len(prompt) : len(chosen)]
    assert set(rows.column_names) - set(row) == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_a_row_that_cannot_be_tokenised_does_not_spoil_its_batch(moody):
    rows = [
        make_row("a:0"),
        make_row("a:1", prompt="refused"),
        make_row("a:2", chosen="refused"),
        make_row("a:3", rejected="odd, and long enough"),
        make_row("a:4", prompt="word " * 40),
        make_row("a:5", prompt="Another one?"),
    ]
    found = tokenize_rows(make_rows(rows), moody, 60)
    told = ["no such word", "no such word", "row a:3: the prompt's tokens are not the beginning of the prompt and rej"]
    told.append("row a:4: the prompt has")
    assert found[0]["fault"] is found[5]["fault"] is None and found[5]["chosen_ids"] == found[0]["chosen_ids"]
    for row, words in zip(found.select(range(1, 5)), told, strict=True):
        assert words in row["fault"] and row["chosen_ids"] == row["rejected_ids"] == []
        assert not row["chosen_cut"] and not row["rejected_cut"]
    assert found[1]["prompt_ids"] == [] and len(found[4]["prompt_ids"]) > 60
    with pytest.raises(RecipeError, match="no such word"):
        trainable_rows(found)
    assert trainable_rows(found.select([0, 5]))[1]["rows"] == 2


def test_the_cache_knows_a_tokenizer_before_and_after_its_use():
    """One that was saved with a truncation, which its first call takes off."""
    tokenizer, rows = build_tokenizer(), make_rows([make_row()])
    tokenizer.backend_tokenizer.enable_truncation(8)
    first, again = (tokenize_rows(rows, tokenizer, 60) for _ in range(2))
    assert first._fingerprint == again._fingerprint and len(first[0]["prompt_ids"]) > 8
    assert tokenize_rows(rows, tokenizer, 61)._fingerprint != first._fingerprint


ODD, LONG = {"rejected": "odd, and long enough"}, {"prompt": "word " * 40}
OFF = "--selection.hygiene.min_answer_tokens=null"


@pytest.mark.parametrize(
    "row, argument, fate",
    [
        ({"prompt": "refused"}, "", "chat template: no such word"),
        ({"prompt": "refused"}, OFF, "chat template: no such word"),
        ({"prompt": "refused", "chosen": " "}, "", "empty"),
        ({"prompt": "refused"}, "--selection.hygiene.unrenderable=drop", "unrenderable"),
        (ODD, "--selection.hygiene.unrenderable=drop", "unrenderable"),
        ({"chosen": "refused and more"}, "", "chat template: no such word"),
        (
            ODD,
            "",
            "row task:1: the prompt's tokens are not the beginning of the prompt and rejected answer's: from '<|",
        ),
        (ODD | {"chosen": ODD["rejected"]}, "", "identical"),
        (LONG, "", "min_answer_tokens"),
        (LONG, OFF, "row task:1: the prompt has 174 tokens and leaves no room for an answer under max_length 100"),
        (LONG | {"rejected": ""}, OFF, "empty"),
    ],
)
def test_hygiene_judges_before_a_row_that_cannot_be_tokenised_ends_the_run(
    row, argument, fate, moody, model_folder, tmp_path
):
    """A row beside a good one: its fate is the rule that drops it, or the message that ends the run."""
    good = {"prompt": "How do I bake bread?", "chosen": GOOD[0], "rejected": GOOD[1] + " Or wait for it to close."}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (good, good | row)))
    (tmp_path / "dpo.yaml").write_text(
        f"model_name_or_path: {model_folder}\noutput_dir: {tmp_path}/run\n"
        "use_cpu: true\nbf16: false\nmax_length: 100\n"
        f"datasets: [{{path: {tmp_path}/rows.jsonl, source: task, "
        "columns: {prompt: prompt, chosen: chosen, rejected: rejected}}]\n"
        "margin: {preset: dpo}\n"
        "trainable_parameters: [down_proj]\n"
    )
    resolved = build(resolve("dpo", ["--config", f"{tmp_path}/dpo.yaml", *filter(None, [argument])]))
    arguments = resolved.recipe.datasets, resolved.recipe, resolved.training, copy.deepcopy(moody)
    if " " in fate:
        with pytest.raises(RecipeError) as caught:
            prepare_pairs(*arguments)
        assert str(caught.value).startswith(fate)
        return
    pairs = prepare_pairs(*arguments)
    assert pairs.dataset["row_id"][:] == ["task:0"]
    assert [reason for _, reason, _ in pairs.audit.table()] == [fate, ""]
