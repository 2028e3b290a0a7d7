import json
import re
import shutil
import socket

import datasets
import pytest
import yaml
from datasets import concatenate_datasets

from conftest import preference_rows
from core.config.parsing import resolve, save_recipe
from core.config.schema import Selection
from core.objective.presets import PRESETS, Margin
from core.reporting.card import fenced, markdown_table, markdown_text, training_table, write_card
from core.reporting.figures import draw_plots
from core.selection.buffer import select_rows
from core.training.records import Record

RECIPE = """
model_name_or_path: {model}
output_dir: {output}
datasets:
  - {{path: PKU-Alignment/PKU-SafeRLHF, columns: {{prompt: prompt, chosen: chosen, rejected: rejected,
      chosen_safe: a, rejected_safe: b}}}}
  - {{path: {rows}, role: buffer, columns: {{prompt: prompt, chosen: chosen, rejected: rejected,
      chosen_safe: true, rejected_safe: true}}}}
margin: {{preset: bfpo}}
trainable_parameters: [down_proj]
per_device_train_batch_size: 2
pairs_per_update: 32
learning_rate: 5.0e-7
bf16: false
"""


def evaluation(step: int, epoch: float, loss: float, chosen: float, rejected: float, accuracy: float) -> Record:
    return {
        "step": step,
        "epoch": epoch,
        "eval_loss": loss,
        "eval_rewards/chosen": chosen,
        "eval_rewards/rejected": rejected,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": chosen - rejected,
        "eval_accuracy_helpful": accuracy,
        "eval_accuracy_target": 1 - accuracy,
        "eval_logps/rejected": -221.25,
        "eval_logps/chosen": -287.5,
        "eval_logits/rejected": -2.125,
        "eval_logits/chosen": -2.25,
        "eval_unsafe_safe/loss": loss / 4,
        "eval_unsafe_safe/accuracy_helpful": 0.125,
        "eval_safe_safe/loss": loss / 2,
        "eval_task/loss": loss,
    }


RECORDS = [
    evaluation(0, 0.0, 0.6931, 0.0, 0.0, 0.0),
    {"step": 10, "epoch": 0.25, "loss": 0.69, "rewards/chosen": -0.5},
    {"step": 20, "epoch": 0.5, "loss": 0.685},
    evaluation(20, 0.5, 0.68, -0.1, -0.08, 0.4375),
    {"step": 40, "epoch": 1.0, "loss": 0.67},
    {"step": 40, "epoch": 1.0, "train_runtime": 70.0, "train_loss": 0.68},
    evaluation(40, 1.0, 0.6777, -0.1371, -0.083, 0.4693),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An output folder with what a run leaves there, its paths absolute and a token in its recipe."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "my-run"
    output.mkdir()
    text = RECIPE.format(model=tmp_path / "start", output=output, rows=tmp_path / "rows.jsonl")
    (tmp_path / "dpo.yaml").write_text(text)
    save_recipe(resolve("dpo", ["--config", str(tmp_path / "dpo.yaml")], world_size=2), output)
    (output / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    rows = preference_rows(40).remove_columns("relabelled")
    twins = rows.select([38, 39]).map(lambda row: {"rejected": row["chosen"]})
    _, audit = select_rows(concatenate_datasets([rows.select(range(38)), twins]), Selection(), seed=7)
    audit.save(output)
    (output / "results.json").write_text(json.dumps({"over_refusal": {"before": 0.0, "after": 0.02}, "seed": 7}))
    draw_plots(output)
    return output


def card(output, **arguments):
    return write_card(output, **arguments).read_text()


def change_recipe(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def metadata(folder):
    return yaml.safe_load(card(folder).split("---\n")[1])


@pytest.mark.parametrize(
    "lines",
    [
        # Training: a row per evaluation. At step 0 Δ is 0 for every pair, which is no accuracy.
        "| Training Loss | Epoch | Step | Validation Loss | Rewards/chosen | Rewards/rejected | Rewards/accuracies "
        "| Rewards/margins | Logps/rejected | Logps/chosen | Logits/rejected | Logits/chosen |",
        "| No log | 0.0000 | 0 | 0.6931 | 0.0000 | 0.0000 | – | 0.0000 | -221.2 | -287.5 | -2.1250 | -2.2500 |",
        "| 0.6850 | 0.5000 | 20 | 0.6800 | -0.1000 | -0.0800 | 0.4375 | -0.0200 | -221.2 | -287.5 | ",
        "| 0.6700 | 1.0000 | 40 | 0.6777 | -0.1371 | -0.0830 | 0.4693 | -0.0541 | -221.2 | -287.5 | ",
        "The training loss is a sum, of the mean over task pairs and λ times the mean over buffer pairs.\n\n| Tr",
        # Before and after; the one role, task, would say what all pairs say.
        "| all | 0.6931 → 0.6777 | 0.000 → -0.054 | 0.469 | 0.531 |\n"
        "| safe/safe | 0.3466 → 0.3388 | – | – | – |\n"
        "| unsafe/safe | 0.1733 → 0.1694 | – | 0.125 | – |\n\n",
        "| over refusal | 0.0000 | 0.0200 |",
        # The margin in numbers: bfpo's table and 10⁴·m² at Δ = 0.
        "a = 1.5, b = 0.5, k = 0.0, c = -0.5, φ = identity, β = 0.01.",
        "    loss = (Δ − m/β)²",
        "This is BFPO: [arXiv 2408.15313](https://arxiv.org/abs/2408.15313).",
        "| safe/safe | 0.5000 | 50.0000 | 2500.0 |\n| safe/unsafe | 1.0000 | 100.0 | 10000.0 |\n"
        "| unsafe/safe | -1.0000 | -100.0 | 10000.0 |\n| unsafe/unsafe | -0.5000 | -50.0000 | 2500.0 |",
        "`start` after preference optimisation (bfpo, squared link)\n"
        "on [PKU-Alignment/PKU-SafeRLHF](https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF), "
        "with `rows.jsonl` replayed beside it.",
        "Trained: down_proj.\nPairs per update: 2 per device × 8 accumulated × 2 processes = 32.",
        "| torch | 2.",
    ],
)
def test_what_the_card_says(folder, lines):
    assert lines in card(folder, world_size=2)


def test_what_is_not_known_is_not_said(folder):
    """A run that was evaluated at its end alone, and whose number of processes nobody tells."""
    (folder / "metrics.jsonl").write_text(json.dumps(RECORDS[-1]) + "\n")
    text = card(folder)
    assert "| all | 0.6777 | -0.054 | 0.469 | 0.531 |\n" in text
    assert "before → after" not in text and "Pairs per update" not in text


def test_without_a_reference_the_first_accuracies_count(folder):
    """Δ is then the policy's own preference, which has an order before training too."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    change_recipe(folder, margin=recipe["margin"] | {"reference_free": True})
    text = card(folder)
    assert "| all | 0.6931 → 0.6777 | 0.000 → -0.054 | 0.000 → 0.469 | 1.000 → 0.531 |\n" in text
    assert "neither order" not in text


def test_selection_is_that_of_the_audit(folder):
    text = card(folder)
    selection = json.loads((folder / "selection.json").read_text())
    counts = selection["counts"]
    assert 0 < counts["kept"] < 40, "nothing was dropped, so the tables would say nothing"
    assert f"{counts['kept']} of 40 rows were kept, {counts['relabelled']} of them relabelled. Seed 7" in text
    assert f"`{selection['digest']}`" in text
    assert "| rows | read | – | 40 |\n" in text
    for entry in counts["stages"]:
        assert f"| {entry['stage']} | {entry['reason']} | {entry['dropped']} | " in text
    assert f" | {counts['kept']} |\n\n" in text  # what the last stage leaves
    for groups in (counts["by_class"], counts["by_role"]):
        for name, count in groups["before"].items():
            assert f"| {name} | {count} | {groups['after'][name]} |\n" in text
    assert "| Source |" not in text  # there is but one


def test_metadata_names_what_the_hub_knows(folder):
    found = metadata(folder)
    assert found["library_name"] == "transformers" and "license" not in found  # a recipe tells none
    assert found["datasets"] == ["PKU-Alignment/PKU-SafeRLHF"]
    assert "base_model" not in found  # a local folder is nothing that the Hub could link
    change_recipe(folder, model_name_or_path="mistralai/Mistral-7B-v0.1")
    (folder / "adapter_config.json").write_text("{}")
    found = metadata(folder)
    assert found["base_model"] == "mistralai/Mistral-7B-v0.1" and found["library_name"] == "peft"
    assert "pip install peft" in card(folder)


@pytest.mark.parametrize(
    ("classes", "roles", "margin", "tags"),
    [
        ({"safe/unsafe": 3}, {"task": 2, "buffer": 1}, {"a": 1.5},
         ["shifted-reward-margin", "safety", "selective-buffer"]),
        ({"safe/safe": 3}, {"task": 3, "buffer": 0}, {"preset": "dpo"}, []),
        ({"safe/safe": 3, "unsafe/safe": 0}, {"task": 3}, {"c": 0.5}, ["shifted-reward-margin"]),
        ({"unlabelled": 3}, {"task": 2, "buffer": 1}, {}, ["selective-buffer"]),
    ],
)  # fmt: skip
def test_only_tags_that_are_true(folder, classes, roles, margin, tags):
    selection = json.loads((folder / "selection.json").read_text())
    selection["counts"] |= {"by_class": {"before": classes, "after": classes}}
    selection["counts"] |= {"by_role": {"before": roles, "after": roles}}
    (folder / "selection.json").write_text(json.dumps(selection))
    change_recipe(folder, margin=margin)
    assert metadata(folder)["tags"] == ["trl", "dpo", "preference-optimization", *tags]


def test_the_model_loads_as_the_card_says(folder, model_folder, monkeypatch, capsys):
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    (code,) = re.findall(r"```python\n(.*?)```", card(folder), re.S)
    monkeypatch.chdir(folder.parent)
    exec(code.replace("max_new_tokens=256", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.strip()


def test_nothing_of_the_machine_is_in_it(folder, tmp_path):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["datasets"][0]["data_files"] = ["/mnt/private/rows.jsonl", "C:\\private\\rows.csv"]
    secrets = {"hub_token": "secret-word", "run_name": "hf_" + "a1B2" * 9, "deepspeed": "~/configs/zero3.json"}
    change_recipe(folder, datasets=recipe["datasets"], **secrets)
    text = card(folder)
    host = socket.gethostname()
    for private in (str(tmp_path), "secret-word", "hub_token", "a1B2a1B2", "/mnt", "private", "~/", host):
        assert private not in text
    for public in ("`start`", "rows.jsonl", "rows.csv", "zero3.json", "output_dir: my-run"):
        assert public in text


def test_plots_are_linked_relatively_in_a_fixed_order(folder):
    (folder / "plots" / "rewards.png").unlink()
    links = re.findall(r"!\[.*?\]\((.*?)\)", card(folder))
    assert links == ["plots/loss.png", "plots/reward_margins.png", "plots/accuracies.png"]
    assert all((folder / link).is_file() for link in links)


def test_the_card_of_a_supervised_run_has_what_there_is(tmp_path):
    recipe = {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "output_dir": "x", "datasets": [{"path": "a/b"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"conversations_per_update": 8}))
    records = [{"step": 5, "epoch": 0.5, "loss": 1.25}, {"step": 10, "epoch": 1.0, "eval_loss": 1.125}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = card(tmp_path, world_size=1)
    assert "| Training Loss | Epoch | Step | Validation Loss |\n| --: | --: | --: | --: |\n" in text
    assert "| 1.2500 | 1.0000 | 10 | 1.1250 |\n" in text
    assert "Conversations per update: 8 per device × 1 accumulated × 1 process = 8.\n" in text
    assert "after supervised fine-tuning on [a/b](https://huggingface.co/datasets/a/b)" in text
    assert "Trained: all parameters.\n" in text
    for absent in ("margin", "selection", "Behaviour", "None"):
        assert absent not in text


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_no_markdown_is_left_open(folder, preset):
    """Every table row has as many cells as its header, and no two blank lines or template marks remain."""
    fields = {key: value for key, value in PRESETS.get(preset, {}).items() if key in Margin.__annotations__}
    change_recipe(folder, margin={"preset": preset} | fields)
    text = card(folder, world_size=2)
    assert "\n\n\n" not in text and "{{" not in text and "{%" not in text and text.count("```") == 4
    cells = [line.count("|") if line.startswith("|") else 0 for line in text.splitlines()]
    assert sum(cells) > 80
    for above, below in zip(cells, cells[1:], strict=False):
        assert 0 in (above, below) or above == below
    assert ("https://arxiv.org" in text) == (preset is not None)


def test_what_others_wrote_is_shown_as_it_is(folder):
    evil = "<img src=x>\n# [a](javascript:b) `c` *d* | \x1b[31m \u202e"
    selection = json.loads((folder / "selection.json").read_text())
    groups = {evil: 1, "b": 2}
    selection["counts"]["by_source"] = {"before": groups, "after": groups}
    (folder / "selection.json").write_text(json.dumps(selection))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["datasets"][0]["path"] = evil
    change_recipe(folder, datasets=recipe["datasets"], system_message="a\n```\n\u202e<b>\n")
    text = card(folder)
    assert f"| {markdown_text(evil)} | 1 | 1 |\n" in text
    assert not {"\x1b", "\u202e"} & set(text)
    fence = re.search(r"^(`+)yaml$", text, re.M).group(1)
    assert len(fence) == 4 and text.count(fence) == 2


def test_markdown_of_cells_and_code():
    assert markdown_table((["Value", "n"], [["a|b", "1"]])) == "| Value | n |\n| :-- | --: |\n| a\\|b | 1 |"
    assert markdown_text("<b>\n`x` [y](z) *w* \\ \u202e") == r"\<b\>\\n\`x\` \[y\](z) \*w\* \\ \\u202e"
    assert fenced("a\n```\nb\n", "yaml") == "````yaml\na\n```\nb\n````"


def test_a_run_without_evaluations_shows_its_training_log():
    """Of 100 logged steps 20 from the first to the last, with the columns that they have and no validation loss."""
    assert training_table([]) == (["Training Loss", "Epoch", "Step"], [])
    records = [{"step": n, "epoch": n / 100, "loss": float(n), "rewards/margins": n / 10} for n in range(1, 101)]
    header, rows = training_table(records)
    assert header == ["Training Loss", "Epoch", "Step", "Rewards/margins"]
    assert len(rows) == 20
    assert rows[0] == ["1.0000", "0.0100", "1", "0.1000"]
    assert rows[-1] == ["100.0", "1.0000", "100", "10.0000"]
