"""The one page that `make gpu` ends with, made from the lines of a results file alone: python -m benchmarks.gpu --summary FILE.

A row an op, dtype and shape, from ours with telemetry on:
  forward, backward   share of the bandwidth of a copy, in CUDA-graph replay; the backward by difference of two lines
  / eager             forward and backward as eager calls, against PyTorch's
  / compile           forward and backward in graph replay, against torch.compile's of PyTorch's op, without telemetry
  on / off            forward and backward in graph replay (eager calls where there is none), telemetry on against off
  host us             microseconds of host time an eager forward and backward, ours and PyTorch's
A figure that misses its target has a `!` behind it; targets() says which figures have one. A dash: no such line yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ON, OFF, EAGER, COMPILED, COPY = "telemetry on", "telemetry off", "eager", "torch.compile", "copy"
BANDWIDTH_SHAPES = ((8192, 4096), (16384, 1024))
NOT_FUSED_SHAPES = ((4096, 4096), (2048, 8192), (8192, 8192))  # by torch.compile, of a norm's backward
SMALL_ROWS = 512
COLUMNS = ("forward", "backward", "/ eager", "/ compile", "on / off", "host us")


@dataclass(frozen=True)
class Target:
    """A figure should be at most, or at least, `limit`."""

    limit: float
    at_least: bool = False

    def missed(self, value: float) -> bool:
        return value < self.limit if self.at_least else value > self.limit


def targets(op: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Target]:
    """{column: target} of a row."""
    found = {"on / off": Target(1.02 if op == "gelu" else 1.01)}
    if op.startswith("lstm"):  # against cuDNN, whose fast path takes float16 of one layer alone
        return found | {"/ eager": Target(0.5 if dtype == "bfloat16" else 1.0)}
    if dtype == "bfloat16" and shape in BANDWIDTH_SHAPES:
        found |= {"forward": Target(0.9, at_least=True), "backward": Target(0.85, at_least=True)}
    if shape[0] <= SMALL_ROWS:
        found["/ eager"] = Target(1.0)
    else:
        found["/ compile"] = Target(0.67 if "norm" in op and shape in NOT_FUSED_SHAPES else 1.0)
    return found


class Lines:
    """Of one op, dtype and shape: the last line of every direction, way of launching and implementation."""

    def __init__(self, lines: list[dict]) -> None:
        self._lines = {(line["direction"], line["launched"], line["implementation"]): line for line in lines}

    def value(self, direction: str, launched: str, implementation: str, name: str = "microseconds") -> float | None:
        return self._lines.get((direction, launched, implementation), {}).get(name)

    def ratio(self, launched: str, implementation: str, base: str) -> float | None:
        """Of the times of forward and backward."""
        mine, other = (self.value("forward+backward", launched, name) for name in (implementation, base))
        return None if mine is None or not other else mine / other

    def forward(self) -> float | None:
        """Share of a copy of the forward's bytes."""
        mine, copy = (self.value("forward", "graph", name) for name in (ON, COPY))
        return None if not mine or copy is None else copy / mine

    def backward(self) -> float | None:
        """The same of the backward's: bytes and time of both directions less those of the forward."""
        both, forward = ("forward+backward", "graph"), ("forward", "graph")
        parts = [self.value(*both, ON), self.value(*forward, ON), self.value(*both, COPY)]
        parts += [self.value(*both, COPY, "bytes_moved"), self.value(*forward, COPY, "bytes_moved")]
        if None in parts:
            return None
        time, moved = parts[0] - parts[1], parts[3] - parts[4]
        return moved * parts[2] / parts[3] / time if time > 0 else None

    def figures(self) -> dict[str, float | None]:
        """{column: figure} of all columns with a target."""
        found = {"forward": self.forward(), "backward": self.backward(), "/ eager": self.ratio("call", ON, EAGER)}
        cost = self.ratio("graph", ON, OFF)
        cost = self.ratio("call", ON, OFF) if cost is None else cost
        return found | {"/ compile": self.ratio("graph", ON, COMPILED), "on / off": cost}

    def host(self) -> str:
        """Ours / PyTorch's."""
        both = [self.value("forward+backward", "call", name, "host_microseconds") for name in (ON, EAGER)]
        return " / ".join("-" if value is None else f"{value:.0f}" for value in both)


def summary(lines: list[dict]) -> str:
    """The page: a head, the table, and the targets that are missed."""
    lines = [line for line in lines if "launched" in line]
    if not lines:
        return "no lines of benchmarks.gpu"
    last = lines[-1]
    rows, missed = [], []
    for op, dtype, *shape in dict.fromkeys((line["op"], line["dtype"], *line["shape"]) for line in lines):
        group = Lines([line for line in lines if (line["op"], line["dtype"], line["shape"]) == (op, dtype, shape)])
        wanted, cells = targets(op, dtype, tuple(shape)), []
        for column, value in group.figures().items():
            target = wanted.get(column)
            wrong = value is not None and target is not None and target.missed(value)
            cells.append("-" if value is None else f"{value:.3f}{'!' if wrong else ' '}")
            if wrong:
                bound = f"{'>=' if target.at_least else '<='} {target.limit}"
                missed.append(f"  {op} {dtype} {'x'.join(map(str, shape))}: {column} {value:.3f}, target {bound}")
        name = f"{op:<18} {dtype.replace('float', 'f'):<6}{'x'.join(map(str, shape)):<12}"
        rows.append(name + "".join(f"{cell:>10}" for cell in cells) + f"{group.host():>13}")
    tests = {None: "not run", 0: "passed"}.get(last.get("tests"), f"FAILED (exit code {last.get('tests')})")
    head = f"{last['device']}, torch {last['torch']}, commit {last['commit']}, {last['date']}; GPU tests {tests}"
    titles = f"{'op':<18} {'':<6}{'shape':<12}" + "".join(f"{column:>10}" for column in COLUMNS[:-1]) + f"{COLUMNS[-1]:>13}"
    verdict = ["every target met that was measured"] if not missed else [f"{len(missed)} targets missed (!):", *missed]
    return "\n".join([head, "", titles, *rows, "", *verdict])


def summary_of(path: Path) -> str:
    """summary() of a results file."""
    return summary([json.loads(line) for line in path.read_text().splitlines()])
