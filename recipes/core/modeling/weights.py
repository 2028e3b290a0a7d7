"""A digest of a model's weights: what tells one reference model from another."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import snapshot_download
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

from core.runtime.errors import RecipeError
from core.runtime.ranks import first_rank_decides

THREADS = 8
PIECE = 16 * 2**20  # bytes of a file that a thread reads and hashes at a time
# Keys of config.json that say where weights come from, not what the model computes. Its dtype does: `auto` obeys it.
INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache")


def weights_digest(source: str | Path | torch.nn.Module, revision: str | None = None) -> str:
    """
    A digest of what the reference model computes with: the bytes of its weights and what its config says of them.

    Files are read on rank 0 alone, by several threads. A folder with an adapter counts with its base model. Only the
    local disk is asked: download a model before.

    Args:
        source: a folder, a model on the Hub, or a model in memory that has no files (all its weights on this rank).
        revision: of a model on the Hub.

    Raises:
        RecipeError: there are no weights on this machine.
    """
    if isinstance(source, torch.nn.Module):
        # ZeRO-3 leaves every rank empty tensors, which are the same for all weights.
        assert not any(hasattr(parameter, "ds_id") for parameter in source.parameters()), "digest the files instead"
        return first_rank_decides(lambda: _digest_of_module(source))
    return first_rank_decides(lambda: _digest_of_folder(_local_folder(str(source), revision)))


def _digest_of_module(model: torch.nn.Module) -> str:
    digest = xxhash.xxh3_128(_config_bytes(model.config.to_dict()))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
        digest.update(_config_bytes(json.loads(config.read_text())) if config.is_file() else b"")
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
            shards = [
                folder / name for name in sorted({*json.loads((folder / index).read_text())["weight_map"].values()})
            ]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise RecipeError(
                    f"{folder}: {index} names {', '.join(absent)}, which is not there; download it again"
                )
            return shards
    return []


def _local_folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise RecipeError(f"model {source} is neither a folder nor in the Hub's local cache") from error


def _config_bytes(config: dict[str, Any]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in INCIDENTAL}
    return json.dumps(kept, sort_keys=True, default=str).encode()
