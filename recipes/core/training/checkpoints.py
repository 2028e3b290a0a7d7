"""Checkpoints that are complete or not there: written aside, sealed by a manifest, put in place by a rename."""

import hashlib
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from accelerate.state import DistributedType
from transformers.utils import logging

from core.runtime.environment import versions
from core.runtime.errors import RecipeError, full_disk
from core.runtime.files import replaced
from core.runtime.ranks import first_rank_decides, rank

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
NO_OPTIMIZER = "it was saved without its optimizer (save_only_model)"
ASIDE = ".saving"  # inside output_dir, so on the same disk: the rename is atomic


class CompleteCheckpoints:
    """
    Mixin for a `Trainer`: `class X(CompleteCheckpoints, DPOTrainer)`.

    Trainer writes a checkpoint in place, file by file, and deletes the older ones before anyone knows whether the new
    one is whole. Here it writes into a folder of another name; when every rank is done, rank 0 adds a manifest with
    the digest of each file, flushes all to the disk, renames the folder, and only then removes the oldest.
    """

    rows_digest: str | None = None  # of the training rows; a script that sets it has them held against a checkpoint's

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last checkpoint, the run has no update left; Trainer looks only after one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        args, final = self.args, Path(self.args.output_dir)
        aside, limit = final / ASIDE, args.save_total_limit
        first_rank_decides(lambda: shutil.rmtree(aside, ignore_errors=True))  # what a killed run left behind
        args.output_dir, args.save_total_limit = str(aside), None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if full_disk(error) is None and shutil.disk_usage(final).free > 1 << 20:
                raise
            shutil.rmtree(aside, ignore_errors=True)
            raise RecipeError(
                f"output_dir {final}: the disk of {socket.gethostname()} is full, so the checkpoint of step "
                f"{self.state.global_step} was not saved ({_last_line(error)}); the checkpoints before it are intact: "
                "make room and go on by resume_from_checkpoint: auto"
            ) from error
        finally:
            args.output_dir, args.save_total_limit = str(final), limit
        if dist.is_initialized():
            dist.barrier()  # a rank may still be writing its optimizer state
        best = self.state.best_model_checkpoint
        if best and Path(best).parent == aside:
            self.state.best_model_checkpoint = str(final / Path(best).name)
            if args.should_save:
                self.state.save_to_json(str(aside / Path(best).name / "trainer_state.json"))
        first_rank_decides(lambda: self._put_in_place(aside, final, limit))

    def _put_in_place(self, aside: Path, final: Path, limit: int | None) -> None:
        folder = final / f"checkpoint-{self.state.global_step}"
        written = aside / folder.name
        seal(written, self.state.global_step, launched_as(self))
        if folder.exists():
            shutil.rmtree(folder)  # of the same step, damaged, and stepped over when this run was resumed
        os.rename(written, folder)
        _flush(final)
        shutil.rmtree(aside)
        if limit:
            # A later step's is damaged, since this run went on from before it: it must not push out a whole one.
            reached = [path for path in numbered(final) if _step(path) <= self.state.global_step]
            for old in reached[limit:]:
                if str(old) != self.state.best_model_checkpoint:
                    shutil.rmtree(old)


def launched_as(trainer: Any) -> dict[str, Any]:
    """What a checkpoint depends on beside the recipe: processes, the way the state is split, batch, rows, versions."""
    args, state = trainer.args, trainer.accelerator.state
    deepspeed = state.distributed_type == DistributedType.DEEPSPEED
    return {
        "world_size": args.world_size,
        "zero_stage": state.deepspeed_plugin.zero_stage if deepspeed else None,
        "batch_per_update": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "rows": trainer.rows_digest,
        "versions": versions(),
    }


def seal(folder: Path, step: int, launch: dict[str, Any]) -> None:
    """Write manifest.json: the size and xxh3_128 digest of every file, with the step and `launched_as`; flush all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(_flush_and_digest, files))
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    with replaced(folder / MANIFEST) as file:
        file.write(json.dumps({"step": step, **launch, "files": entries}, indent=1).encode())
    _flush(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, held against its manifest; None if it is whole."""
    try:
        manifest = _manifest(folder)
        expected, step = manifest["files"], manifest["step"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if folder.name != f"checkpoint-{step}":
        return f"its {MANIFEST} is of step {step}"
    present = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    present.pop(MANIFEST)
    if missing := sorted(set(expected) - set(present)):
        return f"{missing[0]} is missing"
    if extra := sorted(set(present) - set(expected)):
        return f"{extra[0]} is not of it"
    for name, entry in expected.items():  # sizes first: they cost nothing
        if (size := present[name].stat().st_size) != entry["bytes"]:
            return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(_digest, (present[name] for name in expected))
        for (name, entry), digest in zip(expected.items(), digests, strict=True):
            if digest != entry["xxh3_128"]:
                return f"{name} has changed since it was saved"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def fault(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint: its `damage`, or no optimizer; None if it can."""
    if reason := damage(folder):
        return reason
    files = _manifest(folder)["files"]
    # Trainer would go on with a fresh optimizer. DeepSpeed's is in a folder of its own.
    has_optimizer = any(name == "optimizer.pt" or name.startswith("global_step") for name in files)
    return None if has_optimizer else NO_OPTIMIZER


def newest_complete(output_dir: str | Path) -> str | None:
    """
    The checkpoint to go on from: the newest in `output_dir` without a `fault`, the same on every rank. Others are
    stepped over with a warning.

    Raises:
        RecipeError: there are checkpoints, and none is such a one.
    """

    def search() -> str | None:
        faults = {}
        for folder in numbered(Path(output_dir)):
            reason = fault(folder)
            if reason is None:
                return str(folder)
            logger.warning(f"stepping over {folder}: {reason}")
            faults[folder] = reason
        if not faults:
            return None
        told = "; ".join(f"{folder.name}: {reason}" for folder, reason in faults.items())
        weights = [folder for folder, reason in faults.items() if reason == NO_OPTIMIZER]
        if weights:
            raise RecipeError(
                f"output_dir {output_dir}: no checkpoint can be gone on from ({told}); {_new_run(weights[0])}"
            )
        raise RecipeError(
            f"output_dir {output_dir}: no checkpoint is whole ({told}); start again in another output_dir, or delete "
            "them to start again in this one"
        )

    return first_rank_decides(search)


def checkpoint_to_resume(resume: str | bool | None, output_dir: str | Path) -> str | None:
    """
    What `resume_from_checkpoint` of the recipe means: true or `auto` is `newest_complete` (None if there is none yet),
    a path is that checkpoint, which must be without a `fault`, and null or false is a fresh start. A manifest tells
    damage, not malice: DeepSpeed unpickles its files, so name only checkpoints that you trust.
    """
    if resume in (None, False, "false", "no"):
        return None
    if resume in (True, "true", "auto"):
        return newest_complete(output_dir)
    reason = first_rank_decides(lambda: fault(Path(resume)) if Path(resume).is_dir() else "it is not a folder")
    if reason is None:
        return str(resume)
    way_out = _new_run(resume) if reason == NO_OPTIMIZER else "name another, or `auto` for the newest whole one"
    raise RecipeError(f"resume_from_checkpoint: {resume}: {reason}; {way_out}")


def check_fits(checkpoint: str | Path, launch: dict[str, Any]) -> None:
    """
    Refuse to go on from a checkpoint in a way that would not continue its run.

    With the same launch the run goes on bit for bit. Without DeepSpeed another number of processes is possible as
    long as an update keeps its batch: then the rows of every update, their order, the optimizer and the schedule are
    exactly what they would have been; sums are taken in another order (float rounding), and what is drawn at random
    in the forward pass (dropout) differs. Other versions of the libraries are told, and go on.

    Args:
        checkpoint: a folder with a manifest; one without rows or versions is of before they were kept.
        launch: `launched_as` of the trainer that would go on.

    Raises:
        RecipeError: another ZeRO stage, another number of processes under DeepSpeed, another batch per update, or
            other training rows.
    """
    then = _manifest(Path(checkpoint))
    way_out = f"or {_new_run(checkpoint)}"
    if then["zero_stage"] != launch["zero_stage"]:
        was, now = (
            "no DeepSpeed" if stage is None else f"DeepSpeed ZeRO-{stage}"
            for stage in (then["zero_stage"], launch["zero_stage"])
        )
        raise RecipeError(
            f"{checkpoint} was saved under {was}; this run has {now}, which cannot take over its optimizer; use the "
            f"launch config of that run, {way_out}"
        )
    if then["zero_stage"] is not None and then["world_size"] != launch["world_size"]:
        raise RecipeError(
            f"{checkpoint} is split over {then['world_size']} processes and this run has {launch['world_size']}; "
            f"start it with --num_processes {then['world_size']}, {way_out}"
        )
    if then["batch_per_update"] != launch["batch_per_update"]:
        raise RecipeError(
            f"{checkpoint} is of updates of {then['batch_per_update']} rows and this run's have "
            f"{launch['batch_per_update']}; set per_device_train_batch_size × gradient_accumulation_steps × processes "
            f"to {then['batch_per_update']}, {way_out}"
        )
    if then.get("rows") and launch.get("rows") and then["rows"] != launch["rows"]:
        raise RecipeError(
            f"{checkpoint} is of other training rows: the data, or what selects and tokenises it, has changed since; "
            f"put back what the run began with, {way_out}"
        )
    if rank() == 0:
        _tell_changes(checkpoint, then, launch)


def _tell_changes(checkpoint: str | Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn of what a run goes on with although it has changed."""
    old, new = then.get("versions", {}), now.get("versions", {})
    changed = [f"{name} {old[name]} → {new.get(name)}" for name in old if old[name] != new.get(name)]
    if changed:
        logger.warning(
            f"going on with other versions than {checkpoint} was saved with ({', '.join(changed)}): the numbers may "
            "differ from an unbroken run"
        )
    if then["world_size"] != now["world_size"]:
        logger.warning(
            f"going on with {now['world_size']} processes from {then['world_size']}: the same rows in the same "
            "updates, the same optimizer and schedule; rounding and dropout masks differ from an unbroken run"
        )


def _new_run(checkpoint: str | Path) -> str:
    return f"train on from its weights as a new run (model_name_or_path: {checkpoint}, another output_dir)"


def numbered(output_dir: Path) -> list[Path]:
    """The folders checkpoint-<step> of `output_dir`, newest step first."""
    folders = [
        path
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _flush_and_digest(path: Path) -> str:
    _flush(path)
    return _digest(path)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
