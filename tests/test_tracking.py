"""wandb with and without login and network, and a run that goes on there."""

import os
import socket
from types import SimpleNamespace

import pytest
import wandb

from core.runtime import network
from core.runtime.errors import RecipeError
from core.training import tracking
from test_environment import in_fresh_process, web_server


@pytest.fixture
def started(monkeypatch, tmp_path):
    """
    `start(folder)` gives what wandb is started with and why it is offline. The environment has no login, proxy or
    offline switch; wandb's server is one that the test chooses.
    """
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: seen.update(settings) or SimpleNamespace(config={}))

    def start(folder="run"):
        wandb.teardown()  # what an earlier test has logged in with
        reason = tracking.start_wandb(tmp_path / folder, {"beta": 0.1}, None)
        return SimpleNamespace(reason=reason, **seen)

    yield start
    wandb.teardown()


def test_without_login_wandb_is_offline(started):
    run = started()
    assert "no login" in run.reason and run.mode == "offline"


def test_with_login_and_no_network_wandb_is_offline(started, monkeypatch):
    with socket.socket() as free:  # a port that refuses
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        run = started()
    assert run.reason.endswith(" cannot be reached") and run.mode == "offline"


@pytest.mark.parametrize("login", ["key", "netrc"])
def test_with_login_and_network_wandb_is_online(login, started, tmp_path, monkeypatch):
    """Also where a local model and local data keep the libraries from asking the Hub."""
    monkeypatch.setattr(network, "switched_off", False)  # taken back after the test
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    assert network.go_offline_if_local([str(tmp_path)]) and os.environ["HF_HUB_OFFLINE"] == "1"
    with web_server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        if login == "key":
            monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        else:
            host = address.removeprefix("http://")
            (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
        run = started()
    assert run.reason is None and run.mode == "online"


def test_what_the_user_says_of_wandb_stands(started, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    run = started()
    assert (run.reason, run.mode, run.id) == (None, "disabled", "mine")


@pytest.mark.parametrize("value", ["1", "true"])
def test_wandb_is_offline_where_the_user_wants_no_network(value, started, tmp_path, monkeypatch):
    """Also with a model and data that are on this disk; nothing is asked whether it answers."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(network, "switched_off", False)
    monkeypatch.setattr(tracking, "answers", lambda *_: pytest.fail("a call into the network"))
    network.go_offline_if_local([str(tmp_path)])
    assert "HF_HUB_OFFLINE" in started().reason


def test_a_key_that_is_none_is_told(started, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(RecipeError, match="wandb does not start: .*mend the login, or set WANDB_MODE=offline"):
        started()


def test_one_wandb_run_per_output_folder(started):
    first, again, other = (started(folder) for folder in ("a", "a", "b"))
    assert first.id == again.id != other.id
    assert first.resume == "allow" and first.dir.endswith("/a")


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_wandb_run(tmp_path):
    """Two processes after each other, offline, as a killed run and its resumption."""
    audit = tmp_path / "selection.json"
    audit.write_text('{"kept": 12}')
    code = f"""
from core.training import tracking
reason = tracking.start_wandb({str(tmp_path / "run")!r}, {{"beta": 0.1}}, {str(audit)!r}, run_name="tiny")
import wandb
print(wandb.run.id, wandb.run.name, wandb.run.settings.mode, dict(wandb.run.config), reason)
wandb.run.log({{"loss": 1.0}})
wandb.finish()
"""
    quiet = {"WANDB_SILENT": "true", "WANDB_API_KEY": None, "NETRC": str(tmp_path / "netrc")}
    first, second = (in_fresh_process(code, **quiet).splitlines()[-1] for _ in range(2))
    assert first == second
    name = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert first.startswith(f"{name} tiny offline {{'recipe': {{'beta': 0.1}}, 'selection': {{'kept': 12}}}} ")
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}"))) == 2
