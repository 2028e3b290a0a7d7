"""Reference log-probabilities on disk: the cache, and what it is keyed by (weights, precision and token ids)."""

import json
import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from datasets import Dataset
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from trl import DPOConfig, ModelConfig

from core.runtime.errors import RecipeError
from core.runtime.ranks import first_rank_decides

FORMAT = 1  # raise it when a key or a value comes to mean something else
DEFAULT_FOLDER = Path(constants.HF_HOME) / "preference_reference"
KEY_BYTES = 16
SEPARATOR = b"\xff" * 4  # between prompt and answer: no token has this id

THREADS = 8
PIECE = 16 * 2**20  # bytes of a file that a thread reads and hashes at a time
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
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                temporary = file.name
                file.write(content)
            os.chmod(temporary, 0o644)  # others may share the cache
            os.replace(temporary, self.folder / f"{xxhash.xxh3_128_hexdigest(content)}.safetensors")
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            warnings.warn(
                f"{self.folder}: {error.strerror}; {len(keys):,} reference log-probabilities are not kept and will be "
                "computed again next time",
                stacklevel=2,
            )


def open_cache(folder: str | None, model: ModelConfig, args: DPOConfig) -> ReferenceCache:
    """
    The cache of a recipe's model as the reference, in the precision of its forward.

    Raises:
        RecipeError: there are no weights on this machine, or the folder can't be made.
    """
    precision = str(model.dtype).removeprefix("torch.")
    if args.mixed_precision != "no":  # also the launcher's; DeepSpeed casts the weights, autocast the operations
        precision += f"-{'deepspeed' if args.deepspeed_plugin else 'autocast'}-{args.mixed_precision}"
    if args.tf32:
        precision += "-tf32"
    digest = weights_digest(model.model_name_or_path, model.model_revision)
    return ReferenceCache(folder or DEFAULT_FOLDER, f"v{FORMAT}-{digest}-{precision}")


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

    Files are read on rank 0 alone, by several threads. A folder with an adapter counts with its base model. Only the
    local disk is asked: download a model before.

    Args:
        source: a folder, or a model on the Hub.
        revision: of a model on the Hub.

    Raises:
        RecipeError: there are no weights on this machine.
    """
    return first_rank_decides(lambda: _digest_of_folder(_local_folder(str(source), revision)))


def _digest_of_folder(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    adapter = folder / ADAPTER_CONFIG_NAME
    if adapter.is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        digest.update(adapter.read_bytes())
        digest.update(_digest_of_folder(_local_folder(base, None)).encode())
        files = [folder / name for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)]
        files = [path for path in files if path.is_file()][:1]
    else:
        files = _weight_files(folder)
        config = folder / CONFIG_NAME
        digest.update(_computing_part(json.loads(config.read_text())) if config.is_file() else b"")
    if not files:
        raise RecipeError(
            f"{folder}: no {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, so the model can't be told from others"
        )
    pieces = [(path, start) for path in files for start in range(0, max(path.stat().st_size, 1), PIECE)]
    with ThreadPoolExecutor(THREADS) as threads:
        for (path, start), piece in zip(pieces, threads.map(_digest_of_piece, pieces), strict=True):
            digest.update(f"{path.name} {start} {piece}".encode())
    return digest.hexdigest()


def _digest_of_piece(piece: tuple[Path, int]) -> str:
    path, start = piece
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return xxhash.xxh3_128_hexdigest(file.read(PIECE))


def _weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read, by its own order of preference."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = sorted({*json.loads((folder / index).read_text())["weight_map"].values()})
            absent = [name for name in names if not (folder / name).is_file()]
            if absent:
                raise RecipeError(
                    f"{folder}: {index} names {', '.join(absent)}, which is not there; download it again"
                )
            return [folder / name for name in names]
    return []


def _local_folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise RecipeError(f"model {source} is neither a folder nor in the Hub's local cache") from error


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
