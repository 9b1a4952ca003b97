"""python -m benchmarks.gpu [--dry-run] [--summary FILE]: what `make gpu` runs on any NVIDIA GPU, important figures first.

The ops' tests on the Triton kernels, then each op's forward and backward as benchmarks/harness.py measures them: against a copy
of the same bytes, eager PyTorch and torch.compile, with telemetry off and on, launched one by one and replayed from a CUDA
graph; then the LSTM against cuDNN. Every figure is appended to benchmarks/results/<device>.jsonl as soon as it is there, so
that stopping at any time loses nothing. --dry-run does the same on the CPU with small shapes, without graphs and without
writing, to try the script where there is no GPU. At the end, and with --summary for any results file, there is one page of what
the figures say: benchmarks/gpu_summary.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import bench_add_layer_norm, bench_gelu, bench_layer_norm, bench_lstm_layer, harness
from benchmarks.case import DTYPES, SHAPES, Case
from benchmarks.gpu_summary import summary, summary_of
from benchmarks.run import show

TESTS = ("test_triton_kernels.py", "test_triton_lstm.py", "test_gpu.py")
PROTOCOL = harness.PROTOCOLS["cuda"]


def cases(where: str) -> list[Case]:
    """The three ops by shape and dtype, then the LSTM."""
    modules = (bench_layer_norm, bench_gelu, bench_add_layer_norm)
    found = [case for module in modules for case in module.cases(where) if case.op != "gelu tanh"]
    found.sort(key=lambda case: (SHAPES[where].index(case.shape), DTYPES.index(case.dtype)))
    return [*found, *bench_lstm_layer.cases(where)]


def run_tests() -> int:
    """The kernels' tests on the GPU; their exit code."""
    tests = Path(__file__).parent.parent / "tests"
    command = [sys.executable, "-m", "pytest", "-p", "on_triton", "-W", "ignore", *TESTS]
    return subprocess.run(command, cwd=tests, env={**os.environ, "PYTHONPATH": str(tests)}, check=False).returncode


def main(arguments: list[str]) -> int:
    """The exit code of the tests; figures are taken whether they pass or not, and say so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU; writes nothing")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="only print the summary of a results file")
    chosen = parser.parse_args(arguments)
    if chosen.summary:
        print(summary_of(chosen.summary))
        return 0
    dry = chosen.dry_run
    if not (dry or torch.cuda.is_available()):
        raise SystemExit(
            "make gpu: torch sees no CUDA device here; python -m benchmarks.gpu --dry-run tries the script on the CPU"
        )
    device, failed = torch.device("cpu" if dry else "cuda"), 0 if dry else run_tests()
    about, lines = {**harness.environment(device), "tests": failed}, []
    for case in cases("dry run" if dry else "cuda"):
        for line in harness.measure(case, device, PROTOCOL):
            show(line)
            lines.append({**line, **about})
            if not dry:
                harness.append(lines[-1], device)
    print(f"\n{summary(lines)}" + ("" if dry else f"\n\nwritten to {harness.results_file(device)}"))
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
