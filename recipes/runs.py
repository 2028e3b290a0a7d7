"""What surrounds a run on its machine: environment, network, wandb, output folder, model folder, disk."""

import contextlib
import ctypes
import importlib.util
import json
import netrc
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from errors import RecipeError

RUN_FILES = ["recipe.yaml", "checkpoint-*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"]
RUN_FILES += ["trainer_state.json", "all_results.json", "metrics.jsonl", "selection.json"]

# What may change when a run goes on: where it runs and what it reports, but nothing that the numbers depend on. The
# batch is held against the checkpoint, as pairs per update, since devices and accumulation may trade places.
MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "num_processes", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "report_to", "run_name", "logging_steps",
    "logging_strategy", "logging_first_step", "logging_dir", "log_level", "disable_tqdm", "save_steps",
    "save_strategy", "save_total_limit", "eval_steps", "eval_strategy", "dataset_num_proc",
    "dataloader_num_workers", "dataloader_pin_memory", "ddp_timeout", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "reference_cache",
}  # fmt: skip
PACKAGES = ["torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "peft", "tokenizers", "numpy"]


def prepare_environment() -> None:
    """
    Set what libraries read at import: no telemetry, no fork warnings, and as many threads as this process's share of
    the cores; and end with the launcher. Call it before torch and transformers are imported; what the user has set
    stays.
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
        Path(place).touch()  # tells launch.sh that the nodes have met; `errors.leave` writes into it
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        # Started by `accelerate launch`: if that is killed, this process would train on unseen. It gets SIGTERM
        # instead, on which it saves and stops.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def go_offline_if_local(paths: Iterable[str | None]) -> bool:
    """
    Keep every library off the network if all of `paths` (models and data of a recipe, None skipped) are on this disk.

    Even a local model asks the Hub for files that it lacks. The switch is read when a library is imported, so those
    that are loaded already are set too.

    Returns:
        Whether the run is offline, by this or by HF_HUB_OFFLINE from outside.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return True
    if not all(os.path.exists(path) for path in paths if path is not None):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True
    return True


def spare_cpu_compile() -> None:
    """
    Do without DeepSpeed's shared-memory collectives for CPU processes, which it would compile for two minutes on first
    use (and a kill during that leaves a lock that hangs every later run). gloo gives the same numbers.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        import deepspeed  # only here: it takes seconds, and most runs do without

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    installed = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {"python": sys.version.split()[0], **installed}


def prepare_wandb(output_dir: str | Path) -> str | None:
    """
    Make wandb work as it stands: offline where there is no login or no network, and one run per output folder, which
    is resumed under its id. Call it on rank 0, before training, if the recipe reports to wandb.

    Returns:
        Why it is offline, for a line in the log; None if it is online, or WANDB_MODE was set.
    """
    reason = None
    if "WANDB_MODE" not in os.environ:
        reason = why_wandb_is_offline()
        os.environ["WANDB_MODE"] = "offline" if reason else "online"
    memory = Path(output_dir) / "wandb_id.txt"
    if "WANDB_RUN_ID" not in os.environ:
        if not memory.exists():
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(uuid.uuid4().hex[:12])
        os.environ["WANDB_RUN_ID"] = memory.read_text().strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", str(output_dir))
    return reason


def why_wandb_is_offline() -> str | None:
    """Why a run could not report to wandb's server from here; None if it could."""
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return "the run is offline (HF_HUB_OFFLINE=1)"
    if not _logged_in(host.hostname):
        return "no login (set WANDB_API_KEY, or run `wandb login`)"
    if not _reachable(host.hostname, host.port or (80 if host.scheme == "http" else 443)):
        return f"{host.hostname} cannot be reached"
    return None


def start_wandb(
    output_dir: str | Path, recipe: Mapping[str, Any], audit: str | Path | None, run_name: str | None = None
) -> str | None:
    """
    `prepare_wandb`, and the job's run with the resolved recipe and the selection's audit (a JSON file) attached. The
    Trainer's callback then logs to this run. Call it on rank 0.

    Raises:
        RecipeError: wandb does not start, e.g. because it does not know the key.
    """
    reason = prepare_wandb(output_dir)
    import wandb  # only here: it reads the environment at import, and most runs do without

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "shifted-margin"), name=run_name, config={"recipe": dict(recipe)}
        )
    except Exception as error:  # wandb's own kinds, whichever part of it fails
        line = str(error).strip().splitlines()[0]
        raise RecipeError(f"wandb does not start: {line}; mend the login, or set WANDB_MODE=offline") from error
    if audit is not None:
        run.config.update({"selection": json.loads(Path(audit).read_text())}, allow_val_change=True)
    return reason


def claim_output_dir(output_dir: str | Path, recipe: Mapping[str, Any], resume: bool) -> None:
    """
    Refuse an output folder that cannot be written or that belongs to another run. Nothing is left behind.

    Args:
        output_dir: the folder, which need not exist.
        recipe: the resolved recipe, as it will be saved to recipe.yaml: plain values, nested.
        resume: whether to go on with the run in the folder; it must have the same recipe but for `MAY_CHANGE`.

    Raises:
        RecipeError: with the way out.
    """
    folder = Path(output_dir)
    check_writable(folder)
    found = sorted(path.name for pattern in RUN_FILES for path in folder.glob(pattern))
    if not found:
        return
    if not resume:
        raise RecipeError(
            f"output_dir {folder} holds another run ({', '.join(found[:3])}{', …' if len(found) > 3 else ''}); choose "
            "another output_dir, or go on with that run by resume_from_checkpoint: auto"
        )
    if "recipe.yaml" not in found:
        raise RecipeError(
            f"output_dir {folder} holds {found[0]} but no recipe.yaml, so it is not known which run that is; choose "
            "another output_dir, or name the checkpoint by resume_from_checkpoint"
        )
    theirs, ours = (flatten(tree) for tree in (yaml.safe_load((folder / "recipe.yaml").read_text()) or {}, recipe))
    differ = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    differ = [key for key in differ if key.split(".")[-1] not in MAY_CHANGE]
    if differ:
        shown = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differ[:5])
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise RecipeError(
            f"output_dir {folder} holds a run of another recipe ({shown}{more}); choose another output_dir, or go on "
            "with the recipe.yaml of that folder"
        )


def check_writable(folder: Path) -> None:
    """
    Write a file under `folder`, or where it will be made, and take it away again.

    Raises:
        RecipeError: that does not work.
    """
    place = _existing_parent(folder)
    made = folder.absolute().relative_to(place).parts
    try:
        folder.mkdir(parents=True, exist_ok=True)  # also tells a file that stands in the way
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise RecipeError(
            f"output_dir {folder} cannot be written ({error.strerror}: {error.filename or folder}); choose another "
            "output_dir, or mend the access to it"
        ) from error
    finally:
        for depth in range(len(made), 0, -1):
            with contextlib.suppress(OSError):
                place.joinpath(*made[:depth]).rmdir()


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
    if os.environ.get("HF_HUB_OFFLINE") == "1":
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
    return _reachable(hub.hostname, hub.port or (80 if hub.scheme == "http" else 443))


def check_tokenizer(tokenizer: Any, path: str) -> None:
    """
    Refuse a tokenizer that cannot pad a batch or write a chat.

    Raises:
        RecipeError: no pad token, no end token or no chat template.
    """
    if tokenizer.pad_token is None:
        raise RecipeError(f"tokenizer of {path} has no pad token; set one, e.g. pad_token: <unk>, in the recipe")
    if tokenizer.eos_token is None:
        raise RecipeError(f"tokenizer of {path} has no end token (eos_token); save one with the tokenizer")
    if not tokenizer.chat_template:
        raise RecipeError(
            f"tokenizer of {path} has no chat template; start from a model that has one, or set chat_template_path"
        )


def check_disk(folder: str | Path, needed: int, what: str) -> None:
    """
    Raises:
        RecipeError: less than `needed` bytes are free where `folder` is or will be; `what` says for what.
    """
    place = _existing_parent(Path(folder))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RecipeError(
            f"{folder}: {what} need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on that disk; make room, "
            "choose another output_dir, or keep fewer checkpoints (save_total_limit)"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping under dotted keys; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _logged_in(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC", os.path.expanduser("~/.netrc"))).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(host: str, port: int, seconds: float = 3.0) -> bool:
    if urllib.request.getproxies():
        return True  # a proxy stands between; only a real request could tell
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False
