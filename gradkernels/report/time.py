"""Pictures of the gradient over the time steps of an LSTM: one training step, or all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradkernels.report.flow import UNDEFINED_COLOUR, ZERO_COLOUR
from gradkernels.telemetry.time_profile import VANISHED, TimeProfile

DECADES = 8.0  # the colours span -DECADES to 0, always


def time_picture(history: Sequence[TimeProfile], path: str | Path) -> None:
    """A PNG at `path`: |dL/dc| at each lag (down) of each training step (right), relative to the largest of that step.

    history: the profile of one site at steps 1, 2, ..., of lengths that may differ. Colours are log10 of the ratio, from -8 to
    0 whatever the data; below that they stay as at the end. Black is a gradient of exactly 0; grey is where there is no such
    lag, or nothing was recorded. The line is the reach. Raises ValueError where there is no profile.
    """
    import matplotlib as mpl

    if not history:
        raise ValueError("time_picture: history must hold at least one profile, got none")
    lags = max(profile.steps for profile in history)
    values = np.full((lags, len(history)), math.nan)
    for step, profile in enumerate(history):
        values[: profile.steps, step] = _decades(profile)
    figure, axes = _figure()
    colours = mpl.colormaps["viridis"].with_extremes(under=ZERO_COLOUR, bad=UNDEFINED_COLOUR)
    extent = (0.5, len(history) + 0.5, lags - 0.5, -0.5)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, vmin=-DECADES, vmax=0.0, extent=extent)
    figure.colorbar(image, ax=axes, pad=0.015).set_label("log10 |dL/dc| relative to the largest of the step (decades)")
    steps = range(1, len(history) + 1)
    axes.plot(steps, [profile.reach() - 0.5 for profile in history], color="white", linewidth=1.5, label="reach")
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.set_ylim(lags - 0.5, -0.5)
    axes.set_xlabel("training step")
    axes.set_ylabel("lag: time steps back from the end")
    axes.legend(loc="lower right", facecolor="#606060", labelcolor="white")
    axes.set_title(f"Gradient over time, {history[-1].site}", fontsize=12, loc="left", parse_math=False)
    figure.savefig(path, format="png")


def profile_picture(profile: TimeProfile, path: str | Path) -> None:
    """A PNG at `path`: the norms of one profile over the lag, and below them the shares of saturated gates and the mean of f.

    Norms of exactly 0 are left out of the logarithmic axis.
    """
    figure, (norms, gates) = _figure(rows=2)
    lags = np.arange(profile.steps)
    for name in ("dc", "dh", "dh_recurrent"):
        values = profile.by_lag(getattr(profile, name))
        norms.plot(lags, np.where(values > 0, values, np.nan), label=f"|{name}|")
    largest = float(np.nanmax(profile.dc, initial=0.0))
    if largest > 0:
        norms.set_yscale("log")
        norms.axhline(VANISHED * largest, color="grey", linestyle=":", label="vanished")
    title = f"{profile.site}: reach {profile.reach()} of {profile.steps}, {profile.slope():+.3f} decades a step"
    norms.set_title(title, fontsize=12, loc="left", parse_math=False)
    norms.set_ylabel("norm over the batch")
    norms.legend()
    count = np.where(profile.gate_count > 0, profile.gate_count, np.nan)
    for name in ("forget_low", "forget_high", "input_low", "output_low", "candidate_high"):
        gates.plot(lags, profile.by_lag(getattr(profile, name) / count), label=name.replace("_", " "))
    gates.plot(lags, profile.by_lag(profile.forget_mean), color="black", label="mean of f")
    gates.set_ylim(-0.02, 1.02)
    gates.set_xlabel("lag: time steps back from the end")
    gates.set_ylabel("share of units")
    gates.legend(ncols=3, fontsize=9)
    figure.savefig(path, format="png")


def _figure(rows: int = 1) -> tuple:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, sharex=rows > 1)


def _decades(profile: TimeProfile) -> np.ndarray:
    """The colour values of one step by lag: decades, clipped but for an exact 0, which lies under the colours."""
    dc = profile.by_lag(profile.dc)
    largest = float(np.nanmax(dc, initial=0.0))
    if not 0 < largest < math.inf:
        return np.full(dc.shape, math.nan)
    with np.errstate(divide="ignore"):
        decades = np.log10(dc) - math.log10(largest)
    return np.where(dc == 0, -2 * DECADES, np.maximum(decades, -DECADES))
