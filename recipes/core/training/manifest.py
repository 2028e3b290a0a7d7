"""manifest.json of a checkpoint: which run it is of, and the digest of each file and of itself."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from core.runtime.environment import versions
from core.runtime.files import replaced
from core.runtime.launching import Launch
from core.runtime.output_folder import recipe_digest
from core.runtime.text import masked

MANIFEST = "manifest.json"
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # xxh3_128
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Trained(_Strict):
    """Which weights the optimizer is of."""

    tensors: Count
    digest: Digest  # of their names and shapes

    @classmethod
    def of(cls, model: torch.nn.Module) -> Self:
        names = sorted(
            f"{name} {tuple(getattr(weight, 'ds_shape', weight.shape))}"  # ZeRO-3 has emptied it
            for name, weight in model.named_parameters()
            if weight.requires_grad
        )
        return cls(tensors=len(names), digest=xxhash.xxh3_128_hexdigest("\n".join(names).encode()))


class Origin(_Strict):
    """What a checkpoint depends on beside its files."""

    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Count | None
    batch_per_update: Annotated[int, Field(ge=1)]
    trained: Trained | None = None
    rows: str | None = None  # digest of the training rows
    reference: str | None = None  # of the reference's weights and precision, where its log-probabilities are cached
    recipe: dict[str, Any] | None = None  # resolved, without secrets
    recipe_digest: str | None = None
    versions: dict[str, str] = {}

    @classmethod
    def with_recipe(cls, recipe: Mapping[str, Any] | None, **rest: Any) -> Self:
        if recipe is None:
            return cls(**rest)
        plain = json.loads(json.dumps(masked(recipe), default=str))
        return cls(recipe=plain, recipe_digest=recipe_digest(recipe), **rest)


class Entry(_Strict):
    """A file of a checkpoint."""

    bytes: Count
    xxh3_128: Digest


class Manifest(Origin):
    """All of manifest.json but the digest of itself, which is its first line."""

    format: Literal[2] = 2  # raise it when a field comes to mean something else
    step: Count
    files: dict[str, Entry]

    def text(self) -> str:
        body = json.dumps(self.model_dump(), indent=1)
        return f'{{\n "digest": "{xxhash.xxh3_128_hexdigest(body.encode())}",{body[1:]}\n'

    @classmethod
    def parse(cls, written: bytes) -> Self:
        """
        Raises:
            ValueError: it is not, to the letter, what `text` has written.
        """
        try:
            fields = json.loads(written.decode())
            del fields["digest"]
            manifest = cls(**fields)
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError("not a manifest") from error
        if manifest.text().encode() != written:
            raise ValueError("not as it was written")
        return manifest

    @classmethod
    def read(cls, folder: Path) -> Self:
        """As `parse`, of a checkpoint's file; FileNotFoundError where there is none."""
        path = folder / MANIFEST
        if path.is_symlink():
            raise ValueError("a symbolic link")
        return cls.parse(path.read_bytes())


def asked_of(launch: Launch, args: Any) -> Origin:
    """The `Origin` of a run that has not started, as far as its launch config and settings tell."""
    return Origin(
        world_size=launch.world_size,
        zero_stage=launch.zero_stage or None,
        batch_per_update=args.per_device_train_batch_size * args.gradient_accumulation_steps * launch.world_size,
        versions=versions(),
    )


def seal(folder: Path, step: int, origin: Origin) -> None:
    """Write manifest.json: the size and xxh3_128 digest of every file, with the step and its `Origin`; flush all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(_flush_and_digest, files))
    entries = {
        str(path.relative_to(folder)): Entry(bytes=path.stat().st_size, xxh3_128=digest)
        for path, digest in zip(files, digests, strict=True)
    }
    with replaced(folder / MANIFEST) as file:
        file.write(Manifest(step=step, files=entries, **dict(origin)).text().encode())
    flush(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, held against its manifest; None if it is whole."""
    if folder.is_symlink():
        return "it is a symbolic link, which is not followed"
    try:
        manifest = Manifest.read(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except (OSError, ValueError):
        return f"its {MANIFEST} is damaged, or of another version of this project"
    if folder.name != f"checkpoint-{manifest.step}":
        return f"its {MANIFEST} is of step {manifest.step}"
    expected = manifest.files
    present = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}
    present.pop(MANIFEST)
    if links := sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink()):
        return f"{links[0]} is a symbolic link, which is not followed"
    if missing := sorted(set(expected) - set(present)):
        return f"{missing[0]} is missing"
    if extra := sorted(set(present) - set(expected)):
        return f"{extra[0]} is not of it"
    try:
        for name, entry in expected.items():  # sizes first: they cost nothing
            if (size := present[name].stat().st_size) != entry.bytes:
                return f"{name} has {size:,} bytes instead of {entry.bytes:,}"
        with ThreadPoolExecutor(8) as pool:
            digests = pool.map(_digest, (present[name] for name in expected))
            for (name, entry), digest in zip(expected.items(), digests, strict=True):
                if digest != entry.xxh3_128:
                    return f"{name} has changed since it was saved"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _flush_and_digest(path: Path) -> str:
    flush(path)
    return _digest(path)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
