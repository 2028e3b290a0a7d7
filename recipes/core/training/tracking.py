"""wandb as it stands: offline where it has to be, and one run per output folder."""

import json
import netrc
import os
import urllib.parse
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.runtime.environment import network_is_off, reachable
from core.runtime.errors import RecipeError


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
    if network_is_off():
        return "the run is offline (HF_HUB_OFFLINE=1)"
    if not _logged_in(host.hostname):
        return "no login (set WANDB_API_KEY, or run `wandb login`)"
    if not reachable(host.hostname, host.port or (80 if host.scheme == "http" else 443)):
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


def _logged_in(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC", os.path.expanduser("~/.netrc"))).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
