"""The picture of the gradient flow: dL/dh over depth and time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradkernels.diagnose import Finding
from gradkernels.diagnose.depth import ZERO, Profile, profiles
from gradkernels.report.labels import short_name
from gradkernels.report.terminal import left_out, summary
from gradkernels.telemetry import History

DECADES = 4.0  # the colours span -DECADES to +DECADES, always
UNDER = -2 * DECADES  # what stands for a gradient of exactly 0: under the colours
MAX_NAMES, NAME_WIDTH = 30, 36
UNDEFINED_COLOUR, ZERO_COLOUR = "#b0b0b0", "#000000"


def flow_picture(history: History, findings: Sequence[Finding], path: str | Path) -> None:
    """A PNG at `path`: dL/dh of each site (down, input first) at each step (right), relative to the last site of its stack.

    Stacks lie one below the other, a line between them. Colours are decades of the root mean square, from -4 to +4 whatever
    the data; beyond that they stay as at the end. Black is a gradient of exactly 0; grey is a site that was not measured, had
    elements that are not finite, or has nothing to be compared with. Raises ValueError where no stack has two sites.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    draw_flow(figure, figure.subplots(), history, findings)
    figure.savefig(path, format="png")


def draw_flow(figure: object, axes: object, history: History, findings: Sequence[Finding], colour_bar: bool = True) -> None:
    """What flow_picture shows, on axes of a figure."""
    import matplotlib as mpl

    every = profiles(history)
    shown = [profile for profile in every if not profile.stack.inside] or every
    if not shown:
        raise ValueError("flow_picture: history must hold a stack of two sites with a gradient, got none")
    rows = np.concatenate([_colour_values(profile) for profile in shown])
    steps = history.steps
    names = [name for profile in shown for name in profile.stack.sites]
    colours = mpl.colormaps["RdBu_r"].with_extremes(under=ZERO_COLOUR, bad=UNDEFINED_COLOUR)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(rows) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap=colours, vmin=-DECADES, vmax=DECADES, extent=extent)
    below = 0
    for profile in shown[:-1]:
        below += len(profile.stack.sites)
        axes.axhline(below - 0.5, color="black", linewidth=1)
    if colour_bar:
        _colour_bar(figure, axes, image)
    _name_axes(axes, names, steps)
    _explain_extremes(axes, rows)
    title = " ".join([summary(history, findings)[0], *left_out(history)])
    axes.set_title("\n".join(textwrap.wrap(title, 110 if colour_bar else 60)), fontsize=11, loc="left", parse_math=False)


def _colour_values(profile: Profile) -> np.ndarray:
    """Decades by site and step, clipped, UNDER for exactly 0, NaN for what is not known."""
    values = np.clip(profile.decades, -DECADES, DECADES)  # 0 at the last site that has a gradient
    values[(profile.decades == ZERO) | (profile.rms == 0)] = UNDER
    return values.T


def _colour_bar(figure: object, axes: object, image: object) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.015, ticks=range(-4, 5))
    bar.set_label("log10 of dL/dh (root mean square) relative to the last site of the stack (decades)")
    ends = {"x": 0.5, "color": "white", "rotation": 90, "ha": "center", "fontsize": 9, "transform": bar.ax.transAxes}
    bar.ax.text(y=0.985, s="explodes", va="top", **ends)
    bar.ax.text(y=0.015, s="vanishes", va="bottom", **ends)


def _name_axes(axes: object, sites: list[str], steps: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    stride = math.ceil(len(sites) / MAX_NAMES)
    shown = [*range(0, len(sites) - 1, stride), len(sites) - 1]
    if len(shown) > 2 and shown[-1] - shown[-2] < stride / 2:
        del shown[-2]
    axes.set_yticks(shown, [short_name(sites[index], NAME_WIDTH) for index in shown], fontsize=9, parse_math=False)
    axes.set_ylabel("loss end  ←  depth  →  input end")
    axes.set_xlabel("training step")
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def _explain_extremes(axes: object, rows: np.ndarray) -> None:
    """A legend for black and grey, where there is any."""
    from matplotlib.patches import Patch

    patches = []
    if (rows == UNDER).any():
        patches.append(Patch(color=ZERO_COLOUR, label="exactly 0"))
    if np.isnan(rows).any():
        patches.append(Patch(color=UNDEFINED_COLOUR, label="not finite, or nothing to compare with"))
    if patches:
        axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(0, -0.06), ncols=2, frameon=False, fontsize=9)
