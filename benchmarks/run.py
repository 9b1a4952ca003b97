"""python -m benchmarks.run [--device cpu|cuda] [--threads N] [op ...]: times the ops, writes benchmarks/results/<device>.jsonl.

On a CPU, lines take the place of those of the same ops; on a GPU they are added, as by benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import harness

MODULES = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
BASES = {"ratio_to_eager": "eager", "ratio_to_normal_values": "normal values"}


def show(line: dict) -> None:
    """One figure on one line."""
    what = f"{line['op']:<21} {line['implementation']:<24}{line['dtype']:<10}{'x'.join(map(str, line['shape'])):<11}"
    if "launched" in line:
        what += f"{line['direction']:<17}{line['launched']:<6}{line['microseconds']:>12.2f} us  "
    if "failed" in line:
        print(f"{what}FAILED: {line['failed']}", flush=True)
        return
    if line["op"] == "watch step":
        print(f"{what}{line['microseconds']['median']:.0f} us", flush=True)
        return
    base = next(key for key in BASES if key in line)
    ratio = line[base]
    text = f"{what}x {BASES[base]} {ratio['median']:.3f} ({ratio['p20']:.3f} to {ratio['p80']:.3f})"
    if "ratio_to_telemetry_off" in line:
        text += f"  on / off {line['ratio_to_telemetry_off']['median']:.3f}"
    print(text, flush=True)


def main() -> int:
    """Prints a line a figure. Exit code 1 if a variant failed its correctness gate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=main.__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(MODULES)}; all of them if none is named")
    parser.add_argument("--device", choices=harness.PROTOCOLS, default="cpu", help="where the ops run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads torch uses")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(MODULES):
        parser.error(f"op must be one of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    lines, ops = [], set()
    for line in lines_of(arguments.ops or MODULES, device):
        show(line)
        lines.append(line)
        ops.add(line["op"])
        if device.type == "cuda":
            harness.append({**line, **harness.environment(device)}, device)
    path = harness.write(lines, ops) if device.type == "cpu" else harness.results_file(device)
    print(f"written to {path.name}")
    return int(any("failed" in line for line in lines))


def lines_of(names: tuple[str, ...], device: torch.device) -> Iterator[dict]:
    """The result lines of modules: those of their cases, or, on a CPU, their own."""
    for module in (import_module(f"benchmarks.bench_{name}") for name in names):
        if hasattr(module, "cases"):
            for case in module.cases(device.type):
                yield from harness.measure(case, device)
        elif device.type == "cpu":
            yield from module.lines()


if __name__ == "__main__":
    raise SystemExit(main())
