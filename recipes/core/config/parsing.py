"""From `--config recipe.yaml [--key value …]` to checked settings: every key is used or refused."""

import dataclasses
import functools
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.checks import (
    Recipe,
    check_margin,
    check_selection,
    check_sources,
    check_training,
    choose_reference_pass,
    expand_preset,
    fit_batch,
)
from core.config.reading import dump, read
from core.config.schema import SFTRecipe
from core.config.trl_keys import MODEL
from core.config.validation import SECTIONS, Kind, section_of, validate
from core.runtime.errors import RecipeError
from core.runtime.files import replaced


@dataclass
class Resolved:
    """A recipe that has passed every check, with its preset expanded and what follows from it filled in."""

    kind: Kind
    model: Any  # a ModelConfig; from `resolve`, the keys that make one
    training: Any  # a DPOConfig or SFTConfig; from `resolve`, the keys that make one
    recipe: Recipe
    values: dict[str, Any]  # plain and nested: what recipe.yaml holds
    path: str = field(compare=False)
    overrides: list[str] = field(compare=False)
    announcements: list[str] = field(compare=False)  # what was decided for the user, a line each


def parse(kind: Kind, argv: list[str] | None = None) -> Resolved:
    """`resolve`, then `build`."""
    return build(resolve(kind, argv))


def build(resolved: Resolved) -> Resolved:
    """
    The same with TRL's configuration objects, which start the process group of a launch.

    Raises:
        RecipeError: what this machine cannot do, or what transformers refuses.
    """
    # TRL takes seconds to import, so nothing above needs it.
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_cuda_available
    from trl import DPOConfig, ModelConfig, SFTConfig

    training = resolved.training
    fp16, bf16 = training.get("fp16"), training.get("bf16")
    if fp16 and not is_torch_cuda_available():
        raise RecipeError(f"{resolved.path}: fp16: true needs a GPU, and this machine has none; set fp16: false")
    if (bf16 or bf16 is None and not fp16) and not is_torch_bf16_gpu_available():
        if not training.get("use_cpu"):
            given = "is set" if bf16 else "is TRL's default"
            raise RecipeError(
                f"{resolved.path}: bf16: true {given}, and this machine has no GPU for it; set bf16: false for "
                "float32, or use_cpu: true as well to run bfloat16 on the CPU"
            )
        resolved.announcements.append("bf16: true on the CPU is slow, and rounds to 3 digits; bf16: false is exact")
    internal = {
        "logging_nan_inf_filter": False,  # the one default that is not TRL's: a NaN would be logged as loss 0.0
        # The new names of the same settings: transformers would warn about the old ones, which it then fills.
        "activation_checkpointing": training.get("gradient_checkpointing", True),
        "activation_checkpointing_kwargs": training.get("gradient_checkpointing_kwargs"),
    }
    try:
        config = (SFTConfig if resolved.kind == "sft" else DPOConfig)(**training, **internal)
        model = ModelConfig(**resolved.model)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"{resolved.path}: {' '.join(str(error).split())}") from error
    # ModelConfig turns a list of one into a string, which PEFT reads as a pattern for the whole name: no match.
    model.lora_target_modules = resolved.model.get("lora_target_modules")
    return dataclasses.replace(resolved, model=model, training=config)


def resolve(
    kind: Kind, argv: list[str] | None = None, world_size: int | None = None, faults: list[str] | None = None
) -> Resolved:
    """
    Read a recipe and its overrides, check every key, value and combination, and expand the margin's preset.

    Args:
        kind: which script asks.
        argv: the command line after the script's name; None: this process's.
        world_size: processes in the launch; None: from the launcher's WORLD_SIZE.
        faults: takes what is wrong, and the rest is resolved without the faulty keys; None: it is raised.

    Raises:
        RecipeError: the first stage that finds something wrong names all that it found, each with file and line. With
            `faults`, only what leaves nothing to go on with: no readable file, or a required key that is missing.
    """

    def check(step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(document, *arguments)
        except RecipeError as error:
            if faults is None:
                raise
            faults.append(str(error))

    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(usage(kind))
        raise SystemExit(0)
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    document = read(argv)
    sections = validate(kind, document, faults)
    given = document.values
    own = set(typing.get_type_hints(SECTIONS[kind]))
    recipe = SECTIONS[kind](**{key: sections[key] for key in given if key in own})
    model = {key: value for key, value in given.items() if key in MODEL}
    training = {key: value for key, value in given.items() if key not in own and key not in MODEL}
    announcements: list[str] = []

    check(functools.partial(check_sources, kind), recipe)
    check(check_training, recipe, model | training)
    if model.get("use_peft") and recipe.trainable_parameters:
        model["lora_target_modules"] = recipe.trainable_parameters
    if kind != "sft":
        expand_preset(document, recipe, training, announcements)
        check(check_margin, recipe)
        check(check_selection, recipe, training)
    if kind == "dpo":
        check(choose_reference_pass, recipe, model, training, announcements)
    # What the resolved recipe says of the batch is the recipe's own word, so that it holds on another number of GPUs.
    values = model | training | _plain(recipe)
    if kind != "evaluate":
        check(fit_batch, recipe, training, world_size)
    if "dtype" not in model:
        announcements.append("dtype float32 (TRL's default): the weights are loaded and saved in 32 bits")
    if training.get("save_only_model"):
        announcements.append("save_only_model: checkpoints hold no optimizer, so the run cannot be resumed")
    if training.get("max_steps", -1) > 0 and "num_train_epochs" in training:
        announcements.append(f"max_steps {training['max_steps']} counts, and num_train_epochs does not")
    return Resolved(kind, model, training, recipe, values, document.path, document.overrides, announcements)


def save_recipe(resolved: Resolved, folder: str | Path) -> Path:
    """
    Write the resolved recipe to `folder`/recipe.yaml, complete or not at all: `--config` of it is the same run.

    Returns:
        The file's path.
    """
    target = Path(folder) / "recipe.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = " ".join([resolved.path, *resolved.overrides])
    with replaced(target) as file:
        file.write(f"# Resolved from {' '.join(origin.split())}\n{dump(resolved.values)}".encode())
    return target


def usage(kind: Kind) -> str:
    lines = [
        f"usage: accelerate launch recipes/{kind}.py --config RECIPE.yaml [--key value | --key=value …]",
        "",
        "A key may be nested (--margin.preset dpo, --datasets.0.path rows.jsonl); values are YAML.",
        "Keys of this project:",
    ]
    for entry in dataclasses.fields(SECTIONS[kind]):
        below = section_of(typing.get_type_hints(SECTIONS[kind])[entry.name])
        inner = f": {', '.join(f.name for f in dataclasses.fields(below))}" if below else ""
        lines.append(f"  {entry.name}{inner}")
    trl = "SFTConfig" if kind == "sft" else "DPOConfig"
    return "\n".join(
        [*lines, f"and the keys of TRL's {trl} and ModelConfig, as far as recipes/core/config/trl_keys.py lists them."]
    )


# --------------------------------------------------------------------------------------------------- resolved recipe


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Our keys for recipe.yaml: the margin and the selection in full, elsewhere what differs from the default."""
    values = {key: _brief(getattr(recipe, key)) for key in _changed(recipe) if key not in ("margin", "selection")}
    if not isinstance(recipe, SFTRecipe):
        values["margin"] = dataclasses.asdict(recipe.margin)
        values["selection"] = dataclasses.asdict(recipe.selection)
    return values


def _changed(section: Any) -> list[str]:
    names = []
    for entry in dataclasses.fields(section):
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        if getattr(section, entry.name) != default:
            names.append(entry.name)
    return names


def _brief(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _brief(getattr(value, name)) for name in _changed(value)}
    return [_brief(item) for item in value] if isinstance(value, list) else value
