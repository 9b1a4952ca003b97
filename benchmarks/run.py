"""python -m benchmarks.run [op ...]: times the ops, prints a line each, and writes benchmarks/results/<device>.jsonl."""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks import harness

MODULES = ("gelu", "layer_norm", "add_layer_norm", "residual", "lstm_layer", "lstm_cell", "step")


def show(line: dict) -> None:
    """One figure on one line."""
    what = f"{line['op']:<22}{line['implementation']:<24}{line['dtype']:<10}{'x'.join(map(str, line['shape'])):<11}"
    if "failed" in line:
        print(f"{what}FAILED: {line['failed']}", flush=True)
        return
    ratio = line["ratio_to_eager"]
    text = f"{what}x eager {ratio['median']:.3f} ({ratio['p20']:.3f} to {ratio['p80']:.3f})"
    if "ratio_to_telemetry_off" in line:
        text += f"  on / off {line['ratio_to_telemetry_off']['median']:.3f}"
    print(text, flush=True)


def main(names: list[str]) -> int:
    """Exit code 1 if a variant failed its correctness gate."""
    lines, ops = [], set()
    for name in names or MODULES:
        for line in import_module(f"benchmarks.bench_{name}").lines() if name == "step" else _lines(name):
            show(line)
            lines.append(line)
            ops.add(line["op"])
    print(f"written to {harness.write(lines, ops).name}")
    return int(any("failed" in line for line in lines))


def _lines(name: str) -> list[dict]:
    return (line for case in import_module(f"benchmarks.bench_{name}").cases() for line in harness.measure(case))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
