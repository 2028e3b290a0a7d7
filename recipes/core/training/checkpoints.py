"""Checkpoints that are complete or not there: written aside, sealed by a manifest, put in place by a rename."""

import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import DistributedType
from transformers.utils import logging

from core.runtime.environment import versions
from core.runtime.errors import RecipeError, full_disk
from core.runtime.files import remove
from core.runtime.output_folder import differences, listed
from core.runtime.ranks import first_rank_decides, rank
from core.runtime.run_lock import check_held
from core.training.manifest import Manifest, Origin, Trained, damage, flush, seal

logger = logging.get_logger(__name__)

DEEPSPEED_STATES = "global_step"  # how the folder of its states begins
NO_OPTIMIZER = "it was saved without its optimizer (save_only_model)"
ASIDE = ".saving"  # inside output_dir, so on the same disk: the rename is atomic


class CompleteCheckpoints:
    """
    Mixin for a `Trainer`: `class X(CompleteCheckpoints, DPOTrainer)`.

    Trainer writes a checkpoint in place, file by file, and deletes the older ones before anyone knows whether the new
    one is whole. Here it writes into a folder of another name; when every rank is done, rank 0 adds a manifest with
    the digest of each file, flushes all to the disk, renames the folder, and only then removes the oldest.
    """

    # Of this run; a script that sets them has them held against a checkpoint's.
    rows_digest: str | None = None
    base_digest: str | None = None  # of what LoRA's adapters are on, where no reference cache is keyed by it
    recipe: Mapping[str, Any] | None = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last checkpoint, the run has no update left; Trainer looks only after one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trainer trains without a cache of keys and values; whoever loads the model would generate without one too.
        config = self.model.config
        with patch.object(config, "use_cache", True) if hasattr(config, "use_cache") else nullcontext():
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        args, final = self.args, Path(self.args.output_dir)
        aside, limit = final / ASIDE, args.save_total_limit
        first_rank_decides(lambda: self._make_aside(aside))
        args.output_dir, args.save_total_limit = str(aside), None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if full_disk(error) is None and shutil.disk_usage(final).free > 1 << 20:
                raise
            remove(aside)
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

    def _make_aside(self, aside: Path) -> None:
        check_held()
        remove(aside)  # what a killed run left behind
        aside.mkdir(parents=True)

    def _put_in_place(self, aside: Path, final: Path, limit: int | None) -> None:
        folder = final / f"checkpoint-{self.state.global_step}"
        written = aside / folder.name
        seal(written, self.state.global_step, launched_as(self))
        if os.path.lexists(folder):
            remove(folder)  # of the same step, damaged, and stepped over when this run was resumed
        os.rename(written, folder)
        flush(final)
        shutil.rmtree(aside)
        if limit:
            # A later step's is damaged, since this run went on from before it: it must not push out a whole one.
            reached = [path for path in numbered(final) if _step(path) <= self.state.global_step]
            reached = [path for path in reached if not path.is_symlink()]  # not what this run has saved
            for old in reached[limit:]:
                if str(old) != self.state.best_model_checkpoint:
                    shutil.rmtree(old)


def launched_as(trainer: Any) -> Origin:
    """What a checkpoint depends on beside its files: processes, the way the state is split, batch, rows, recipe, …"""
    args, state = trainer.args, trainer.accelerator.state
    deepspeed = state.distributed_type == DistributedType.DEEPSPEED
    cache = getattr(trainer, "reference_cache", None)
    return Origin.with_recipe(
        trainer.recipe,
        world_size=args.world_size,
        zero_stage=state.deepspeed_plugin.zero_stage if deepspeed else None,
        batch_per_update=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        trained=Trained.of(trainer.model),
        rows=trainer.rows_digest,
        reference=trainer.base_digest if cache is None else cache.folder.name,
        versions=versions(),
    )


def fault(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint: its `damage`, or no optimizer; None if it can."""
    if reason := damage(folder):
        return reason
    files = Manifest.read(folder).files
    # Trainer would go on with a fresh optimizer. DeepSpeed's is in a folder of its own.
    has_optimizer = any(name == "optimizer.pt" or name.startswith(DEEPSPEED_STATES) for name in files)
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


def checkpoint_to_resume(
    resume: str | bool | None, output_dir: str | Path, recipe: Mapping[str, Any] | None = None
) -> str | None:
    """
    What `resume_from_checkpoint` of the recipe means: true or `auto` is `newest_complete` (None if there is none yet),
    a path is that checkpoint, which must be without a `fault`, and null or false is a fresh start.

    Args:
        resume: the key's value.
        output_dir: of this run, which need not be that of the checkpoint.
        recipe: this run's resolved one, which may differ from the checkpoint's in `MAY_CHANGE` alone.

    Raises:
        RecipeError: no such checkpoint, one of another recipe, or one that is read as pickles and is not this run's.
    """
    if resume in (None, False, "false", "no"):
        return None
    if resume in (True, "true", "auto"):
        found = newest_complete(output_dir)
    else:
        found = str(resume)
        first_rank_decides(lambda: _check_named(Path(found), Path(output_dir)))
    if found is not None and recipe is not None:
        first_rank_decides(lambda: _check_recipe(found, recipe))
    return found


def _check_named(checkpoint: Path, output_dir: Path) -> None:
    reason = fault(checkpoint) if checkpoint.is_dir() else "it is not a folder"
    if reason is not None:
        way_out = (
            _new_run(checkpoint) if reason == NO_OPTIMIZER else "name another, or `auto` for the newest whole one"
        )
        raise RecipeError(f"resume_from_checkpoint: {checkpoint}: {reason}; {way_out}")
    own = checkpoint.resolve().is_relative_to(output_dir.resolve())
    if not own and any(name.startswith(DEEPSPEED_STATES) for name in Manifest.read(checkpoint).files):
        # A manifest tells damage, not malice.
        raise RecipeError(
            f"resume_from_checkpoint: {checkpoint}: DeepSpeed unpickles its states, which runs whatever code is in "
            "them, so they are read below output_dir alone; if that is a run of your own, go on in its folder "
            f"(output_dir: {checkpoint.parent}, resume_from_checkpoint: auto), or {_new_run(checkpoint)}"
        )


def _check_recipe(checkpoint: str, recipe: Mapping[str, Any]) -> None:
    """Refuse a recipe that would make another run of the checkpoint's, and say what else it changes."""
    then = Manifest.read(Path(checkpoint)).recipe
    if then is None:
        return
    decides, may_change = differences(then, recipe)
    if decides:
        raise RecipeError(
            f"resume_from_checkpoint: {checkpoint} is of another recipe ({listed(decides)}); put back what that run "
            f"began with, or, to train by this recipe and its schedule, {_new_run(checkpoint)}"
        )
    may_change = [line for line in may_change if not line.startswith("resume_from_checkpoint:")]
    print(f"going on from {checkpoint}" + (f", with {listed(may_change)}" if may_change else ""), flush=True)


def check_fits(checkpoint: str | Path, now: Origin) -> None:
    """
    Refuse to go on from a checkpoint in a way that would not continue its run.

    With the same launch the run goes on bit for bit. Without DeepSpeed another number of processes is possible as
    long as an update keeps its batch: then the rows of every update, their order, the optimizer and the schedule are
    exactly what they would have been; sums are taken in another order (float rounding), and what is drawn at random
    in the forward pass (dropout) differs. Other versions of the libraries are told, and go on.

    Args:
        checkpoint: a folder with a manifest.
        now: `launched_as` of the trainer that would go on; what either does not know is not held against the other.

    Raises:
        RecipeError: another ZeRO stage, another number of processes under DeepSpeed, another batch per update, other
            training rows, another reference, or other trained weights.
    """
    then = Manifest.read(Path(checkpoint))
    way_out = f"or {_new_run(checkpoint)}"
    if then.zero_stage != now.zero_stage:
        was, is_now = (
            "no DeepSpeed" if stage is None else f"DeepSpeed ZeRO-{stage}"
            for stage in (then.zero_stage, now.zero_stage)
        )
        raise RecipeError(
            f"{checkpoint} was saved under {was}; this run has {is_now}, which cannot take over its optimizer; use "
            f"the launch config of that run, {way_out}"
        )
    if then.zero_stage is not None and then.world_size != now.world_size:
        raise RecipeError(
            f"{checkpoint} is split over {then.world_size} processes and this run has {now.world_size}; "
            f"start it with --num_processes {then.world_size}, {way_out}"
        )
    if then.batch_per_update != now.batch_per_update:
        raise RecipeError(
            f"{checkpoint} is of updates of {then.batch_per_update} rows and this run's have "
            f"{now.batch_per_update}; set per_device_train_batch_size × gradient_accumulation_steps × processes "
            f"to {then.batch_per_update}, {way_out}"
        )
    if then.rows and now.rows and then.rows != now.rows:
        raise RecipeError(
            f"{checkpoint} is of other training rows: the data, or what selects and tokenises it, has changed since; "
            f"put back what the run began with, {way_out}"
        )
    if then.reference and now.reference and then.reference != now.reference:
        raise RecipeError(
            f"{checkpoint} is of another reference: the weights of model_name_or_path, or their precision, have "
            f"changed since; put back what the run began with, {way_out}"
        )
    if then.trained and now.trained and then.trained != now.trained:
        raise RecipeError(
            f"{checkpoint} is of other trained weights ({then.trained.tensors} tensors there, {now.trained.tensors} "
            f"here, or others by name and shape); put back the model and trainable_parameters, {way_out}"
        )
    if rank() == 0:
        _tell_changes(checkpoint, then, now)


def _tell_changes(checkpoint: str | Path, then: Origin, now: Origin) -> None:
    """Warn of what a run goes on with although it has changed."""
    old, new = then.versions, now.versions
    changed = [f"{name} {old[name]} → {new.get(name)}" for name in old if old[name] != new.get(name)]
    if changed:
        logger.warning(
            f"going on with other versions than {checkpoint} was saved with ({', '.join(changed)}): the numbers may "
            "differ from an unbroken run"
        )
    if then.world_size != now.world_size:
        logger.warning(
            f"going on with {now.world_size} processes from {then.world_size}: the same rows in the same "
            "updates, the same optimizer and schedule; rounding and dropout masks differ from an unbroken run"
        )


def _new_run(checkpoint: str | Path) -> str:
    return f"train on from its weights as a new run (model_name_or_path: {checkpoint}, another output_dir)"


def numbered(output_dir: Path) -> list[Path]:
    """The folders checkpoint-<step> of `output_dir`, newest step first."""
    folders = [
        path
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
