"""What a recipe may not say at once, and what follows from what it says: preset, reference pass, batch arithmetic."""

import importlib.util
import math
from typing import Any

from core.config.entries import check_conversations, check_preferences
from core.config.reading import Document
from core.config.schema import DatasetEntry, EvaluateRecipe, PreferenceRecipe, Replay, SFTRecipe
from core.config.trl_keys import DEFAULTS
from core.objective.presets import PAIR_CLASSES, PAIR_METRICS, PRESETS, PROPORTIONAL, Margin
from core.runtime.errors import RecipeError, first_line
from core.runtime.text import did_you_mean, show

Recipe = PreferenceRecipe | SFTRecipe | EvaluateRecipe
Given = dict[str, Any]  # the recipe's keys of TRL
MARGIN_SETTINGS = ("a", "b", "k", "c", "phi", "link", "scaled", "p", "epsilon", "length_normalized", "reference_free")
SAFETY = ("safe", "severity", "chosen_safe", "chosen_severity")
SAFETY_WAY_OUT = "map safe, or chosen_safe and rejected_safe (a column, or true or false for all), or severities"
# What torch.utils.checkpoint takes of what YAML can write; anything else would be handed on to each layer, unread.
CHECKPOINTING = {"use_reentrant": bool, "preserve_rng_state": bool, "determinism_check": str, "debug": bool}
CHECKPOINTING |= {"early_stop": bool}
SFT_METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")  # of an evaluation by TRL
LINK_KEYS = {"scaled": "squared", "p": "signed", "epsilon": "soft"}  # the one link that reads the key


def check_sources(document: Document, recipe: Recipe, kind: str) -> None:
    asks = kind == "evaluate" and (recipe.prompts is not None or recipe.prompt_sets)
    if kind == "evaluate" and not (asks or recipe.datasets or recipe.eval_datasets):
        raise RecipeError(f"{document.path}: nothing to evaluate; give datasets, or prompt_sets")
    if kind != "evaluate" and not recipe.datasets:
        raise document.refuse(("datasets",), "is empty; give at least one source of rows")
    for index, entry in enumerate(recipe.datasets):
        if kind == "sft" and entry.role == "buffer":
            raise document.refuse(("datasets", index, "role"), "an SFT stage replays nothing; remove it")
    if recipe.datasets and all(entry.role == "buffer" for entry in recipe.datasets):
        raise document.refuse(("datasets",), "all entries are buffer; an epoch is the task set, so one must be a task")
    for entries in (recipe.datasets, recipe.eval_datasets):
        (check_conversations if kind == "sft" else check_preferences)(entries)


def check_training(document: Document, recipe: Recipe, given: Given) -> None:
    setting = DEFAULTS | given
    if setting["fp16"] and given.get("bf16"):
        raise document.refuse(("bf16",), "fp16 is true as well; keep one")
    if not recipe.eval_datasets:
        for key, off in (("eval_strategy", "no"), ("eval_on_start", False), ("load_best_model_at_end", False)):
            if setting[key] != off:
                raise document.refuse((key,), "there is nothing to evaluate on; give eval_datasets, or remove it")
    if setting["load_best_model_at_end"] and setting["eval_strategy"] == "no":
        raise document.refuse(("load_best_model_at_end",), "needs eval_strategy: steps or epoch")
    check_best(document, recipe, setting)
    for key, value in (setting["gradient_checkpointing_kwargs"] or {}).items():
        if not isinstance(value, CHECKPOINTING.get(key, ())):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in CHECKPOINTING.items())
            raise document.refuse(
                ("gradient_checkpointing_kwargs", key),
                f"is not one of torch's: {known}{did_you_mean(key, CHECKPOINTING)}",
            )
    if setting["use_cpu"] and str(setting["attn_implementation"]).startswith("flash_attention"):
        raise document.refuse(("attn_implementation",), "needs a GPU, and use_cpu is true; remove it")
    for tracker in [setting["report_to"]] if isinstance(setting["report_to"], str) else setting["report_to"]:
        if tracker != "none" and importlib.util.find_spec(tracker) is None:
            raise document.refuse(("report_to",), f"{tracker} is not installed; run `pip install {tracker}`")
    flash = str(setting["attn_implementation"]).startswith("flash_attention")
    if setting["packing"] and setting["packing_strategy"] != "wrapped" and not flash:
        raise document.refuse(
            ("packing",),
            "conversations would see each other without attn_implementation: flash_attention_2; set false: "
            "padding_free, the default, leaves padding out as well",
        )
    if setting["eval_packing"] and not setting["packing"]:
        raise document.refuse(("eval_packing",), "packed conversations would see each other without packing: true")


def check_best(document: Document, recipe: Recipe, setting: Given) -> None:
    """What follows an evaluation's figures: the best checkpoint, and a learning rate that waits on a plateau."""
    key, metric = "metric_for_best_model", setting["metric_for_best_model"]
    users = {
        "save_strategy: best": setting["save_strategy"] == "best",
        "load_best_model_at_end: true": setting["load_best_model_at_end"],
        "lr_scheduler_type: reduce_lr_on_plateau": setting["lr_scheduler_type"] == "reduce_lr_on_plateau",
    }
    for user, asked in users.items():
        if asked and setting["eval_strategy"] == "no":
            raise document.refuse(
                (user.partition(":")[0],), f"{user.partition(': ')[2]} needs eval_strategy: steps or epoch; set it"
            )
    if setting["save_strategy"] == "best" and metric is None:
        raise document.refuse(("save_strategy",), f"best needs {key}, e.g. {key}: loss")
    if metric is None:
        return
    if not any(users.values()):
        raise document.refuse((key,), f"has no effect without {' or '.join(users)}; set one, or remove it")
    known = SFT_METRICS if isinstance(recipe, SFTRecipe) else PAIR_METRICS
    if metric.removeprefix("eval_") not in known:
        raise document.refuse(
            (key,),
            f"no evaluation here gives {show(metric)}; there are {', '.join(known)}{did_you_mean(metric, known)}",
        )


def check_schedule(path: str, args: Any) -> None:
    """
    Try the schedule of the learning rate, some of which take keyword arguments of their own.

    Args:
        path: the recipe's.
        args: TRL's configuration.

    Raises:
        RecipeError: transformers cannot make it of lr_scheduler_kwargs.
    """
    import torch
    from transformers import get_scheduler

    steps = args.max_steps if args.max_steps > 0 else 100
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    warmup, name = args.get_warmup_steps(steps), args.lr_scheduler_type.value
    try:
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs)
        for factor in getattr(schedule, "lr_lambdas", []):
            assert all(math.isfinite(factor(step)) for step in (0, warmup, steps // 2, steps)), "it is not finite"
    except Exception as error:
        raise RecipeError(
            f"{path}: lr_scheduler_type {name} cannot be made of lr_scheduler_kwargs {args.lr_scheduler_kwargs}: "
            f"{first_line(error)}; correct them"
        ) from error


def expand_preset(document: Document, recipe: Recipe, training: Given, announcements: list[str]) -> None:
    """Put the preset's numbers where the recipe gives none of its own, and say so."""
    margin, selection = recipe.margin, recipe.selection
    given = document.values.get("margin") or {}
    if not given:
        margin.preset = "dpo"
        announcements.append("margin: not given, so plain DPO")
    if margin.preset is not None:
        preset = dict(PRESETS[margin.preset])
        proportional, beta = PROPORTIONAL.get(margin.preset), training.get("beta")
        if proportional is not None and beta is not None:
            ratio = preset[proportional] / preset["beta"]
            preset[proportional] = ratio * beta
            if beta != preset["beta"] and proportional not in given:
                announcements.append(
                    f"margin.{proportional} {ratio * beta:g} is {ratio:g} x beta {beta:g}, the ratio of preset "
                    f"{margin.preset}"
                )
        own = {
            "learning_rate": training.get("learning_rate"),
            "beta": training.get("beta"),
            "labels": selection.labels,
        }
        own |= {key: value for key, value in given.items() if key != "preset"}
        for key, value in preset.items():
            if own.get(key) is not None and own[key] != value:
                name = {"beta": "", "learning_rate": "", "labels": "selection."}.get(key, "margin.") + key
                announcements.append(f"{name} {own[key]} is the recipe's own; preset {margin.preset} has {value}")
            elif key in ("beta", "learning_rate"):
                training[key] = value
            elif key == "labels":
                selection.labels = value
            else:
                setattr(margin, key, value)
    training.setdefault("beta", DEFAULTS["beta"])
    if selection.labels is None:
        selection.labels = "helpful"
    numbers = " ".join(f"{key}={getattr(margin, key)}" for key in MARGIN_SETTINGS)
    name = f"preset {margin.preset}" if margin.preset else "without preset"
    announcements.append(f"margin {name}: {numbers}, beta={training['beta']}, labels={selection.labels}")


def check_margin(document: Document, recipe: Recipe) -> None:
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
            place = (name, index, "columns")
            if margin.k and not _maps(entry, "scores", "score_chosen"):
                raise document.refuse(
                    place,
                    f"margin.k = {margin.k:g}{origin} needs scores; map scores, or score_chosen and score_rejected",
                )
            if (margin.a or margin.b) and not _maps(entry, *SAFETY):
                raise document.refuse(place, f"margin.a and margin.b{origin} need safety labels; {SAFETY_WAY_OUT}")


def _maps(entry: DatasetEntry, *columns: str) -> bool:
    return any(getattr(entry.columns, name) is not None for name in columns)


def check_selection(document: Document, recipe: Recipe, training: Given) -> None:
    selection = recipe.selection
    for index, entry in enumerate(recipe.datasets):
        if selection.labels != "helpful" and entry.role == "task" and not _maps(entry, *SAFETY):
            raise document.refuse(
                ("datasets", index, "columns"),
                f"selection.labels: {selection.labels} needs safety labels; {SAFETY_WAY_OUT}",
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


def choose_reference_pass(
    document: Document, recipe: Recipe, model: Given, training: Given, announcements: list[str]
) -> None:
    key = "precompute_ref_log_probs"
    if recipe.margin.reference_free and training.get(key):
        raise document.refuse((key,), "margin.reference_free has no reference to compute; set one of them to false")
    if model.get("load_in_8bit") and training.get(key):
        raise document.refuse(
            (key,),
            "with load_in_8bit a row's numbers depend on its batch, which policy and reference must share; false",
        )
    if key not in training:
        live = recipe.margin.reference_free or bool(model.get("load_in_8bit"))
        training[key] = not live
        reason = "there is no reference" if recipe.margin.reference_free else "so no update needs the reference"
        if live and not recipe.margin.reference_free:
            reason = "in 8 bits a row's numbers depend on its batch, which policy and reference share so"
        announcements.append(f"{key}: {str(training[key]).lower()}, {reason}")
    if recipe.reference_cache is not None and not training[key]:
        raise document.refuse(("reference_cache",), f"nothing is cached while {key} is false; remove it")


def announce_attention(
    document: Document, recipe: Recipe, model: Given, training: Given, announcements: list[str]
) -> None:
    key, rows = "prefix_sharing", "pairs that share their prompts"
    if isinstance(recipe, SFTRecipe):
        key, rows = "padding_free", "conversations without padding"
    if getattr(recipe, key) and model.get("attn_implementation") is not None and not training.get("packing"):
        announcements.append(
            f"attn_implementation: has no effect on {rows} ({key}: true), which have an attention of their own"
        )


def fit_batch(document: Document, recipe: Recipe, training: Given, world_size: int) -> None:
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
    if rest:
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
