"""wandb with and without login and network, and a run that goes on there."""

import os
import socket

import pytest

from core.runtime import environment
from core.training import tracking
from test_environment import in_fresh_process


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
    assert "no login" in tracking.prepare_wandb(no_wandb / "run")
    assert os.environ["WANDB_MODE"] == "offline"


def test_with_login_and_no_network_wandb_is_offline(no_wandb, monkeypatch):
    with socket.socket() as free:  # a port that refuses
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert tracking.prepare_wandb(no_wandb) == "127.0.0.1 cannot be reached"
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize("login", ["key", "netrc"])
def test_with_login_and_network_wandb_is_online(login, no_wandb, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        if login == "key":
            monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        else:
            (no_wandb / "netrc").write_text(f"machine 127.0.0.1 login user password {'0' * 40}\n")
        assert tracking.prepare_wandb(no_wandb) is None
    assert os.environ["WANDB_MODE"] == "online"


def test_what_the_user_says_of_wandb_stands(no_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert tracking.prepare_wandb(no_wandb) is None
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_RUN_ID"]) == ("disabled", "mine")


@pytest.mark.parametrize("value", ["1", "true"])
def test_wandb_is_offline_where_the_user_wants_no_network(value, no_wandb, monkeypatch):
    """Also with a model and data that are on this disk; nothing is asked whether it answers."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(tracking, "reachable", lambda *_: pytest.fail("a call into the network"))
    environment.go_offline_if_local([str(no_wandb)])
    assert "HF_HUB_OFFLINE" in tracking.prepare_wandb(no_wandb)


def test_a_local_model_and_local_data_leave_wandb_online(no_wandb, monkeypatch):
    """They keep the libraries from asking the Hub, which says nothing of wandb's server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(environment, "switched_off", False)  # taken back after the test
    assert environment.go_offline_if_local([str(no_wandb)])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert tracking.prepare_wandb(no_wandb) is None


def test_one_wandb_run_per_output_folder(no_wandb, monkeypatch):
    ids = []
    for folder in ("a", "a", "b"):
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
        tracking.prepare_wandb(no_wandb / folder)
        ids.append(os.environ["WANDB_RUN_ID"])
    assert ids[0] == ids[1] != ids[2]
    assert os.environ["WANDB_RESUME"] == "allow"


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_wandb_run(no_wandb):
    """Two processes after each other, offline, as a killed run and its resumption."""
    audit = no_wandb / "selection.json"
    audit.write_text('{"kept": 12}')
    code = f"""
import wandb
from core.training import tracking
reason = tracking.start_wandb({str(no_wandb / "run")!r}, {{"beta": 0.1}}, {str(audit)!r}, run_name="tiny")
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
