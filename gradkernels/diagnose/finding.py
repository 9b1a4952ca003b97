"""What a rule concludes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How sure and how bad: a note may be healthy, a warning is not, an error stops learning."""

    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True)
class Finding:
    """One conclusion: its code, how severe, the site it points at, from which step to which, the numbers, and what to try.

    stack: along which it was found, empty where it is about one site. until_step: the last step in which it held, where it has
    passed; None where it holds in the last step of the history.
    """

    code: str
    severity: Severity
    site: str
    since_step: int
    evidence: str
    advice: str
    stack: str = ""
    until_step: int | None = None

    @property
    def when(self) -> str:
        """Its steps in words."""
        if self.until_step is None:
            return f"since step {self.since_step}"
        return f"from step {self.since_step} to {self.until_step}, and passed"
