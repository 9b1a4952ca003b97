"""python -m benchmarks.chart: docs/performance.png, the README's chart, made from the committed result lines of one machine.

The machine is the one whose lines cover the most ops and dtypes. Its figures are also in the PNG, as text, so that a test
can tell whether the picture is that of the lines.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from benchmarks.table import geometric_mean, machines, median, ours

PICTURE = Path(__file__).parent.parent / "docs" / "performance.png"
FASTER, SLOWER = "#2a6f97", "#c1440e"
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


def figures() -> dict[str, dict[str, list[float]]]:
    """{machine: {op and dtype: [geometric mean, smallest, largest] of fused / eager with telemetry on}} of one machine."""
    found = {}
    for name, lines in machines().items():
        wanted = {pair: group for pair, group in ours(lines).items() if not pair[0].endswith(" rows")}
        ratios = {pair: [median(line) for line in group] for pair, group in wanted.items()}
        bars = {
            f"{op}, {dtype}": [round(value, 4) for value in (geometric_mean(own), min(own), max(own))]
            for (op, dtype), own in sorted(ratios.items(), key=order)
        }
        if len(bars) > max((len(own) for own in found.values()), default=0):
            found = {name: bars}
    return found


def order(group: tuple[tuple[str, str], list[float]]) -> tuple[bool, str, str]:
    """Pointwise ops and norms first, then the LSTM."""
    (op, dtype), _ = group
    return op.startswith("lstm"), op, dtype


def draw(machine: str, bars: dict[str, list[float]]) -> Figure:
    """Horizontal bars from 1, on a logarithmic axis, with a line from the smallest to the largest shape."""
    figure = Figure(figsize=(9.5, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, (mean, low, high) in enumerate(bars.values()):
        axes.barh(row, mean - 1, left=1, height=0.62, color=FASTER if mean <= 1 else SLOWER)
        axes.plot((low, high), (row, row), color="black", linewidth=1.1, marker="|", markersize=7)
        axes.text(1.015, row, f"{mean:.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize=10)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.8 * min(low for _, low, _ in bars.values()), 1.15 * max(high for *_, high in bars.values()))
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "time of the fused layer with telemetry on / time of eager PyTorch, forward and backward\n"
        "bar: geometric mean of the shapes; line: from the best shape to the worst; left of 1 is faster"
    )
    axes.set_title(machine, loc="left", fontsize=11)
    return figure


def main() -> None:
    """Writes the picture."""
    ((machine, bars),) = figures().items()
    draw(machine, bars).savefig(PICTURE, format="png", metadata={"Description": json.dumps(figures()), "Software": None})


if __name__ == "__main__":
    main()
