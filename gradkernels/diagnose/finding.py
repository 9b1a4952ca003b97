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
    """One conclusion: its code, how severe, the site it points at, since which step, the numbers, and what to try."""

    code: str
    severity: Severity
    site: str
    since_step: int
    evidence: str
    advice: str
