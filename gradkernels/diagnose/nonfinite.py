"""NONFINITE: gradients that are NaN or infinite, and where in the backward pass they were made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from gradkernels.diagnose.finding import Finding, Severity
from gradkernels.telemetry.fields import NONFINITE
from gradkernels.telemetry.history import History
from gradkernels.telemetry.records import Record

INCOMING = ("dy", "dskip", "dbranch", "dnew_residual", "dh_next", "dc_next")
ADVICE = (
    "look at what this module computes there (a division, a root, a logarithm, an overflow of a 16-bit dtype), lower the "
    "learning rate and clip the gradient norm"
)


def nonfinite(history: History) -> list[Finding]:
    """The steps with gradients that are not finite up to the last step, or the last ones that have passed.

    Not those that a GradScaler has skipped: a scale that is too large is what it looks for.
    """
    bad = np.array([not snapshot.skipped and snapshot.values[:, NONFINITE].sum() for snapshot in history.snapshots])
    if not bad.any():
        return []
    last = int(np.flatnonzero(bad)[-1])
    first = last
    while first and bad[first - 1]:
        first -= 1
    steps = history.steps
    records = history.records(int(steps[first]))
    count = len({record.site for record in records if record.nonfinite_count})
    place, site = origin(records)
    evidence = f"gradients of {count} sites are NaN or infinite in step {steps[first]}, {place}"
    passed = last < len(bad) - 1
    until = int(steps[last]) if passed else None
    return [
        Finding("NONFINITE", Severity.NOTE if passed else Severity.ERROR, site, int(steps[first]), evidence, ADVICE, "", until)
    ]


def origin(records: Sequence[Record]) -> tuple[str, str]:
    """Where the backward pass, which runs from the last site to the first, met what is not finite first, and at which site.

    records: of one step, by depth. A site whose incoming gradients are finite has made it itself, or what it hands to its
    weights; else it was made between this site and the one behind it.
    """
    clean = None
    for site, group in groupby(reversed(records), key=lambda record: record.site):
        ports = list(group)
        if any(record.nonfinite_count for record in ports if record.port in INCOMING):
            place = f"the loss handed them to {site}" if clean is None else f"made between {clean} and {site}"
            return place, site
        if any(record.nonfinite_count for record in ports):
            return f"made in {site}", site
        clean = site
    return "none", ""
