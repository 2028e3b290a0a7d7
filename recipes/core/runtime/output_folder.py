"""The output folder: that it can be written, and that it belongs to no other run."""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.runtime.errors import RecipeError
from core.runtime.text import flatten

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
    place = existing_parent(folder)
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


def existing_parent(path: Path) -> Path:
    """The folder that is there already: `path`, or the nearest above it."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
