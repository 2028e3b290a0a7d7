"""What `check.py` finds: every fault and every note, collected instead of stopping at the first."""

from collections.abc import Callable
from typing import Any, TypeVar

from core.runtime.errors import RecipeError
from core.runtime.text import without_secrets

Result = TypeVar("Result")


class Findings:
    """Faults are what a run would stop at, or what would make it another run; notes are what to know."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.notes: list[str] = []

    def attempt(self, step: Callable[..., Result], *arguments: Any, **options: Any) -> Result | None:
        """The result of a step, or None where it refuses; its reason is then a fault."""
        try:
            return step(*arguments, **options)
        except RecipeError as error:
            self.fault(str(error))
            return None

    def fault(self, line: str) -> None:
        if line not in self.faults:  # two steps may meet the same fault
            self.faults.append(line)

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def report(self) -> int:
        """Print all of them; the number of faults."""
        for line in self.notes:
            print(f"note: {without_secrets(line)}")
        if not self.faults:
            print("\nNothing found that would stop this run.", flush=True)
        else:
            print(f"\n{len(self.faults)} thing{'s' if len(self.faults) > 1 else ''} to mend:")
            for number, line in enumerate(self.faults, start=1):
                print(f"  {number}. {without_secrets(line)}", flush=True)
        return len(self.faults)
