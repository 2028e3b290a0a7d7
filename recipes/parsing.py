"""From `--config recipe.yaml [--key value …]` to checked settings: every key is used or refused."""

import dataclasses
import importlib.util
import json
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic

from arguments import EvaluateRecipe, Margin, PreferenceRecipe, Replay, SFTRecipe
from errors import RecipeError
from losses import PRESETS
from reading import Document, Keys, did_you_mean, dotted, dump, read, show
from trl_keys import DEFAULTS, KINDS, MODEL, RENAMED

Kind = Literal["dpo", "sft", "evaluate"]
Recipe = PreferenceRecipe | SFTRecipe | EvaluateRecipe
SECTIONS: dict[Kind, type] = {"dpo": PreferenceRecipe, "sft": SFTRecipe, "evaluate": EvaluateRecipe}
REQUIRED = ("model_name_or_path", "output_dir", "datasets")
MARGIN_SETTINGS = ("a", "b", "k", "c", "phi", "link", "scaled", "p", "epsilon", "length_normalized", "reference_free")
PAIR_CLASSES = ("safe/safe", "safe/unsafe", "unsafe/safe", "unsafe/unsafe", "unlabelled")
LINK_KEYS = {"scaled": "squared", "p": "signed", "epsilon": "soft"}  # which link reads the key


@dataclass
class Settings:
    """A recipe that has passed every check. `model` and `training` hold what goes to TRL's classes."""

    kind: Kind
    model: dict[str, Any]
    training: dict[str, Any]
    recipe: Recipe
    values: dict[str, Any]  # resolved, plain and nested: what recipe.yaml holds
    path: str = field(compare=False)
    overrides: list[str] = field(compare=False)
    announcements: list[str] = field(compare=False)  # what was decided for the user, a line each


@dataclass
class Resolved:
    """Settings with TRL's objects built: `model` is a ModelConfig, `training` a DPOConfig or SFTConfig."""

    model: Any
    training: Any
    recipe: Recipe
    values: dict[str, Any]
    path: str = field(compare=False)
    overrides: list[str] = field(compare=False)
    announcements: list[str] = field(compare=False)


def parse(kind: Kind, argv: list[str] | None = None) -> Resolved:
    """
    Check a recipe (see `resolve`) and build TRL's configuration objects, which start the process group of a launch.

    Raises:
        RecipeError: what `resolve` finds, what this machine cannot do, or what transformers refuses.
    """
    settings = resolve(kind, argv)
    # TRL takes seconds to import, so nothing above needs it.
    from transformers.utils import is_torch_bf16_gpu_available
    from trl import DPOConfig, ModelConfig, SFTConfig

    training = settings.training
    bf16 = training.get("bf16")
    if (bf16 or bf16 is None and not training.get("fp16")) and not is_torch_bf16_gpu_available():
        if not training.get("use_cpu"):
            given = "is set" if bf16 else "is TRL's default"
            raise RecipeError(
                f"{settings.path}: bf16: true {given}, and this machine has no GPU for it; set bf16: false for "
                "float32, or use_cpu: true as well to run bfloat16 on the CPU"
            )
        settings.announcements.append("bf16: true on the CPU is slow, and rounds to 3 digits; bf16: false is exact")
    try:
        # The one default that is not TRL's: a NaN would be logged as loss 0.0.
        config = (SFTConfig if kind == "sft" else DPOConfig)(**training, logging_nan_inf_filter=False)
        model = ModelConfig(**settings.model)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"{settings.path}: {' '.join(str(error).split())}") from error
    # ModelConfig turns a list of one into a string, which PEFT reads as a pattern for the whole name: no match.
    model.lora_target_modules = settings.model.get("lora_target_modules")
    return Resolved(
        model, config, settings.recipe, settings.values, settings.path, settings.overrides, settings.announcements
    )


def resolve(kind: Kind, argv: list[str] | None = None, world_size: int | None = None) -> Settings:
    """
    Read a recipe and its overrides, check every key, value and combination, and expand the margin's preset.

    Args:
        kind: which script asks.
        argv: the command line after the script's name; None: this process's.
        world_size: processes in the launch; None: from the launcher's WORLD_SIZE.

    Raises:
        RecipeError: the first stage that finds something wrong names all that it found, each with file and line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(usage(kind))
        raise SystemExit(0)
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    document = read(argv)
    sections = _checked(kind, document)
    given = document.values
    own = set(typing.get_type_hints(SECTIONS[kind]))
    recipe = SECTIONS[kind](**{key: sections[key] for key in given if key in own})
    model = {key: value for key, value in given.items() if key in MODEL}
    training = {key: value for key, value in given.items() if key not in own and key not in MODEL}
    announcements: list[str] = []

    _check_sources(kind, document, recipe)
    _check_training(document, recipe, model | training)
    if model.get("use_peft") and recipe.trainable_parameters:
        model["lora_target_modules"] = recipe.trainable_parameters
    if kind != "sft":
        _expand_preset(document, recipe, training, announcements)
        _check_margin(document, recipe)
        _check_selection(document, recipe, training)
    if kind == "dpo":
        _choose_reference_pass(document, recipe, model, training, announcements)
    # What the resolved recipe says of the batch is the recipe's own word, so that it holds on another number of GPUs.
    values = model | training | _plain(recipe)
    if kind != "evaluate":
        _fit_batch(document, recipe, training, world_size)
    if "dtype" not in model:
        announcements.append("dtype float32 (TRL's default): the weights are loaded and saved in 32 bits")
    if training.get("save_only_model"):
        announcements.append("save_only_model: checkpoints hold no optimizer, so the run cannot be resumed")
    if training.get("max_steps", -1) > 0 and "num_train_epochs" in training:
        announcements.append(f"max_steps {training['max_steps']} counts, and num_train_epochs does not")
    return Settings(kind, model, training, recipe, values, document.path, document.overrides, announcements)


def save_recipe(resolved: Settings | Resolved, folder: str | Path) -> Path:
    """
    Write the resolved recipe to `folder`/recipe.yaml, complete or not at all: `--config` of it is the same run.

    Returns:
        The file's path.
    """
    target = Path(folder) / "recipe.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = " ".join([resolved.path, *resolved.overrides])
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_text(f"# Resolved from {' '.join(origin.split())}\n{dump(resolved.values)}", encoding="utf-8")
    os.replace(aside, target)
    return target


def usage(kind: Kind) -> str:
    lines = [
        f"usage: accelerate launch recipes/{kind}.py --config RECIPE.yaml [--key value | --key=value …]",
        "",
        "A key may be nested (--margin.preset dpo, --datasets.0.path rows.jsonl); values are YAML.",
        "Keys of this project:",
    ]
    for entry in dataclasses.fields(SECTIONS[kind]):
        below = _section(typing.get_type_hints(SECTIONS[kind])[entry.name])
        inner = f": {', '.join(f.name for f in dataclasses.fields(below))}" if below else ""
        lines.append(f"  {entry.name}{inner}")
    trl = "SFTConfig" if kind == "sft" else "DPOConfig"
    return "\n".join(
        [*lines, f"and the keys of TRL's {trl} and ModelConfig, as far as recipes/trl_keys.py lists them."]
    )


# ------------------------------------------------------------------------------------------- keys, types and ranges


def _checked(kind: Kind, document: Document) -> dict[str, Any]:
    """The values with their types checked, sections as dataclasses; keys that may only be off are taken out."""
    accepted, refused = KINDS[kind]
    problems = []
    for key in [key for key in document.values if key in refused]:
        # What is refused may be said to be off: that is what it is.
        if document.values.pop(key) not in (None, False):
            problems.append((document.place((key,)), f"{key}: {refused[key]}"))
    hints = accepted | typing.get_type_hints(SECTIONS[kind], include_extras=True)
    required = [key for key in REQUIRED if not (kind == "evaluate" and key == "datasets")]
    schema = pydantic.create_model(
        "Recipe",
        __config__=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        **{key: (hint, ... if key in required else None) for key, hint in hints.items()},
    )
    checked = None
    try:
        # As JSON, since pydantic is strict about values but takes a mapping for a dataclass only from there.
        checked = schema.model_validate_json(json.dumps(document.values))
    except pydantic.ValidationError as error:
        problems += _problems(error, document, hints)
    if problems:
        raise RecipeError("; ".join(dict.fromkeys(f"{place}: {problem}" for place, problem in problems)))
    return {key: getattr(checked, key) for key in document.values}


def _problems(error: pydantic.ValidationError, document: Document, hints: dict[str, Any]) -> list[tuple[str, str]]:
    """Pydantic's errors, one for each value, as (place, problem)."""
    found: dict[Keys, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_keys_of(item, document.values), []).append(item)
    problems = []
    for keys, items in found.items():
        if any(other[: len(keys)] == keys for other in found if other != keys):
            continue  # a union: what is wrong inside the list says more than that it is no string either
        kinds = {item["type"] for item in items}
        if kinds & {"extra_forbidden", "unexpected_keyword_argument"}:
            problem = f"unknown key{_nearest_key(keys, hints)}"
        elif "missing" in kinds:
            problem = "is missing"
        else:
            wants = " or ".join(dict.fromkeys(_wanted(item) for item in items))
            problem = f"must be {wants}, not {show(items[0]['input'])}{_nearest_value(items)}"
        problems.append((document.place(keys), f"{dotted(keys)}: {problem}"))
    return problems


def _keys_of(item: dict[str, Any], values: Any) -> Keys:
    """The way to the faulty value, without the branches of unions that pydantic puts between."""
    keys: list[str | int] = []
    for part in item["loc"]:
        if isinstance(values, dict) and part in values or isinstance(values, list) and isinstance(part, int):
            values = values[part]
            keys.append(part)
    return (*keys, item["loc"][-1]) if item["type"] == "missing" else tuple(keys)


def _wanted(item: dict[str, Any]) -> str:
    words = item["msg"].removeprefix("Input should be ").split(" after validation")[0]
    plain = {
        "a valid integer": "an integer",
        "a valid number": "a number",
        "a valid string": "a string",
        "a valid boolean": "true or false",
        "a valid array": "a list",
        "a valid list": "a list",
        "an object": "a mapping",
    }
    return plain.get(words, words[0].lower() + words[1:])


def _nearest_value(items: list[dict[str, Any]]) -> str:
    allowed = [word for item in items for word in re.findall("'([^']+)'", item.get("ctx", {}).get("expected", ""))]
    return did_you_mean(items[0]["input"], allowed) if isinstance(items[0]["input"], str) else ""


def _nearest_key(keys: Keys, hints: dict[str, Any]) -> str:
    level, word = hints, str(keys[-1])
    for part in keys[:-1]:
        if isinstance(part, str):
            level = typing.get_type_hints(_section(level[part]))
    if len(keys) == 1 and word in RENAMED:
        return f"; did you mean {RENAMED[word]}?"
    if near := did_you_mean(word, level):
        return near
    elsewhere = [path for path in _all_keys(hints) if path.split(".")[-1] == word.split(".")[-1]]
    if elsewhere:
        where = ", a key within a section" if "." in elsewhere[0] else ", at the top level"
        return f"; did you mean {' or '.join(elsewhere)}{where}?"
    if len(keys) > 1:
        return f"; known here: {', '.join(level)}"
    others = [name for name in SECTIONS if word in KINDS[name][0] or word in typing.get_type_hints(SECTIONS[name])]
    return f"; it is a key of recipes/{others[0]}.py" if others else ""


def _all_keys(hints: dict[str, Any], above: str = "") -> list[str]:
    paths = []
    for key, hint in hints.items():
        paths.append(above + key)
        if section := _section(hint):
            paths += _all_keys(typing.get_type_hints(section), f"{above}{key}.")
    return paths


def _section(hint: Any) -> type | None:
    """The dataclass in a type such as `Score | None` or `list[DatasetEntry]`."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for inner in typing.get_args(hint) if (found := _section(inner))), None)


# ------------------------------------------------------------------------------------------------------ combinations


def _check_sources(kind: Kind, document: Document, recipe: Recipe) -> None:
    if kind == "evaluate" and not recipe.datasets and recipe.prompts is None:
        raise RecipeError(f"{document.path}: nothing to evaluate; give datasets, or prompts")
    if kind != "evaluate" and not recipe.datasets:
        raise document.refuse(("datasets",), "is empty; give at least one source of rows")
    for index, entry in enumerate(recipe.datasets):
        if kind == "sft" and entry.role == "buffer":
            raise document.refuse(("datasets", index, "role"), "an SFT stage replays nothing; remove it")
    if recipe.datasets and all(entry.role == "buffer" for entry in recipe.datasets):
        raise document.refuse(("datasets",), "all entries are buffer; an epoch is the task set, so one must be a task")


def _check_training(document: Document, recipe: Recipe, given: dict[str, Any]) -> None:
    setting = DEFAULTS | given
    if setting["fp16"] and given.get("bf16"):
        raise document.refuse(("bf16",), "fp16 is true as well; keep one")
    if not recipe.eval_datasets:
        for key, off in (("eval_strategy", "no"), ("eval_on_start", False), ("load_best_model_at_end", False)):
            if setting[key] != off:
                raise document.refuse((key,), "there is nothing to evaluate on; give eval_datasets, or remove it")
    if setting["load_best_model_at_end"] and setting["eval_strategy"] == "no":
        raise document.refuse(("load_best_model_at_end",), "needs eval_strategy: steps or epoch")
    for tracker in [setting["report_to"]] if isinstance(setting["report_to"], str) else setting["report_to"]:
        if tracker != "none" and importlib.util.find_spec(tracker) is None:
            raise document.refuse(("report_to",), f"{tracker} is not installed; run `pip install {tracker}`")
    if not setting["use_peft"]:
        for key in given:
            if key.startswith("lora_") or key in ("use_rslora", "use_dora"):
                raise document.refuse((key,), "has no effect without use_peft: true; set that, or remove the key")
    targets = given.get("lora_target_modules")
    if setting["use_peft"] and recipe.trainable_parameters and targets is not None:
        if targets not in (recipe.trainable_parameters, *recipe.trainable_parameters):
            raise document.refuse(
                ("lora_target_modules",), "differs from trainable_parameters, which name LoRA's targets; keep one"
            )
    flash = str(setting["attn_implementation"]).startswith("flash_attention")
    packs = setting["padding_free"] or setting["packing"] and setting["packing_strategy"] != "wrapped"
    if packs and not flash:
        key = "padding_free" if setting["padding_free"] else "packing"
        raise document.refuse(
            (key,), "conversations would see each other without attn_implementation: flash_attention_2; set false"
        )


def _expand_preset(document: Document, recipe: Recipe, training: dict[str, Any], announcements: list[str]) -> None:
    """Put the preset's numbers where the recipe gives none of its own, and say so."""
    margin, selection = recipe.margin, recipe.selection
    given = document.values.get("margin") or {}
    if not given:
        margin.preset = "dpo"
        announcements.append("margin: not given, so plain DPO")
    if margin.preset is not None:
        preset = PRESETS[margin.preset]
        own = {
            "learning_rate": training.get("learning_rate"),
            "beta": training.get("beta"),
            "labels": selection.labels,
        }
        own |= {key: value for key, value in given.items() if key != "preset"}
        for key, value in preset.items():
            if own.get(key) is not None and own[key] != value:
                name = (
                    key
                    if key in ("beta", "learning_rate")
                    else f"selection.{key}"
                    if key == "labels"
                    else f"margin.{key}"
                )
                announcements.append(f"{name} {own[key]} is the recipe's own; preset {margin.preset} has {value}")
            elif key in ("beta", "learning_rate"):
                training[key] = value
            elif key == "labels":
                selection.labels = value
            elif key not in given:
                setattr(margin, key, value)
    training.setdefault("beta", DEFAULTS["beta"])
    if selection.labels is None:
        selection.labels = "helpful"
    numbers = " ".join(f"{key}={getattr(margin, key)}" for key in MARGIN_SETTINGS)
    name = f"preset {margin.preset}" if margin.preset else "without preset"
    announcements.append(f"margin {name}: {numbers}, beta={training['beta']}, labels={selection.labels}")


def _check_margin(document: Document, recipe: Recipe) -> None:
    margin = recipe.margin
    origin = f" (from preset {margin.preset})" if margin.preset else ""
    for key, link in LINK_KEYS.items():
        if margin.link != link and getattr(margin, key) != getattr(Margin, key):
            value = show(getattr(margin, key)) + ("" if key in document.values["margin"] else origin)
            raise document.refuse(
                ("margin", key), f"{value} is read by link {link}, and the link is {margin.link}; remove one of them"
            )
    for key, default, weights in (("phi", "identity", "k"), ("indicator", "safe", "ab")):
        if getattr(margin, key) != default and not any(getattr(margin, weight) for weight in weights):
            raise document.refuse(
                ("margin", key), f"has no effect while {' and '.join(weights)} are 0; set them, or remove it"
            )
    for name, entries in (("datasets", recipe.datasets), ("eval_datasets", recipe.eval_datasets)):
        for index, entry in enumerate(entries):
            columns = entry.columns
            if (
                margin.k
                and columns.scores is None
                and (columns.score_chosen is None or columns.score_rejected is None)
            ):
                raise document.refuse(
                    (name, index, "columns"),
                    f"margin.k = {margin.k:g}{origin} needs scores; map scores, or score_chosen and score_rejected",
                )


def _check_selection(document: Document, recipe: Recipe, training: dict[str, Any]) -> None:
    selection, margin = recipe.selection, recipe.margin
    safety = ("safe", "severity", "chosen_safe", "chosen_severity")
    for index, entry in enumerate(recipe.datasets):
        if entry.role == "task" and all(getattr(entry.columns, name) is None for name in safety):
            needs = f"selection.labels: {selection.labels}" if selection.labels != "helpful" else None
            needs = needs or ("margin.a and margin.b" if margin.a or margin.b else None)
            if needs:
                raise document.refuse(
                    ("datasets", index, "columns"),
                    f"{needs} needs safety labels; map safe, or chosen_safe and rejected_safe (or severities)",
                )
    if (score := selection.score) is not None:
        if (score.keep is None) == (score.band is None):
            raise document.refuse(("selection", "score"), "give either keep or band")
        if score.band and not 0 <= score.band[0] < score.band[1] <= 1:
            raise document.refuse(("selection", "score", "band"), f"{score.band} must rise within 0 and 1")
    if (quotas := selection.quotas) is not None and quotas.by == "pair_class":
        for name in quotas.limits:
            if name not in PAIR_CLASSES:
                hint = did_you_mean(name, PAIR_CLASSES) or f"; there are {', '.join(PAIR_CLASSES)}"
                raise document.refuse(("selection", "quotas", "limits", name), f"no such pair class{hint}")
    replay, batch = selection.replay, (DEFAULTS | training)["per_device_train_batch_size"]
    if any(entry.role == "buffer" for entry in recipe.datasets):
        if batch % (replay.task + replay.buffer):
            raise document.refuse(
                ("per_device_train_batch_size",),
                f"{batch} pairs cannot be split {replay.task} task to {replay.buffer} buffer (selection.replay); make "
                f"it a multiple of {replay.task + replay.buffer}",
            )
    elif replay != Replay():
        raise document.refuse(
            ("selection", "replay"), "no entry of datasets has role: buffer; add one, or remove this"
        )
    if selection.seed is None:
        selection.seed = (DEFAULTS | training)["seed"]


def _choose_reference_pass(
    document: Document, recipe: Recipe, model: dict[str, Any], training: dict[str, Any], announcements: list[str]
) -> None:
    key = "precompute_ref_log_probs"
    if recipe.margin.reference_free and training.get(key):
        raise document.refuse((key,), "margin.reference_free has no reference to compute; set one of them to false")
    if key not in training:
        training[key] = not (model.get("use_peft") or recipe.margin.reference_free)
        reason = {True: "so the reference model leaves memory"}.get(training[key], "no second model is needed")
        announcements.append(f"{key}: {str(training[key]).lower()}, {reason}")
    if recipe.reference_cache is not None and not training[key]:
        raise document.refuse(("reference_cache",), f"nothing is cached while {key} is false; remove it")


def _fit_batch(document: Document, recipe: Recipe, training: dict[str, Any], world_size: int) -> None:
    """Derive the accumulation from the rows per update, and hold the launch against `num_processes`."""
    if recipe.num_processes not in (None, world_size):
        raise document.refuse(
            ("num_processes",),
            f"{recipe.num_processes}, but the launcher started {world_size}; start with accelerate launch "
            f"--num_processes {recipe.num_processes}, or correct the recipe",
        )
    key = "conversations_per_update" if isinstance(recipe, SFTRecipe) else "pairs_per_update"
    wanted = getattr(recipe, key)
    if wanted is None:
        return
    batch = (DEFAULTS | training)["per_device_train_batch_size"]
    steps, rest = divmod(wanted, batch * world_size)
    if rest or not steps:
        raise document.refuse(
            (key,),
            f"{wanted} is not a multiple of per_device_train_batch_size {batch} x {world_size} processes = "
            f"{batch * world_size}; change one of the three",
        )
    given = training.setdefault("gradient_accumulation_steps", steps)
    if given != steps:
        raise document.refuse(
            ("gradient_accumulation_steps",),
            f"{given}, but {key} {wanted} = {batch} per device x {steps} x {world_size} processes; remove one of them",
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
