"""Timing side by side, on a CPU or a GPU: correctness first, then every variant in turns on rotating buffers.

One call is one forward and backward with all gradients, or the forward alone, allocation included for everybody. Variants
take turns within a round, in an order that rotates; a round gives one time per variant, and ratios are taken round by round,
so that what slows the machine slows both sides. `eager again` is eager against itself: how far from 1 its ratio lies is the
noise. On a GPU the variants are launched one by one and replayed from CUDA graphs, a time ends when the device has finished,
and lines also hold microseconds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gradkernels as gk
from benchmarks.case import BASE, DIRECTIONS, Case, Variant, bytes_moved, gate
from gradkernels.library import _C

RESULTS = Path(__file__).parent / "results"
HOST_CALLS = 50  # timed without waiting for the device, whose queue of launches they do not fill
PRODUCT = 512  # rows and columns of the product whose rate is the yardstick
CPU = torch.device("cpu")
Call = Callable[[int], object]  # with a running number, to rotate buffers by


@dataclass(frozen=True)
class Protocol:
    """How a kind of device is measured; buffers are rotated until a round trip is larger than `rotated_bytes`, the caches."""

    directions: tuple[str, ...]
    rounds: int
    round_seconds: float
    most_calls: int
    rotated_bytes: int
    most_buffers: int
    launches: bool  # whether lines say how a variant is launched, and hold microseconds


PROTOCOLS = {
    "cpu": Protocol(("forward+backward",), 15, 0.006, 500, 64 * 2**20, 16, launches=False),
    "cuda": Protocol(("forward", "forward+backward"), 7, 0.02, 2000, 256 * 2**20, 8, launches=True),
}


def seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds a call, from before the first to the end of the last."""
    synchronize(device)
    start = time.perf_counter()
    for index in range(repeats):
        call(index)
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_rounds(calls: dict[Any, Call], device: torch.device = CPU, protocol: Protocol | None = None) -> dict[Any, list[float]]:
    """Seconds a call, per variant and round."""
    protocol, repeats = protocol or PROTOCOLS[device.type], {}
    for name, call in calls.items():
        seconds(call, 3, device)
        repeats[name] = max(1, min(protocol.most_calls, int(protocol.round_seconds / seconds(call, 3, device))))
    names, times = list(calls), {name: [] for name in calls}
    for index in range(protocol.rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(seconds(calls[name], repeats[name], device))
    return times


def host_microseconds(calls: dict[Any, Call], device: torch.device, rounds: int) -> dict[Any, dict[str, float]]:
    """The host's time a call, until the work is in the device's queue: the median of rounds in turns, as a part of a line."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            for index in range(HOST_CALLS):
                call(index)
            times[name].append((time.perf_counter() - start) / HOST_CALLS)
    synchronize(device)
    return {name: {"host_microseconds": round(1e6 * statistics.median(own), 2)} for name, own in times.items()}


def in_graphs(call: Call, count: int) -> Call:
    """The call's work for each set of buffers, captured once; a call replays one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(3):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in range(count)]
    for index, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            call(index)
    return lambda index: graphs[index % count].replay()


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 for float32 products and for cuDNN, or for neither."""
    before, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        with cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=allowed
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    pick = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]  # noqa: E731
    return {"median": round(pick(0.5), 4), "p20": round(pick(0.2), 4), "p80": round(pick(0.8), 4)}


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Quantiles of times over those of the same rounds."""
    return quantiles([mine / other for mine, other in zip(times, base, strict=True)])


def measure(case: Case, device: torch.device = CPU, protocol: Protocol | None = None) -> Iterator[dict]:
    """One result line a direction, variant and way of launching, with ratios to others of the same rounds."""
    protocol = protocol or PROTOCOLS[device.type]
    with tf32(case.tf32):
        buffers = case.buffers(device, protocol.rotated_bytes, protocol.most_buffers)
        variants, check = case.variants(device), case.check
        if check is None:
            wrong = gate(case, variants, *buffers[0])
        else:
            wrong = gate(check, check.variants(device), *check.buffers(device)[0])
        for direction in protocol.directions:
            what = {
                "direction": direction,
                "dtype": str(case.dtype).removeprefix("torch."),
                "shape": list(case.shape),
                "bytes_moved": bytes_moved(case, direction),
                "buffers": len(buffers),
            }
            yield from ({"op": case.op, "implementation": name, **what, "failed": "correctness gate"} for name in wrong)
            right = {name: variant for name, variant in variants.items() if name not in wrong}
            calls = calls_of(case, right, buffers, direction, what["bytes_moved"], device)
            if case.flops and not protocol.launches:
                square = torch.randn(PRODUCT, PRODUCT).to(case.dtype)
                calls["product", "call"] = lambda index, square=square: square @ square
            times, host = time_rounds(calls, device, protocol), {}
            if protocol.launches and case.replayed is None:
                launched = {way: call for way, call in calls.items() if way[1] == "call"}
                host = host_microseconds(launched, device, protocol.rounds)
            for way, own in times.items():
                line = {"op": case.op, "implementation": way[0], **what}
                if protocol.launches:
                    line |= {"launched": way[1], "microseconds": round(1e6 * statistics.median(own), 2), **host.get(way, {})}
                yield line | ratios(case, *way, times)


def calls_of(
    case: Case, variants: dict[str, Variant], buffers: list, direction: str, moved: int, device: torch.device
) -> dict[tuple[str, str], Call]:
    """{(name, "call" or "graph"): call} of a copy of as many bytes, and of every variant."""
    source, run = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device), DIRECTIONS[direction]
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda index: target.copy_(source)}
    for name, variant in {**variants, "eager again": variants[BASE]}.items():
        calls[name] = lambda index, variant=variant: run(variant, *buffers[index % len(buffers)])
    found = {(name, "call"): call for name, call in calls.items()}
    if device.type == "cuda":
        replayed = [name for name in calls if case.replayed is None or name in case.replayed]
        found |= {(name, "graph"): in_graphs(calls[name], len(buffers)) for name in replayed}
    return found


def ratios(case: Case, name: str, launched: str, times: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """The ratios of a line, to what is launched in the same way where there is that."""
    own, others = times[name, launched], {other: time for (other, way), time in times.items() if way in ("call", launched)}
    found = {"ratio_to_eager": ratio(own, others[BASE]), "share_of_copy": ratio(others["copy"], own)["median"]}
    if "product" in others and name not in ("copy", "product"):
        share = case.flops / (2 * PRODUCT**3)
        found["share_of_product"] = quantiles([share * p / mine for p, mine in zip(others["product"], own, strict=True)])[
            "median"
        ]
    if name == "telemetry on" and "telemetry off" in others:
        found["ratio_to_telemetry_off"] = ratio(own, others["telemetry off"])
    return found


def environment(device: torch.device = CPU) -> dict:
    """Where and with what a line was measured."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": gk.implementations().get(f"gelu on {device.type}", "C++"),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def name_of(device: torch.device) -> str:
    """The GPU's name; or the CPU's, the instruction set our kernels use on it, and the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {_C.cpu_capability() if _C is not None else 'no kernels'}, {torch.get_num_threads()} threads"


def results_file(device: torch.device = CPU) -> Path:
    """benchmarks/results/<device>.jsonl"""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', name_of(device).lower().replace('(r)', '')).strip('-')}.jsonl"


def write(lines: Sequence[dict], ops: set[str]) -> Path:
    """Puts the CPU's lines in the results file in place of what it held of the same ops."""
    path = results_file()
    path.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in kept if line["op"] not in ops]
    where = environment()
    path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *({**line, **where} for line in lines)]))
    return path


def append(line: dict, device: torch.device) -> Path:
    """Puts a line at the end of the results file at once, so that stopping at any time loses nothing."""
    path = results_file(device)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return path
