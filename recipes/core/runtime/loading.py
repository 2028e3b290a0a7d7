"""
The one place that reads what strangers hand over: models, adapters, tokenizers, configs and rows. None of them runs
code of its own, asks a question, or is unpickled: `trust_remote_code=False`, safetensors, and no dataset's script.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, GENERATION_CONFIG_NAME

from core.runtime.errors import RecipeError, full_disk
from core.runtime.ranks import rank
from core.runtime.text import printable

SHOWN = 3  # names in a message
ROW_FORMATS = {"json", "csv", "parquet", "arrow"}  # of the builders of datasets; others unpickle, or run queries


@contextlib.contextmanager
def _of_strangers(what: str, way_out: str) -> Iterator[None]:
    """One line for whatever is wrong with their files: libraries fail on them in every way that there is."""
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if full_disk(error) is not None:
            raise
        told = printable(" ".join(str(error).split()))[:500]
        if "trust_remote_code" in told:
            told = "it comes with code of its own (auto_map), which is never run"
            way_out = "use one that transformers knows"
        elif not isinstance(error, OSError | ValueError | ImportError):
            told = f"{type(error).__name__}: {told}"
        raise RecipeError(f"{what} cannot be loaded: {told}; {way_out}") from error


def _without_code(what: str, holder: Any) -> None:
    """Forget code that was not run, so that what is saved does not ask others to run it, and say so."""
    named = holder.init_kwargs if isinstance(holder, PreTrainedTokenizerBase) else vars(holder)
    if named.pop("auto_map", None) and rank() == 0:
        print(f"note: {what} comes with code of its own (auto_map), which is not run: transformers' is", flush=True)


def model_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """
    What config.json says of a model.

    Raises:
        RecipeError: it cannot be read, or is of a model that transformers does not know.
    """
    with _of_strangers(f"model {path}: its config", "mend that folder, or give another model"):
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)


def generation_config(path: str, revision: str | None = None) -> GenerationConfig | None:
    """
    The settings of generation that come with a model; None where there are none, as with many.

    Raises:
        RecipeError: they cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except Exception as error:  # transformers answers a file that it did not expect in all ways
        if isinstance(error, OSError) and not (Path(path) / GENERATION_CONFIG_NAME).is_file():
            return None
        told = printable(" ".join(str(error).split()))
        raise RecipeError(f"model {path}: {GENERATION_CONFIG_NAME} is invalid: {told}; mend that file") from error


def causal_lm(path: str, **options: Any) -> PreTrainedModel:
    """
    A causal language model with weights of safetensors; `options` are those of `from_pretrained`.

    Raises:
        RecipeError: it cannot be loaded, or its files lack weights, which transformers would draw at random.
    """
    with _of_strangers(f"model {path}", "mend that folder, or give another model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, **options, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        _without_code(f"model {path}", model.config)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{len(missing)} of its tensors are in none of its files: {', '.join(missing[:SHOWN])}"
                + (", …" if len(missing) > SHOWN else "")
            )
    return model


def classifier(path: str, **options: Any) -> PreTrainedModel:
    """
    A sequence classifier, as `causal_lm`.

    Raises:
        RecipeError: it cannot be loaded.
    """
    with _of_strangers(f"model {path}", "mend that folder, or give another model"):
        return AutoModelForSequenceClassification.from_pretrained(
            path, **options, trust_remote_code=False, use_safetensors=True
        )


def adapter_base(folder: str | Path) -> str:
    """
    The model that an adapter is of: a path, or a name on the Hub.

    Raises:
        RecipeError: its config cannot be read or names no other model, or its weights are not safetensors.
    """
    bases = [str(folder)]
    with _of_strangers(f"adapter {folder}", "save it again"):
        while (config := Path(bases[-1]) / ADAPTER_CONFIG_NAME).is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
            base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
            if not isinstance(base, str) or not base:
                raise ValueError(f"{config} names no base_model_name_or_path")
            if any(Path(base).resolve() == Path(other).resolve() for other in bases):
                raise ValueError(f"{config} names {base} as its base, which leads back to itself")
            bases.append(base)
        if not (Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
            raise ValueError(f"it has no {ADAPTER_SAFE_WEIGHTS_NAME}, and weights in a pickle are not read")
    return bases[1]


def adapter_config(folder: str | Path) -> PeftConfig:
    """
    What an adapter is made of.

    Raises:
        RecipeError: see `adapter_base`, or it is not LoRA's.
    """
    adapter_base(folder)
    with _of_strangers(f"adapter {folder}", "save it again"):
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"it is {config.peft_type.value}, and LoRA alone is trained on")
    return config


def with_adapter(base: PreTrainedModel, folder: str | Path, **options: Any) -> PeftModel:
    """
    A model with an adapter on it.

    Raises:
        RecipeError: see `adapter_base`, or the adapter does not fit.
    """
    adapter_base(folder)
    with _of_strangers(f"adapter {folder}", "give the base that it was trained on"):
        return PeftModel.from_pretrained(base, str(folder), **options)


def tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, which pads on the left.

    Raises:
        RecipeError: it cannot be loaded.
    """
    with _of_strangers(f"model {path}: its tokenizer", "save one that belongs to the model"):
        found = AutoTokenizer.from_pretrained(path, revision=revision, padding_side="left", trust_remote_code=False)
        _without_code(f"the tokenizer of {path}", found)
        for key in (
            "local_files_only",
            "is_local",
            "trust_remote_code",
        ):  # of this call; it would be saved with the tokenizer
            found.init_kwargs.pop(key, None)
    return found


@contextlib.contextmanager
def _without_scripts(target: str) -> Iterator[None]:
    """datasets refuses the script of a dataset in an error of no kind of its own; all others are for the caller."""
    if target in _PACKAGED_DATASETS_MODULES and target not in ROW_FORMATS:
        raise RecipeError(f"datasets: {target}: rows are read from {', '.join(sorted(ROW_FORMATS))}; convert them")
    try:
        yield
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise RecipeError(
            f"datasets: {target}: it comes with a script, which is never run; name its files by data_files, or "
            "convert its rows"
        ) from error


def row_builder(target: str, **options: Any) -> datasets.DatasetBuilder:
    """
    What reads and prepares rows (`datasets.load_dataset_builder`).

    Raises:
        RecipeError: a script, or a format that is not read.
    """
    with _without_scripts(target):
        return datasets.load_dataset_builder(target, **options)


def row_configurations(folder: str) -> list[str]:
    """The configurations of a folder; RecipeError as in `row_builder`."""
    with _without_scripts(folder):
        return datasets.get_dataset_config_names(folder)


def saved_rows(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    """What `save_to_disk` has written."""
    return datasets.load_from_disk(str(path))
