"""python -m benchmarks.gpu [--dry-run] [--summary FILE]: what `make gpu` runs on any NVIDIA GPU, important figures first.

The ops' tests on the Triton kernels, then each op's forward and backward against a copy of the same bytes, eager PyTorch
and torch.compile, with telemetry off and on, launched one by one and replayed from a CUDA graph; then the LSTM against cuDNN
(gpu_lstm.py). Every figure is appended to benchmarks/results/<device>.jsonl as soon as it is there, so that stopping at any
time loses nothing. --dry-run does the same on the CPU with small shapes, without graphs and without writing, to try the script
where there is no GPU. At the end, and with --summary for any results file, there is one page of what the figures say:
benchmarks/gpu_summary.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

import gradkernels as gk
from benchmarks import gpu_lstm
from benchmarks.gpu_summary import summary, summary_of
from benchmarks.harness import RESULTS, environment

SHAPES = ((8192, 4096), (16384, 1024), (4096, 4096), (2048, 8192), (8192, 8192), (512, 768), (64, 256), (8, 64))
DTYPES = (torch.bfloat16, torch.float32)
TESTS = ("test_triton_kernels.py", "test_triton_lstm.py", "test_gpu.py")
ROUNDS = 7
ROUND_SECONDS = 0.02
HOST_CALLS = 50  # timed without waiting for the device, whose queue of launches they do not fill
CACHE_BYTES = 256 * 2**20  # buffers are rotated until a round trip is larger than any L2 cache
Step = Callable[[int], object]


@dataclass(frozen=True)
class Op:
    """variants: {name: function of the inputs}; the floor in elements of x is `forward` and `backward` times M N."""

    name: str
    num_inputs: int
    forward: int
    backward: int
    variants: Callable[[int, torch.device], dict[str, Callable]]


def gelu(N: int, device: torch.device) -> dict[str, Callable]:
    stats = gk.new_stats(2, device)
    return {"eager": F.gelu, "telemetry off": gk.gelu, "telemetry on": lambda x: gk.gelu(x, stats=stats)}


def layer_norm(N: int, device: torch.device) -> dict[str, Callable]:
    stats = gk.new_stats(4, device)
    return {
        "eager": lambda x, w, b: F.layer_norm(x, (N,), w, b),
        "telemetry off": lambda x, w, b: gk.layer_norm(x, (N,), w, b),
        "telemetry on": lambda x, w, b: gk.layer_norm(x, (N,), w, b, stats=stats),
    }


def add_layer_norm(N: int, device: torch.device) -> dict[str, Callable]:
    stats = gk.new_stats(5, device)

    def eager(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple:
        h = residual + x
        return F.layer_norm(h, (N,), w, b), h

    return {
        "eager": eager,
        "telemetry off": lambda x, r, w, b: gk.add_layer_norm(x, r, (N,), w, b),
        "telemetry on": lambda x, r, w, b: gk.add_layer_norm(x, r, (N,), w, b, stats=stats),
    }


OPS = (
    Op("layer_norm", 1, 2, 3, layer_norm),
    Op("gelu", 1, 2, 3, gelu),
    Op("add_layer_norm", 2, 4, 4, add_layer_norm),
)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    """Seconds a step, from before the first to the end of the last."""
    synchronize(device)
    start = time.perf_counter()
    for index in range(repeats):
        step(index)
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleaved(steps: dict[str, Step], device: torch.device) -> dict[str, list[float]]:
    """Seconds a step by variant and round; variants take turns within a round."""
    repeats = {}
    for name, step in steps.items():
        seconds(step, 3, device)
        repeats[name] = max(1, min(2000, int(ROUND_SECONDS / seconds(step, 3, device))))
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(seconds(step, repeats[name], device))
    return times


def host_seconds(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """Seconds of the host's a step: until the work is in the device's queue. The median of rounds in turns."""
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for index in range(HOST_CALLS):
                step(index)
            times[name].append((time.perf_counter() - start) / HOST_CALLS)
    synchronize(device)
    return {name: statistics.median(values) for name, values in times.items()}


def in_graphs(step: Step, count: int) -> Step:
    """The step's work for each set of buffers, captured once; a call replays one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(3):
            step(index)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in range(count)]
    for index, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            step(index)
    return lambda index: graphs[index % count].replay()


def make_buffers(op: Op, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[tuple[list, tuple]]:
    """(inputs, gradients of the outputs), as many sets as leave the caches."""
    make = lambda *sizes: torch.randn(sizes, device=device).to(dtype).requires_grad_()  # noqa: E731
    buffers, size = [], 0
    while size < CACHE_BYTES and len(buffers) < 8:
        parameters = [] if op.name == "gelu" else [make(shape[1]), make(shape[1])]
        inputs = [*(make(*shape) for _ in range(op.num_inputs)), *parameters]
        dys = tuple(torch.randn(shape, device=device).to(dtype) for _ in range(op.num_inputs))
        buffers.append((inputs, dys))
        size += sum(t.nbytes for t in (*inputs, *dys))
    return buffers


def steps_of(direction: str, variants: dict[str, Callable], buffers: list[tuple[list, tuple]]) -> dict[str, Step]:
    """One step a variant: the forward alone, or forward and backward."""

    def step_of(variant: Callable) -> Step:
        def forward(index: int) -> None:
            with torch.no_grad():
                variant(*buffers[index % len(buffers)][0])

        def both(index: int) -> None:
            inputs, dys = buffers[index % len(buffers)]
            outputs = variant(*inputs)
            torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), inputs, dys)

        return forward if direction == "forward" else both

    return {name: step_of(variant) for name, variant in variants.items()}


def lines_of(op: Op, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[dict]:
    """A line for every direction, way of launching and variant."""
    buffers, variants = make_buffers(op, shape, dtype, device), op.variants(shape[1], device)
    if device.type == "cuda":
        variants["torch.compile"] = torch.compile(variants["eager"], dynamic=False)
    for direction, elements in (("forward", op.forward), ("forward+backward", op.forward + op.backward)):
        moved = elements * shape[0] * shape[1] * dtype.itemsize
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        steps = {"copy": lambda index, a=source, b=target: b.copy_(a), **steps_of(direction, variants, buffers)}
        ways = {"call": steps}
        if device.type == "cuda":
            ways["graph"] = {name: in_graphs(step, len(buffers)) for name, step in steps.items()}
        for way, steps_this_way in ways.items():
            times = interleaved(steps_this_way, device)
            host = host_seconds(steps_this_way, device) if way == "call" else {}
            for name, own in times.items():
                ratio = lambda base, own=own, times=times: statistics.median(  # noqa: E731
                    mine / other for mine, other in zip(own, times[base], strict=True)
                )
                yield {
                    "op": op.name,
                    "implementation": name,
                    "direction": direction,
                    "launched": way,
                    "dtype": str(dtype).removeprefix("torch."),
                    "shape": list(shape),
                    "bytes_moved": moved,
                    "microseconds": round(1e6 * statistics.median(own), 2),
                    **({"host_microseconds": round(1e6 * host[name], 2)} if host else {}),
                    "share_of_copy": round(1 / ratio("copy"), 3),
                    "ratio_to_eager": round(ratio("eager"), 3),
                    **({"ratio_to_telemetry_off": round(ratio("telemetry off"), 4)} if name == "telemetry on" else {}),
                }


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
    device = torch.device("cpu" if dry else "cuda")
    name = "dry run" if dry else torch.cuda.get_device_name()
    path = RESULTS / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"
    failed = 0 if dry else run_tests()
    about = {**environment(), "device": name, "kernels": gk.implementations().get("gelu on cuda", "C++"), "tests": failed}
    cases = [(op, shape, dtype) for shape in (((16, 64),) if dry else SHAPES) for dtype in DTYPES for op in OPS]
    of_ops = (line for op, shape, dtype in cases for line in lines_of(op, shape, dtype, device))
    lines = []
    for line in chain(of_ops, gpu_lstm.lines(device, interleaved, in_graphs)):
        lines.append({**line, **about})
        print(" ".join(str(value) for value in line.values()), flush=True)
        if not dry:
            with path.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(f"\n{summary(lines)}" + ("" if dry else f"\n\nwritten to {path}"))
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
