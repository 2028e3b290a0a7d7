"""The environment, the network and the model's folder: refused at once, with the way out."""

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core.runtime import environment, network
from core.runtime.errors import INTERRUPTED, SAVED_ON_SIGNAL, RecipeError
from core.runtime.files import replaced

RECIPES = Path(__file__).parents[1] / "recipes"
PREPARE = "from core.runtime.environment import prepare_environment; prepare_environment()"


def in_fresh_process(code: str, **environment: str | None) -> str:
    """stdout of `code` in a Python that has imported nothing, with recipes/ as its script folder."""
    env = {key: value for key, value in os.environ.items() if key not in environment}
    env |= {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], cwd=RECIPES, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------- environment


def test_nothing_heavy_is_imported_before_the_environment_is_set():
    heavy = {"torch", "transformers", "datasets", "huggingface_hub"}
    code = f"from core.runtime import environment, network; import sys; print({heavy} & set(sys.modules))"
    assert in_fresh_process(code) == "set()"


@pytest.mark.parametrize(
    ("own", "processes", "threads"),
    [(None, None, None), (None, "4", "4"), ("3", "4", "3"), (None, "64", "1")],  # alone, torch may take all cores
)
def test_threads_are_this_processes_share_of_16_cores(own, processes, threads):
    code = (
        f"import os; os.sched_getaffinity = lambda _: set(range(16)); {PREPARE}; print(os.getenv('OMP_NUM_THREADS'))"
    )
    assert in_fresh_process(code, OMP_NUM_THREADS=own, LOCAL_WORLD_SIZE=processes) == str(threads)


@pytest.mark.parametrize(
    ("own", "spin"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(own, spin):
    unset = dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    code = f"{PREPARE}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert in_fresh_process(code, **(unset | own)) == spin


def signalled(number: int, code: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a process that gets a signal after it has printed a first line."""
    env = os.environ | environment
    command = [sys.executable, "-c", f"import os, time\n{code}\nprint('ready', flush=True)\ntime.sleep(30)"]
    process = subprocess.Popen(command, cwd=RECIPES, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


@pytest.mark.parametrize("number", environment.STOP_SIGNALS)
def test_a_signal_during_the_imports_ends_a_launched_process_as_if_saved(number, tmp_path):
    place = tmp_path / "code"
    code, output = signalled(number, PREPARE, LAUNCH_EXIT_CODE=str(place))
    assert code == SAVED_ON_SIGNAL and place.read_text() == str(SAVED_ON_SIGNAL)
    assert output == f"stopped by {number.name} before the first update; start again as before\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_of_a_pool_does_not_speak_for_the_run(number, tmp_path):
    fork = "if worker := os.fork(): os._exit(128 - os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))"
    kill = f"os.kill(os.getpid(), 2); os.kill(os.getpid(), {int(number)})"  # Ctrl-C it leaves to its parent
    done = subprocess.run(
        [sys.executable, "-c", f"import os\n{PREPARE}\n{fork}\n{kill}"],
        cwd=RECIPES,
        env=os.environ | {"LAUNCH_EXIT_CODE": str(tmp_path / "pool")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, (tmp_path / "pool").read_text()) == (128 + number, "", "")


def test_a_process_that_is_not_launched_or_not_the_main_thread_keeps_the_systems_answer(tmp_path):
    assert signalled(signal.SIGTERM, PREPARE) == (-15, "")
    thread = "from core.runtime.environment import prepare_environment\nimport threading\n"
    thread += "work = threading.Thread(target=prepare_environment); work.start(); work.join()"
    assert signalled(signal.SIGTERM, thread, LAUNCH_EXIT_CODE=str(tmp_path / "code")) == (-15, "")


def test_ctrl_c_where_there_is_nothing_to_save_is_a_line():
    wrap = "from core.runtime.errors import exits_cleanly"
    code = f"{wrap}\n@exits_cleanly\ndef main():\n    print('ready', flush=True); time.sleep(30)\nmain()"
    assert signalled(signal.SIGINT, code) == (INTERRUPTED, "")


@pytest.mark.parametrize("loaded_before", [True, False])
@pytest.mark.parametrize(("path", "offline"), [(str(RECIPES), True), ("mistralai/Mistral-7B-v0.1", False)])
def test_local_paths_alone_take_the_libraries_offline(path, offline, loaded_before):
    """Whether they were imported before the switch or after it."""
    load = "import datasets, huggingface_hub, transformers\n"
    hub = "huggingface_hub.is_offline_mode(), transformers.utils.hub.is_offline_mode()"
    look = f"print({hub}, datasets.config.HF_HUB_OFFLINE)"
    places = [str(RECIPES), path, None]
    switch = f"from core.runtime import network; print(network.go_offline_if_local({places}))\n"
    code = load + switch + look if loaded_before else switch + load + look
    assert in_fresh_process(code, HF_HUB_OFFLINE=None) == f"{offline}\n{offline} {offline} {offline}"


def test_who_is_offline_stays_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert network.go_offline_if_local(["mistralai/Mistral-7B-v0.1"])


def test_versions_name_what_counts():
    assert {"python", "torch", "transformers", "trl", "accelerate", "datasets"} <= environment.versions().keys()


# ------------------------------------------------------------------------------------------ model and tokenizer


def test_a_saved_model_passes(model_folder):
    network.check_model_path(model_folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./runs/sft", "no such folder"),
        ("/no/such/model", "no such folder"),
        ("runs/quickstart/sft", "no such folder"),
        ("~/model", "no such folder"),
        ("EMPTY", "the folder has no config.json"),
        ("nobody/no-such-model", "neither a folder here nor in the Hub's cache, and the run is offline"),
    ],
)
def test_what_is_no_model(path, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # where no earlier run has left a model
    path = path.replace("EMPTY", str(tmp_path))
    with pytest.raises(RecipeError, match=f"model {path}: .*{message}"):
        network.check_model_path(path)


def set_proxies(monkeypatch, proxies):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)


def test_online_without_a_network_nothing_is_tried_again(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    set_proxies(monkeypatch, {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(RecipeError, match="nor in the Hub's cache, and 127.0.0.1 cannot be reached"):
            network.check_model_path("nobody/no-such-model")


REFUSES = "http://127.0.0.1:1"


@contextlib.contextmanager
def web_server():
    """A server that refuses every request, but answers: its address."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("proxies", "reached"),
    [({}, True), ({"http_proxy": REFUSES}, False), ({"http_proxy": REFUSES, "no_proxy": "*"}, True)],
)
def test_a_server_is_asked_through_the_proxy_that_is_set(proxies, reached, monkeypatch):
    set_proxies(monkeypatch, proxies)
    with web_server() as address:
        assert network.answers(address) is reached


@pytest.mark.parametrize("address", [REFUSES, "no address", "http://[", "silent"])
def test_a_server_that_does_not_answer(address, monkeypatch):
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}" if address == "silent" else address
        assert not network.answers(address)


# ------------------------------------------------------------------------------------------ files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert [other.name for other in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"
    with replaced(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert [other.name for other in tmp_path.iterdir()] == ["file"] and path.read_text() == "new"


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    """Neither where the file's own name is one, nor where somebody has guessed the name beside it."""
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "file"
    path.symlink_to(tmp_path / "precious")
    with replaced(path) as file:
        file.write(b"new")
    assert not path.is_symlink() and (tmp_path / "precious").read_text() == "mine"
    monkeypatch.setattr("core.runtime.files.secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".file.guessed.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError), replaced(path) as file:
        file.write(b"newer")
    assert (tmp_path / "precious").read_text() == "mine" and path.read_text() == "new"


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        ("1 / 0", "error: ZeroDivisionError: division by zero; nobody foresaw this: please report it with ", 1),
        ("open('/none/of/this')", "error: /none/of/this cannot be read or written on ", 2),
        ("raise RecipeError('mend it')", "error: mend it", 2),
    ],
)
def test_every_end_is_a_line(text, line, code, tmp_path):
    """What nobody foresaw leaves its traceback in a file that the line names."""
    script = f"from core.runtime.errors import *\n@exits_cleanly\ndef main():\n    {text}\nmain()"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=RECIPES, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    logs = list(tmp_path.glob("traceback-*"))
    assert [str(path) in done.stderr and "Traceback" in path.read_text() for path in logs] == [True] * (code == 1)


@pytest.mark.parametrize(
    ("world", "visible", "left"),
    [(None, "2,3", "2"), ("1", "0,1", "0"), ("2", "0,1", "0,1"), (None, "", ""), (None, "GPU-a,GPU-b", "GPU-a")],
)
def test_one_process_takes_one_gpu(world, visible, left, monkeypatch, capsys):
    """Of several transformers would make an nn.DataParallel; ranks of a launch see all, and take their own."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment.take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    assert ("one process uses one GPU" in capsys.readouterr().out) is (left != visible)
