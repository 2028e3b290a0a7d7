"""One run at a time in an output folder: a lock of the system's, and in it who holds it."""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from core.runtime.errors import RecipeError, before_leaving
from core.runtime.output_folder import check_writable, existing_parent, recipe_digest
from core.runtime.text import printable

LOCK = ".run-lock"
REQUEUE_SECONDS = 120.0  # how long a network disk may keep the lock of a node that is lost
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass
class Hold:
    """This process's hold of an output folder."""

    path: Path  # of the lock
    descriptor: int
    process: int
    made: list[Path]  # folders that were not there before


held: Hold | None = None


def hold(output_dir: str | Path, recipe: Mapping[str, Any]) -> None:
    """
    Take the folder for this process until it ends; on rank 0, for the whole run. The lock is the system's (`flock`):
    it goes with the process, however that ends, and with its node, once a network disk notices; one that is stopped
    keeps it. Who holds it stands in the file, for whoever comes second. Where a file system has no locks, that alone
    decides, which is said: a process that has ended frees the folder on its own host, and elsewhere only a requeue of
    the same Slurm job, or the user who deletes the file.

    Raises:
        RecipeError: another process has the folder, or it cannot be written.
    """
    global held
    folder = Path(output_dir)
    place = existing_parent(folder)
    parts = folder.absolute().relative_to(place).parts
    made = [place.joinpath(*parts[: depth + 1]) for depth in range(len(parts))]
    check_writable(folder)
    ours, start = _identity(recipe), time.monotonic()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        free, theirs = _lock(descriptor, fcntl.LOCK_EX), _read(descriptor)
        if has_none := free is None:
            free = _is_over(theirs, ours)
        if free and _is_there(descriptor, folder / LOCK):  # else its last holder has just removed it
            break
        os.close(descriptor)
        # `make check` may be looking at it, or its holder be leaving.
        patience = REQUEUE_SECONDS if _is_requeue(theirs, ours) else 0.5
        if not free and time.monotonic() - start > patience:
            raise RecipeError(_refusal(folder / LOCK, theirs, has_none))
        time.sleep(0.1)
    if has_none:
        print(f"note: the file system of {folder} has no locks: {LOCK} in it alone says who uses it", flush=True)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(ours).encode(), 0)
    if has_none:
        time.sleep(0.5)
        if (theirs := _read(descriptor)) != ours:  # of two that saw it free, the later
            raise RecipeError(_refusal(folder / LOCK, theirs, has_none))
    held = Hold(folder / LOCK, descriptor, os.getpid(), made)
    before_leaving(release)
    atexit.register(release)


def release() -> None:
    """End the hold: the lock goes, and with it a folder that was made for it and holds nothing else."""
    global held
    if held is None or held.process != os.getpid():
        return
    mine, held = held, None
    with contextlib.suppress(OSError):
        if _is_there(mine.descriptor, mine.path):
            mine.path.unlink()  # whoever waits for it sees that it is gone, and makes another
            for folder in reversed(mine.made):
                folder.rmdir()  # fails, and so ends, at the first that holds something
    os.close(mine.descriptor)


def check_held() -> None:
    """
    Refuse to write on in a folder that is no longer this run's.

    Raises:
        RecipeError: it was removed, renamed or replaced, or its lock was deleted.
    """
    if held is not None and not _is_there(held.descriptor, held.path):
        raise RecipeError(
            f"output_dir {held.path.parent} is no longer this run's: it, or {LOCK} in it, was moved or deleted while "
            "the run went on; nothing more is written. Put it back and go on by resume_from_checkpoint: auto"
        )


def check_free(output_dir: str | Path) -> None:
    """
    As `hold`, for `make check`: only looks, and leaves nothing.

    Raises:
        RecipeError: another process has the folder.
    """
    path = Path(output_dir) / LOCK
    if not os.path.lexists(path):
        return
    descriptor = _open(path, os.O_RDONLY)
    try:
        free, theirs = _lock(descriptor, fcntl.LOCK_SH), _read(descriptor)
    finally:
        os.close(descriptor)
    if free is False or free is None and not _is_over(theirs, _identity({})):
        raise RecipeError(_refusal(path, theirs, free is None))


def _identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "born": psutil.Process().create_time(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "recipe": recipe_digest(recipe),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        link = " (a symbolic link, which is not followed)" if error.errno == errno.ELOOP else ""
        raise RecipeError(f"{path}: {error.strerror}{link}; remove it, or choose another output_dir") from error


def _lock(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was free, and is now ours; None where the file system has no locks."""
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in NO_LOCKS:
                raise
    return None


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_over(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names has ended, as far as can be told without locks."""
    if not theirs:
        return True
    if theirs.get("host") != ours["host"]:
        return _is_requeue(theirs, ours)
    try:
        return psutil.Process(theirs.get("process")).create_time() != theirs.get("born")
    except (psutil.Error, TypeError, ValueError):
        return True


def _is_requeue(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether they are our Slurm job before it was requeued, and so over, whatever their disk knows of it."""
    return ours["job"] is not None and theirs.get("job") == ours["job"] and theirs.get("restart") != ours["restart"]


def _refusal(path: Path, theirs: Mapping[str, Any], has_none: bool) -> str:
    who = "another process, which has not said which"
    if theirs:
        who = f"process {theirs.get('process')} on {theirs.get('host')}"
        who += f" since {theirs.get('since')} (recipe {theirs.get('recipe')})"
    or_delete = f"; if it has ended, delete {path}, since that file system has no locks" if has_none else ""
    return (
        f"output_dir {path.parent} is in use by {printable(who)[:300]}; wait for its end, stop it, or choose another "
        f"output_dir{or_delete}"
    )


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _forget() -> None:
    """In a forked worker, which may outlive the process that has the lock."""
    global held
    if held is not None:
        os.close(held.descriptor)
        held = None


os.register_at_fork(after_in_child=_forget)
