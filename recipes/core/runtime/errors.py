"""The one exception that a user may see, the wrapper that prints it as one line, and the exit codes of a run."""

import errno
import functools
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from core.runtime.text import without_secrets

USER_ERROR = 2  # exit code of a run that stops because of its input
PEER_LOST = 70  # exit code of a rank that stops because another one is gone
SAVED_ON_SIGNAL = 75  # EX_TEMPFAIL: stopped by a signal, saved; start it again to go on
INTERRUPTED = 130  # Ctrl-C where there is nothing to save

_last_steps: list[Callable[[], None]] = []  # what `leave` does before the end, since it runs no exit handlers

connection_broke = threading.Event()  # a collective has failed: `watch.Watch` then waits less for a beat


class RecipeError(ValueError):
    """
    Something the user can mend. The message says what is wrong, where (file, row, key) and what to do.

    Args:
        message: one line.
        everywhere: all ranks raise it together, so that one line on each node is enough.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """
    Turn a `RecipeError`, or a disk that fails, into one line on stderr and exit code 2, Ctrl-C into a line, and
    `SystemExit` into its code; every other exception into a line with the file that holds its traceback, and 1.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except SystemExit as stop:
            leave(stop.code or 0)
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
            leave(INTERRUPTED)
        except Exception as error:
            told = error if isinstance(error, RecipeError) else full_disk(error) or lost_file(error)
            if told is None:
                print(f"error: {unexpected(error)}", file=sys.stderr, flush=True)
                if "RANK" in os.environ and any(name in str(error) for name in ("gloo", "NCCL", "Connection ")):
                    connection_broke.set()
                    time.sleep(20)  # `watch.Watch` tells in the meantime which rank is gone, and ends this one
                leave(1)
            if told.everywhere and os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(1)  # or the launcher might end the rank that prints it before it has
            else:
                print(f"error: {without_secrets(str(told))}", file=sys.stderr, flush=True)
            leave(USER_ERROR)

    return wrapped


def before_leaving(step: Callable[[], None]) -> None:
    """Have `leave` call a short `step`."""
    _last_steps.append(step)


def leave(code: int) -> NoReturn:
    """End the process at once: threads and process groups of a half-started run must not outlive or hang it."""
    for step in _last_steps:
        step()
    place = os.environ.get("LAUNCH_EXIT_CODE")  # for launch.sh: accelerate makes a 1 of every code
    if code and place and not (Path(place).is_file() and Path(place).read_text()):  # the first to stop is the cause
        Path(place).write_text(str(code))
    sys.stdout.flush()
    os._exit(code)


def full_disk(error: Exception) -> RecipeError | None:
    """
    What to tell of an exception that a full disk caused, None if it has another cause. safetensors and torch wrap the
    system's error in their own (torch says "unexpected pos 1249856 vs 1249744").
    """
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and not any(words in str(error) for words in ("No space left", "quota exceeded", "unexpected pos")):
        return None
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return RecipeError(
        f"a disk of {socket.gethostname()} is full ({line}); make room and go on by resume_from_checkpoint: auto"
    )


def lost_file(error: Exception) -> RecipeError | None:
    """What to tell of a file or folder that was taken away, renamed or locked meanwhile, None of all else."""
    lost = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)
    if not (lost or getattr(error, "errno", None) in (errno.EROFS, errno.ESTALE, errno.EIO)) or not error.filename:
        return None
    return RecipeError(
        f"{error.filename} cannot be read or written on {socket.gethostname()} ({error.strerror}); put it back or "
        "mend the access to it, then go on by resume_from_checkpoint: auto"
    )


def unexpected(error: Exception) -> str:
    """A line for what nobody foresaw, naming the file in which its traceback was left."""
    prefix = f"traceback-{socket.gethostname()}-rank{os.environ.get('RANK', 0)}-"
    with tempfile.NamedTemporaryFile("w", prefix=prefix, suffix=".log", delete=False, encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {first_line(error)}; nobody foresaw this: please report it with {log.name}"


def first_line(error: BaseException) -> str:
    """The beginning of what an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
