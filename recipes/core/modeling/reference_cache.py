"""Reference log-probabilities on disk: the cache, and what it is keyed by (weights, precision and token ids)."""

import hashlib
import json
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from datasets import Dataset
from huggingface_hub import constants, snapshot_download
from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from trl import DPOConfig, ModelConfig

from core.runtime.errors import RecipeError
from core.runtime.files import replaced
from core.runtime.loading import adapter_base
from core.runtime.ranks import first_rank_decides

FORMAT = 1  # raise it when a key or a value comes to mean something else
DEFAULT_FOLDER = Path(constants.HF_HOME) / "preference_reference"
KEY_BYTES = 16
SEPARATOR = b"\xff" * 4  # between prompt and answer: no token has this id
# Keys of config.json that say where weights come from, not what the model computes. Its dtype does: `auto` obeys it.
INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache")


class ReferenceCache:
    """
    Token-summed log-probabilities of (prompt, answer) sequences under one reference model.

    Every write is a new file named by the digest of its content, written aside and renamed: any number of runs and
    ranks may write at once, and a killed one leaves whole files only (and a temporary one that nobody reads).

    Args:
        folder: of all caches (the recipe's `reference_cache`).
        namespace: of this model: see `open_cache`.

    Raises:
        RecipeError: the folder can't be made.
    """

    def __init__(self, folder: str | Path, namespace: str):
        self.folder = Path(folder).expanduser() / namespace
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"reference_cache {self.folder}: {error.strerror}; name a folder to write to") from error

    def lookup(self, keys: list[bytes]) -> np.ndarray:
        """The log-probability of each of n sequences in nats, NaN where there is none. Shape: (n,), float64."""
        known: dict[bytes, float] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if shard := _read(path):
                known.update(zip(_to_bytes(shard["keys"]), shard["logps"].tolist(), strict=True))
        return np.array([known.get(key, np.nan) for key in keys])

    def append(self, keys: list[bytes], logps: np.ndarray) -> None:
        """
        Add the log-probabilities of n sequences; a warning if the disk takes none.

        Args:
            keys: of the sequences, n of them.
            logps: shape (n,), float64.
        """
        if not keys:
            return
        content = safetensors.numpy.save(
            {"keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES), "logps": np.array(logps)}
        )
        try:
            with replaced(self.folder / f"{xxhash.xxh3_128_hexdigest(content)}.safetensors") as file:
                file.write(content)
        except OSError as error:
            warnings.warn(
                f"{self.folder}: {error.strerror}; {len(keys):,} reference log-probabilities are not kept and will be "
                "computed again next time",
                stacklevel=2,
            )


def open_cache(folder: str | None, model: ModelConfig, args: DPOConfig, loaded: nn.Module) -> ReferenceCache:
    """
    The cache of a recipe's model as the reference, in the precision of its forward.

    Args:
        loaded: that model, held as in the run: which weights are in which dtype is part of the key.

    Raises:
        RecipeError: the folder can't be made.
    """
    precision = _dtypes(loaded)
    if args.mixed_precision != "no":  # also the launcher's; DeepSpeed casts the weights, autocast the operations
        precision += f"-{'deepspeed' if args.deepspeed_plugin else 'autocast'}-{args.mixed_precision}"
    if args.tf32:
        precision += "-tf32"
    if quantised := quantised_as(model):
        precision += f"-{quantised}"
    digest = weights_digest(model.model_name_or_path, model.model_revision)
    return ReferenceCache(folder or DEFAULT_FOLDER, f"v{FORMAT}-{digest}-{precision}")


def quantised_as(model: ModelConfig) -> str | None:
    """The name of a recipe's quantisation: nf4-nested, nf4, fp4 …, int8; None without."""
    if model.load_in_4bit:
        return model.bnb_4bit_quant_type + ("-nested" if model.use_bnb_nested_quant else "")
    return "int8" if model.load_in_8bit else None


def _dtypes(model: nn.Module) -> str:
    """The dtype of all weights; of several, what most have and a digest of which has which."""
    named = {name: str(weight.dtype).removeprefix("torch.") for name, weight in model.named_parameters()}
    most, count = Counter(named.values()).most_common(1)[0]
    return (
        most
        if count == len(named)
        else f"{most}-{xxhash.xxh3_64_hexdigest(json.dumps(named, sort_keys=True).encode())}"
    )


def sequence_keys(dataset: Dataset) -> tuple[list[tuple[bytes, bytes]], np.ndarray]:
    """
    What the cache knows a row by: the digest of prompt + chosen ids and that of prompt + rejected ids. Labels, margins
    and the order of the two answers don't enter; tokenizer, template and length limit do, through the ids.

    Returns:
        The two keys of each row, of 16 bytes, and the tokens of prompt, chosen and rejected, shape (rows, 3).
    """
    keys, lengths = [], []
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    # Batch by batch as arrays: a Python integer for each token of a large set would take minutes.
    for batch in dataset.select_columns(columns).with_format("numpy").iter(batch_size=1024):
        for ids in zip(*(batch[name] for name in columns), strict=True):
            prompt, *answers = (part.astype("<i4").tobytes() for part in ids)
            keys.append(tuple(xxhash.xxh3_128_digest(prompt + SEPARATOR + answer) for answer in answers))
            lengths.append([len(part) for part in ids])
    return keys, np.array(lengths, dtype=np.int64).reshape(-1, 3)


def weights_digest(source: str | Path, revision: str | None = None) -> str:
    """
    A digest of what the reference model computes with: the bytes of its weights and what its config says of them.

    Files are read on rank 0 alone, each by a thread. A folder with an adapter counts with its base model.

    Args:
        source: a model that has been loaded: a folder, or a name on the Hub whose files are in the local cache.
        revision: of a model on the Hub.
    """
    return first_rank_decides(lambda: _digest_of_folder(local_folder(str(source), revision)))


def _digest_of_folder(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    adapter = folder / ADAPTER_CONFIG_NAME
    if adapter.is_file():
        base = adapter_base(folder)
        digest.update(adapter.read_bytes())
        digest.update(_digest_of_folder(local_folder(base, None)).encode())
        files = sorted(folder.glob("adapter_model.*"))
    else:
        digest.update(_computing_part(json.loads((folder / CONFIG_NAME).read_text())))
        files = weight_files(folder)
    with ThreadPoolExecutor() as threads:
        for path, content in zip(files, threads.map(_digest_of_file, files), strict=True):
            digest.update(f"{path.name} {content}".encode())
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads; a folder may hold the same weights in another form too."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    return [folder / name for name in sorted({*index["weight_map"].values()})]


def local_folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, revision=revision, local_files_only=True))


def _computing_part(config: dict[str, Any]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in INCIDENTAL}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        content = path.read_bytes()
    except OSError:  # somebody has just removed it, or may not have it read
        return None
    if xxhash.xxh3_128_hexdigest(content) == path.stem:
        return safetensors.numpy.load(content)
    warnings.warn(f"{path} is damaged: its rows are computed again; delete it to end this warning", stacklevel=3)
    return None


def _to_bytes(keys: np.ndarray) -> list[bytes]:
    """Shape (n, 16), uint8 → n keys."""
    return np.ascontiguousarray(keys).view(f"V{KEY_BYTES}").ravel().tolist()
