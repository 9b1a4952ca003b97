"""The table of `print(watch)`: verdict first, one line a site, at most 80 columns."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

from gradkernels.diagnose import slope_finding
from gradkernels.diagnose.slope import PERSISTENCE
from gradkernels.telemetry import Record

if TYPE_CHECKING:
    from gradkernels.watch import Watch

COLUMNS = 80
INCOMING = ("dy", "dskip", "dbranch", "dnew_residual", "dh_next", "dc_next")
BAR = 16  # characters for 8 decades, -4 to +4


def verdict(slopes: list[float | None], stream: list[Record]) -> str:
    """One or two lines: the finding of the slope rule, or that there is none."""
    if len(stream) < 2 or not slopes or slopes[-1] is None:
        return "No verdict: dL/dh was measured at fewer than two depths, or is zero at the last."
    first, last = stream[0].site, stream[-1].site
    finding = slope_finding(slopes, first, last)
    if math.isnan(slopes[-1]):
        number = f"dL/dh from {last} back to {first} is no longer finite"
        if finding is None:
            return f"No verdict: {number}."
    else:
        number = f"dL/dh slope {slopes[-1]:+.2f} decades from {last} back to {first}"
    if finding is None:
        return f"No finding: {number}." if len(slopes) >= PERSISTENCE else f"No verdict before step {PERSISTENCE}: {number}."
    lines = [f"{finding.code} ({finding.severity.name.lower()}) since step {finding.since_step}: {number}."]
    return "\n".join([*lines, f"Try: {finding.advice}."])


def flow_bar(decades: float) -> str:
    """A bar from the middle (0 decades) to `decades`, clipped at -4 and +4."""
    half = BAR // 2
    length = half if math.isinf(decades) else min(half, round(abs(decades) * half / 4))
    return (" " * (half - length) + "<" * length if decades < 0 else " " * half) + "|" + (">" * length if decades > 0 else "")


def table(watch: Watch) -> str:
    """The last finished step: verdict, then a line a site; the bar is |dL/dx| relative to the last layer's, in decades."""
    rows = watch.site_records()
    if not rows:
        return "gradkernels: no finished step yet: call watch.step() after optimizer.step()"
    stream = watch.stream()
    reference = stream[-1].norm if stream else 0.0
    head = f"step {watch.step_count}"
    if watch.loss is not None:
        head += f", loss {float(watch.loss):.4f}"
    if watch.learning_rate is not None:
        head += f", lr {float(watch.learning_rate):.2e}"
    lines = [head, verdict(watch.slopes(), stream)]
    count = sum(record.nonfinite_count for _, record in rows)
    if count:
        lines.append(f"NaN or infinite: {count} gradient elements; {origin([record for _, record in rows])}.")
    lines.append("")
    lines.append(f"{'site':<32}{'|dL/dy|':>9}{'|dL/dx|':>9}{'zero':>6}{'bad':>6} {'-4  decades   +4':<{BAR + 1}}".rstrip())
    for _, group in groupby(rows, key=lambda row: id(row[0])):
        lines.append(_line([record for _, record in group], reference))
    wrapped = []
    for line in lines:
        wrapped += _wrap(line)
    return "\n".join(wrapped)


def origin(records: list[Record]) -> str:
    """Where the backward pass, which runs from the last site to the first, met what is not finite first.

    records: of one step, by depth. A site whose incoming gradients are finite has made it itself, or what it hands to its
    weights; else it was made between this site and the one behind it.
    """
    clean = None
    for site, group in groupby(reversed(records), key=lambda record: record.site):
        ports = list(group)
        incoming = [record for record in ports if record.port in INCOMING]
        if any(record.nonfinite_count for record in incoming):
            return f"the loss handed them to {site}" if clean is None else f"made between {clean} and {site}"
        if any(record.nonfinite_count for record in ports):
            return f"made in {site}"
        clean = site
    return "none"


def _line(records: list[Record], reference: float) -> str:
    """One site: what comes in and what goes out, exact zeros in what comes in, non-finite elements anywhere."""
    ports = {record.port: record for record in records}
    incoming = ports.get("dy") or ports.get("dskip") or records[0]
    outgoing = ports.get("dx")
    shown = outgoing or incoming
    bad = sum(record.nonfinite_count for record in records)
    zeros = f"{100 * incoming.zero_count / incoming.numel:.0f}%" if incoming.numel else "-"
    known = reference and shown.nonfinite_count < shown.numel
    bar = flow_bar(math.log10(shown.norm / reference) if shown.norm else -math.inf) if known else ""
    out = _norm(outgoing) if outgoing else "-"
    site = short_name(incoming.site, 31)
    return f"{site:<32}{_norm(incoming):>9}{out:>9}{zeros:>6}{bad if bad < 100_000 else '>99k':>6} {bar}".rstrip()


def _norm(record: Record) -> str:
    """The norm of the finite elements; of a gradient that has none, what it is."""
    return "nan" if record.numel and record.nonfinite_count == record.numel else f"{record.norm:.2e}"


def short_name(path: str, width: int) -> str:
    """A module path that fits: names cut to their first letter from the left, then the end alone; numbers stay whole."""
    parts = path.split(".")
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        parts[index] = part if part.isdigit() else part[0]
    name = ".".join(parts)
    return name if len(name) <= width else "…" + name[1 - width :]


def _wrap(line: str) -> list[str]:
    """A line broken at spaces so that it fits; rows of the table always do."""
    parts = []
    while len(line) > COLUMNS:
        cut = line.rfind(" ", 0, COLUMNS + 1)
        cut = cut if cut > 0 else COLUMNS
        parts.append(line[:cut].rstrip())
        line = "  " + line[cut:].lstrip()
    return [*parts, line]
