"""Backward passes with telemetry on gradients that hold other values than most: zeros, NaN, and what float32 cannot square."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

import gradkernels as gk
from benchmarks import harness
from benchmarks.case import DTYPES
from gradkernels.ops import OPS

SHAPE = (2048, 768)


def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A gradient of every kind; the first is what the others are compared with."""
    normal, half = torch.randn(SHAPE), torch.rand(SHAPE) < 0.5
    found = {
        "normal": normal,
        "zeros": torch.zeros(SHAPE),
        "half zeros": normal.masked_fill(half, 0.0),
        "one NaN": normal.index_put((torch.tensor(1000), torch.tensor(300)), torch.tensor(math.nan)),
        "NaN in each row": normal.index_fill(1, torch.tensor([300]), math.nan),
        "half NaN": normal.masked_fill(half, math.nan),
        "1e-30": normal * 1e-30,
        "1e30": normal * 1e30,
        "1e-30 beside 1e30": torch.where(half, normal * 1e-30, normal * 1e30),
    }
    return {name: values.to(dtype) for name, values in found.items()}


def backward(op: str, dtype: torch.dtype) -> Callable[[torch.Tensor], object]:
    """The op's backward as a function of dy; the gradient of a second output, where there is one, stays the same."""
    N = SHAPE[1:]
    x, beside, weight, bias = (torch.randn(size).to(dtype).requires_grad_() for size in (SHAPE, SHAPE, N, N))
    fused, inputs = {
        "gelu": (gk.gelu, [x]),
        "residual": (gk.residual_fork, [x]),
        "layer_norm": (lambda x, *weights, **stats: gk.layer_norm(x, N, *weights, **stats), [x, weight, bias]),
        "add_layer_norm": (
            lambda x, residual, *weights, **stats: gk.add_layer_norm(x, residual, N, *weights, **stats),
            [x, beside, weight, bias],
        ),
        "probe": (gk.probe, [x]),
    }[op]
    outputs = fused(*inputs, stats=gk.new_stats(len(OPS[op].PORTS)))
    outputs, others = (outputs, [torch.randn_like(x)]) if isinstance(outputs, tuple) else ((outputs,), [])
    return lambda dy: torch.autograd.grad(outputs, inputs, [dy, *others], retain_graph=True)


def lines() -> Iterator[dict]:
    """One result line an op, dtype and kind: its time as a ratio to that of ordinary values in the same round."""
    for op in ("gelu", "layer_norm", "add_layer_norm", "residual", "probe"):
        for dtype in DTYPES:
            call, kinds = backward(op, dtype), gradients(dtype)
            times = harness.time_rounds({name: lambda index, call=call, dy=dy: call(dy) for name, dy in kinds.items()})
            what = {"op": f"{op} values", "direction": "backward", "dtype": str(dtype).removeprefix("torch.")}
            for name, own in times.items():
                ratio = harness.ratio(own, times["normal"])
                yield {**what, "shape": list(SHAPE), "implementation": name, "ratio_to_normal_values": ratio}
