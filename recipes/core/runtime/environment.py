"""What surrounds a run: environment, network, versions, and whether its model is to be had."""

import ctypes
import hashlib
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from core.runtime.errors import SAVED_ON_SIGNAL, RecipeError, leave

PACKAGES = ["torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "peft", "tokenizers", "numpy"]

CORE = Path(__file__).parents[1]

switched_off = False  # HF_HUB_OFFLINE is set by `go_offline_if_local`, not from outside


def prepare_environment() -> None:
    """
    Set what libraries read at import: no telemetry, no fork warnings, and as many threads as this process's share of
    the cores; and end with the launcher, or on a signal. Call it before torch and transformers are imported; what the
    user has set stays.
    """
    # Of names that the pinned versions still have: DeepSpeed's gathers alone would print a dozen lines a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "LOCAL_WORLD_SIZE" in os.environ:
        # Every process would take all cores: eight steps took 15.5 s instead of 0.6 s on a busy machine.
        share = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    if place := os.environ.get("LAUNCH_EXIT_CODE"):
        _leave_on_signal()
        Path(place).touch()  # tells launch.sh that the nodes have met; `errors.leave` writes into it
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        # Started by `accelerate launch`: if that is killed, this process would train on unseen. It gets SIGTERM
        # instead, on which it saves and stops.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def _leave_on_signal() -> None:
    """
    Answer launch.sh's SIGTERM or SIGUSR1 from the first moment, until `stopping.StopOnSignal` takes over: nothing is
    lost yet, so that the exit code is that of a saved run.
    """

    def end(name: str) -> None:
        os.write(1, f"stopped by {name} before the first update; start again as before\n".encode())
        leave(SAVED_ON_SIGNAL)

    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        answer_signals(end)


def answer_signals(answer: Callable[[str], object]) -> None:
    """Have SIGTERM and SIGUSR1 (preemption, Slurm's signal before the end) call `answer` with their name."""
    process = os.getpid()

    def handle(number: int, _: object) -> None:
        if os.getpid() != process:  # a forked worker, which its pool ends by SIGTERM
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        answer(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handle)


def go_offline_if_local(paths: Iterable[str | None]) -> bool:
    """
    Keep every library off the network if all of `paths` (models and data of a recipe, None skipped) are on this disk.

    Even a local model asks the Hub for files that it lacks. The switch is read when a library is imported, so those
    that are loaded already are set too.

    Returns:
        Whether the run is offline, by this or by HF_HUB_OFFLINE from outside.
    """
    global switched_off
    if hub_is_off():
        return True
    if not all(os.path.exists(path) for path in paths if path is not None):
        return False
    os.environ["HF_HUB_OFFLINE"], switched_off = "1", True
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True
    return True


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE is set, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}


def network_is_off() -> bool:
    """Whether the user wants no network at all: HF_HUB_OFFLINE came from outside."""
    return hub_is_off() and not switched_off


def spare_cpu_compile() -> None:
    """
    Do without DeepSpeed's shared-memory collectives for CPU processes, which it would compile for two minutes on first
    use (and a kill during that leaves a lock that hangs every later run). gloo gives the same numbers.
    """
    if deepspeed_is_started():
        import deepspeed  # only here: it takes seconds, and most runs do without

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_is_started() -> bool:
    """Whether the launcher that started this process gave it DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def code_digest(*modules: str) -> str:
    """Of the source of modules of core/ ("data/columns"): part of a cache's key, so that what other code has made is
    never read back."""
    sources = ((CORE / f"{name}.py").read_bytes() for name in modules)
    return hashlib.sha256(b"".join(sources)).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    installed = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {"python": sys.version.split()[0], **installed}


def check_model_path(path: str, revision: str | None = None) -> None:
    """
    Refuse a model that is not there before transformers turns it into a riddle or a retry loop.

    Raises:
        RecipeError: a folder that does not exist or holds no config.json, or a Hub name that is neither in the cache
            nor to be had.
    """
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise RecipeError(f"model {path}: the folder has no config.json; give the folder of a saved model")
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path):
        raise RecipeError(f"model {path}: no such folder; train or download it first, or correct the path")
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache  # reads the environment at import

    if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        return
    where = f"model {path}: neither a folder here nor in the Hub's cache"
    if hub_is_off():
        raise RecipeError(
            f"{where}, and the run is offline (HF_HUB_OFFLINE=1); download it first, or correct the path"
        )
    if not hub_is_reachable():
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
        raise RecipeError(f"{where}, and {host} cannot be reached; download it first, or correct the path")
    try:
        hf_hub_download(path, "config.json", revision=revision)
    except Exception as error:  # a name that is not there, a gate, a broken connection: all end here
        raise RecipeError(f"{where}, and the Hub says: {str(error).strip().splitlines()[0]}") from error


def hub_is_reachable() -> bool:
    """Whether the Hub's port answers."""
    from huggingface_hub import constants  # reads the environment at import

    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    return reachable(hub.hostname, hub.port or (80 if hub.scheme == "http" else 443))


def reachable(host: str, port: int, seconds: float = 3.0) -> bool:
    """Whether a server answers."""
    if {"http", "https", "all"} & set(urllib.request.getproxies()):  # NO_PROXY alone is in it too, as "no"
        return True  # a proxy stands between; only a real request could tell
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False
