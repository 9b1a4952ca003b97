"""What watching costs beside the kernels: the probes of a training step, and `watch.step()`.

`on` is a watched model, "eager" the same model, converted and not watched, in turns on the same batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import gradkernels as gk
from benchmarks import harness

ROUNDS = 60
SITES = 200


def mlp(width: int, depth: int = 8) -> nn.Module:
    """Linear and ReLU in turns: a probe for each Linear."""
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())])


def encoder(width: int) -> nn.Module:
    """Four blocks, a probe each."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True), 4)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "encoder 256": (lambda: encoder(256), (8, 64, 256)),
    "encoder 512": (lambda: encoder(512), (8, 128, 512)),
    "mlp 1024": (lambda: mlp(1024), (512, 1024)),
    "mlp 512": (lambda: mlp(512), (128, 512)),
    "mlp 64": (lambda: mlp(64), (32, 64)),
}


def lines() -> Iterator[dict]:
    """A line a model, and one for `watch.step()` of SITES sites, in microseconds."""
    for name, (make, shape) in MODELS.items():
        on, off, x = make(), gk.convert(make()), torch.randn(shape)
        watch = gk.watch(on)
        models = {"eager": off, "on": on}

        def step(model: nn.Module, x: torch.Tensor = x) -> None:
            model(x).square().mean().backward()

        for _ in range(12):
            step(on)
            watch.step()
        times = harness.time_rounds({key: lambda index, model=model: step(model) for key, model in models.items()})
        what = {"op": f"watch {name}", "implementation": "probes", "direction": "forward and backward", "dtype": "float32"}
        yield {**what, "shape": list(shape), "ratio_to_eager": harness.ratio(times["on"], times["eager"])}
    yield {**what, "op": "watch step", "implementation": f"{SITES} sites", "shape": [SITES], "microseconds": _step_time()}


def _step_time() -> dict:
    """Of ten steps in a row, so that what is done once in ten counts."""
    net = nn.Sequential(*[nn.LayerNorm(64) for _ in range(SITES)])
    watch, times = gk.watch(net), []
    for _ in range(5 * ROUNDS):
        net(torch.randn(8, 64)).sum().backward()
        start = time.perf_counter()
        watch.step()
        times.append(1e6 * (time.perf_counter() - start))
    warm = times[ROUNDS:]
    return harness.quantiles([sum(warm[first : first + 10]) / 10 for first in range(0, len(warm), 10)])
