"""Reference log-probabilities, computed once: a cache on disk that is keyed by weights, precision and token ids."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.numpy
import torch
import torch.distributed as dist
import xxhash
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub import constants
from tqdm import tqdm

from core.runtime.errors import RecipeError
from core.runtime.files import replaced

FORMAT = 1  # raise it when a key or a value comes to mean something else
DEFAULT_FOLDER = Path(constants.HF_HOME) / "preference_reference"
KEY_BYTES = 16
SEPARATOR = b"\xff" * 4  # between prompt and answer: no token has this id

logger = logging.getLogger(__name__)

Compute = Callable[[list[dict[str, Any]]], tuple[torch.Tensor, torch.Tensor]]


class ReferenceCache:
    """
    Token-summed log-probabilities of (prompt, answer) sequences under one reference model.

    Every write is a new file named by the digest of its content, written aside and renamed: any number of runs and
    ranks may write at once, and a killed one leaves whole files only (and a temporary one that nobody reads).

    Args:
        folder: of all caches (the recipe's `reference_cache`).
        namespace: of this model, from `namespace`.

    Raises:
        RecipeError: the folder can't be made.
    """

    def __init__(self, folder: str | Path, namespace: str):
        self.folder = Path(folder).expanduser() / namespace
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"reference_cache {self.folder}: {error.strerror}; name a folder to write to") from error

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            keys: shape (n, 16), uint8.

        Returns:
            The log-probabilities in nats, NaN where there is none, and which were found. Shapes (n,) and (n,).
        """
        shards = [shard for path in sorted(self.folder.glob("*.safetensors")) if (shard := _read(path))]
        known = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(shard["keys"] for shard in shards)])
        logps = np.concatenate([[np.nan], *(shard["logps"] for shard in shards)])  # index 0: not found
        index = pc.fill_null(pc.index_in(_binary(keys), value_set=_binary(known)), -1).to_numpy() + 1
        return logps[index], index > 0

    def append(self, keys: np.ndarray, logps: np.ndarray) -> None:
        """
        Add log-probabilities; a warning if the disk takes none.

        Args:
            keys: shape (n, 16), uint8.
            logps: shape (n,), float64.
        """
        if not len(keys):
            return
        content = safetensors.numpy.save({"keys": np.ascontiguousarray(keys), "logps": np.ascontiguousarray(logps)})
        try:
            with replaced(self.folder / f"{xxhash.xxh3_128_hexdigest(content)}.safetensors") as file:
                file.write(content)
        except OSError as error:
            warnings.warn(
                f"{self.folder}: {error.strerror}; {len(keys):,} reference log-probabilities are not kept and will be "
                "computed again next time",
                stacklevel=2,
            )


def namespace(weights: str, precision: str) -> str:
    """The cache's folder name for a `weights.weights_digest` and what the reference forward computes in."""
    return f"v{FORMAT}-{weights}-{precision}"


def reference_logps(
    dataset: Dataset,
    cache: ReferenceCache,
    compute: Compute,
    *,
    batch_size: int,
    accelerator: Accelerator,
    padded: bool = False,
    description: str = "Reference log-probabilities",
    flush_seconds: float = 60.0,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Token-summed reference log-probabilities of every row, from the cache where it has them.

    What is missing is computed longest first, so that a lack of memory shows at once, and each micro-batch is dealt to
    the ranks in turn. Each rank writes what it computed to its own disk and reads what is there; what any rank has is
    then shared with all, so nodes need no common disk. No random number is drawn.

    Args:
        dataset: the same rows on every rank, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        cache: of the reference model's namespace.
        compute: the reference forward of a list of rows: chosen and rejected log-probabilities, shapes (B,) and (B,).
            Every rank calls it equally often, as ZeRO-3 needs; when all rows are cached, never.
        batch_size: pairs in the first micro-batch; later, shorter ones hold as many as give no more tokens.
        padded: each answer repeats its prompt and is padded to the micro-batch's longest; else prompts are shared.
        accelerator: the process group.
        description: of the progress bar.
        flush_seconds: at most this much work is lost in a kill.

    Returns:
        Chosen and rejected log-probabilities in nats, float64, shapes (rows,) and (rows,).

    Raises:
        RecipeError: the reference model gives a row NaN or infinity.
    """
    keys, lengths = sequence_keys(dataset)
    # Equal sequences get one number, counted in order of first appearance.
    codes = _binary(keys).dictionary_encode().indices.to_numpy().reshape(-1, 2)
    _, first = np.unique(codes, return_index=True)
    distinct = keys.reshape(-1, KEY_BYTES)[first]
    logps, found = cache.lookup(distinct)
    logps = _max_over_ranks(np.where(found, logps, -np.inf), accelerator)
    missing = np.isneginf(logps)
    rows = np.unique(first[missing] // 2)  # where each missing sequence appears first
    batches = _micro_batches(rows, lengths, batch_size, padded)
    logger.info("%s: %d of %d pairs are cached", description, len(dataset) - len(rows), len(dataset))

    done = np.zeros(len(distinct), dtype=bool)

    def flush() -> None:
        keep = done & np.isfinite(logps)
        cache.append(distinct[keep], logps[keep])
        done[:] = False

    rank, world_size, flushed = accelerator.process_index, accelerator.num_processes, time.monotonic()
    bar = tqdm(total=len(rows), desc=description, unit="pair", disable=rank > 0 or not len(rows))
    try:
        for start in range(0, len(batches), world_size):
            # Beyond the last micro-batch a rank repeats it, only to keep in step with the others.
            batch = batches[min(start + rank, len(batches) - 1)]
            columns = dataset[batch.tolist()]
            examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            with torch.no_grad():
                computed = torch.stack(compute(examples), dim=1).double().cpu().numpy()
            new = missing[codes[batch]]
            logps[codes[batch][new]] = np.where(np.isfinite(computed), computed, np.inf)[new]
            done[codes[batch][new]] = True
            bar.update(sum(len(batch) for batch in batches[start : start + world_size]))
            if time.monotonic() - flushed > flush_seconds:
                flush()
                flushed = time.monotonic()
    finally:
        flush()
        bar.close()
    logps = _max_over_ranks(logps, accelerator)
    chosen, rejected = logps[codes].T.copy()
    broken = np.flatnonzero(~np.isfinite(chosen + rejected))
    if len(broken):
        row = int(broken[0])
        name = f"row {row}" + (f" ({dataset[row]['row_id']})" if "row_id" in dataset.column_names else "")
        raise RecipeError(
            f"the reference model gives {len(broken):,} of {len(dataset):,} rows no finite log-probability, the first "
            f"is {name}: check its weights for NaN, and whether its dtype holds them"
        )
    return chosen, rejected


def sequence_keys(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """
    What the cache knows a row by: the digest of prompt + chosen ids and that of prompt + rejected ids. Labels, margins
    and the order of the two answers don't enter; tokenizer, template and length limit do, through the ids.

    Returns:
        Keys, shape (rows, 2, 16), uint8, and the tokens of prompt, chosen and rejected, shape (rows, 3).
    """
    keys, lengths = bytearray(), []
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=4096):
        sequences = [list(_token_bytes(table[name].combine_chunks())) for name in columns]
        for prompt, *answers in zip(*sequences, strict=True):
            head = xxhash.xxh3_128(prompt)
            head.update(SEPARATOR)
            for answer in answers:
                whole = head.copy()
                whole.update(answer)
                keys += whole.digest()
            lengths.append([len(part) // 4 for part in (prompt, *answers)])
    return np.frombuffer(keys, np.uint8).reshape(-1, 2, KEY_BYTES), np.array(lengths, dtype=np.int64).reshape(-1, 3)


def _micro_batches(rows: np.ndarray, lengths: np.ndarray, batch_size: int, padded: bool) -> list[np.ndarray]:
    """Split the rows, longest first, into micro-batches of no more tokens than the longest `batch_size` pairs have."""
    k, n, m = lengths[rows].T
    tokens = k + np.maximum(n, m) if padded else k + n + m  # of an answer's row, of which each pair has two; of a pair
    order = np.argsort(-tokens, kind="stable")
    rows, tokens = rows[order], tokens[order]
    budget = tokens[:1].sum() * batch_size if padded else tokens[:batch_size].sum()
    start, used, cuts = 0, 0, []
    for position, length in enumerate(tokens):
        used = tokens[start] * (position - start + 1) if padded else used + length
        if used > budget:
            cuts.append(position)
            start, used = position, length
    return np.split(rows, cuts) if len(rows) else []


def _max_over_ranks(values: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """The greatest of all ranks' values, bit for bit, so that −∞ marks what a rank lacks and +∞ what is broken."""
    if accelerator.num_processes == 1:
        return values
    tensor = torch.from_numpy(values).to(accelerator.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu().numpy()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        content = path.read_bytes()
    except OSError:  # somebody has just removed it, or may not have it read
        return None
    if xxhash.xxh3_128_hexdigest(content) == path.stem:
        return safetensors.numpy.load(content)
    warnings.warn(f"{path} is damaged: its rows are computed again; delete it to end this warning", stacklevel=3)
    return None


def _binary(keys: np.ndarray) -> pa.FixedSizeBinaryArray:
    keys = np.ascontiguousarray(keys).reshape(-1, KEY_BYTES)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys)])


def _token_bytes(sequences: pa.ListArray) -> Iterator[memoryview]:
    """Each row's token ids as little-endian 32-bit integers, whatever type the column has."""
    ids = memoryview(sequences.flatten().to_numpy(zero_copy_only=False).astype("<i4")).cast("B")
    ends = np.cumsum(sequences.value_lengths().to_numpy()).tolist()
    return (ids[4 * start : 4 * end] for start, end in zip([0, *ends], ends, strict=False))
