"""Two nodes on one machine, each with recipes/launch.sh: network namespaces, or two launchers on loopback."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "recipes" / "launch.sh"

Place = tuple[list[str], dict[str, str]]  # what a command on the node begins with, and its environment


def allowed(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


NAMESPACES = allowed("unshare", "-n", "true") and allowed("ip", "netns", "list")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def nodes_of_two() -> Iterator[list[Place]]:
    """The two nodes."""
    if not NAMESPACES:
        shared = {"NODES": "127.0.0.1 127.0.0.1", "PORT": str(free_port())}
        yield [([], shared | {"NODE_RANK": str(node)}) for node in range(2)]
        return
    name = f"n{os.getpid() % 10000}"
    subnet = f"10.{os.getpid() % 250}.77"
    commands = [f"ip netns add {name}a", f"ip netns add {name}b"]
    commands += [f"ip link add {name}a netns {name}a type veth peer name {name}b netns {name}b"]
    for number, side in enumerate("ab", start=1):
        commands += [f"ip -n {name}{side} addr add {subnet}.{number}/24 dev {name}{side}"]
        commands += [f"ip -n {name}{side} link set {link} up" for link in ("lo", f"{name}{side}")]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        nodes = {"NODES": f"{subnet}.1 {subnet}.2"}
        yield [(["ip", "netns", "exec", f"{name}{side}"], nodes) for side in "ab"]
    finally:
        for side in "ab":
            subprocess.run(["ip", "netns", "del", f"{name}{side}"], check=False)


class Node:
    """A node's launcher, started by the same command on each, and its output."""

    def __init__(self, prefix: list[str], environment: dict[str, str], config: Path, arguments: list[str]) -> None:
        slurm = [name for name in os.environ if name.startswith("SLURM_")]
        env = {name: value for name, value in os.environ.items() if name not in slurm}
        env |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        self.script = arguments[0]
        self.process = subprocess.Popen(
            [*prefix, LAUNCH, config, *arguments],
            cwd=ROOT,
            env=env | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, seconds: float) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def children(self) -> list[psutil.Process]:
        """The training processes."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        commands = [(child, child.cmdline()) for child in descendants]
        return [
            child for child, words in commands if self.script in words and "accelerate_launch" not in "".join(words)
        ]

    def kill(self) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.kill()


def await_checkpoint(folder: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not list(folder.glob("checkpoint-*")):
        assert time.monotonic() < deadline, "no checkpoint yet"
        time.sleep(0.2)
