"""A launch config (`accelerate launch --config_file FILE`) as the launcher reads it, and what it cannot do."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from core.runtime.environment import deepspeed_is_started
from core.runtime.errors import RecipeError
from core.runtime.text import did_you_mean

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")


@dataclass(frozen=True)
class Launch:
    """How the processes of a run start and what they share out. `world_size` is theirs on all machines together."""

    path: str
    kind: str  # accelerate's distributed_type
    processes: int  # what the file, or --processes, asks for
    machines: int = 1
    use_cpu: bool = False
    mixed_precision: str = "no"
    zero_stage: int = 0  # 0: no DeepSpeed
    offload_optimizer: bool = False
    offload_param: bool = False
    saves_weights: bool = True  # ZeRO-3: zero3_save_16bit_model
    multinode_launcher: str | None = None

    @property
    def world_size(self) -> int:
        """accelerate starts one process under distributed_type NO, and without a word."""
        return 1 if self.kind == "NO" else self.processes

    def __str__(self) -> str:
        several = self.world_size > 1
        device = ("CPU processes" if several else "CPU process") if self.use_cpu else ("GPUs" if several else "GPU")
        machines = f" on {self.machines} machines" if self.machines > 1 else ""
        split = f"ZeRO-{self.zero_stage}" if self.zero_stage else "DDP" if several else None
        offloaded = [f"{part} offloaded" for part in ("optimizer", "param") if getattr(self, f"offload_{part}")]
        return ", ".join([f"{self.world_size} {device}{machines}", *([split] if split else []), *offloaded])


def read_launch(path: str, processes: int | None = None) -> Launch:
    """
    Read a launch config.

    Args:
        path: the YAML file.
        processes: what `accelerate launch --num_processes` would put in its place.

    Raises:
        RecipeError: no such file, or not one that the pinned accelerate takes.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: the launch config cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or "distributed_type" not in given:
        raise RecipeError(f"{path}: no launch config (it has no distributed_type); take one of accelerate_configs/")
    inside = given.get("deepspeed_config") or {}
    _check_keys(path, given, inside)
    kind = {False: "NO"}.get(given["distributed_type"], given["distributed_type"])  # YAML reads a bare NO as false
    if kind not in KINDS:
        raise RecipeError(
            f"{path}: distributed_type {kind} is not one that the recipes are made for; take one of "
            f"{', '.join(KINDS)}{did_you_mean(str(kind), KINDS)}"
        )
    number = processes or given.get("num_processes")
    if not isinstance(number, int) or number < 1:
        raise RecipeError(
            f"{path}: num_processes is {number!r}; give the number of processes on all machines together"
        )
    zero = _zero(path, inside) if kind == "DEEPSPEED" else {}
    return Launch(
        path,
        kind,
        number,
        machines=given.get("num_machines") or 1,
        use_cpu=bool(given.get("use_cpu")),
        mixed_precision=str(given.get("mixed_precision") or "no"),
        **zero,
    )


def launch_faults(launch: Launch, training: dict[str, Any]) -> list[str]:
    """
    Shapes of cluster under which the run would fail, or would go on as another run without a word; each with the way
    out. What the recipe says of the batch is `checks.fit_batch`'s business.
    """
    faults, where = [], launch.path
    if launch.kind == "NO" and launch.processes > 1:
        faults.append(
            f"{where}: distributed_type NO starts one process, whatever num_processes ({launch.processes}) says; take "
            "MULTI_GPU (accelerate_configs/ddp.yaml) or DEEPSPEED (accelerate_configs/zero3.yaml)"
        )
    if launch.processes % launch.machines:
        faults.append(
            f"{where}: num_processes {launch.processes} (in total) cannot be shared out to num_machines "
            f"{launch.machines}; make it a multiple"
        )
    if launch.machines > 1 and launch.zero_stage and launch.multinode_launcher != "standard":
        faults.append(
            f"{where}: over {launch.machines} machines it needs deepspeed_multinode_launcher: standard, or DeepSpeed "
            "trains on one process without a word; take accelerate_configs/zero3-nodes.yaml"
        )
    if not launch.saves_weights:
        faults.append(f"{where}: without zero3_save_16bit_model: true the saved model would have no weights; set it")
    if launch.use_cpu and not training.get("use_cpu"):
        faults.append(f"{where}: use_cpu: true needs it in the recipe as well; add --use_cpu true")
    if training.get("use_cpu") and not launch.use_cpu:
        faults.append(f"{where}: the recipe has use_cpu: true, and the launch config does not; set it in both")
    wanted = "fp16" if training.get("fp16") else "bf16" if training.get("bf16", True) else "no"
    if launch.mixed_precision not in ("no", wanted):
        said = f"{wanted}: true" if wanted != "no" else "bf16: false"
        faults.append(
            f"{where}: mixed_precision: {launch.mixed_precision} is started where the recipe has {said}; make them "
            "agree"
        )
    return faults


def check_launched(training: dict[str, Any], num_processes: int | None = None) -> None:
    """
    Hold the launch that this process is part of against the recipe, as far as its environment tells. A launcher that
    misreads its configuration starts fewer processes, or none of DeepSpeed, and trains on without a word.

    Args:
        training: the recipe's training arguments.
        num_processes: processes on all nodes together; None: any number.

    Raises:
        RecipeError: they differ, or one of `launch_faults`; on every rank.
    """
    started, deepspeed = int(os.environ.get("WORLD_SIZE", 1)), deepspeed_is_started()
    if num_processes is not None and started != num_processes:
        raise RecipeError(
            f"the recipe is for num_processes: {num_processes}, but {started} started; launch it with "
            f"`accelerate launch --num_processes {num_processes}` and a config file of accelerate_configs/ that has "
            "them (without --cpu, which starts a single process), or set num_processes in the recipe",
            everywhere=True,
        )
    if deepspeed_is_asked_for() and not deepspeed:
        raise RecipeError(
            "the launch config is one of DeepSpeed, but the launcher did not start it; launch without --cpu (a config "
            "file with use_cpu: true runs DeepSpeed on the CPU), or use accelerate_configs/cpu.yaml",
            everywhere=True,
        )
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return  # started by something else
    names = ("config_file", "zero_stage", "zero3_save_16bit_model")
    config_file, stage, saves = (os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}") for name in names)
    inside = {"zero_stage": stage or 0, "zero3_save_16bit_model": saves == "true"}
    inside |= {"deepspeed_config_file": config_file, "deepspeed_multinode_launcher": "standard"}
    launch = Launch(
        "the launch config",
        "DEEPSPEED" if deepspeed else "MULTI_GPU",
        started,
        use_cpu=bool(training.get("use_cpu")),  # the environment does not tell it under DeepSpeed
        mixed_precision=os.environ["ACCELERATE_MIXED_PRECISION"],
        **(_zero("the launch config", inside) if deepspeed else {}),
    )
    if faults := launch_faults(launch, training):
        raise RecipeError("; ".join(faults), everywhere=True)


def deepspeed_is_asked_for() -> bool | None:
    """Whether the config file of the `accelerate launch` above this process is one of DeepSpeed; None: not known."""
    try:
        command = psutil.Process().parent().cmdline()
        config = yaml.safe_load(Path(command[command.index("--config_file") + 1]).read_text())
        return config["distributed_type"] == "DEEPSPEED" if "launch" in " ".join(command) else None
    except (psutil.Error, OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError):
        return None


def _check_keys(path: str, given: dict[str, Any], inside: dict[str, Any]) -> None:
    from accelerate.commands.config.config_args import load_config_from_file  # with torch, which takes seconds
    from accelerate.commands.launch import launch_command_parser

    # accelerate refuses unknown keys at the top and takes anything inside, where a typo is a setting lost.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for key in inside:
        if key not in known:
            raise RecipeError(f"{path}: deepspeed_config.{key}: unknown key{did_you_mean(key, known)}")
    try:
        load_config_from_file(path)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path}: accelerate refuses it: {' '.join(str(error).split())}") from error


def _zero(path: str, inside: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings, from the keys of accelerate or from the JSON that they name."""
    file = inside.get("deepspeed_config_file")
    if file is None:
        stage = inside.get("zero_stage", 2)
        devices = {part: inside.get(f"offload_{part}_device", "none") for part in ("optimizer", "param")}
        saves = inside.get("zero3_save_16bit_model", False)
    else:
        try:
            settings = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: deepspeed_config_file {file} cannot be read: {error}") from error
        stage = settings.get("stage", 0)
        devices = {part: settings.get(f"offload_{part}", {}).get("device", "none") for part in ("optimizer", "param")}
        saves = settings.get("stage3_gather_16bit_weights_on_model_save", False)
    return {
        "zero_stage": int(stage),
        "offload_optimizer": devices["optimizer"] not in (None, "none"),
        "offload_param": devices["param"] not in (None, "none"),
        "saves_weights": bool(saves) or int(stage) != 3,
        "multinode_launcher": inside.get("deepspeed_multinode_launcher"),
    }
