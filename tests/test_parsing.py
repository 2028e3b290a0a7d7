"""The strict parser: what is refused and in which words, what is resolved, and that a saved recipe is the same run."""

import re
from pathlib import Path

import pytest
import yaml
from trl import DPOConfig, ModelConfig, SFTConfig

from core.config import trl_keys
from core.config.checks import MARGIN_SETTINGS
from core.config.keys import keys_of
from core.config.parsing import look_over, parse, resolve, save_recipe
from core.objective.presets import PRESETS
from core.runtime.errors import RecipeError

ROOT = Path(__file__).parents[1]
DPO = """\
model_name_or_path: tiny
output_dir: runs/out
bf16: false
use_cpu: true
per_device_train_batch_size: 4
datasets:
  - path: task.jsonl
    columns: {prompt: p, responses: [r0, r1], better: b, safe: [s0, s1], scores: [x0, x1]}
  - path: buffer.jsonl
    role: buffer
    columns:
      chosen: c
      rejected: r
      chosen_safe: true
      rejected_safe: true
      score_chosen: x
      score_rejected: y
margin:
  preset: bfpo
"""
SFT = """\
model_name_or_path: tiny
output_dir: runs/out
bf16: false
use_cpu: true
datasets:
  - path: chats.jsonl
    columns: {conversation: messages}
"""
NO_BUFFER = DPO.replace("    role: buffer\n", "")
NO_SCORES = DPO.replace(", scores: [x0, x1]", "")
NO_SAFETY = DPO.replace(", safe: [s0, s1]", "")


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def refusal(kind: str, argv: list[str]) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(kind, argv, world_size=1)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_overrides(path: str, overrides: str) -> list[str]:
    """`--a 1 --b [x, y]` as the shell would pass it with the values quoted."""
    return ["--config", path, *(part.strip() for part in re.split(r"(--\S+) ", overrides) if part.strip())]


# Overrides on the recipe DPO, and the words that the one line must hold.
BAD_VALUES = [
    # unknown keys (of each section one more in `test_every_section_is_strict`)
    ("--learning_rat 1", "learning_rat: unknown key; did you mean learning_rate?"),
    ("--margin.prest dpo", "margin.prest: unknown key; did you mean preset?"),
    ("--selection.hygeine.ties drop", "selection.hygeine: unknown key; did you mean hygiene?"),
    ("--datasets.1.columns.turns.usr x", "datasets.1.columns.turns.usr: unknown key; did you mean user?"),
    ("--link soft", "link: unknown key; did you mean margin.link"),
    ("--labels safer", "labels: unknown key; did you mean selection.labels"),
    ("--margin.beta 1", "margin.beta: unknown key; did you mean beta, at the top level?"),
    ("--lr 1", "did you mean learning_rate?"),
    ("--dataset_name x", "did you mean datasets"),
    ("--warmup_ratio 0.1", "did you mean warmup_steps"),
    (
        "--selection.hygiene.min_characters 10",
        "selection.hygiene.min_characters: unknown key; did you mean selection.hygiene.min_tokens (tokens of the",
    ),
    ("--generate_during_eval true", "generate_during_eval: unknown key"),
    ("--conversations_per_update 3", "conversations_per_update: unknown key"),
    ("--shuffle_dataset true", "it is a key of recipes/sft.py"),
    # types
    ("--per_device_train_batch_size true", "per_device_train_batch_size: must be an integer, not true"),
    ("--per_device_train_batch_size 2.0", "must be an integer, not 2.0"),
    ("--learning_rate [1.0e-6]", "learning_rate: must be a number, not [1e-06]"),
    ("--learning_rate 1e-6x", 'learning_rate: must be a number, not "1e-6x"'),
    ("--max_length 1_024", 'max_length: must be an integer, not "1_024"'),
    ("--bf16 1", "bf16: must be true or false, not 1"),
    ("--output_dir 3", "output_dir: must be a string, not 3"),
    ("--margin 3", "margin: must be a mapping, not 3"),
    ("--datasets 3", "datasets: must be a list, not 3"),
    ("--datasets.0 x.jsonl", "datasets.0: must be a mapping"),
    ("--datasets.0.data_files [a,1]", "datasets.0.data_files.1: must be a string, not 1"),
    ("--datasets.0.columns.safe [a]", "datasets.0.columns.safe: must have at least 2 items, not"),
    ("--datasets.0.columns.chosen_safe 1", "must be a string or true or false, not 1"),
    ("--trainable_parameters 3", "trainable_parameters: must be a list, not 3"),
    ('--trainable_parameters ""', "trainable_parameters: must be a list"),
    ("--margin.preset bfpo2", "margin.preset: must be", "did you mean bfpo"),
    ("--datasets.1.role bufer", "datasets.1.role: must be 'task' or 'buffer', not \"bufer\"; did you mean buffer?"),
    ("--optim galore_adamw", "optim: must be"),
    ("--report_to wandbb", "report_to: must be", "did you mean wandb?"),
    # Of each kind of range one or two; which key has which, KEYS.md holds.
    ("--learning_rate 0", "learning_rate: must be greater than 0, not 0"),
    ("--learning_rate .nan", "learning_rate: must be a finite number"),
    ("--margin.a .inf", "margin.a: must be a finite number"),
    ("--max_steps 0", "max_steps: must be -1 or greater than or equal to 1"),
    ("--warmup_steps 1.5", "warmup_steps: must be less than 1 or an integer"),
    ("--max_length 1", "max_length: must be greater than or equal to 2"),
    ("--margin.epsilon 0.5", "margin.epsilon: must be less than 0.5"),
    ("--datasets.0.fraction 1.1", "datasets.0.fraction: must be less than or equal to 1"),
    ("--datasets.0.columns.chosen_severity 4", "chosen_severity: must be a string or less than or equal to 3"),
    ("--datasets []", "datasets: is empty"),
    ("--trainable_parameters []", "trainable_parameters: must have at least 1 item"),
    ("--selection.score {signal: score_gap, band: [0.5]}", "selection.score.band: must have at least 2"),
    ("--selection.score {signal: score_gap, band: [0.6, 0.5]}", "selection.score.band: [0.6, 0.5] must rise"),
    ("--selection.score {signal: score_gap, band: [0.5, 1.5]}", "selection.score.band: [0.5, 1.5] must rise"),
    ("--selection.quotas {by: source, limits: {x: -1}}", "selection.quotas.limits.x: must be"),
    # combinations
    ("--bf16 true --fp16 true", "bf16: fp16 is true as well"),
    ("--eval_strategy steps", "eval_strategy: there is nothing to evaluate on; give eval_datasets"),
    ("--load_best_model_at_end true", "load_best_model_at_end: there is nothing to evaluate on"),
    ("--lora_r 8", "lora_r: has no effect without use_peft: true"),
    (
        "--use_peft true --trainable_parameters [down_proj] --lora_target_modules [q_proj]",
        "lora_target_modules: differs from trainable_parameters",
    ),
    ("--margin.reference_free true --precompute_ref_log_probs true", "precompute_ref_log_probs: margin.refer"),
    ("--reference_cache x --precompute_ref_log_probs false", "reference_cache: nothing is cached"),
    ("--per_device_train_batch_size 3", "3 pairs cannot be split 1 task to 1 buffer", "a multiple of 2"),
    ("--selection.replay.task 2", "4 pairs cannot be split 2 task to 1 buffer", "a multiple of 3"),
    ("--datasets.0.role buffer", "datasets: all entries are buffer"),
    ("--margin.p 2", "margin.p: 2.0 is read by link signed, and the link is squared"),
    ("--margin.epsilon 0.1", "margin.epsilon: 0.1 is read by link soft"),
    ("--margin.link signed --margin.scaled true", "margin.scaled: true is read by link squared"),
    ("--margin.preset bfpo_signed --margin.link soft", "margin.p: -1.0 (from preset bfpo_signed) is read by"),
    ("--margin.phi log", "margin.phi: has no effect while k are 0"),
    ("--margin.preset dpo --margin.indicator severity", "margin.indicator: has no effect while a and b are 0"),
    ("--selection.score {signal: score_gap}", "selection.score: give either keep or band"),
    ("--selection.score {signal: score_gap, keep: 0.5, band: [0, 1]}", "selection.score: give either"),
    (
        "--selection.quotas {by: pair_class, limits: {safe/unsave: 3}}",
        "selection.quotas.limits.safe/unsave: no such pair class; did you mean safe/unsafe?",
    ),
    ("--pairs_per_update 6", "pairs_per_update: 6 is not a multiple of per_device_train_batch_size 4 x 1"),
    ("--pairs_per_update 2", "pairs_per_update: 2 is not a multiple"),
    (
        "--pairs_per_update 32 --gradient_accumulation_steps 4",
        "gradient_accumulation_steps: 4, but pairs_per_update 32 = 4 per device x 8 x 1 processes",
    ),
    ("--num_processes 2", "num_processes: 2, but the launcher started 1", "--num_processes 2"),
    # mappings, before any source is loaded: none of these files is there
    ("--datasets.1.columns {chosen: a}", "buffer.jsonl: the mapping names no pair; set columns.chosen"),
    ("--datasets.1.columns.better b", "buffer.jsonl: columns.better goes with columns.responses"),
    ("--datasets.1.columns.extra [tie]", "buffer.jsonl: columns.extra names 'tie', which is a name of the rows'"),
    ("--datasets.1.answer rejected", "buffer.jsonl: columns.conversation, columns.safer and `answer` choose"),
    ("--datasets.1.path task.jsonl", "datasets: 2 entries are called 'task.jsonl'; name each with `source:`"),
    # keys of other scripts
    ("--prompts x.txt", "prompts: unknown key; it is a key of recipes/evaluate.py"),
]
# The same of other recipes: which script, its recipe, overrides, words.
BAD_RECIPES = [
    ("dpo", NO_BUFFER, "--selection.replay.weight 2", "selection.replay: no entry of datasets has role: buffer"),
    ("dpo", NO_SCORES, "--margin.preset odpo", "line 8: datasets.0.columns: margin.k = 1 (from preset odpo) needs"),
    ("dpo", NO_SAFETY, "", "columns: margin.a and margin.b (from preset bfpo) need safety labels; map safe"),
    (
        "dpo", NO_SAFETY, "--margin.preset dpo --selection.labels safe_first",
        "datasets.0.columns: selection.labels: safe_first needs safety labels",
    ),
    ("dpo", DPO.replace("output_dir: runs/out\n", ""), "", "output_dir: is missing"),
    ("dpo", DPO.replace("model_name_or_path: tiny\n", ""), "", "model_name_or_path: is missing"),
    ("dpo", DPO.replace("  - path: task.jsonl\n    columns", "  - columns"), "", "datasets.0.path: is missing"),
    (
        "dpo", "model_name_or_path: tiny\noutput_dir: x\ndataset_name: y\n", "",
        "did you mean datasets", "datasets: is missing",
    ),
    ("sft", SFT, "--datasets.0.role buffer", "datasets.0.role: an SFT stage replays nothing"),
    ("sft", SFT, "--datasets.0 {path: x, columns: {conversation: m, score_chosen: 0}}", "remove columns.score_chosen"),
    ("sft", SFT, "--datasets.0 {path: x, columns: {conversation: m, extra: [e]}}", "remove columns.extra"),
    ("sft", SFT, "--eval_datasets [{path: x, columns: {conversation: m, extra: [e]}}]", "remove columns.extra"),
    ("sft", SFT, "--datasets.0 {path: x, columns: {conversation: m}, answer: rejected}", "remove `answer`"),
    (
        "sft", SFT, "--datasets.0 {path: x, answer: safer, columns: {chosen: a, rejected: b}}",
        "`answer: safer` needs columns.safer, safety",
    ),
    (
        "sft", SFT, "--datasets.0 {path: x, answer: safer, columns: {chosen: a, rejected: b, safer: s}}",
        "columns.safer goes with `answer: safer`",
    ),
    ("sft", SFT, "--packing true", "packing: conversations would see each other"),
    ("sft", SFT, "--eval_packing true", "eval_packing: packed conversations would see each other"),
    ("sft", SFT, "--prefix_sharing true", "prefix_sharing: unknown key; it is a key of recipes/dpo.py"),
    ("dpo", DPO, "--padding_free true", "padding_free: use prefix_sharing: true"),
    ("sft", SFT, "--margin.preset dpo", "margin: unknown key; it is a key of recipes/dpo.py"),
    ("sft", SFT, "--beta 1", "beta: unknown key; it is a key of recipes/dpo.py"),
    ("sft", SFT, "--eos_token x", "eos_token: the tokenizer has it"),
    ("sft", SFT, "--conversations_per_update 12", "12 is not a multiple of per_device_train_batch_size 8 x 1"),
    ("evaluate", DPO, "--datasets []", "nothing to evaluate; give datasets, or prompt_sets"),
    ("evaluate", DPO, "--max_new_tokens 0", "max_new_tokens: must be greater than or equal to 1"),
]  # fmt: skip
BAD_RECIPES += [("dpo", DPO, *row) for row in BAD_VALUES]


@pytest.mark.parametrize(("kind", "text", "overrides", "words"), [(*row[:3], row[3:]) for row in BAD_RECIPES])
def test_what_is_wrong_is_told_in_a_line(write, kind, text, overrides, words):
    message = refusal(kind, with_overrides(write(text), overrides))
    for word in words:
        assert word in message


LISTS = {
    "eval_datasets": "[{path: x}]",
    "judges": "[{name: n, model: m, kind: chat}]",
    "prompt_sets": "[{name: n, path: p}]",
}


@pytest.mark.parametrize("kind", ["dpo", "sft", "evaluate"])
def test_every_section_is_strict(write, kind):
    """A misspelt key in each of them; in a list's entry of keys_of's `datasets`, by its number."""
    sections = {name.rpartition(".")[0] for name in keys_of(kind)} - {""}
    assert len(sections) >= 8
    path = write(SFT if kind == "sft" else DPO)
    for section in sections:
        first = section.partition(".")[0]
        key = f"{section}.nokey".replace(first, f"{first}.0", 1 if first == "datasets" or first in LISTS else 0)
        entry = [f"--{first}", LISTS[first]] if first in LISTS else []
        assert f"{key}: unknown key" in refusal(kind, ["--config", path, *entry, f"--{key}", "x"])


def test_every_problem_is_named_at_once_with_its_line(write):
    path = write(DPO + "  lnk: soft\nbeta: -1\nloss_type: ipo\n")
    message = refusal("dpo", ["--config", path])
    assert f"{path} line 20: margin.lnk: unknown key" in message
    assert f"{path} line 21: beta: must be greater than 0" in message
    assert f"{path} line 22: loss_type: the loss is chosen by margin.preset or margin.link" in message


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_refused_keys_are_refused_unless_they_are_off(write, kind):
    path = write(DPO if kind == "dpo" else SFT)
    for key, reason in trl_keys.REFUSED[kind].items():
        assert f"{key}: {reason}" in refusal(kind, ["--config", path, f"--{key}", "x"])
        for off in ("false", "null"):
            resolved = resolve(kind, ["--config", path, f"--{key}", off], world_size=1)
            assert key not in resolved.training and key not in resolved.values


def test_overrides_reach_their_sections(write):
    argv = ["--config", write(DPO), "--selection.score", "{signal: length_ratio, keep: 0.5}"]
    argv += ["--selection.hygiene.ties", "keep", "--learning_rate", "5e-7", "--save_strategy", "no"]
    resolved = resolve("dpo", argv, world_size=1)
    recipe = resolved.recipe
    assert (recipe.selection.score.signal, recipe.selection.score.keep) == ("length_ratio", 0.5)
    assert recipe.selection.hygiene.ties == "keep" and recipe.selection.hygiene.identical == "drop"
    assert resolved.training["learning_rate"] == 5e-7 and resolved.training["save_strategy"] == "no"
    assert recipe.datasets[0].columns.responses == ["r0", "r1"]


def test_one_pattern_needs_no_brackets(write):
    for path, given in ((write(DPO), ["--trainable_parameters", "down_proj"]),
                        (write(DPO + "trainable_parameters: down_proj\n", "in.yaml"), [])):  # fmt: skip
        resolved = resolve("dpo", ["--config", path, *given], world_size=1)
        assert resolved.recipe.trainable_parameters == resolved.values["trainable_parameters"] == ["down_proj"]


def test_all_contradictions_are_told_and_the_rest_is_resolved(write):
    """A contradiction may follow from a key that is wrong, so that only `check.py` is told of both."""
    path = write(DPO + "beta: -1\nmax_length: 1\n")
    argv = ["--config", path, "--eval_strategy", "steps", "--num_processes", "2"]
    settings, wrong, contradictory = look_over("dpo", argv, world_size=1)
    assert {line.split(": ")[1] for line in wrong} == {"beta", "max_length"}
    assert [line.split(": ")[1] for line in contradictory] == ["eval_strategy", "num_processes"]
    assert settings.training["beta"] == 0.01 and "max_length" not in settings.values
    assert refusal("dpo", argv) == "; ".join(wrong)
    assert refusal("dpo", ["--config", write(DPO), *argv[2:]]) == "; ".join(contradictory)
    with pytest.raises(RecipeError, match="datasets.0.path: must be a string, not 3$"):
        look_over("dpo", [*argv[:2], "--beta", "1", "--max_length", "9", "--datasets.0.path", "3"], world_size=1)


# ------------------------------------------------------------------------------------------------------------ presets

NEUTRAL = {
    "a": 0, "b": 0, "k": 0, "c": 0, "phi": "identity", "link": "logistic", "scaled": False, "p": 1, "epsilon": 0.01,
    "length_normalized": False, "reference_free": False,
}  # fmt: skip
# The numbers of the papers, written out once more: margin, beta, learning rate (None: TRL's), label policy.
EXPANDED = {
    "dpo": ({}, 0.1, None, "helpful"),
    "odpo": ({"k": 1, "phi": "log"}, 0.1, None, "helpful"),
    "safedpo": ({"a": 10, "b": 10}, 0.1, 1e-6, "safedpo_t"),
    "simpo": ({"c": 1.6, "length_normalized": True, "reference_free": True}, 2.0, None, "helpful"),
    "ipo": ({"c": 0.5, "link": "squared"}, 0.1, None, "helpful"),
    "bfpo": ({"a": 1.5, "b": 0.5, "c": -0.5, "link": "squared"}, 0.01, None, "helpful"),
    "bfpo_noshift": ({"a": 1.5, "b": 0.5, "link": "squared"}, 0.01, None, "helpful"),
    "bfpo_signed": ({"a": 1.5, "b": 0.5, "c": -0.5, "link": "signed", "p": -1}, 0.01, None, "helpful"),
    "bfpo_soft": ({"a": 1.5, "b": 0.5, "c": -0.5, "link": "soft"}, 0.01, None, "helpful"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_become_numbers(write, preset):
    margin, beta, learning_rate, labels = EXPANDED[preset]
    resolved = resolve("dpo", ["--config", write(DPO), "--margin.preset", preset], world_size=1)
    assert {key: getattr(resolved.recipe.margin, key) for key in MARGIN_SETTINGS} == NEUTRAL | margin
    assert resolved.training["beta"] == beta and resolved.training.get("learning_rate") == learning_rate
    assert resolved.recipe.selection.labels == labels
    assert resolved.training["precompute_ref_log_probs"] == (preset != "simpo")
    assert {key: resolved.values["margin"][key] for key in NEUTRAL} == NEUTRAL | margin
    assert resolved.values["beta"] == beta and resolved.values["selection"]["labels"] == labels
    (line,) = [line for line in resolved.announcements if line.startswith(f"margin preset {preset}: ")]
    for word in (f"link={resolved.recipe.margin.link}", f"beta={beta}", f"c={resolved.recipe.margin.c}"):
        assert word in line


def test_simpo_s_constant_follows_beta(write):
    """The paper's setting is γ/β = 0.8: at β = 10 γ is 8, and it is said; a recipe's own c stays."""
    simpo = ["--config", write(DPO), "--margin.preset", "simpo"]
    resolved = resolve("dpo", [*simpo, "--beta", "10"], world_size=1)
    assert resolved.recipe.margin.c == pytest.approx(8.0) and resolved.training["beta"] == 10
    assert "margin.c 8 is 0.8 x beta 10, the ratio of preset simpo" in resolved.announcements
    resolved = resolve("dpo", [*simpo, "--beta", "10", "--margin.c", "3"], world_size=1)
    assert resolved.recipe.margin.c == 3
    assert "margin.c 3 is the recipe's own; preset simpo has 8.0" in resolved.announcements


@pytest.mark.parametrize(
    ("kind", "arguments", "dropout"),
    [
        ("dpo", "", 0.0),
        ("dpo", "--disable_dropout false", None),
        ("dpo", "--disable_dropout false --lora_dropout 0.1", 0.1),
        ("dpo", "--lora_dropout 0", 0.0),
        ("dpo", "--disable_dropout false --lora_target_parameters [experts.down_proj]", 0.0),
        ("sft", "", None),
        ("sft", "--lora_target_parameters [experts.down_proj]", 0.0),
        ("dpo", "--lora_dropout 0.1", "lora_dropout: has no effect: disable_dropout is true"),
        ("sft", "--lora_target_parameters [down_proj] --lora_dropout 0.1", "lora_dropout: has no effect: adapters of"),
    ],
)
def test_lora_dropout_is_what_the_adapters_have(write, kind, arguments, dropout):
    """None: TRL's default."""
    argv = ["--config", write({"dpo": DPO, "sft": SFT}[kind]), "--use_peft", "true", *arguments.split()]
    if isinstance(dropout, str):
        assert dropout in refusal(kind, argv)
    else:
        assert resolve(kind, argv, world_size=1).model.get("lora_dropout") == dropout


ON_AN_ADAPTER = "has no effect: model_name_or_path is an adapter"
OWN_REFERENCE = "is its own reference only before it is trained"


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("dpo", "--load_in_4bit true", "load_in_4bit: quantised weights are not trained; set use_peft: true"),
        ("sft", "--load_in_8bit true", "load_in_8bit: quantised weights are not trained; set use_peft: true"),
        ("dpo", "--use_peft true --load_in_4bit true --load_in_8bit true", "load_in_8bit: load_in_4bit is true as"),
        ("dpo", "--use_peft true --bnb_4bit_quant_type fp4", "bnb_4bit_quant_type: has no effect without load_in_4"),
        ("dpo", "--use_peft true --use_bnb_nested_quant true", "use_bnb_nested_quant: has no effect without load_in"),
        ("dpo", "--bnb_4bit_quant_storage uint8", "bnb_4bit_quant_storage: weights of 4 bits are stored in bytes"),
        ("dpo", "--optim paged_adamw_8bit", "optim: paged_adamw_8bit pages a GPU's memory, and use_cpu is true; take"),
        (
            "dpo",
            "--use_peft true --load_in_8bit true --precompute_ref_log_probs true",
            "precompute_ref_log_probs: with load_in_8bit a row's numbers depend on its batch",
        ),
        ("dpo", "--model_name_or_path HERE --use_peft true --lora_r 8", f"lora_r: {ON_AN_ADAPTER}"),
        ("sft", "--model_name_or_path HERE --use_peft true --use_dora true", f"use_dora: {ON_AN_ADAPTER}"),
        (
            "dpo",
            "--model_name_or_path HERE --use_peft true --trainable_parameters q_proj",
            f"trainable_parameters: {ON_AN_ADAPTER}",
        ),
        ("dpo", "--model_name_or_path HERE --use_peft true --precompute_ref_log_probs false", OWN_REFERENCE),
        ("dpo", "--model_name_or_path HERE --use_peft true --load_in_8bit true", OWN_REFERENCE),
    ],
)
def test_what_adapters_and_quantised_weights_cannot_have(write, tmp_path, kind, arguments, told):
    (tmp_path / "adapter_config.json").write_text("{}")
    argv = ["--config", write({"dpo": DPO, "sft": SFT}[kind]), *arguments.replace("HERE", str(tmp_path)).split()]
    assert told in refusal(kind, argv)


def test_what_follows_from_quantised_weights(write):
    """Constants of 4 bits are quantised too; in 8 bits the reference is live; an evaluation needs no use_peft."""
    argv = ["--config", write(DPO), "--use_peft", "true"]
    four = resolve("dpo", [*argv, "--load_in_4bit", "true"], world_size=1)
    assert four.model["use_bnb_nested_quant"] and four.training["precompute_ref_log_probs"]
    assert four.values["use_bnb_nested_quant"], "recipe.yaml says it"
    plain = resolve("dpo", [*argv, "--load_in_4bit", "true", "--use_bnb_nested_quant", "false"], world_size=1)
    assert not plain.model["use_bnb_nested_quant"]
    eight = resolve("dpo", [*argv, "--load_in_8bit", "true"], world_size=1)
    assert not eight.training["precompute_ref_log_probs"]
    assert any("a row's numbers depend on its batch" in line for line in eight.announcements)
    resolve("evaluate", ["--config", write(DPO), "--load_in_4bit", "true"], world_size=1)


def test_keys_of_the_recipe_come_before_the_preset(write):
    argv = ["--config", write(DPO), "--margin.preset", "safedpo", "--margin.a", "5", "--beta", "0.3"]
    argv += ["--learning_rate", "1e-5", "--selection.labels", "helpful"]
    resolved = resolve("dpo", argv, world_size=1)
    margin = resolved.recipe.margin
    assert (margin.a, margin.b, resolved.training["beta"], resolved.training["learning_rate"]) == (5, 10, 0.3, 1e-5)
    assert resolved.recipe.selection.labels == "helpful"
    for line in (
        "margin.a 5 is the recipe's own; preset safedpo has 10.0",
        "beta 0.3 is the recipe's own; preset safedpo has 0.1",
        "learning_rate 1e-05 is the recipe's own; preset safedpo has 1e-06",
        "selection.labels helpful is the recipe's own; preset safedpo has safedpo_t",
    ):
        assert line in resolved.announcements, (line, resolved.announcements)


def test_no_margin_is_plain_dpo_and_says_so(write):
    resolved = resolve("dpo", ["--config", write(DPO.replace("margin:\n  preset: bfpo\n", ""))], world_size=1)
    assert resolved.recipe.margin.preset == "dpo" and resolved.training["beta"] == 0.1
    assert "margin: not given, so plain DPO" in resolved.announcements


def test_numbers_without_a_preset_stay_as_they_are(write):
    text = DPO.replace("preset: bfpo", "link: hinge\n  c: 0.25")
    margin = resolve("dpo", ["--config", write(text)], world_size=1).recipe.margin
    assert margin.preset is None
    assert {key: getattr(margin, key) for key in MARGIN_SETTINGS} == NEUTRAL | {"link": "hinge", "c": 0.25}


# ------------------------------------------------------------------------------------------- batch, seeds, reference


def test_accumulation_follows_the_number_of_processes(write, monkeypatch):
    """32 pairs = 4 per device x 8 x 1 = 4 x 4 x 2 = 4 x 1 x 8; the saved recipe holds on all of them."""
    argv = ["--config", write(DPO), "--pairs_per_update", "32"]
    for processes, steps in ((1, 8), (2, 4), (8, 1)):
        resolved = resolve("dpo", argv, world_size=processes)
        assert resolved.training["gradient_accumulation_steps"] == steps
        assert "gradient_accumulation_steps" not in resolved.values and resolved.values["pairs_per_update"] == 32
    assert "4 x 3 processes = 12" in str(pytest.raises(RecipeError, resolve, "dpo", argv, 3).value)
    monkeypatch.setenv("WORLD_SIZE", "2")  # the launcher's
    resolve("dpo", [*argv, "--gradient_accumulation_steps", "4", "--num_processes", "2"])


def test_seed_and_reference_pass(write):
    def resolved(*argv: str):
        return resolve("dpo", ["--config", write(DPO), *argv], 1)

    for argv, seed in ([], 42), (["--seed", "7"], 7), (["--seed", "7", "--selection.seed", "3"], 3):
        assert resolved(*argv).recipe.selection.seed == seed
    for argv in [], ["--use_peft", "true"]:
        assert resolved(*argv).training["precompute_ref_log_probs"] is True
    for argv, noted in ([], True), (["--prefix_sharing", "false"], False):
        lines = resolved("--attn_implementation", "eager", *argv).announcements
        assert noted == any(line.startswith("attn_implementation: has no effect on pairs that") for line in lines)


# ----------------------------------------------------------------------------------------------- TRL's objects, saving


@pytest.mark.parametrize(
    ("kind", "text", "overrides"),
    [
        ("dpo", DPO, ""),
        ("dpo", DPO, "--margin.preset safedpo --margin.a 5 --pairs_per_update 16 --learning_rate 5e-7"),
        ("dpo", DPO, "--margin.preset simpo --save_strategy no --report_to [none] --max_length null"),
        ("dpo", DPO, "--use_peft true --lora_r 4 --trainable_parameters [down_proj] --system_message on"),
        ("dpo", NO_BUFFER, "--selection {score: {signal: x, band: [0, 0.5]}, hygiene: {max_similarity: null}}"),
        (
            "dpo",
            DPO,
            "--margin {link: soft, epsilon: 0.2, a: 1} --selection.quotas {by: source, limits: {x: 0.5, y: 9}}",
        ),
        ("dpo", DPO, "--datasets.0.columns.turns {user: 'Human:', assistant: '5e-7'}"),
        ("dpo", DPO, "--lr_scheduler_type polynomial --lr_scheduler_kwargs {power: 2.0}"),
        ("sft", SFT, "--trainable_parameters [down_proj] --conversations_per_update 16 --pad_token <unk>"),
        (
            "sft",
            SFT,
            "--datasets.0.columns {conversation: m, messages: {role: from, content: value}, row_id: i}",
        ),
        ("evaluate", DPO, "--prompts p.txt --max_new_tokens 5 --reference_model ref"),
        (
            "evaluate",
            DPO,
            "--models {a: x, b: y} --temperature 1.0 --require ['over_refusal <= 0.1'] "
            "--prompt_sets [{name: n, path: p.csv, column: c, where: {label: safe}, measure: over_refusal}]",
        ),
    ],
)
def test_a_saved_recipe_is_the_same_run(write, tmp_path, kind, text, overrides):
    first = parse(kind, with_overrides(write(text), overrides))
    saved = save_recipe(first, tmp_path / "out" / "run")
    assert [path.name for path in saved.parent.iterdir()] == ["recipe.yaml"]
    second = parse(kind, ["--config", str(saved)])
    assert second == first and second.training.to_dict() == first.training.to_dict()
    assert not any("recipe's own" in line for line in second.announcements if "5" not in line)
    assert yaml.safe_load(saved.read_text()) == first.values  # any YAML reader, not ours alone


def test_what_reaches_trl(write):
    argv = ["--config", write(DPO), "--pairs_per_update", "32", "--use_peft", "true"]
    resolved = parse("dpo", [*argv, "--trainable_parameters", "[down_proj]", "--gradient_checkpointing", "false"])
    assert isinstance(resolved.training, DPOConfig) and isinstance(resolved.model, ModelConfig)
    assert resolved.training.gradient_accumulation_steps == 8 and resolved.training.beta == 0.01
    assert resolved.training.gradient_checkpointing is resolved.training.activation_checkpointing is False
    assert resolved.training.logging_nan_inf_filter is False
    assert resolved.model.lora_target_modules == ["down_proj"]  # not the string that ModelConfig makes of it
    assert parse("dpo", ["--config", write(DPO)]).training.gradient_checkpointing is True
    assert isinstance(parse("sft", ["--config", write(SFT)]).training, SFTConfig)


def test_precision_that_the_machine_lacks(write, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("transformers.utils.is_torch_cuda_available", lambda: False)
    path = write(DPO.replace("bf16: false\nuse_cpu: true\n", ""))
    for argv, words in (
        ([], "bf16: true is TRL's default, and this machine has no GPU for it; set bf16: false"),
        (["--bf16", "true"], "bf16: true is set, and this machine has no GPU"),
        (["--fp16", "true"], "fp16: true needs a GPU"),
    ):
        with pytest.raises(RecipeError, match=re.escape(words)):
            parse("dpo", ["--config", path, *argv])
    resolved = parse("dpo", ["--config", path, "--use_cpu", "true"])
    assert resolved.training.bf16 and any("bf16: true on the CPU" in line for line in resolved.announcements)


def test_what_transformers_refuses_is_one_line(write):
    argv = ["--config", write(DPO), "--load_best_model_at_end", "true", "--eval_strategy", "epoch"]
    argv += [
        "--eval_datasets",
        "[{path: x, columns: {chosen: c, rejected: r, chosen_safe: true, rejected_safe: true}}]",
    ]
    with pytest.raises(RecipeError, match="save and eval strategy to match") as caught:
        parse("dpo", argv)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- the recipes of this project

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.stem != "evaluation")
BATCH = re.compile(
    r"^# batch: (\d+) per device x (\d+) accumulation x (\d+) (?:GPUs?|process(?:es)?) = (\d+) "
    r"(pairs|conversations) per update",
    re.MULTILINE,
)


def test_the_list_of_an_evaluation_parses():
    resolved = resolve("evaluate", ["--config", str(ROOT / "recipes/smollm2-135m/evaluation.yaml")])
    assert [entry.measure for entry in resolved.recipe.prompt_sets][1:] == ["harmful_compliance"] * 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_parses_and_its_batch_arithmetic_holds(path):
    kind = "sft" if path.name.startswith("sft") else "dpo"
    headers = BATCH.findall(path.read_text())
    assert len(headers) == 1, "one line `# batch: 2 per device x 8 accumulation x 2 GPUs = 32 pairs per update`"
    batch, steps, processes, update = (int(number) for number in headers[0][:4])
    assert headers[0][4] == ("conversations" if kind == "sft" else "pairs")
    assert batch * steps * processes == update
    resolved = resolve(kind, ["--config", str(path)], world_size=processes)
    training = trl_keys.DEFAULTS | resolved.training
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (batch, steps)


def test_a_file_of_thousands_of_unknown_keys(write):
    """Twenty of them are told, and how many there are more; soon, and in a line that a terminal holds."""
    with pytest.raises(RecipeError) as refused:
        resolve("dpo", with_overrides(write(DPO + "".join(f"kex_{n}: 1\n" for n in range(5000))), ""), 1)
    assert str(refused.value).count("unknown key") == 20 and "and 4,980 keys more" in str(refused.value)
    assert len(str(refused.value)) < 4000
