"""The output folder: that it can be written, and that it belongs to no other run."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.runtime.errors import RecipeError
from core.runtime.text import flatten, masked

RUN_FILES = ["recipe.yaml", "checkpoint-*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"]
RUN_FILES += ["trainer_state.json", "all_results.json", "metrics.jsonl", "selection.json"]

# What may change when a run goes on: where it runs and what it reports, but nothing that the numbers depend on. The
# batch is held against the checkpoint, as pairs per update, since devices and accumulation may trade places.
MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "num_processes", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "report_to", "run_name", "logging_steps",
    "logging_strategy", "logging_first_step", "logging_dir", "log_level", "disable_tqdm", "save_steps",
    "save_strategy", "save_total_limit", "save_only_model", "eval_steps", "eval_strategy", "dataset_num_proc",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_timeout",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "reference_cache",
}  # fmt: skip


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """Of what decides a run's numbers: the same for recipes that differ in `MAY_CHANGE` alone."""
    decides = {key: value for key, value in flatten(masked(recipe)).items() if not _may_change(key)}
    decides = {key: value for key, value in sorted(decides.items()) if value is not None}
    return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()[:16]


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """
    How two recipes differ, as `key: … there, … here`: in what decides the run, and in what may change. Null and a
    missing key are the same, and so are two secrets, of which a saved recipe holds none.
    """
    theirs, ours = (flatten(json.loads(json.dumps(masked(tree), default=str))) for tree in (theirs, ours))
    differ = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    lines = {key: f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differ}
    return ([lines[key] for key in differ if not _may_change(key)], [lines[key] for key in differ if _may_change(key)])


def listed(lines: list[str]) -> str:
    """On one line: five of them whole, of the others the keys."""
    more = [line.partition(":")[0] for line in lines[5:25]] + (["…"] if len(lines) > 25 else [])
    return "; ".join(lines[:5]) + (f"; and {', '.join(more)}" if more else "")


def check_no_run(folder: Path) -> None:
    """
    Raises:
        RecipeError: a run, or an earlier evaluation, lies in the folder.
    """
    found = sorted(
        path.name for pattern in [*RUN_FILES, "evaluation.json", "answers.jsonl"] for path in folder.glob(pattern)
    )
    if found:
        raise RecipeError(
            f"output_dir {folder} holds {found[0]}; give the evaluation a folder of its own by --output_dir"
        )


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
    decides, _ = differences(_saved_recipe(folder / "recipe.yaml"), recipe)
    if decides:
        raise RecipeError(
            f"output_dir {folder} holds a run of another recipe ({listed(decides)}); choose another output_dir, or go "
            "on with the recipe.yaml of that folder"
        )


def _saved_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {_MEND}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} is no recipe; {_MEND}")
    return recipe


_MEND = "put that run's recipe back, or choose another output_dir"


def _may_change(key: str) -> bool:
    return key.split(".")[-1] in MAY_CHANGE


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
