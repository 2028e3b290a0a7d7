"""From `--config recipe.yaml [--key value …]` to a run: every key is used or refused, before TRL is imported."""

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from core.config.adapters import check_adapters, settle_adapters
from core.config.checks import (
    Recipe,
    announce_attention,
    check_margin,
    check_schedule,
    check_selection,
    check_sources,
    check_training,
    choose_reference_pass,
    expand_preset,
    fit_batch,
)
from core.config.keys import usage
from core.config.reading import dump, read
from core.config.schema import RECIPES, Kind, SFTRecipe
from core.config.trl_keys import MODEL
from core.config.validation import check_keys
from core.runtime.errors import RecipeError
from core.runtime.files import replaced
from core.runtime.text import masked, without_secrets

if TYPE_CHECKING:
    from trl import DPOConfig, ModelConfig, SFTConfig


@dataclass
class Resolved:
    """A recipe with its preset expanded and what follows from it filled in."""

    kind: Kind
    recipe: Recipe
    values: dict[str, Any]  # plain and nested: what recipe.yaml holds
    path: str = field(compare=False)
    overrides: list[str] = field(compare=False)
    announcements: list[str] = field(compare=False)  # what was decided for the user, a line each


@dataclass
class Settings(Resolved):
    """Before TRL is imported: its part of the recipe as plain keys."""

    model: dict[str, Any]
    training: dict[str, Any]


@dataclass
class Run(Resolved):
    """With TRL's configuration objects."""

    model: "ModelConfig"
    training: "DPOConfig | SFTConfig"


def parse(kind: Kind, argv: list[str] | None = None) -> Run:
    """`resolve`, then `build`."""
    return build(resolve(kind, argv))


def resolve(kind: Kind, argv: list[str] | None = None, world_size: int | None = None) -> Settings:
    """
    Read a recipe and its overrides, check every key, value and combination, and expand the margin's preset.

    Args:
        kind: which script asks.
        argv: the command line after the script's name; None: this process's.
        world_size: processes in the launch; None: from the launcher's WORLD_SIZE.

    Raises:
        RecipeError: all that is wrong with the keys, each with file and line; or, where nothing is, with their
            combination.
    """
    settings, wrong, contradictory = look_over(kind, argv, world_size)
    if wrong or contradictory:
        raise RecipeError("; ".join(wrong or contradictory))
    return settings


def look_over(
    kind: Kind, argv: list[str] | None = None, world_size: int | None = None
) -> tuple[Settings, list[str], list[str]]:
    """
    The same for `check.py`, which goes on with what is right.

    Returns:
        The settings without the keys that are wrong; a line for each of those; and a line for each contradiction among
        the keys that are left (which may be a consequence, if a key is wrong).

    Raises:
        RecipeError: nothing to go on with: no readable file, or a required key is missing.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(usage(kind))
        raise SystemExit(0)
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    document = read(argv)
    sections, wrong = check_keys(kind, document)
    recipe = RECIPES[kind](**sections)
    model = {key: value for key, value in document.values.items() if key in MODEL}
    training = {key: value for key, value in document.values.items() if key not in sections and key not in MODEL}
    announcements: list[str] = []
    contradictory: list[str] = []

    def hold(check: Callable[..., None], *arguments: Any) -> None:
        try:
            check(document, recipe, *arguments)
        except RecipeError as error:
            contradictory.append(str(error))

    hold(check_sources, kind)
    hold(check_training, model | training)
    hold(check_adapters, kind, model | training)
    hold(settle_adapters, kind, model, training, announcements)
    if model.get("use_peft") and recipe.trainable_parameters:
        model["lora_target_modules"] = recipe.trainable_parameters
    if kind != "sft":
        expand_preset(document, recipe, training, announcements)
        hold(check_margin)
        hold(check_selection, training)
    if kind == "dpo":
        hold(choose_reference_pass, model, training, announcements)
    # What the resolved recipe says of the batch is the recipe's own word, so that it holds on another number of GPUs.
    values = model | training | _plain(recipe)
    if kind != "evaluate":
        hold(fit_batch, training, world_size)
        hold(announce_attention, model, training, announcements)
    if "dtype" not in model:
        announcements.append("dtype float32 (TRL's default): the weights are loaded in 32 bits")
    if training.get("save_only_model"):
        announcements.append("save_only_model: checkpoints hold no optimizer, so the run cannot be resumed")
    if training.get("max_steps", -1) > 0 and "num_train_epochs" in training:
        announcements.append(f"max_steps {training['max_steps']} counts, and num_train_epochs does not")
    settings = Settings(
        kind, recipe, values, document.path, document.overrides, announcements, model=model, training=training
    )
    return settings, wrong, contradictory


def build(settings: Settings) -> Run:
    """
    The same with TRL's configuration objects, which start the process group of a launch.

    Raises:
        RecipeError: what this machine cannot do, or what transformers refuses.
    """
    # TRL takes seconds to import, so nothing above needs it.
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_cuda_available
    from trl import DPOConfig, ModelConfig, SFTConfig

    training, announcements = settings.training, [*settings.announcements]
    fp16, bf16 = training.get("fp16"), training.get("bf16")
    if fp16 and not is_torch_cuda_available():
        raise RecipeError(f"{settings.path}: fp16: true needs a GPU, and this machine has none; set fp16: false")
    if (bf16 or bf16 is None and not fp16) and not is_torch_bf16_gpu_available():
        if not training.get("use_cpu"):
            given = "is set" if bf16 else "is TRL's default"
            raise RecipeError(
                f"{settings.path}: bf16: true {given}, and this machine has no GPU for it; set bf16: false for "
                "float32, or use_cpu: true as well to run bfloat16 on the CPU"
            )
        announcements.append("bf16: true on the CPU is slow, and rounds to 3 digits; bf16: false is exact")
    internal = {
        "logging_nan_inf_filter": False,  # the one default that is not TRL's: a NaN would be logged as loss 0.0
        # The new names of the same settings: transformers would warn about the old ones, which it then fills.
        "activation_checkpointing": training.get("gradient_checkpointing", True),
        "activation_checkpointing_kwargs": training.get("gradient_checkpointing_kwargs"),
    }
    try:
        config = (SFTConfig if settings.kind == "sft" else DPOConfig)(**training, **internal)
        model = ModelConfig(**settings.model)
    except (ValueError, TypeError, ImportError, OverflowError) as error:
        raise RecipeError(f"{settings.path}: {' '.join(str(error).split())}") from error
    check_schedule(settings.path, config)
    if config.n_gpu > 1:
        raise RecipeError(
            f"one process sees {config.n_gpu} GPUs; show it one (CUDA_VISIBLE_DEVICES=0), or launch one process for "
            "each by accelerate_configs/ddp.yaml or zero3.yaml"
        )
    # ModelConfig turns a list of one into a string, which PEFT reads as a pattern for the whole name: no match.
    model.lora_target_modules = settings.model.get("lora_target_modules")
    shared = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(Resolved)}
    return Run(**shared | {"announcements": announcements}, model=model, training=config)


def save_recipe(resolved: Run, folder: str | Path) -> Path:
    """
    Write the resolved recipe to `folder`/recipe.yaml, complete or not at all and without secrets: `--config` of it is
    the same run.

    Returns:
        The file's path.
    """
    target = Path(folder) / "recipe.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = without_secrets(" ".join([resolved.path, *resolved.overrides]))
    with replaced(target) as file:
        file.write(f"# Resolved from {' '.join(origin.split())}\n{dump(masked(resolved.values))}".encode())
    return target


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Our keys for recipe.yaml: the margin and the selection in full, elsewhere what differs from the default."""
    full = {} if isinstance(recipe, SFTRecipe) else {"margin": recipe.margin, "selection": recipe.selection}
    brief = pydantic.TypeAdapter(type(recipe)).dump_python(recipe, exclude_defaults=True, exclude=set(full))
    return brief | {key: dataclasses.asdict(section) for key, section in full.items()}
