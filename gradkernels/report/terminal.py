"""The table of `print(watch)`: a summary first, then the sites, at most 80 columns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from gradkernels.diagnose import RULES, Finding
from gradkernels.diagnose.depth import PERSISTENCE
from gradkernels.report.labels import short_name, site_label, wrap
from gradkernels.telemetry import History, Record, SiteRows
from gradkernels.telemetry.names import without_numbers

BAR = 16  # characters
SITE = 31
ALIKE = 5  # so many sites that differ in numbers alone are shown each; of more, the ends and the worst
SILENT = 6  # names of sites without a gradient before the rest is a number


def summary(history: History, findings: Sequence[Finding]) -> list[str]:
    """The findings with what to try, or that there is none; a line each, of any length."""
    if not findings:
        steps = len(history)
        if steps < PERSISTENCE:
            return [f"Nothing is judged before step {PERSISTENCE}."]
        stacks = len(history.stacks)
        return [f"No finding. {len(RULES)} rules checked on {steps} steps, {stacks} stack{'s' * (stacks != 1)}."]
    lines = []
    for finding in findings:
        where = f" in {finding.stack}" if finding.stack else f" at {finding.site}"
        lines.append(f"{finding.code} ({finding.severity.name.lower()}) {finding.when}{where}: {finding.evidence}.")
        if finding.until_step is None:
            lines.append(f"Try: {finding.advice}.")
    return lines


def left_out(history: History) -> list[str]:
    """A line that says how many lines of the history's file could not be read; none where all could."""
    count = history.lines_left_out
    return [
        f"{count} line{'s' * (count != 1)} of the file could not be read and {'was' if count == 1 else 'were'} left out."
    ] * bool(count)


def table(history: History, findings: Sequence[Finding], *, all: bool = False) -> str:
    """The last finished step of a history: a summary, then a line a site, with all=False of many alike a few."""
    if not history.snapshots:
        return "\n".join(["gradkernels: no finished step yet: call watch.step() after optimizer.step()", *left_out(history)])
    snapshot = history.snapshots[-1]
    head = f"step {snapshot.step}"
    if snapshot.loss is not None:
        head += f", loss {snapshot.loss:.4f}"
    if snapshot.learning_rates:
        head += ", lr " + " ".join(f"{rate:.2e}" for rate in dict.fromkeys(snapshot.learning_rates))
    head += ", skipped by the gradient scaler" if snapshot.skipped else ""
    text = [head, *summary(history, findings), *left_out(history)]
    rows = _rows(history)
    if not rows:
        text.append("This step measured nothing: no backward pass reached a site.")
    silent = [site_label(site.name, site.layer) for site in history.sites if site.name not in rows]
    if rows and silent:
        more = f" and {len(silent) - SILENT} more" if len(silent) > SILENT and not all else ""
        names = silent if all else silent[:SILENT]
        text.append(f"No gradient in this step: {', '.join(names)}{more}. watch.coverage() says why.")
    lines = [line for part in text for line in wrap(part)]
    return "\n".join([*lines, "", *_lines(history, rows, all)] if rows else lines)


def _rows(history: History) -> dict[str, dict[str, Record]]:
    """The records of the last step by site and port, sites by depth."""
    rows: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in history.records():
        rows[record.site][record.port] = record
    return rows


def _lines(history: History, rows: dict[str, dict[str, Record]], all: bool) -> list[str]:
    sites = {site.name: site for site in history.sites}
    decades = _decades(history, rows, sites)
    scale = max(1, math.ceil(max((abs(value) for value in decades.values() if math.isfinite(value)), default=1.0)))
    nonfinite = any(record.nonfinite_count for ports in rows.values() for record in ports.values())
    zeros = any(record.zero_count for ports in rows.values() for record in ports.values())
    outgoing = any("dx" in ports and sites[name].port != "dx" for name, ports in rows.items())
    width = _site_width(nonfinite)
    head = f"{'site':<{width + 1}}{'|dL/dh|':>9}" + (f"{'|dL/dx|':>9}" if outgoing else "")
    head += (f"{'zeros':>6}" if zeros else "") + (f"{'nonfinite':>10}" if nonfinite else "")
    lines = [(head + f" {-scale:<+{BAR // 2 - 3}d} decades {scale:>+{BAR // 2 - 4}d}").rstrip()]
    shown = set(rows) if all else _worth_showing(rows, decades)
    hidden = 0
    for name, ports in rows.items():
        if name not in shown:
            hidden += 1
            continue
        if hidden:
            lines.append(f"  … {hidden} more like these")
            hidden = 0
        lines.append(_line(sites[name], ports, decades.get(name), scale, (outgoing, zeros, nonfinite)))
    if hidden:
        lines.append(f"  … {hidden} more like these")
    return lines


def _decades(history: History, rows: dict, sites: dict[str, SiteRows]) -> dict[str, float]:
    """log10 of |dL/dh| at each site as a root mean square, relative to the last site of its stack."""
    result = {}
    for stack in reversed(history.stacks):
        known = [(name, rows[name][sites[name].port]) for name in stack.sites if sites[name].port in rows.get(name, ())]
        reference = next((record.rms for _, record in reversed(known) if record.rms), 0.0)
        for name, record in known:
            if reference and not record.nonfinite_count:
                result[name] = math.log10(record.rms / reference) if record.rms else -math.inf
    return result


def _worth_showing(rows: dict[str, dict[str, Record]], decades: dict[str, float]) -> set[str]:
    """Of many sites that differ in numbers alone: the first, the last, the lowest, the highest and the first that is broken."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in rows:
        kinds[without_numbers(name)].append(name)
    shown: set[str] = set()
    for names in kinds.values():
        if len(names) <= ALIKE:
            shown.update(names)
            continue
        by_size = sorted(names, key=lambda name: decades.get(name, 0.0))
        broken = [name for name in names if any(record.nonfinite_count for record in rows[name].values())]
        shown.update((names[0], names[-1], by_size[0], by_size[-1], *broken[-1:]))
    return shown


def flow_bar(decades: float, scale: int) -> str:
    """A bar from the middle (0 decades) to `decades`, clipped at -scale and +scale."""
    half = BAR // 2
    length = half if math.isinf(decades) else min(half, round(abs(decades) * half / scale))
    return (" " * (half - length) + "<" * length if decades < 0 else " " * half) + "|" + (">" * length if decades > 0 else "")


def _site_width(nonfinite: bool) -> int:
    """What fits 80 columns beside all the others."""
    return SITE - 5 if nonfinite else SITE


def _line(site: SiteRows, ports: dict[str, Record], decades: float | None, scale: int, columns: tuple[bool, bool, bool]) -> str:
    """One site: dL/dh, what goes out, exact zeros of dL/dh, elements that are not finite anywhere."""
    outgoing, zeros, nonfinite = columns
    hidden = ports.get(site.port)
    width = _site_width(nonfinite)
    line = f"{short_name(site_label(site.name, site.layer), width):<{width + 1}}{_norm(hidden):>9}"
    if outgoing:
        line += f"{_norm(ports.get('dx') if site.port != 'dx' else None):>9}"
    if zeros:
        line += f"{f'{100 * hidden.zero_count / hidden.numel:.0f}%' if hidden and hidden.numel else '-':>6}"
    if nonfinite:
        count = sum(record.nonfinite_count for record in ports.values())
        line += f"{count:>10}"
    return f"{line} {'' if decades is None else flow_bar(decades, scale)}".rstrip()


def _norm(record: Record | None) -> str:
    """The norm of the finite elements; of a gradient that has none, what it is."""
    if record is None:
        return "-"
    return "nan" if record.numel and record.nonfinite_count == record.numel else f"{record.norm:.2e}"
