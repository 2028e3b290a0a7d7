"""
Starts of recipes/dpo.py that cannot work, as a user would make them: each must end soon, with one line that says what,
where and what to do, a code that is not 0, no traceback, and no output folder that was not there before. What the
recipe, the model and the rows can be refused for, whatever starts the run, is in test_refusals.py.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from processes import CONFIGS, ROOT, free_port, user_environment

LIMIT_SECONDS = 90  # a start that has said nothing by then is killed, and has failed

Recipe = dict[str, Any]


@dataclass
class BadStart:
    """What is wrong, how it is made wrong, and what the line must hold (a regular expression)."""

    name: str
    says: str
    change: Callable[[Recipe, Path], None] = lambda recipe, folder: None  # of the recipe or of its folder
    launch: list[str] = field(default_factory=lambda: ["--config_file", str(CONFIGS / "cpu.yaml")])
    mount: str | None = None  # a shell command, in which FOLDER is the recipe's folder
    nodes: list[dict[str, str]] = field(default_factory=list)  # of launch.sh on each node, instead of `launch`
    arguments: list[list[str]] = field(default_factory=lambda: [[], []])  # of each node
    taken: bool = False  # something else listens at PORT
    keeps: str | None = None  # a file that must stay as it is


def put(*keys: str | int, value: Any) -> Callable[[Recipe, Path], None]:
    """Set a value of the recipe; FOLDER in it is the recipe's folder."""

    def change(recipe: Recipe, folder: Path) -> None:
        for key in keys[:-1]:
            recipe = recipe[key]
        recipe[keys[-1]] = value.replace("FOLDER", str(folder)) if isinstance(value, str) else value

    return change


def lose(path: str) -> Callable[[Recipe, Path], None]:
    return lambda recipe, folder: (folder / path).unlink()


def on_loopback(**other: str) -> list[dict[str, str]]:
    """Two launchers on this machine; `other` is the second's own."""
    return [{"NODES": "127.0.0.1 127.0.0.1", "NODE_RANK": str(node)} | (other if node else {}) for node in range(2)]


def file_in_the_way(recipe: Recipe, folder: Path) -> None:
    (folder / "file").write_text("mine")
    recipe["output_dir"] = str(folder / "file" / "run")


DISK = "mkdir FOLDER/disk && mount -t tmpfs"

BAD_STARTS = [
    BadStart("unknown key", r"learning_rat: unknown key; did you mean learning_rate", put("learning_rat", value=1e-6)),
    BadStart(
        "processes that the recipe is not for",
        r"num_processes: 2, but the launcher started 1",
        put("num_processes", value=2),
    ),
    BadStart(
        "batch that accumulation cannot hold",
        r"pairs_per_update: 9 is not a multiple of",
        put("pairs_per_update", value=9),
    ),
    BadStart(
        "micro-batch that cannot hold the replay",
        r"3 pairs cannot be split 1 task to 1 buffer",
        put("per_device_train_batch_size", value=3),
    ),
    BadStart(
        "ZeRO-3 launched with --cpu",
        r"is one of DeepSpeed, but the launcher did not start it",
        launch=["--cpu", "--config_file", str(CONFIGS / "zero3-cpu.yaml")],
    ),
    BadStart(
        "ZeRO-3 that would save no weights",
        r"without zero3_save_16bit_model: true the saved model would have no weights",
        launch=["--config_file", str(CONFIGS / "zero3-cpu.yaml"), "--zero3_save_16bit_model", "false"],
    ),
    BadStart(
        "launcher in another precision",
        r"mixed_precision: bf16 is started where the recipe has bf16: false",
        launch=["--config_file", str(CONFIGS / "cpu.yaml"), "--mixed_precision", "bf16"],
    ),
    BadStart(
        "full disk",
        r"output_dir .*cannot be written \(No space left",
        put("output_dir", value="FOLDER/disk/run"),
        mount=f"{DISK} -o size=4k none FOLDER/disk && head -c 4096 /dev/zero > FOLDER/disk/full",
    ),
    BadStart(
        "read-only disk",
        r"output_dir .*cannot be written \(Read-only",
        put("output_dir", value="FOLDER/disk/run"),
        mount=f"{DISK} -o ro none FOLDER/disk",
    ),
    BadStart("file in the way", r"output_dir .*cannot be written \(Not a directory", file_in_the_way, keeps="file"),
    BadStart(
        "checkpoint that is not there",
        r"resume_from_checkpoint: .*checkpoint-9: it is not a folder",
        put("resume_from_checkpoint", value="FOLDER/run/checkpoint-9"),
    ),
    BadStart("model without a config", r"the folder has no config.json", lose("model/config.json")),
    BadStart(
        "mapping without a pair in the second source",
        r"buffer.jsonl: the mapping names no pair",
        put("datasets", 1, "columns", value={"chosen": "chosen"}),
    ),
    BadStart(
        "first node that does not exist",
        r"no-such-host.invalid, is no name",
        nodes=[{"NODES": "no-such-host.invalid here", "NODE_RANK": "1"}],
    ),
    BadStart(
        "first node that never starts",
        r"did not meet at 127.0.0.1:\d+ in 10 s; start the same command",
        nodes=[on_loopback(START_SECONDS="10")[1]],
    ),
    BadStart("port that is taken", r"port \d+ of 127.0.0.1 is taken; set PORT", nodes=on_loopback()[:1], taken=True),
    BadStart(
        "nodes with other recipes",
        r"do not have the same recipe: rank 1 .*differ from rank 0 in learning_rate",
        nodes=on_loopback(),
        arguments=[[], ["--learning_rate", "2e-3"]],
    ),
    BadStart(
        "one node with a bad recipe",
        r"rank 1 on .* cannot start: .*learning_rat: unknown key",
        nodes=on_loopback(),
        arguments=[[], ["--learning_rat", "2e-3"]],
    ),
    BadStart(
        "nodes of other sizes",
        r"do not have the same number of processes: .* 1, .* 2",
        nodes=on_loopback(PROCESSES_PER_NODE="2"),
    ),
]


@dataclass
class Verdict:
    """How a bad start ended: what falls short (empty: nothing), its line, and the seconds that it took."""

    faults: list[str]
    line: str
    seconds: float


def attempt(bad: BadStart, folder: Path) -> Verdict:
    """Make the start in `folder`, a copy of `real_run.prepare`'s."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"output_dir": str(folder / "run"), "reference_cache": str(folder / "reference")}
    bad.change(recipe, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    kept = bad.keeps and (folder / bad.keeps).read_bytes()
    before = set(os.listdir(folder))

    script = [str(ROOT / "recipes" / "dpo.py"), "--config", str(folder / "recipe.yaml")]
    env = user_environment()
    port = {"PORT": str(free_port())}
    commands = []
    if bad.nodes:
        for node, own in zip(bad.nodes, bad.arguments, strict=False):
            launch = [str(ROOT / "recipes" / "launch.sh"), str(CONFIGS / "zero3-cpu.yaml")]
            commands.append(([*launch, *script, *own], env | {"START_SECONDS": "20"} | port | node))
    else:
        launch = [sys.executable, str(ROOT / "recipes/core/runtime/accelerate_launch.py"), *bad.launch]
        commands.append(([*launch, *script], env))
    if bad.mount:
        shell = f'{bad.mount.replace("FOLDER", str(folder))} && exec "$@"'
        commands = [(["unshare", "-m", "sh", "-c", shell, "sh", *command], env) for command, env in commands]

    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", int(port["PORT"]))) if bad.taken else nullcontext():
        started = [
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command, env in commands
        ]
        outputs, faults = [], []
        for process in started:
            try:
                outputs.append(process.communicate(timeout=LIMIT_SECONDS)[0])
            except subprocess.TimeoutExpired:
                process.terminate()  # launch.sh ends what it started
                outputs.append(process.communicate()[0])
                faults.append(f"no end in {LIMIT_SECONDS} s")
    seconds = time.monotonic() - begun

    line = ""
    for process, output in zip(started, outputs, strict=True):
        told = [text for text in output.splitlines() if text.startswith("error: ")]
        if process.returncode in (0, None):
            faults.append(f"exit code {process.returncode}")
        if len(told) != 1:
            faults.append(f"{len(told)} error lines")
        line = line or next(iter(told), "")
        if "Traceback" in output:
            faults.append("a traceback")
    if not re.search(bad.says, line):
        faults.append("the line does not say it")
    if left := set(os.listdir(folder)) - before - {"disk", "reference"}:
        faults.append(f"left behind: {', '.join(left)}")
    if kept and (folder / bad.keeps).read_bytes() != kept:
        faults.append(f"{bad.keeps} was changed")
    return Verdict(faults, line or outputs[0][-300:], seconds)


def fresh_copy(workspace: Path, folder: Path) -> Path:
    """The recipe and all that it names, in a folder of its own."""
    folder.mkdir()
    shutil.copytree(workspace / "model", folder / "model")
    for name in ("task", "buffer", "held_out"):
        shutil.copy(workspace / f"{name}.jsonl", folder)
    text = (workspace / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(f"{workspace}/", f"{folder}/"))
    return folder
