"""wandb as it stands: offline where it has to be, and one run per output folder."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.runtime.errors import RecipeError
from core.runtime.files import replaced
from core.runtime.network import answers, network_is_off
from core.runtime.text import masked


def start_wandb(
    output_dir: str | Path, recipe: Mapping[str, Any], audit: str | Path | None, run_name: str | None = None
) -> str | None:
    """
    Start the job's wandb run, with the resolved recipe and the selection's audit (a JSON file) attached: offline where
    there is no login or no network, and one run per output folder, which is resumed under its id. The Trainer's
    callback then logs to it. Call it on rank 0. What the user has set by wandb's own variables stays.

    Returns:
        Why it is offline, for a line in the log; None if it is online, or WANDB_MODE was set.

    Raises:
        RecipeError: wandb does not start, e.g. because it does not know the key.
    """
    import wandb  # only here: most runs do without

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        reason = None if os.environ.get("WANDB_MODE") else why_wandb_is_offline()
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "shifted-margin"),
            name=run_name,
            config={"recipe": masked(recipe)},
            mode=os.environ.get("WANDB_MODE") or ("offline" if reason else "online"),
            id=os.environ.get("WANDB_RUN_ID") or run_id(folder),
            resume=os.environ.get("WANDB_RESUME", "allow"),
            dir=os.environ.get("WANDB_DIR", str(folder)),
        )
    except Exception as error:  # wandb's own kinds, whichever part of it fails
        line = str(error).strip().splitlines()[0]
        raise RecipeError(f"wandb does not start: {line}; mend the login, or set WANDB_MODE=offline") from error
    if audit is not None:
        run.config.update({"selection": masked(json.loads(Path(audit).read_text()))}, allow_val_change=True)
    return reason


def why_wandb_is_offline() -> str | None:
    """Why a run could not report to wandb's server from here; None if it could."""
    import wandb

    if network_is_off():
        return "the run is offline (HF_HUB_OFFLINE=1)"
    if not wandb.login(prompt=False, verify=False):  # looks where it keeps logins, and asks nobody
        return "no login (set WANDB_API_KEY, or run `wandb login`)"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return None if answers(server) else f"{server} cannot be reached"


def run_id(folder: Path) -> str:
    """The id of an output folder's run, which is made up once and kept in wandb_id.txt."""
    memory = folder / "wandb_id.txt"
    if not memory.exists():
        with replaced(memory) as file:
            file.write(uuid.uuid4().hex[:12].encode())
    return memory.read_text().strip()
