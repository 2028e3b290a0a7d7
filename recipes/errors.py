"""The one exception that a user may see, and the wrapper that prints it as one line."""

import functools
import os
import sys
from collections.abc import Callable

USER_ERROR = 2  # exit code of a run that stops because of its input


class RecipeError(ValueError):
    """Something the user can mend. The message says what is wrong, where (file, row, key) and what to do."""


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Turn a `RecipeError` into one line on stderr and exit code 2; every other exception stays a traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # Threads and process groups of a half-started run must not outlive the message or print over it.
            os._exit(USER_ERROR)

    return wrapped
