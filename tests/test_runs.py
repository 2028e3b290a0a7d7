"""The environment, the network, the output folder and the model's folder: refused at once, with the way out."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import runs
from conftest import build_tokenizer
from errors import RecipeError

RECIPES = Path(__file__).parents[1] / "recipes"


def in_fresh_process(code: str, **environment: str | None) -> str:
    """stdout of `code` in a Python that has imported nothing, with recipes/ as its script folder."""
    env = {key: value for key, value in os.environ.items() if key not in environment}
    env |= {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], cwd=RECIPES, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------- environment


def test_nothing_heavy_is_imported_before_the_environment_is_set():
    code = "import runs, sys; print({'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules))"
    assert in_fresh_process(code) == "set()"


def test_threads_are_this_processes_share(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    runs.prepare_environment()
    assert "OMP_NUM_THREADS" not in os.environ, "alone, torch may take all cores"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    runs.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runs.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3", "the user's own stays"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    runs.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("loaded_before", [True, False])
def test_local_paths_take_the_libraries_offline(loaded_before, tmp_path):
    """Whether they were imported before the switch or after it."""
    load = "import datasets, huggingface_hub, transformers\n"
    hub = "huggingface_hub.is_offline_mode(), transformers.utils.hub.is_offline_mode()"
    look = f"print({hub}, datasets.config.HF_HUB_OFFLINE)"
    switch = f"import runs; print(runs.go_offline_if_local([{str(tmp_path)!r}, None]))\n"
    code = load + switch + look if loaded_before else switch + load + look
    assert in_fresh_process(code, HF_HUB_OFFLINE=None) == "True\nTrue True True"


def test_a_name_of_the_hub_stays_online(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert not runs.go_offline_if_local([str(tmp_path), "mistralai/Mistral-7B-v0.1"])
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert runs.go_offline_if_local(["mistralai/Mistral-7B-v0.1"])


def test_versions_name_what_counts():
    assert {"python", "torch", "transformers", "trl", "accelerate", "datasets"} <= runs.versions().keys()


# ------------------------------------------------------------------------------------------------------- wandb


@pytest.fixture
def no_wandb(monkeypatch, tmp_path):
    """An environment without login, proxies or offline switch; wandb's server is a port that this test chooses."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # What prepare_wandb sets is taken back after the test.
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_without_login_wandb_is_offline(no_wandb):
    assert "no login" in runs.prepare_wandb(no_wandb / "run")
    assert os.environ["WANDB_MODE"] == "offline"


def test_with_login_and_no_network_wandb_is_offline(no_wandb, monkeypatch):
    with socket.socket() as free:  # a port that refuses
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert runs.prepare_wandb(no_wandb) == "127.0.0.1 cannot be reached"
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize("login", ["key", "netrc"])
def test_with_login_and_network_wandb_is_online(login, no_wandb, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        if login == "key":
            monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        else:
            (no_wandb / "netrc").write_text(f"machine 127.0.0.1 login user password {'0' * 40}\n")
        assert runs.prepare_wandb(no_wandb) is None
    assert os.environ["WANDB_MODE"] == "online"


def test_what_the_user_says_of_wandb_stands(no_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert runs.prepare_wandb(no_wandb) is None
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_RUN_ID"]) == ("disabled", "mine")


def test_wandb_is_offline_with_the_hub(no_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in runs.prepare_wandb(no_wandb)


def test_one_wandb_run_per_output_folder(no_wandb, monkeypatch):
    ids = []
    for folder in ("a", "a", "b"):
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
        runs.prepare_wandb(no_wandb / folder)
        ids.append(os.environ["WANDB_RUN_ID"])
    assert ids[0] == ids[1] != ids[2]
    assert os.environ["WANDB_RESUME"] == "allow"


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_wandb_run(no_wandb):
    """Two processes after each other, offline, as a killed run and its resumption."""
    audit = no_wandb / "selection.json"
    audit.write_text('{"kept": 12}')
    code = f"""
import runs, wandb
reason = runs.start_wandb({str(no_wandb / "run")!r}, {{"beta": 0.1}}, {str(audit)!r}, run_name="tiny")
print(wandb.run.id, wandb.run.name, wandb.run.settings.mode, dict(wandb.run.config), reason)
wandb.run.log({{"loss": 1.0}})
wandb.finish()
"""
    quiet = {"WANDB_SILENT": "true", "WANDB_API_KEY": None}
    first, second = (in_fresh_process(code, **quiet).splitlines()[-1] for _ in range(2))
    assert first == second
    name = (no_wandb / "run" / "wandb_id.txt").read_text()
    assert first.startswith(f"{name} tiny offline {{'recipe': {{'beta': 0.1}}, 'selection': {{'kept': 12}}}} ")
    assert len(list((no_wandb / "run" / "wandb").glob(f"offline-run-*-{name}"))) == 2


# ----------------------------------------------------------------------------------------------- output folder

RECIPE = {"beta": 0.1, "output_dir": "runs/a", "margin": {"preset": "bfpo", "a": 1.5}, "save_steps": 100}


def run_in(folder: Path, recipe: dict = RECIPE, checkpoint: bool = True) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if checkpoint:
        (folder / "checkpoint-100").mkdir()
    return folder


def test_a_new_folder_is_free_and_stays_unmade(tmp_path):
    runs.claim_output_dir(tmp_path / "runs" / "a", RECIPE, resume=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_free(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    runs.claim_output_dir(tmp_path, RECIPE, resume=False)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "checkpoint-5/trainer_state.json", "model.safetensors", "metrics.jsonl"]
)
def test_another_run_is_not_overwritten(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(
        RecipeError, match=f"holds another run \\({name.split('/')[0]}\\); .*resume_from_checkpoint: auto"
    ):
        runs.claim_output_dir(tmp_path, RECIPE, resume=False)


def test_the_same_recipe_goes_on(tmp_path):
    """Where it runs and how often it saves may change; null and a missing key are the same."""
    folder = run_in(tmp_path / "a")
    moved = RECIPE | {"output_dir": str(folder), "resume_from_checkpoint": "auto", "save_steps": 50, "trust": None}
    runs.claim_output_dir(folder, moved, resume=True)
    runs.claim_output_dir(tmp_path / "empty", moved, resume=True)


def test_another_recipe_does_not_go_on(tmp_path):
    folder = run_in(tmp_path / "a")
    other = RECIPE | {"beta": 0.2, "margin": {"preset": "bfpo", "a": 1.0}, "learning_rate": 1e-6}
    with pytest.raises(RecipeError) as refused:
        runs.claim_output_dir(folder, other, resume=True)
    assert "(beta: 0.1 there, 0.2 here; learning_rate: None there, 1e-06 here; margin.a: 1.5 there, 1.0 here)" in str(
        refused.value
    )


def test_checkpoints_of_nobody_are_not_gone_on_with(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    with pytest.raises(RecipeError, match="holds checkpoint-100 but no recipe.yaml"):
        runs.claim_output_dir(tmp_path, RECIPE, resume=True)


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/none/run"])
def test_a_folder_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecipeError, match="cannot be written .*choose another output_dir"):
        runs.claim_output_dir(tmp_path / place, RECIPE, resume=False)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_is_too_small(tmp_path):
    runs.check_disk(tmp_path / "not" / "yet", 1, "3 checkpoints")
    with pytest.raises(RecipeError, match="3 checkpoints need 1000000.0 GB and .* GB are free"):
        runs.check_disk(tmp_path / "not" / "yet", 10**15, "3 checkpoints")


# ------------------------------------------------------------------------------------------ model and tokenizer


def test_a_saved_model_passes(model_folder):
    runs.check_model_path(model_folder)


@pytest.mark.parametrize("path", ["./runs/sft", "/no/such/model", "runs/quickstart/sft", "~/model"])
def test_a_missing_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no earlier run has left a model
    with pytest.raises(RecipeError, match=f"model {path}: no such folder"):
        runs.check_model_path(path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(RecipeError, match="the folder has no config.json"):
        runs.check_model_path(str(tmp_path))


def test_offline_a_hub_name_is_looked_up_in_the_cache_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match="neither a folder here nor in the Hub's cache, and the run is offline"):
        runs.check_model_path("nobody/no-such-model")


def test_online_without_a_network_nothing_is_tried_again(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(RecipeError, match="nor in the Hub's cache, and 127.0.0.1 cannot be reached"):
            runs.check_model_path("nobody/no-such-model")


def test_tokenizers():
    tokenizer = build_tokenizer()
    runs.check_tokenizer(tokenizer, "tiny")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(RecipeError, match="tokenizer of tiny has no chat template"):
        runs.check_tokenizer(tokenizer, "tiny")
    tokenizer.chat_template, tokenizer.pad_token = template, None
    with pytest.raises(RecipeError, match="tokenizer of tiny has no pad token"):
        runs.check_tokenizer(tokenizer, "tiny")
