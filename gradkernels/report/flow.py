"""The picture of the gradient flow: dL/dh over depth and time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gradkernels.diagnose import slope
from gradkernels.report.terminal import short_name, verdict
from gradkernels.telemetry import Record

DECADES = 4.0  # the colours span -DECADES to +DECADES, always
ZERO = -2 * DECADES  # what stands for a gradient of exactly 0: under the colours
MAX_NAMES, NAME_WIDTH = 30, 36
UNDEFINED_COLOUR, ZERO_COLOUR = "#b0b0b0", "#000000"


def flow_picture(history: Sequence[Sequence[Record]], path: str | Path) -> None:
    """A PNG at `path`: |dL/dh| of each site (down, input first) at each step (right), relative to the last site's.

    history: dL/dh of steps 1, 2, ..., each by depth, as `watch.stream()` gives it. Colours are log10 of the ratio, from -4 to
    +4 whatever the data; beyond that they stay as at the end. Black is a gradient of exactly 0; grey is a site that was not
    measured, had non-finite elements, or has nothing to be compared with. Raises ValueError where no step has a record.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = _sites(history)
    if not sites:
        raise ValueError("flow_picture: history must hold at least one record, got none")
    steps = [{record.site: record for record in stream} for stream in history]
    rows = [[_decades(step.get(site), step.get(sites[-1])) for step in steps] for site in sites]
    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = mpl.colormaps["RdBu_r"].with_extremes(under=ZERO_COLOUR, bad=UNDEFINED_COLOUR)
    extent = (0.5, len(history) + 0.5, len(sites) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap=colours, vmin=-DECADES, vmax=DECADES, extent=extent)
    bar = figure.colorbar(image, ax=axes, pad=0.015, ticks=range(-4, 5))
    bar.set_label("log10 |dL/dh| relative to the last layer (decades)")
    ends = {"x": 0.5, "color": "white", "rotation": 90, "ha": "center", "fontsize": 9, "transform": bar.ax.transAxes}
    bar.ax.text(y=0.985, s="explodes", va="top", **ends)
    bar.ax.text(y=0.015, s="vanishes", va="bottom", **ends)
    _name_axes(axes, sites, len(history))
    _explain_extremes(axes, rows)
    title = verdict([slope(stream) for stream in history], list(history[-1])).splitlines()[0]
    axes.set_title("\n".join(textwrap.wrap(title, 110)), fontsize=12, loc="left", parse_math=False)
    figure.savefig(path, format="png")


def _sites(history: Sequence[Sequence[Record]]) -> list[str]:
    """All sites by depth: those of the step that has the most, then any others."""
    longest = max(history, key=len, default=())
    return list(dict.fromkeys(record.site for stream in (longest, *history) for record in stream))


def _decades(record: Record | None, last: Record | None) -> float:
    """The colour value of a site at one step beside the last site's: clipped decades, ZERO, or NaN."""
    if record is None or last is None or not _finite(record) or not _finite(last) or not last.norm:
        return math.nan
    if not record.norm:
        return ZERO
    return max(-DECADES, min(DECADES, math.log10(record.norm) - math.log10(last.norm)))


def _finite(record: Record) -> bool:
    return not record.nonfinite_count and math.isfinite(record.norm)


def _name_axes(axes: object, sites: list[str], steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    stride = math.ceil(len(sites) / MAX_NAMES)
    shown = [*range(0, len(sites) - 1, stride), len(sites) - 1]
    if len(shown) > 2 and shown[-1] - shown[-2] < stride / 2:
        del shown[-2]
    axes.set_yticks(shown, [short_name(sites[index], NAME_WIDTH) for index in shown], fontsize=9, parse_math=False)
    axes.set_ylabel("loss end  ←  depth  →  input end")
    axes.set_xlabel("training step")
    axes.set_xlim(0.5, steps + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def _explain_extremes(axes: object, rows: list[list[float]]) -> None:
    """A legend for black and grey, where there is any."""
    from matplotlib.patches import Patch

    values = [value for row in rows for value in row]
    patches = []
    if ZERO in values:
        patches.append(Patch(color=ZERO_COLOUR, label="exactly 0"))
    if any(math.isnan(value) for value in values):
        patches.append(Patch(color=UNDEFINED_COLOUR, label="not finite, or nothing to compare with"))
    if patches:
        axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(0, -0.06), ncols=2, frameon=False, fontsize=9)
