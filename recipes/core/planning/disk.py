"""Disk that a run's checkpoints and its final model take, held against what is free before the run starts."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from core.config.parsing import Run
from core.modeling.parameters import count_parameters
from core.runtime.errors import RecipeError
from core.runtime.output_folder import existing_parent
from core.runtime.ranks import first_rank_decides
from core.training.checkpoints import ASIDE, numbered

# Tensors of a trained weight's size that an optimizer keeps, of 4 bytes each; adafactor's are of its rows and columns.
OPTIMIZER_STATES: dict[str, float] = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0,
    "paged_adamw_32bit": 2,
}  # fmt: skip
EIGHT_BITS = 2 * (1 + 4 / 256) / 4  # two states of a byte, and a constant for each 256 of them
OPTIMIZER_STATES |= dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), EIGHT_BITS)


@dataclass(frozen=True)
class Saved:
    """What one run writes. N parameters, P of them trained, w bytes a weight."""

    total: int  # N
    trained: int  # P
    weight_bytes: int  # w, of a frozen weight as it is saved
    zero_stage: int  # 0: no DeepSpeed
    adapter: bool = False  # the model is saved as an adapter: its P weights alone
    trained_bytes: int = 4  # of a trained weight; under DeepSpeed w

    def model(self) -> int:
        """The final model at most: it may be rounded to less (training/saving.py)."""
        frozen = 0 if self.adapter else self.total - self.trained
        return frozen * self.weight_bytes + self.trained * self.trained_bytes

    def checkpoint(self, optim: str, only_model: bool) -> int:
        """
        The model and, for a resume, k float32 states of the optimizer for each trained weight, of all processes
        together; under DeepSpeed a float32 master beside them. DeepSpeed also writes the weights once more: all of
        them under ZeRO-2, the frozen ones under ZeRO-3.
        """
        if only_model:
            return self.model()
        k = OPTIMIZER_STATES[optim]
        if not self.zero_stage:
            return self.model() + math.ceil(self.trained * k * self.trained_bytes)
        again = self.total - (self.trained if self.zero_stage == 3 else 0)
        return self.model() + self.trained * (k + 1) * 4 + again * self.weight_bytes


def checkpoints_kept(args: Any, steps: int) -> int:
    """
    The most checkpoints that are on the disk at a time in a run of `steps` updates: `save_total_limit` of them, and
    one more while it is written, since the oldest goes only when the newest is whole.
    """
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
        saves = math.ceil(steps / every)  # the last update is saved too
    else:
        saves = math.ceil(args.num_train_epochs)
    return saves if args.save_total_limit is None else min(saves, args.save_total_limit + 1)


@dataclass(frozen=True)
class Room:
    """What a run takes in its output folder."""

    needed: int  # bytes
    there: int  # of these, when a run goes on: written already
    what: str

    def __str__(self) -> str:
        known = f", of which {self.there / 1e9:.1f} GB are there" if self.there else ""
        return f"{self.what}: {self.needed / 1e9:.1f} GB{known}"

    def check(self, folder: str | Path) -> None:
        """
        Raises:
            RecipeError: less than what is missing is free where `folder` is or will be.
        """
        free = shutil.disk_usage(existing_parent(Path(folder))).free
        if free < self.needed - self.there:
            known = f", of which {self.there / 1e9:.1f} GB are there," if self.there else ""
            raise RecipeError(
                f"{folder}: {self.what} need {self.needed / 1e9:.1f} GB{known} and {free / 1e9:.1f} GB are free on "
                "that disk; make room, choose another output_dir, or keep fewer checkpoints (save_total_limit)"
            )


def room_for(saved: Saved, args: Any, steps: int) -> Room:
    """
    What a run of `steps` updates takes, and what of it a run that goes on has written: the checkpoints that stay while
    the next one is written, what an interrupted save left behind, which goes before that, and final weights, written
    over.
    """
    kept, each = checkpoints_kept(args, steps), saved.checkpoint(args.optim, args.save_only_model)
    checkpoints = f"{kept} checkpoint{'s' if kept > 1 else ''} of {each / 1e9:.1f} GB and " if kept else ""
    folder, stay = Path(args.output_dir), kept
    if args.save_total_limit is not None:
        stay = min(kept, args.save_total_limit)
    files = [path for name in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(name)]
    for inside in (folder / ASIDE, *numbered(folder)[:stay]):
        files += inside.rglob("*")
    there = sum(path.stat().st_size for path in files if path.is_file())
    return Room(kept * each + saved.model(), there, f"{checkpoints}the final weights")


def updates_in_all(args: Any, updates: int) -> int:
    """Updates of a run with `updates` in an epoch."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)


def check_room(model: PreTrainedModel, resolved: Run, rows: int) -> None:
    """
    For the start of a run, on every rank.

    Args:
        model: the policy, its trainable parameters chosen.
        rows: that an epoch trains on at least.

    Raises:
        RecipeError: the checkpoints would not fit on the disk of output_dir.
    """
    args, adapter = resolved.training, resolved.model.use_peft
    trained, total = count_parameters(model)
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    # An adapter is not there yet, and is small.
    of = {weight.requires_grad: weight.dtype.itemsize for weight in model.parameters()}
    width = of.get(True, 4)
    if stage and args.mixed_precision != "no":
        of, width = {}, 2  # what DeepSpeed casts them to
    saved = Saved(0 if adapter else total, 0 if adapter else trained, of.get(False, width), stage, trained_bytes=width)
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = updates_in_all(args, math.ceil(rows / per_update))
    first_rank_decides(lambda: room_for(saved, args, steps).check(args.output_dir))
