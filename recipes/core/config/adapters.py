"""LoRA, and frozen weights of 4 or 8 bits under it: what a recipe may not say of them, and what follows."""

import importlib.util
from pathlib import Path
from typing import Any

from core.config.reading import Document
from core.config.schema import EvaluateRecipe, PreferenceRecipe, SFTRecipe
from core.config.trl_keys import BITSANDBYTES, DEFAULTS

Recipe = PreferenceRecipe | SFTRecipe | EvaluateRecipe
Given = dict[str, Any]  # the recipe's keys of TRL
QUANTISED = ("load_in_4bit", "load_in_8bit")
OF_4_BITS = ("bnb_4bit_quant_type", "use_bnb_nested_quant")


def is_lora(key: str) -> bool:
    return key.startswith("lora_") or key in ("use_rslora", "use_dora")


def is_adapter(setting: Given) -> bool:
    """Whether the recipe's model is a folder with an adapter."""
    return (Path(str(setting.get("model_name_or_path"))) / "adapter_config.json").is_file()


def check_adapters(document: Document, recipe: Recipe, kind: str, given: Given) -> None:
    setting = DEFAULTS | given
    if not setting["use_peft"]:
        for key in filter(is_lora, given):
            raise document.refuse((key,), "has no effect without use_peft: true; set that, or remove the key")
    elif kind != "evaluate" and is_adapter(setting):
        _check_start(document, recipe, kind, given)
    targets = given.get("lora_target_modules")
    if setting["use_peft"] and recipe.trainable_parameters and targets is not None:
        if targets not in (recipe.trainable_parameters, *recipe.trainable_parameters):
            raise document.refuse(
                ("lora_target_modules",), "differs from trainable_parameters, which name LoRA's targets; keep one"
            )
    for key in QUANTISED:
        if setting[key] and kind != "evaluate" and not setting["use_peft"]:
            raise document.refuse((key,), "quantised weights are not trained; set use_peft: true for LoRA over them")
    if setting["load_in_4bit"] and setting["load_in_8bit"]:
        raise document.refuse(("load_in_8bit",), "load_in_4bit is true as well; keep one")
    for key in OF_4_BITS:
        if key in given and not setting["load_in_4bit"]:
            raise document.refuse((key,), "has no effect without load_in_4bit: true; set that, or remove the key")
    _check_library(document, setting)


def _check_start(document: Document, recipe: Recipe, kind: str, given: Given) -> None:
    """A model that is an adapter itself is trained on as it is, and is what training is held against."""
    trained = ["trainable_parameters"] if recipe.trainable_parameters else []
    for key in [*filter(is_lora, given), *trained]:
        raise document.refuse(
            (key,),
            "has no effect: model_name_or_path is an adapter, which is trained on with its own settings; remove the "
            "key, or merge and save the adapter first",
        )
    if kind == "dpo" and not recipe.margin.reference_free:
        why = "model_name_or_path is an adapter, which is its own reference only before it is trained"
        if given.get("precompute_ref_log_probs") is False:
            raise document.refuse(("precompute_ref_log_probs",), f"{why}; remove the key")
        if given.get("load_in_8bit"):
            raise document.refuse(("load_in_8bit",), f"{why}, and 8 bits need it live; take load_in_4bit, or merge it")


def _check_library(document: Document, setting: Given) -> None:
    optim = setting["optim"]
    asked = [key for key in QUANTISED if setting[key]] + (["optim"] if optim in BITSANDBYTES else [])
    if asked and importlib.util.find_spec("bitsandbytes") is None:
        raise document.refuse((asked[0],), "bitsandbytes is not installed; run `pip install bitsandbytes`")
    if optim.startswith("paged") and setting["use_cpu"]:
        other = "adamw_8bit" if optim.endswith("8bit") else "adamw_torch"
        raise document.refuse(("optim",), f"{optim} pages a GPU's memory, and use_cpu is true; take {other}")


def settle_adapters(
    document: Document, recipe: Recipe, kind: str, model: Given, training: Given, announcements: list[str]
) -> None:
    """
    Constants of 4 bits are quantised too. TRL's dropout of 0.05 is 0 where dropout is off or has no place; another
    number there is refused.
    """
    if model.get("load_in_4bit") and "use_bnb_nested_quant" not in model:
        model["use_bnb_nested_quant"] = True
        announcements.append("use_bnb_nested_quant: true, with load_in_4bit: 4.13 bits a weight instead of 4.5")
    if not model.get("use_peft"):
        return
    reason = None
    if kind != "sft" and (DEFAULTS | training)["disable_dropout"]:
        reason = "disable_dropout is true (its default)"
    elif model.get("lora_target_parameters"):
        reason = "adapters of lora_target_parameters have none"
    if reason is None:
        return
    if model.get("lora_dropout"):
        raise document.refuse(("lora_dropout",), f"has no effect: {reason}; set 0, or change that")
    if "lora_dropout" not in model and not is_adapter(model):
        model["lora_dropout"] = 0.0
        announcements.append(f"lora_dropout: 0, since {reason}")
