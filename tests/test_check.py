"""`recipes/check.py`: a sound recipe passes with numbers worked out by hand; of a faulty one every fault is told."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import check
from conftest import build_model
from core.planning import inspection
from core.runtime.errors import RecipeError
from core.runtime.launching import Launch, check_launched, launch_faults, read_launch

ROOT = Path(__file__).parents[1]
CPU = str(ROOT / "accelerate_configs" / "cpu.yaml")
ZERO3_CPU = str(ROOT / "accelerate_configs" / "zero3-cpu.yaml")
COLUMNS = {key: key for key in ("prompt", "chosen", "rejected", "chosen_safe", "rejected_safe")}


def write_rows(path: Path, labels: list[tuple[bool, bool]]) -> str:
    """A pair for each (chosen safe, rejected safe); the texts differ, so that hygiene keeps all of them."""
    with path.open("w") as file:
        for number, (chosen_safe, rejected_safe) in enumerate(labels):
            row = {
                "prompt": f"{path.stem}: how do I bake bread number {number}?",
                "chosen": f"Mix flour and water, add salt {number}, then wait.",
                "rejected": f"Is Paris the capital of France {number}, or not?",
                "chosen_safe": chosen_safe,
                "rejected_safe": rejected_safe,
            }
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture
def recipe(tmp_path, model_folder):
    """Eight task pairs and four of a buffer, under bfpo."""
    labels = [(True, False)] * 4 + [(False, True)] * 2 + [(True, True)] * 2
    return {
        "model_name_or_path": model_folder,
        "dtype": "float32",
        "output_dir": str(tmp_path / "runs" / "a"),
        "datasets": [
            {"path": write_rows(tmp_path / "task.jsonl", labels), "columns": dict(COLUMNS)},
            {
                "path": write_rows(tmp_path / "buffer.jsonl", [(True, True)] * 4),
                "role": "buffer",
                "columns": dict(COLUMNS),
            },
        ],
        "margin": {"preset": "bfpo"},
        "trainable_parameters": ["down_proj"],
        "per_device_train_batch_size": 2,
        "pairs_per_update": 4,
        "num_train_epochs": 2,
        "warmup_steps": 0.25,
        "max_length": 128,
        "bf16": False,
        "use_cpu": True,
        "save_steps": 3,
        "save_total_limit": 1,
    }


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Run the check on a recipe; its exit code and what it printed."""

    def run(recipe: dict, *options: str, launch: str = CPU, name: str = "dpo.yaml") -> tuple[int, str]:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe))
        arguments = ["check.py", "--config", str(path), "--accelerate_config", launch, *options]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            check.main.__wrapped__()  # without the wrapper that would end this process
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_sound_recipe_by_hand(recipe, checked, tmp_path):
    """
    Margins under bfpo: safe/unsafe +1, unsafe/safe −1, safe/safe +0.5. With beta 0.01 a squared link costs (m/β)² at
    Δ = 0: the task (6·100² + 2·50²) / 8 = 8125 and the buffer 50² = 2500, together 10625.

    2 per device x 2 x 1 = 4 pairs, 2 of each role; 8 task pairs are 4 updates, 2 epochs 8, a quarter of them 2.

    Parameters: 2·320·32 embeddings and head, 32 of the last norm, and 2 layers of q, o 2·32·32, k, v 2·32·16, MLP
    3·32·64 and 2·32 of norms: 39,072; down_proj 2·64·32 = 4,096, 10.5 %.

    Checkpoints: 39,072·4 + 4,096·8 bytes, two at a time (one kept, one in the making), and the final weights.
    """
    code, text = checked(recipe)
    assert code == 0, text
    for line in (
        "12 of 12 rows kept",
        "| task   | safe/unsafe |     4 |   1.0000 |      100.0 |       10000.0 |",
        "| task   | unsafe/safe |     2 |  -1.0000 |     -100.0 |       10000.0 |",
        "| buffer | safe/safe   |     4 |   0.5000 |    50.0000 |        2500.0 |",
        "Expected loss at step 0: 10625.0 (task 8125.0, buffer 2500.0 x 1)",
        "Batch: 2 per device x 2 accumulation x 1 process = 4 pairs (2 task + 2 buffer) per update",
        "Steps: 4 updates an epoch, 8 in all, of which 2 warm up",
        "Parameters: 39,072, of which 4,096 are trained (10.5%)",
        "Disk: 2 checkpoints of 0.0 GB and the final weights",
        "  prompt   | <|user|>",
        "  prompt   | task: how do I bake bread number 0?</s>",
        "  chosen   | Mix flour and water, add salt 0, then wait.</s>",
        "  rejected | Is Paris the capital of France 0, or not?</s>",
        "Nothing found that would stop this run.",
    ):
        assert line in text, line
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_tokens_by_hand(recipe, checked, tokenizer):
    """An epoch computes k + n + m − 1 tokens of each pair that it draws; the buffer's four are drawn twice."""

    def length(row: dict) -> int:
        prompt = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        parts = [text, *(f"{row[answer]}</s>\n" for answer in ("chosen", "rejected"))]
        return sum(len(ids) for ids in tokenizer(parts, add_special_tokens=False)["input_ids"]) - 1

    task, buffer = (
        [length(json.loads(line)) for line in Path(entry["path"]).read_text().splitlines()]
        for entry in recipe["datasets"]
    )
    _, text = checked(recipe)
    assert f"Tokens: {sum(task) + 2 * sum(buffer):,} an epoch" in text


def test_faults_are_all_told_at_once(recipe, checked, tmp_path):
    """Two misspelt keys, a bad value, a missing source, another run's folder, a batch that does not fit."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("beta: 0.1\n")
    before = sorted(folder.iterdir())
    recipe |= {"lerning_rate": 1e-6, "seed": "x", "pairs_per_update": 5}
    recipe["datasets"].append({"path": str(tmp_path / "none.jsonl"), "columns": dict(COLUMNS)})
    code, text = checked(recipe, "--margin.bta", "1")
    assert code == 2
    for fault in (
        "lerning_rate: unknown key; did you mean learning_rate?",
        "margin.bta: unknown key",
        "seed: must be an integer, not",
        "5 is not a multiple of per_device_train_batch_size 2 x 1 processes",
        "none.jsonl: no such file",
        "holds another run (recipe.yaml)",
    ):
        assert fault in text.split("to mend:")[1], fault
    assert "6 things to mend" in text
    assert "Expected loss at step 0: 10625.0" in text, "what can be checked is checked all the same"
    assert sorted(folder.iterdir()) == before


def change(key: str, value):
    def apply(recipe: dict, tmp_path: Path) -> None:
        recipe[key] = value

    return apply


def without_model_on_the_hub(recipe, tmp_path):
    recipe["model_name_or_path"] = "nobody/no-such-model"


def tokenizer_without_template(recipe, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(recipe["model_name_or_path"], folder)
    (folder / "chat_template.jinja").unlink()
    recipe["model_name_or_path"] = str(folder)


def model_of_a_smaller_vocabulary(recipe, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(recipe["model_name_or_path"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    recipe["model_name_or_path"] = str(folder)


def generation_that_cannot_be_loaded(recipe, tmp_path):
    folder = tmp_path / "invalid"
    shutil.copytree(recipe["model_name_or_path"], folder)
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3, "num_beams": 2}')
    recipe["model_name_or_path"] = str(folder)


def evaluation_rows_that_are_trained_on(recipe, tmp_path):
    recipe["eval_datasets"] = [dict(recipe["datasets"][0], source="eval")]
    recipe["selection"] = {"hygiene": {"eval_ngram": None}}


@pytest.mark.parametrize(
    ("fault", "options", "words"),
    [
        (change("output_dir", "/proc/none/run"), (), "output_dir /proc/none/run cannot be written"),
        (change("model_name_or_path", "./none"), (), "model ./none: no such folder"),
        (without_model_on_the_hub, (), "nobody/no-such-model: neither a folder here nor in the Hub's cache"),
        (tokenizer_without_template, (), "has no chat template"),
        (model_of_a_smaller_vocabulary, (), "the tokenizer has 320 tokens and the model 300"),
        (change("trainable_parameters", ["down_prj"]), (), "'down_prj' matches no parameter"),
        (evaluation_rows_that_are_trained_on, (), "8 evaluation rows are training rows too"),
        (change("max_length", 8), (), "the selection leaves no row of 12"),
        (change("num_processes", 3), (), "3, but the launcher started 1"),
        (change("use_cpu", False), (), "use_cpu: true needs it in the recipe as well"),
        (change("bf16", False), ("--gpu_memory", "0.000001"), "memory: each process needs about"),
        (change("learning_rate", 1e-10), (), "learning_rate 1e-10: one step of it can move"),
        (generation_that_cannot_be_loaded, (), "generation_config.json is invalid"),
        (change("fp16", True), ("--bf16", "true"), "fp16 is true as well; keep one"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else getattr(value, "__name__", None),
)
def test_each_fault(fault, options, words, recipe, checked, tmp_path):
    """Beside a second one, without which there would be a model to trace."""
    if "memory" not in words and "learning_rate" not in words:
        recipe["trainable_parameters"] = ["down_prj"]
    fault(recipe, tmp_path)
    code, text = checked(recipe, *options)
    assert code == 2
    assert words in text.split("to mend:")[1]


def test_a_disk_that_is_too_small(recipe, checked, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    code, text = checked(recipe)
    assert code == 2
    assert "2 checkpoints of 0.0 GB and the final weights need 0.0 GB and 0.0 GB are free" in text


def test_a_disk_that_the_run_fills_itself_is_large_enough(recipe, checked, monkeypatch, tmp_path):
    """Of 2·(39,072·4 + 4,096·8) + 39,072·4 = 534,400 bytes the checkpoint that is there takes 189,056."""
    folder = tmp_path / "runs" / "a"
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(bytes(189_056))
    recipe["resume_from_checkpoint"] = str(folder / "checkpoint-3")
    for free, fault in ((345_344, False), (345_343, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: shutil._ntuple_diskusage(0, 0, free))
        _, text = checked(recipe)
        assert "Disk: 2 checkpoints of 0.0 GB and the final weights: 0.0 GB, of which 0.0 GB are there\n" in text
        assert ("GB are free on that disk" in text) is fault


def test_without_a_required_key_nothing_else_is_known(recipe, checked):
    del recipe["output_dir"]
    code, text = checked(recipe, launch="none.yaml")
    assert code == 2
    assert "output_dir: is missing" in text and "none.yaml: the launch config cannot be read" in text


def test_a_model_that_is_only_a_config_is_enough(recipe, checked, tmp_path, tokenizer):
    folder = tmp_path / "config-only"
    build_model().config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    code, text = checked(recipe | {"model_name_or_path": str(folder)})
    assert code == 0
    assert "Parameters: 39,072" in text
    assert "has no weights (*.safetensors) yet" in text


def test_rows_are_checked_without_a_model(recipe, checked):
    code, text = checked(recipe | {"model_name_or_path": "nobody/no-such-model"})
    assert code == 2
    assert "1 thing to mend" in text
    assert "Expected loss at step 0: 10625.0" in text
    assert "8 in all" in text
    assert "memory and disk are not estimated" in text


def test_a_recipe_of_the_sft_stage(recipe, checked, tmp_path):
    """Six conversations, 2 per device x 2 = 4 an update: 2 updates an epoch."""
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "bake bread"}, {"role": "assistant", "content": "Mix flour and water."}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 6)
    kept = ("model_name_or_path", "dtype", "output_dir", "trainable_parameters", "per_device_train_batch_size")
    sft = {key: recipe[key] for key in (*kept, "max_length", "bf16", "use_cpu")}
    sft |= {"datasets": [{"path": str(path), "columns": {"conversation": "messages"}}], "conversations_per_update": 4}
    code, text = checked(sft, name="sft.yaml")
    assert code == 0, text
    assert "= 4 conversations per update" in text
    assert "Steps: 2 updates an epoch, 6 in all" in text
    assert "  prompt   | bake bread</s>" in text
    assert "  answer   | Mix flour and water.</s>" in text
    assert "Parameters: 39,072, of which 4,096" in text


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_largest_micro_batch_of_conversations(padding_free, recipe, checked, tmp_path, tokenizer):
    """Two of the longest and the second longest: without padding their own tokens, else twice the longest's."""
    path, lengths = tmp_path / "chats.jsonl", []
    with path.open("w") as file:
        for words in (3, 30, 9, 17):
            turns = [{"role": "user", "content": "bake bread"}, {"role": "assistant", "content": "flour " * words}]
            lengths.append(len(tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]))
            file.write(json.dumps({"messages": turns}) + "\n")
    kept = ("model_name_or_path", "dtype", "output_dir", "per_device_train_batch_size", "bf16", "use_cpu")
    sft = {key: recipe[key] for key in kept} | {"max_length": 1000, "padding_free": padding_free}
    sft |= {"datasets": [{"path": str(path), "columns": {"conversation": "messages"}}], "conversations_per_update": 4}
    code, text = checked(sft, name="sft.yaml")
    assert code == 0, text
    assert lengths[1] > lengths[3] > lengths[2] > lengths[0]
    tokens = lengths[1] + lengths[3] if padding_free else 2 * lengths[1]
    assert f"largest micro-batch {tokens:,} tokens" in text
    assert "falls back" not in text


def test_wandb_and_the_hub_are_told(recipe, checked, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(inspection, "why_wandb_is_offline", lambda: "no login")
    code, text = checked(recipe | {"report_to": "wandb"})
    assert code == 0
    assert "wandb: offline, no login" in text
    assert "Hub: not asked" in text
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(inspection, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(check, "go_offline_if_local", lambda paths: False)
    assert "Hub: cannot be reached from here" in checked(recipe)[1]
    assert not Path(recipe["output_dir"]).exists()


@pytest.mark.parametrize("name", ["dpo.yaml", "sft.yaml"])
def test_the_7b_recipes_offline(name, checked, monkeypatch):
    """Nothing of them is on this disk: each source and the model are told, at once, and nothing is tried again."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = yaml.safe_load((ROOT / "recipes" / "mistral-7b" / name).read_text())
    code, text = checked(recipe, launch=str(ROOT / "accelerate_configs" / "zero3.yaml"), name=name)
    assert code == 2
    assert "PKU-Alignment/PKU-SafeRLHF" in text
    assert "model " in text
    assert "2 GPUs, ZeRO-3" in text


# --------------------------------------------------------------------------------------------------- launch config


def test_every_launch_config_is_read():
    launches = {path.stem: read_launch(str(path)) for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert len(launches) >= 8
    assert {name: (launch.world_size, launch.zero_stage) for name, launch in launches.items()} == {
        "cpu": (1, 0), "gpu": (1, 0), "ddp": (2, 0), "zero2": (2, 2), "zero3": (2, 3), "zero3-cpu": (2, 3),
        "zero3-offload": (2, 3), "zero3-nodes": (16, 3),
    }  # fmt: skip
    assert launches["zero3-offload"].offload_optimizer and launches["zero3-offload"].offload_param
    assert str(launches["zero3-nodes"]) == "16 GPUs on 2 machines, ZeRO-3"
    for launch in launches.values():
        assert not launch_faults(launch, {"use_cpu": launch.use_cpu, "bf16": launch.mixed_precision == "bf16"})


@pytest.mark.parametrize(
    ("launch", "training", "words"),
    [
        (Launch("x", "NO", 4), {}, "distributed_type NO starts one process"),
        (Launch("x", "MULTI_GPU", 7, machines=2), {}, "cannot be shared out to num_machines 2"),
        (Launch("x", "DEEPSPEED", 4, machines=2, zero_stage=3), {}, "deepspeed_multinode_launcher: standard"),
        (Launch("x", "DEEPSPEED", 2, zero_stage=3, saves_weights=False), {}, "zero3_save_16bit_model"),
        (Launch("x", "NO", 1, use_cpu=True), {}, "add --use_cpu true"),
        (Launch("x", "NO", 1), {"use_cpu": True}, "the launch config does not"),
        (Launch("x", "NO", 1, mixed_precision="bf16"), {"bf16": False}, "where the recipe has bf16: false"),
        (Launch("x", "NO", 1, mixed_precision="bf16"), {"fp16": True}, "where the recipe has fp16: true"),
    ],
)
def test_shapes_of_cluster(launch, training, words):
    faults = launch_faults(launch, training)
    assert len(faults) == 1 and words in faults[0]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MIXED_PRECISION": "bf16"}, "mixed_precision: bf16 is started where the recipe has bf16: false"),
        (
            {"MIXED_PRECISION": "no", "USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3",
             "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"},
            "the saved model would have no weights",
        ),
        ({"MIXED_PRECISION": "no", "USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "FILE"}, "would have no weights"),
        ({"MIXED_PRECISION": "no", "USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "2"}, None),
        ({"MIXED_PRECISION": "no"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_run_is_held_against_its_launcher(environment, words, monkeypatch, tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value.replace("FILE", str(tmp_path / "zero.json")))
    training = {"bf16": False, "use_cpu": True}
    if words is None:
        check_launched(training)
        return
    with pytest.raises(RecipeError, match=words):
        check_launched(training)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_processes: 2", "no launch config"),
        ("distributed_type: FSDP\nnum_processes: 2", "not one that the recipes are made for"),
        ("distributed_type: MULTI_GPU\nnum_processes: 0", "num_processes is 0"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stge: 3}", "did you mean zero_stage"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nnum_procs: 2", "accelerate refuses it"),
        ("- a\n- b: [", "cannot be read"),
    ],
)
def test_a_launch_config_that_is_none(text, words, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        read_launch(str(path))


def test_deepspeeds_own_file(tmp_path):
    """Stage and offloading are read where accelerate would read them."""
    settings = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    path = tmp_path / "launch.yaml"
    inside = {"deepspeed_config_file": str(tmp_path / "ds.json")}
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": inside}))
    launch = read_launch(str(path), processes=16)
    assert (launch.zero_stage, launch.offload_optimizer, launch.offload_param) == (3, True, False)
    assert (launch.world_size, launch.saves_weights) == (16, False)


def test_zero3_on_two_processes(recipe, checked):
    code, text = checked(recipe, launch=ZERO3_CPU)
    assert code == 0, text
    assert "2 per device x 1 accumulation x 2 processes = 4 pairs" in text
    assert "2 CPU processes, ZeRO-3" in text
    assert "gathered weights" in text
    assert os.environ["HF_HUB_OFFLINE"] == "1"
