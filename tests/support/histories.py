"""Histories made of numbers: what rules and renderers are tested with."""

import numpy as np

from gradkernels.telemetry import FIELDS, History, SiteRows, Snapshot, Stack

SIZE = 64


def history_of(steps, *, names=None, sizes=None, bypassed=None, bad=(), losses=None):
    """A history of one stack of probes: steps[k][i] is the root mean square of dL/dh at site i in step k + 1, None without one.

    sizes: elements by site. bad: (step index, site index) with elements that are not finite.
    """
    count = max(map(len, steps), default=0)
    names = names or [f"layers.{index}" for index in range(count)]
    sizes = sizes or [SIZE] * count
    sites = [SiteRows(name, "Block", "probe", ("dy",), "dy", index) for index, name in enumerate(names)]
    history = History(sites, [Stack("layers", tuple(names), tuple(bypassed or [False] * (count - 1)))] if count > 1 else [])
    for step, values in enumerate(steps):
        table = np.zeros((count, len(FIELDS)))
        for index, (rms, size) in enumerate(zip(values, sizes, strict=False)):
            if rms is not None:
                broken = (step, index) in bad
                fields = {"numel": size, "observation_count": 1, "square_sum": rms**2 * size, "abs_max": rms}
                fields |= {"nonfinite_count": float(broken), "zero_count": float(size if rms == 0 else 0)}
                for name, value in fields.items():
                    table[index, FIELDS.index(name)] = value
        history.append(Snapshot(step + 1, None if losses is None else losses[step], (), table))
    return history


def decades(*values):
    """Root mean squares of one step from decades."""
    return [None if value is None else 0.0 if value == -np.inf else 10.0**value for value in values]
