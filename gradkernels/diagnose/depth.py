"""VANISHING and EXPLODING: how dL/dh changes along a stack, from its last site back to its first.

Compared are root mean squares, in decades. Where sites differ in size, a change that the sizes explain does not count: of a map
that keeps the norm, or the root mean square, the other one changes with the number of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gradkernels.diagnose.finding import Finding, Severity
from gradkernels.telemetry.fields import NONFINITE, NUMEL, OBSERVATIONS
from gradkernels.telemetry.history import History, SiteRows, Stack
from gradkernels.telemetry.records import norms_of

GRADES = ((3.0, Severity.ERROR), (1.5, Severity.WARNING), (1.0, Severity.NOTE))  # decades
PERSISTENCE = 3  # steps in a row before anything is said
ZERO_PERSISTENCE = 10  # the same for a gradient that is exactly 0: layers that start at zero pass nothing on in the first steps
ZERO = -20.0  # decades, for a gradient of exactly 0 behind one that is not

# Decades that a layer of this class takes by construction, at PyTorch's initialisation: its gates are half open. Measured at
# hidden sizes 32 to 256 and 12 to 50 time steps, before and after training: 0.6 to 0.8, 0.3 to 0.5.
GATED = {"LSTM": 0.8, "GRU": 0.5}


@dataclass(frozen=True)
class Profile:
    """A stack over the steps: arrays (steps, sites).

    decades: log10 of the root mean square of dL/dh, less what sizes and gates explain, 0 at the last site; NaN where there is
    no gradient, or none that is finite. rms: the root mean square itself.
    """

    stack: Stack
    steps: np.ndarray
    decades: np.ndarray
    rms: np.ndarray


def profiles(history: History) -> list[Profile]:
    """One profile for each stack that has two sites with a gradient."""
    sites = {site.name: site for site in history.sites}
    steps = history.steps
    found = []
    for stack in history.stacks:
        rms, size = _gather(history, [sites[name] for name in stack.sites])
        if (np.isfinite(rms).sum(1) >= 2).any():
            allowed = np.array([GATED.get(sites[name].layer, 0.0) for name in stack.sites])
            found.append(Profile(stack, steps, _decades(rms, size, allowed), rms))
    return found


def _gather(history: History, sites: list[SiteRows]) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square (NaN: no gradient, or none that is finite) and elements per backward call: (steps, sites) each."""
    rows = np.stack([history.rows(site) for site in sites], 1)
    skipped = np.array([snapshot.skipped for snapshot in history.snapshots], dtype=bool)[:, None]
    broken, observations = (rows[..., NONFINITE] > 0) | skipped, rows[..., OBSERVATIONS]
    seen = observations > 0
    size = np.divide(rows[..., NUMEL], observations, out=np.full(seen.shape, np.nan), where=seen)
    return np.where(seen & ~broken, norms_of(rows, rms=True), np.nan), size


def _decades(rms: np.ndarray, size: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """See Profile. Between neighbours that differ in size, the change nearest to 0 between that of the root mean square and
    that of the norm."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(rms > 0, np.log10(rms), np.where(rms == 0, -np.inf, np.nan))
        elements = np.log10(size)
    result = np.full(values.shape, np.nan)
    for step, (value, count) in enumerate(zip(values, elements, strict=True)):
        known = np.flatnonzero(np.isfinite(value))
        level = 0.0
        for place in range(len(known) - 1, -1, -1):
            index = known[place]
            if place < len(known) - 1:
                following = known[place + 1]
                change = value[index] - value[following]
                other = change + (count[index] - count[following]) / 2
                change = 0.0 if change * other < 0 else min(change, other, key=abs)
                level += min(0.0, change + allowed[following]) if change < 0 else change
            result[step, index] = level
        first = known[0] if known.size else 0
        result[step, :first][np.isneginf(value[:first])] = ZERO  # exactly 0 in front of all others: nothing gets through
    return result


def vanishing(history: History) -> list[Finding]:
    """Where the gradient of a site is far below that of a later one of its stack."""
    return _along(history, "VANISHING", _drop)


def exploding(history: History) -> list[Finding]:
    """Where the gradient of a site is far above that at the end of its stack, and has come through what lies between."""
    return _along(history, "EXPLODING", _growth)


def _drop(decades: np.ndarray, bypassed: tuple[bool, ...]) -> np.ndarray:
    """By how much each site lies below the largest later one, at least 0; (steps, sites)."""
    reference = np.fmax.accumulate(decades[:, ::-1], 1)[:, ::-1]
    return np.nan_to_num(np.maximum(reference - decades, 0.0))


def _growth(decades: np.ndarray, bypassed: tuple[bool, ...]) -> np.ndarray:
    """By how much each site lies above the last, without what came past the site behind it."""
    result = np.zeros_like(decades)
    for step, values in enumerate(decades):
        known = np.flatnonzero(np.isfinite(values) & (values > ZERO))
        level = 0.0
        for index, following in zip(known[-2::-1], known[:0:-1], strict=True):
            change = values[index] - values[following]
            around = any(bypassed[index:following])
            level += min(change, 0.0) if around else change
            result[step, index] = level
    return np.maximum(result, 0.0)


def _along(history: History, code: str, amount_of: Callable[[np.ndarray, tuple[bool, ...]], np.ndarray]) -> list[Finding]:
    """The findings of all stacks. What is found in blocks is not said again of the layers inside them."""
    found = []
    for profile in profiles(history):
        finding = _finding(profile, code, amount_of(profile.decades, profile.stack.bypassed), history)
        if finding is not None:
            found.append((profile.stack.inside, finding))
    outer = {finding.until_step is None for inside, finding in found if not inside}
    return [finding for inside, finding in found if not inside or (finding.until_step is None) not in outer]


def _finding(profile: Profile, code: str, amount: np.ndarray, history: History) -> Finding | None:
    """The finding of one stack: of the run of steps that reaches the end, or of the last one that has passed."""
    usable = np.isfinite(profile.decades).sum(1) >= 2
    if not usable.any():
        return None
    # Steps that were not finite say nothing about size: what held before them still holds.
    profile = replace(profile, steps=profile.steps[usable], decades=profile.decades[usable], rms=profile.rms[usable])
    amount = amount[usable]
    worst = amount.max(1)
    for ongoing in (True, False):
        for threshold, severity in GRADES:
            run = _run(worst >= threshold, profile.decades, ongoing)
            if run is not None:
                return _describe(profile, code, severity, (*run, ongoing), amount, history)
    return None


def _run(held: np.ndarray, decades: np.ndarray, ongoing: bool) -> tuple[int, int] | None:
    """First and last index of the run of steps that counts: the one that reaches the end, or the longest that does not."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], held.astype(int), [0]))))
    runs = [(first, last - 1) for first, last in zip(edges[::2], edges[1::2], strict=True)]
    runs = [run for run in runs if run[1] - run[0] + 1 >= _needed(decades[run[0] : run[1] + 1])]
    ending = [run for run in runs if run[1] == len(held) - 1]
    if ongoing:
        return ending[0] if ending else None
    return max((run for run in runs if run not in ending), key=lambda run: run[1] - run[0], default=None)


def _needed(decades: np.ndarray) -> int:
    return ZERO_PERSISTENCE if (decades == ZERO).any(1).all() else PERSISTENCE


def _describe(
    profile: Profile,
    code: str,
    severity: Severity,
    run: tuple[int, int, bool],
    amount: np.ndarray,
    history: History,
) -> Finding:
    first, last, ongoing = run
    shown = last if ongoing else first + int(amount[first : last + 1].max(1).argmax())
    sites, steps, values = profile.stack.sites, profile.steps, profile.decades[shown]
    site = int(amount[shown].argmax())
    known = np.flatnonzero(np.isfinite(values))
    later = known[known > site]
    reference = later[np.argmax(values[later])] if code == "VANISHING" else later[-1]
    between = known[(known >= site) & (known <= reference)]
    changes = np.diff(values[between])
    steepest = int((changes if code == "VANISHING" else -changes).argmax())
    low, high = sites[between[steepest]], sites[between[steepest + 1]]
    size = abs(values[reference] - values[site])
    if values[site] == ZERO:
        evidence = f"dL/dh is exactly 0 at {sites[site]} and not at {sites[reference]}"
    else:
        word = "below" if code == "VANISHING" else "above"
        evidence = f"dL/dh at {sites[site]} is {size:.1f} decades {word} that at {sites[reference]}"
        if len(between) > 2:
            evidence += f", steepest between {low} and {high} ({abs(changes[steepest]):.1f})"
    if not ongoing:
        severity = Severity.NOTE
    until = None if ongoing else int(steps[last])
    return Finding(code, severity, sites[site], int(steps[first]), evidence, _advice(code, history), profile.stack.name, until)


def _advice(code: str, history: History) -> str:
    """What to try, in the words of the net at hand."""
    has_norm = any(name.rstrip("123d").endswith(("Norm", "Norm_")) for name in history.layers)
    if code == "EXPLODING":
        norm = "check that the norm stands before each block" if has_norm else "put a norm before each block"
        return f"initialise with a smaller gain, {norm}, clip the gradient norm, and warm the learning rate up"
    squashing = [name for name in ("Sigmoid", "Hardsigmoid", "Softsign") if name in history.layers]
    gains = {"ReLU": "He", "LeakyReLU": "He", "GELU": "He", "SiLU": "He", "Tanh": "Xavier (gain 5/3)"}
    known = [f"{gains[name]} for {name}" for name in gains if name in history.layers]
    first = f"replace {squashing[0]} between layers by ReLU or GELU, and initialise for that (He)" if squashing else ""
    first = first or f"initialise for the activation ({' or '.join(known) or 'He for ReLU and GELU, Xavier for tanh'})"
    if has_norm:
        return f"{first}; put the norm before each block (pre-LN) and warm the learning rate up"
    return f"{first}; put a norm before each block and a residual connection around it"
