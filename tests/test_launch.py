"""The launch configurations are what the pinned accelerate accepts; the launchers derive the settings of each node."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed import DistStoreError

from core.runtime import accelerate_launch, launching
from core.runtime.errors import PEER_LOST, RecipeError
from core.runtime.stage import DPO_KEYS, EVALUATE_KEYS, SFT_KEYS, stage_of
from core.training.checkpoints import newest_complete
from processes import CONFIGS as FOLDER
from processes import (
    LAUNCH,
    NAMESPACES,
    ROOT,
    Node,
    await_checkpoint,
    free_port,
    nodes_of_two,
    run_script,
    user_environment,
)
from tiny_run import outcome

CONFIGS = sorted(FOLDER.glob("*.yaml"))


def launch_arguments(config: Path):
    """What `accelerate launch --config_file config recipes/dpo.py` resolves to."""
    parser = launch_command_parser()
    return _validate_launch_command(parser.parse_args(["--config_file", str(config), "recipes/dpo.py"]))[0]


def test_every_configuration_is_there():
    names = {config.stem for config in CONFIGS}
    assert names == {"cpu", "gpu", "ddp", "zero2", "zero3", "zero3-offload", "zero3-nodes", "zero3-cpu"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_accelerate_accepts_every_key_and_arrives_at_what_the_file_says(config):
    """
    accelerate refuses unknown keys at the top level; inside `deepspeed_config` it takes anything, so these are held
    against the launcher's own arguments.
    """
    assert (
        set(load_config_from_file(str(config)).deepspeed_config)
        <= vars(launch_command_parser().parse_args(["x"])).keys()
    )
    text = config.read_text()
    said, arguments = yaml.safe_load(text), launch_arguments(config)
    assert text.startswith("# ")
    assert arguments.num_processes == said["num_processes"]
    assert arguments.num_machines == said["num_machines"]
    assert bool(arguments.use_deepspeed) == (said["distributed_type"] == "DEEPSPEED")
    assert bool(arguments.multi_gpu) == (said["distributed_type"] == "MULTI_GPU")
    for key, value in said.get("deepspeed_config", {}).items():
        assert str(getattr(arguments, key)).lower() == str(value).lower(), key


@pytest.mark.parametrize(("config", "asked"), [("zero3-cpu", True), ("cpu", False), ("gone", None)])
def test_whether_the_launch_config_is_one_of_deepspeed(config, asked, monkeypatch):
    path = FOLDER / f"{config}.yaml"
    launcher = ["python", "-m", "accelerate.commands.launch", "--cpu", "--config_file", str(path), "recipes/dpo.py"]
    monkeypatch.setattr(launching.psutil.Process, "parent", lambda process: process)
    monkeypatch.setattr(launching.psutil.Process, "cmdline", lambda process: launcher)
    assert launching.deepspeed_is_asked_for() is asked
    if asked:
        with pytest.raises(RecipeError, match="is one of DeepSpeed, but the launcher did not start it"):
            launching.check_launched({})
    else:
        launching.check_launched({})


def test_the_world_is_the_one_of_the_recipe(monkeypatch):
    """`accelerate launch --cpu` with a DeepSpeed configuration starts a single process."""
    for started, wanted in (1, 2), (2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(started))
        launching.check_launched({}, num_processes=started)
        with pytest.raises(RecipeError, match=f"is for num_processes: {wanted}, but {started} started") as refused:
            launching.check_launched({}, num_processes=wanted)
        assert refused.value.everywhere


# ------------------------------------------------------------------------------------------------- the Makefile


@pytest.mark.parametrize(
    ("name", "text", "stage"),
    [
        ("sft-then-dpo.yaml", "margin: {preset: bfpo}\n", "dpo"),
        ("mine.yaml", "seed: 1\nconversations_per_update: 64\n", "sft"),
        ("sft.yaml", "beta: 0.1\nlearning_rate: 1.0e-6\n", "dpo"),
        ("sft-mine.yaml", "learning_rate: 1.0e-6\n", "sft"),
        ("sft-then-dpo.yaml", "learning_rate: 1.0e-6\n", "dpo"),
        ("mine.yaml", "# conversations_per_update: 64\nseed: 1\n", "dpo"),
        ("gone.yaml", None, "dpo"),
    ],
)
def test_a_recipe_says_which_script_it_is_for(name, text, stage, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert stage_of(tmp_path / name) == stage
    words = ["make", "--no-print-directory", "-n", "train", f"PYTHON={sys.executable}", f"RECIPE={tmp_path / name}"]
    assert f" recipes/{stage}.py --config {tmp_path / name}" in subprocess.check_output(words, cwd=ROOT, text=True)


def test_every_recipe_here_says_it_by_a_key():
    recipes = list((ROOT / "recipes").glob("*/*.yaml"))
    assert len(recipes) >= 10
    for path in recipes:
        assert set(SFT_KEYS + DPO_KEYS + EVALUATE_KEYS) & yaml.safe_load(path.read_text()).keys(), path
        assert stage_of(path) == {"sft": "sft", "evaluation": "evaluate"}.get(path.stem, "dpo")


def test_a_variable_in_small_letters_is_refused():
    """make would say nothing of it, and train the quickstart."""
    words = ["make", "--no-print-directory", "-n", "train", "recipe=my.yaml"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "in capitals: RECIPE=… instead of recipe=…" in done.stderr and not done.stdout


# ---------------------------------------------------------------------------------------------------- launch.sh

CPU, NODES = FOLDER / "zero3-cpu.yaml", FOLDER / "zero3-nodes.yaml"
TINY = "tests/tiny_run.py"
ONE, GPU = "accelerate_configs/cpu.yaml", "accelerate_configs/gpu.yaml"


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    """
    A folder for PATH with what a test machine lacks or must not start: a python that prints what it is given, a
    node of eight GPUs, Slurm's commands for two nodes.
    """
    commands = {
        "python": '[ "$1" = -c ] || echo "GPUs: ${CUDA_VISIBLE_DEVICES:-all} $@"',
        "nvidia-smi": 'for gpu in 0 1 2 3 4 5 6 7; do echo "GPU $gpu: NVIDIA"; done',
        "hostname": "echo gpu-b",
        "getent": "[[ $2 != *.invalid ]]",
        "timeout": "true",  # the first node answers
        "scontrol": '[ "$1" = show ] && { echo gpu-a; echo gpu-b; } || echo "scontrol $*"',
        "srun": 'while [[ $1 == --* ]]; do shift; done\necho "srun: ${SRUN_CPUS_PER_TASK:-no} cores"\n'
        'SLURM_NODEID=1 "$@"; exit "${SRUN_CODE:-0}"',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def start(
    stand_ins: Path, config: str | Path, *arguments: str, script: str = "launch.sh", **environment: str
) -> subprocess.CompletedProcess:
    set_outside = re.compile("(SLURM|SRUN)_.*|NODES|CUDA_VISIBLE_DEVICES")
    env = {name: value for name, value in os.environ.items() if not set_outside.fullmatch(name)}
    env |= {"PATH": f"{stand_ins}:{os.environ['PATH']}"} | environment
    words = ["bash", f"recipes/{script}", str(config), *(arguments or [TINY])]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def options_of(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The options that the stand-in for `python recipes/core/runtime/accelerate_launch.py` was given."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("accelerate_launch.py ")[1].split()
    return {words[place]: words[place + 1] for place in range(0, words.index(TINY), 2)}


SLURM = {"SLURM_JOB_NODELIST": "gpu-[a-b]"}
# What launch.sh is given → nodes, processes in all, this node's rank and the first node.
PLACES = [
    *((NODES, {"NODES": nodes}, (3, 24, 1, "gpu-a")) for nodes in ("gpu-a gpu-b gpu-c", "gpu-a,gpu-b,gpu-c", "HOSTS")),
    (NODES, {"NODES": "gpu-a\ngpu-b\ngpu-c\n"}, (3, 24, 1, "gpu-a")),
    ("accelerate_configs/zero3.yaml", {}, (1, 8, 0, None)),  # one node needs no list
    ("accelerate_configs/zero3.yaml", {"CUDA_VISIBLE_DEVICES": "2,5"}, (1, 2, 0, None)),
    # `distributed_type: NO`, quoted or not: accelerate starts a single process whatever --num_processes says.
    (GPU, {}, (1, 1, 0, None)),
    (GPU, {"CUDA_VISIBLE_DEVICES": "3,4", "PROCESSES_PER_NODE": "1"}, (1, 1, 0, None)),
    (ONE, {}, (1, 1, 0, None)),
    (CPU, {}, (1, 2, 0, None)),  # the processes of a CPU config are shared out
    (CPU, {"NODES": "gpu-a gpu-b"}, (2, 2, 1, "gpu-a")),
    (NODES, SLURM | {"SLURM_NODEID": "1"}, (2, 16, 1, "gpu-a")),
    (NODES, SLURM, (2, 16, 1, "gpu-a")),  # an salloc's shell has no SLURM_NODEID
    # A list that is given counts over Slurm's, of which SLURM_NODEID says that this is the first.
    (NODES, SLURM | {"SLURM_NODEID": "0", "NODES": "gpu-c gpu-a gpu-b"}, (3, 24, 2, "gpu-c")),
]


@pytest.mark.parametrize(("config", "environment", "place"), PLACES)
def test_a_node_derives_its_place(config, environment, place, stand_ins, tmp_path):
    """This is gpu-b, with eight GPUs as every node."""
    (tmp_path / "hosts").write_text("gpu-a slots=8\ngpu-b slots=8\ngpu-c slots=8\n")
    environment = {name: value.replace("HOSTS", str(tmp_path / "hosts")) for name, value in environment.items()}
    done = start(stand_ins, config, TINY, "--beta", "0.1", **environment)
    options = options_of(done)
    assert options["--config_file"] == str(config)
    nodes, processes, rank, first = place
    named = ("--num_machines", "--num_processes", "--machine_rank")
    assert [options[name] for name in named] == [str(nodes), str(processes), str(rank)]
    if first is not None:
        assert options["--main_process_ip"] == first and 20000 <= int(options["--main_process_port"]) < 30000


def test_a_config_of_one_process_takes_one_gpu_and_says_so(stand_ins):
    gpu = start(stand_ins, GPU).stdout
    assert gpu.startswith(f"note: {GPU} uses one of 8 GPUs; ddp.yaml and zero3.yaml use all\n")
    assert ": 1 processes, 1 in all" in gpu and "GPUs: 0 " in gpu
    third = start(stand_ins, GPU, CUDA_VISIBLE_DEVICES="3,4", PROCESSES_PER_NODE="1").stdout
    assert "GPUs: 3 " in third
    cpu = start(stand_ins, ONE).stdout
    assert "note:" not in cpu and "GPUs: all " in cpu


def test_every_node_derives_the_same_port_and_another_job_another(stand_ins):
    def port(**environment: str) -> str:
        return options_of(start(stand_ins, NODES, **environment))["--main_process_port"]

    first = port(NODES="gpu-a gpu-b", NODE_RANK="0")
    assert first == port(NODES="gpu-a,gpu-b", NODE_RANK="1")
    assert first != port(NODES="gpu-b gpu-c")
    assert port(NODES="gpu-a gpu-b", PORT="1234") == "1234"


def test_the_first_node_is_waited_for_as_long_as_is_said(stand_ins):
    (stand_ins / "timeout").unlink()
    port = free_port()
    late = {"NODES": "127.0.0.1 gpu-b", "PORT": str(port), "START_SECONDS": "2"}
    done = start(stand_ins, NODES, **late)
    assert done.returncode == 2
    assert f"did not meet at 127.0.0.1:{port} in 2 s; start the same command on each" in done.stderr
    servers: list[socket.socket] = []
    begins = threading.Timer(1, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    begins.start()
    assert options_of(start(stand_ins, NODES, **late | {"START_SECONDS": "20"}))
    begins.join()
    servers[0].close()


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (NODES, {"NODES": "gpu-x gpu-y"}, "none of NODES (gpu-x gpu-y) is a name or address"),
        (NODES, {"NODES": "gpu-b gpu-b"}, "NODES holds this node twice"),
        (NODES, {"NODES": "a b", "NODE_RANK": "2"}, "NODE_RANK 2, but NODES are 2"),
        ("no.yaml", {}, "no.yaml: no such launch config"),
        ("accelerate_configs/zero3.yaml", {"NODES": "a gpu-b"}, "take zero3-nodes.yaml"),
        (NODES, {"PROCESSES_PER_NODE": "0"}, "no GPU on gpu-b"),
        (NODES, {"NODES": "no.invalid gpu-b"}, "no.invalid, is no name that gpu-b knows"),
        (GPU, {"PROCESSES_PER_NODE": "4"}, "PROCESSES_PER_NODE is 4, but"),
        (GPU, {"NODES": "gpu-a gpu-b"}, "is for one process; take zero3-nodes.yaml"),
        (ONE, {"NODES": "gpu-a gpu-b"}, "but accelerate_configs/cpu.yaml is for one"),
        (ONE, {"NODES": "a gpu-b", "PROCESSES_PER_NODE": "1"}, "NODES are 2 (a gpu-b), but"),
        (CPU, {"NODES": "gpu-a gpu-b gpu-c"}, "2 processes cannot be shared out to 3 nodes"),
    ],
)
def test_what_cannot_start_is_told(config, environment, message, stand_ins):
    assert message in told(start(stand_ins, config, **environment))


def test_what_is_not_there_is_told(stand_ins):
    assert "recipes/no.py: no such script" in told(start(stand_ins, NODES, "recipes/no.py"))
    (stand_ins / "scontrol").unlink()  # a container often has none
    assert told(start(stand_ins, NODES, **SLURM)) == (
        "error: no scontrol on gpu-b that could read the Slurm job's list of nodes, gpu-[a-b]; set NODES\n"
    )


def told(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("command", "script", "code"),
    [
        ("nvidia-smi", "touch ready; sleep 1; echo GPU 0", 75),  # launch.sh itself, which has started nothing
        ("python", '[ "$1" = -c ] || { touch ready; exec sleep 30; }', 75),  # the launcher, which has no process
        ("python", '[ "$1" = -c ] || { touch ready; sleep 30; exit 1; }', 75),  # a process that has no handler yet
        ("python", '[ "$1" = -c ] || { touch $LAUNCH_EXIT_CODE ready; sleep 30; exit 1; }', 1),  # one that crashes
        ("python", '[ "$1" = -c ] || { touch ready; sleep 30; exit 0; }', 0),
    ],
)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_before_there_is_a_run(name, command, script, code, stand_ins, tmp_path):
    (stand_ins / command).write_text(f"#!/bin/bash\n{script.replace('ready', str(tmp_path / 'ready'))}\n")
    env = os.environ | {"PATH": f"{stand_ins}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    words = ["bash", LAUNCH, "accelerate_configs/zero3.yaml", TINY]
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # until launch.sh waits
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert (f"stopped by {name} before the start; start again as before\n" in output) == (code == 75)


@pytest.mark.parametrize(("code", "requeued", "cores"), [("0", False, "64"), ("1", False, None), ("75", True, None)])
def test_slurm_gives_a_task_its_cores_and_puts_a_saved_job_back_into_the_queue(code, requeued, cores, stand_ins):
    slurm = SLURM | {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), "SRUN_CODE": code}
    slurm |= {"SLURM_CPUS_PER_TASK": cores} if cores else {}
    done = start(stand_ins, NODES, script="launch.slurm", **slurm)
    assert done.returncode == int(code) and f"srun: {cores or 'no'} cores\n" in done.stdout
    assert ("scontrol requeue 77" in done.stdout) == requeued
    assert f"{TINY} --resume_from_checkpoint auto" in done.stdout


def test_the_log_of_a_slurm_job_is_in_a_folder_that_a_clone_has():
    options = re.findall(r"^#SBATCH --(\w+)=(\S+)", (ROOT / "recipes" / "launch.slurm").read_text(), re.MULTILINE)
    assert (ROOT / dict(options)["output"]).parent == ROOT


# --------------------------------------------------------------------------------------------- real runs through it


@pytest.fixture
def two_nodes():
    with nodes_of_two() as places:
        yield places


@pytest.fixture
def nodes():
    """Start nodes; whatever the test leaves running is killed."""
    started: list[Node] = []

    def begin(prefix: list[str], environment: dict[str, str], config: Path, **options) -> Node:
        arguments = [TINY, json.dumps(options)]
        started.append(Node(prefix, environment | {"HF_HUB_OFFLINE": "1"}, config, arguments))
        return started[-1]

    yield begin
    for node in started:
        node.kill()


@pytest.mark.slow
def test_two_nodes_train_like_one(two_nodes, nodes, tmp_path):
    """ZeRO-3 on one node with two processes, and on two nodes with one: the same losses and weights, bit for bit."""
    alone = nodes([], {"PORT": "0"}, CPU, output_dir=str(tmp_path / "one"), accumulation=1)
    code, output = alone.wait(120)
    assert code == 0, output
    both = [nodes(*node, CPU, output_dir=str(tmp_path / "two"), accumulation=1) for node in two_nodes]
    for node in both:
        code, output = node.wait(120)
        assert code == 0, output
    _, expected, weights = outcome(tmp_path / "one")
    _, losses, found = outcome(tmp_path / "two")
    assert losses == expected
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["kill", "freeze", "cut"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_node_ends_the_other_within_a_minute(fate, victim, two_nodes, nodes, tmp_path):
    if fate == "cut" and not NAMESPACES:
        pytest.skip("a link can only be cut between namespaces")
    slow = {"output_dir": str(tmp_path / "run"), "accumulation": 1, "steps": 500, "seconds_per_step": 0.2}
    both = [nodes(*node, CPU, **slow) for node in two_nodes]
    await_checkpoint(tmp_path / "run")
    if fate == "cut":
        name = two_nodes[victim][0][-1]
        subprocess.run(["ip", "-n", name, "link", "set", name, "down"], check=True)
    for child in both[victim].children() if fate != "cut" else []:
        child.send_signal(signal.SIGKILL if fate == "kill" else signal.SIGSTOP)
    begun = time.monotonic()
    code, output = both[1 - victim].wait(60)
    assert code == PEER_LOST, output
    if fate != "kill":
        told = rf"stops: rank {victim} on \S+ was not heard of for 10 s: ended, frozen, or cut off"
        assert re.search(told, output), output
    if fate == "cut":
        code, output = both[victim].wait(60)
        assert code not in (0, 75), output
    print(f"{fate} of node {victim}: the other ended after {time.monotonic() - begun:.1f} s with code {code}")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["two nodes", "loopback"])
def test_a_node_that_waits_in_vain(where, two_nodes, nodes, tmp_path):
    loopback = {"NODES": "127.0.0.1 127.0.0.1", "NODE_RANK": "1", "PORT": str(free_port())}
    prefix, environment = two_nodes[1] if where == "two nodes" else ([], loopback)
    begun = time.monotonic()
    node = nodes(prefix, environment | {"START_SECONDS": "10"}, CPU, output_dir=str(tmp_path))
    code, output = node.wait(60)
    assert code == 2 and re.search(r"error: the nodes .* did not meet at \S+ in 10 s; start the same", output), output
    assert time.monotonic() - begun < 18, "torch's launcher waits twice as long"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_launcher_saves_on_both_nodes(name, two_nodes, nodes, tmp_path):
    slow = {"output_dir": str(tmp_path), "accumulation": 1, "steps": 500, "seconds_per_step": 0.2}
    both = [nodes(*node, CPU, **slow) for node in two_nodes]
    await_checkpoint(tmp_path)
    both[1].process.send_signal(signal.Signals[name])
    for node in both:
        code, output = node.wait(60)
        assert code == 75, output
    assert newest_complete(tmp_path) is not None


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "accelerate", "all"])
def test_no_process_trains_on_without_its_launcher(whom, nodes, tmp_path):
    """
    SIGTERM to launch.sh saves and exits with 75. A kill −9 of it, or of accelerate below it, makes the training
    process save and end as well.
    """
    node = nodes([], {"PORT": "0"}, FOLDER / "cpu.yaml", output_dir=str(tmp_path), steps=500, seconds_per_step=0.2)
    await_checkpoint(tmp_path)
    (child,) = node.children()
    if whom == "accelerate":
        child.parent().kill()
    elif whom == "launcher":
        node.process.kill()
    else:
        node.process.terminate()
        assert node.wait(30)[0] == 75
    child.wait(20)
    last = newest_complete(tmp_path)
    assert last is not None and (whom != "all" or json.loads((Path(last) / "manifest.json").read_text())["step"] > 2)


# ---------------------------------------------------------------------------------------------------- the last line


def ended(folder: Path, head: str, ending: str, *launcher: str | Path) -> subprocess.CompletedProcess:
    """Two processes under a launcher, of which the second ends like this."""
    script = folder / "ends.py"
    script.write_text(f"{head}\nimport os, sys, time\nif os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(60)\n")
    command, env = [*launcher, CPU, script], user_environment()
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "code"), [("os.kill(os.getpid(), 9)", 1), ("sys.exit(4)", 1), ("leave(75)", 75)])
def test_a_crash_is_not_taken_for_the_signal_that_ends_the_others(ending, code, tmp_path):
    """torch's launcher ends the first process by SIGTERM, which it answers as one that is saved: with 75."""
    head = f"""import sys
sys.path[:0] = [{str(ROOT / "recipes")!r}]
from core.runtime.environment import prepare_environment
from core.runtime.errors import leave
prepare_environment()"""
    done = ended(tmp_path, head, f"time.sleep(1); {ending}", "bash", LAUNCH)
    assert "stopped by SIGTERM before the first update" in done.stdout
    assert done.returncode == code, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ("os._exit(3)", "process 1 ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", "process 1 was ended by SIGKILL; the system kills so where memory runs out"),
    ],
)
def test_a_failed_process_is_told_in_a_line(ending, line, tmp_path):
    launcher = ROOT / "recipes/core/runtime/accelerate_launch.py"
    done = ended(tmp_path, "", ending, sys.executable, launcher, "--config_file")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr


def test_only_the_launchers_own_exceptions_become_a_line(capsys):
    accelerate_launch.in_a_line(DistStoreError, DistStoreError("timed out\nmore"), None)
    assert capsys.readouterr().err == "launcher: timed out\n"
    accelerate_launch.in_a_line(KeyError, KeyError("here"), None)
    assert "KeyError: 'here'" in capsys.readouterr().err


def test_check_is_not_for_an_evaluation():
    recipe = ROOT / "recipes/smollm2-135m/evaluation.yaml"
    code, errors = run_script("check.py", [f"--config={recipe}", f"--accelerate_config={FOLDER}/cpu.yaml"])
    assert code == 2 and "is a list for recipes/evaluate.py" in errors
