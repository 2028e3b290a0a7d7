"""The process that a run lives in: variables that libraries read at import, signals, versions."""

import ctypes
import hashlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from core.runtime.errors import SAVED_ON_SIGNAL, leave

PACKAGES = ["torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "peft", "tokenizers", "numpy"]
PACKAGES += ["bitsandbytes"]

CORE = Path(__file__).parents[1]

# Preemption, Slurm's signal before the end, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def prepare_environment() -> None:
    """
    Set what libraries read at import: no telemetry, no fork warnings, and as many threads as this process's share of
    the cores; and end with the launcher, or on a signal. Call it before torch and transformers are imported; what the
    user has set stays.
    """
    # Of names that the pinned versions still have: DeepSpeed's gathers alone would print a dozen lines a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers")
    # Where it is installed, transformers and bitsandbytes would fetch code from the Hub by it, and run it.
    sys.modules.setdefault("kernels", None)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses those, and tells each cast to 16 bits
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other spin, for long where there are as many as cores; if another process has one
        # of the cores, a step of 0.12 s took 3 s. So short a spin costs nothing on a quiet machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    take_one_gpu()
    if "LOCAL_WORLD_SIZE" in os.environ:
        # Every process would take all cores: eight steps took 15.5 s instead of 0.6 s on a busy machine.
        share = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`
    place = os.environ.get("LAUNCH_EXIT_CODE")
    if launched or place:
        _leave_on_signal()
    if place:
        Path(place).touch()  # tells launch.sh that the nodes have met; `errors.leave` writes into it
    if launched and sys.platform == "linux":
        # If the launcher is killed, this process would train on unseen. It gets SIGTERM instead, on which it saves
        # and stops.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def take_one_gpu() -> None:
    """Hide all GPUs but the first from a process that is alone: transformers would use them all by nn.DataParallel."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = len([path for path in Path("/dev").glob("nvidia*") if path.name[len("nvidia") :].isdigit()])
        visible = ",".join(map(str, range(count)))
    first, _, others = visible.partition(",")
    if others:
        os.environ["CUDA_VISIBLE_DEVICES"] = first
        print(f"note: one process uses one GPU, number {first} of {visible}; for more take another launch config")


def _leave_on_signal() -> None:
    """
    Answer a stop signal from the first moment, until `stopping.StopOnSignal` takes over: nothing is lost yet, so that
    the exit code is that of a saved run.
    """

    def end(name: str) -> None:
        os.write(1, f"stopped by {name} before the first update; start again as before\n".encode())
        leave(SAVED_ON_SIGNAL)

    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        answer_signals(end)


def answer_signals(answer: Callable[[str], object]) -> None:
    """Have each of `STOP_SIGNALS` call `answer` with its name."""
    process = os.getpid()

    def handle(number: int, _: object) -> None:
        if os.getpid() != process:  # a forked worker, which its pool ends by SIGTERM
            if number == signal.SIGINT:
                return  # Ctrl-C reaches the whole group, and the pool's own process says what becomes of it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        answer(signal.Signals(number).name)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


def deepspeed_is_started() -> bool:
    """Whether the launcher that started this process gave it DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def spare_cpu_compile() -> None:
    """
    Do without DeepSpeed's shared-memory collectives for CPU processes, which it would compile for two minutes on first
    use (and a kill during that leaves a lock that hangs every later run). gloo gives the same numbers.
    """
    if deepspeed_is_started():
        import deepspeed  # only here: it takes seconds, and most runs do without

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def code_digest(*modules: str) -> str:
    """Of the source of modules of core/ ("data/columns"): part of a cache's key, so that what other code has made is
    never read back."""
    sources = ((CORE / f"{name}.py").read_bytes() for name in modules)
    return hashlib.sha256(b"".join(sources)).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    installed = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {"python": sys.version.split()[0], **installed}
