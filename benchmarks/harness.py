"""Timing side by side: correctness first, then every variant in turns on rotating buffers, figures as ratios.

One call is one forward and backward with all gradients, allocation included for everybody. Variants take turns within a
round, in an order that rotates; a round gives one time per variant, and ratios are taken round by round, so that what
slows the machine slows both sides. `eager again` is eager against itself: how far from 1 its ratio lies is the noise.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import gradkernels as gk
from gradkernels.library import _C

RESULTS = Path(__file__).parent / "results"
SHAPES = ((8, 64), (64, 256), (512, 768), (2048, 768), (2048, 3072), (8192, 1024))
COMPILED_SHAPES = ((512, 768), (8192, 1024))
DTYPES = (torch.bfloat16, torch.float32)
ROUNDS = 15
ROUND_SECONDS = 0.006
ROTATE_BYTES = 64 * 2**20  # buffers are rotated until a round trip is larger than this
BASE = "eager"
ALLOWED_ERROR = 2.0  # a variant whose error against float64 exceeds this multiple of eager's is not timed
ORDER_OF_SUMS = 64  # roundings
PRODUCT = 512  # rows and columns of the product whose rate is the yardstick

Tensors = Sequence[torch.Tensor]
Variant = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass
class Case:
    """One op at one shape and dtype. A variant maps the inputs to one output or several.

    `bytes_moved` is its floor. flops: of an op made of products, twice its multiply-adds; its share of the rate of one large
    product, measured in the same rounds, then says how far it is from what the arithmetic allows.
    """

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make_inputs: Callable[[], list[torch.Tensor]]
    variants: dict[str, Variant]
    bytes_moved: int
    flops: int = 0
    buffers: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list)


def outputs_of(variant: Variant, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The variant's outputs, always as a tuple."""
    result = variant(*inputs)
    return result if isinstance(result, tuple) else (result,)


def forward_backward(variant: Variant, inputs: Tensors, dys: Tensors) -> tuple[torch.Tensor, ...]:
    """Outputs and the gradients of all inputs."""
    outputs = outputs_of(variant, inputs)
    return (*outputs, *torch.autograd.grad(outputs, inputs, dys))


def prepare(case: Case) -> None:
    """Fills case.buffers with random inputs and dy, as many sets as it takes to leave the caches."""
    torch.manual_seed(0)
    size = 0
    while size < ROTATE_BYTES and len(case.buffers) < 16:
        inputs = [tensor.requires_grad_() for tensor in case.make_inputs()]
        dys = [torch.randn_like(output) for output in outputs_of(case.variants[BASE], inputs)]
        case.buffers.append((inputs, dys))
        size += sum(tensor.nbytes for tensor in (*inputs, *dys))


def gate(case: Case) -> list[str]:
    """The variants that are wrong: an error beyond ALLOWED_ERROR times eager's against float64, plus rounding."""
    inputs, dys = case.buffers[0]
    wide_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = forward_backward(case.variants[BASE], wide_inputs, [dy.double() for dy in dys])
    base = forward_backward(case.variants[BASE], inputs, dys)
    # In float64 eager is its own truth, and its error 0: ours may differ by what sums in another order do.
    rounding = torch.finfo(case.dtype).eps * (ORDER_OF_SUMS if case.dtype is torch.float64 else 1)
    wrong = []
    for name, variant in case.variants.items():
        for got, eager, truth in zip(forward_backward(variant, inputs, dys), base, exact, strict=True):
            allowed = ALLOWED_ERROR * (eager.double() - truth).abs().max() + rounding * truth.abs().max()
            if not (got.double() - truth).abs().max() <= allowed:
                wrong.append(name)
                break
    return wrong


def time_rounds(calls: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds a call, per variant and round; each call gets a running number, to rotate buffers by."""
    counts = {}
    for name, call in calls.items():
        for index in range(3):
            call(index)
        start = time.perf_counter()
        call(3)
        counts[name] = max(1, min(500, int(ROUND_SECONDS / (time.perf_counter() - start))))
    names, times = list(calls), {name: [] for name in calls}
    for index in range(ROUNDS):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            call = calls[name]
            start = time.perf_counter()
            for repeat in range(counts[name]):
                call(repeat)
            times[name].append((time.perf_counter() - start) / counts[name])
    return times


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    pick = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]  # noqa: E731
    return {"median": round(pick(0.5), 4), "p20": round(pick(0.2), 4), "p80": round(pick(0.8), 4)}


def measure(case: Case) -> Iterator[dict]:
    """One result line a variant: its time as a ratio to eager's in the same round, and to a copy of the floor's bytes."""
    prepare(case)
    wrong = gate(case)
    for name in wrong:
        yield {**identity(case, name), "failed": "correctness gate"}
    source = torch.empty(max(1, case.bytes_moved // 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[int], object]] = {"copy": lambda index: target.copy_(source)}
    if case.flops:
        square = torch.randn(PRODUCT, PRODUCT).to(case.dtype)
        calls["product"] = lambda index: square @ square
    for name, variant in {**case.variants, "eager again": case.variants[BASE]}.items():
        if name not in wrong:
            calls[name] = lambda index, variant=variant: forward_backward(variant, *case.buffers[index % len(case.buffers)])
    times = time_rounds(calls)
    for name in calls:
        ratios = [mine / base for mine, base in zip(times[name], times[BASE], strict=True)]
        copies = [copy / mine for copy, mine in zip(times["copy"], times[name], strict=True)]
        line = {**identity(case, name), "ratio_to_eager": quantiles(ratios), "share_of_copy": quantiles(copies)["median"]}
        if case.flops and name not in ("copy", "product"):
            rates = zip(times["product"], times[name], strict=True)
            shares = [case.flops / mine / (2 * PRODUCT**3 / product) for product, mine in rates]
            line["share_of_product"] = quantiles(shares)["median"]
        if name == "telemetry on":
            pairs = zip(times[name], times["telemetry off"], strict=True)
            line["ratio_to_telemetry_off"] = quantiles([mine / off for mine, off in pairs])
        yield line


def identity(case: Case, implementation: str) -> dict:
    """What a line is about."""
    return {
        "op": case.op,
        "implementation": implementation,
        "direction": "forward+backward",
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": list(case.shape),
        "bytes_moved": case.bytes_moved,
        "buffers": len(case.buffers),
    }


def environment() -> dict:
    """Where and with what a line was measured."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "device": device(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": gk.implementations()["gelu on cpu"],
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def device() -> str:
    """The CPU's model name, the instruction set our kernels use on it, and the number of threads torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {_C.cpu_capability() if _C is not None else 'no kernels'}, {torch.get_num_threads()} threads"


def results_file() -> Path:
    """benchmarks/results/<device>.jsonl"""
    slug = "".join(letter if letter.isalnum() else "-" for letter in device().lower().replace("(r)", ""))
    return RESULTS / f"{'-'.join(part for part in slug.split('-') if part)}.jsonl"


def write(lines: Sequence[dict], ops: set[str]) -> Path:
    """Puts the lines in the results file in place of what it held of the same ops."""
    path = results_file()
    path.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in kept if line["op"] not in ops]
    where = environment()
    path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *({**line, **where} for line in lines)]))
    return path
