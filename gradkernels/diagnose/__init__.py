"""Rules: records in, findings out. One function each, pure: no model, no device, no clock."""

from gradkernels.diagnose.finding import Finding, Severity
from gradkernels.diagnose.slope import slope, slope_finding

__all__ = ["Finding", "Severity", "slope", "slope_finding"]
