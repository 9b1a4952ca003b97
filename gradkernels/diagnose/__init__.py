"""Rules: a history in, findings out. Pure functions: no model, no device, no clock. A new rule goes into RULES."""

from collections.abc import Callable

from gradkernels.diagnose.depth import exploding, vanishing
from gradkernels.diagnose.finding import Finding, Severity
from gradkernels.diagnose.nonfinite import nonfinite
from gradkernels.telemetry.history import History

RULES: tuple[Callable[[History], list[Finding]], ...] = (nonfinite, vanishing, exploding)

__all__ = ["RULES", "Finding", "Severity", "diagnose"]


def diagnose(history: History) -> list[Finding]:
    """What every rule concludes, the worst first."""
    found = [finding for rule in RULES for finding in rule(history)]
    return sorted(found, key=lambda finding: (-finding.severity, finding.until_step is not None, finding.since_step))
