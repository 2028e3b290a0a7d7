"""The network: whether it is wanted, whether a server answers, and whether a recipe's model is to be had."""

import os
import re
import sys
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from core.runtime.errors import RecipeError

PROBE_SECONDS = 5.0

switched_off = False  # HF_HUB_OFFLINE is set by `go_offline_if_local`, not from outside


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


def answers(url: str) -> bool:
    """Whether a server answers a request, through the environment's proxies, soon enough to be worth waiting for."""
    import httpx  # what huggingface_hub speaks with; most runs need no network

    try:
        httpx.head(url, timeout=PROBE_SECONDS)
    except (httpx.TransportError, httpx.InvalidURL):
        return False
    return True


def hub_is_reachable() -> bool:
    """Whether the Hub, or what HF_ENDPOINT names in its place, answers."""
    from huggingface_hub import constants  # reads the environment at import

    return answers(constants.ENDPOINT)


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
