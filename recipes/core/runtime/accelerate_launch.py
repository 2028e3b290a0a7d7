"""
`accelerate launch` that ends in a line where torch's launcher would end in a traceback of itself.

    python recipes/core/runtime/accelerate_launch.py --config_file CONFIG recipes/dpo.py --config my.yaml

A process that fails says why by itself; torch's launcher then adds sixty lines about the launcher, below which the
cause is hard to find. A script of its own, since it stands in for a command: launch.sh and the Makefile run it.
"""

import os
import signal
import sys
from pathlib import Path
from types import TracebackType

sys.path[0] = str(Path(__file__).resolve().parents[2])  # recipes/, and not the folder of this file

from core.runtime.errors import PEER_LOST, SAVED_ON_SIGNAL, USER_ERROR  # noqa: E402
from core.runtime.text import without_secrets  # noqa: E402


def main() -> None:
    if "LAUNCH_EXIT_CODE" not in os.environ:  # launch.sh has said what it starts
        print(without_secrets(f"starting {' '.join(sys.argv[1:])}"), flush=True)
    from accelerate.commands.launch import launch_command, launch_command_parser  # late: it takes seconds to import

    sys.excepthook = in_a_line
    arguments = launch_command_parser().parse_args(["--quiet", *sys.argv[1:]])
    # Ctrl-C reaches the training process too, which saves and ends; torch's launcher of several answers it by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launch_command(arguments)


def in_a_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The hook for exceptions that nobody caught: a line for the launcher's own, Python's traceback for all others."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if isinstance(error, ChildFailedError):
        for rank, failure in sorted(error.failures.items()):
            print(f"process {rank} {ending(failure.exitcode)}", file=sys.stderr)
        note_crash({failure.exitcode for failure in error.failures.values()})
    elif isinstance(error, DistError | RendezvousError | SignalException):
        print(f"launcher: {str(error).splitlines()[0]}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def note_crash(codes: set[int]) -> None:
    """
    Let a crash count for launch.sh over a 75: torch's launcher ends the other processes by SIGTERM, which these answer
    as if the run was stopped and saved.
    """
    place = Path(os.environ.get("LAUNCH_EXIT_CODE", ""))
    told = {USER_ERROR, PEER_LOST, SAVED_ON_SIGNAL, -signal.SIGTERM, -signal.SIGUSR1}
    if codes - told and place.is_file() and place.read_text() == str(SAVED_ON_SIGNAL):
        place.write_text("1")


def ending(code: int) -> str:
    """What an exit code says; a negative one is a signal's number."""
    if code >= 0:
        return f"ended with exit code {code}"
    lack = "; the system kills so where memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{lack}"


if __name__ == "__main__":
    main()
