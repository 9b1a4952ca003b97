"""Backward passes with telemetry on gradients that hold other values than most: zeros, NaN, and what float32 cannot square."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

import gradkernels as gk
from benchmarks import harness
from gradkernels.ops import OPS

SHAPE = (2048, 768)
KERNELS = torch.ops.gradkernels


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
    """The op's backward as a function of dy."""
    N = SHAPE[1]
    x, beside, weight, bias = (torch.randn(size).to(dtype) for size in (SHAPE, SHAPE, (N,), (N,)))
    stats = gk.new_stats(len(OPS[op].PORTS))
    _, mean, rstd = KERNELS.layer_norm_fwd(x, weight, bias, 1, 1e-5)
    norm = (mean, rstd, weight, bias, 1)
    return {
        "gelu": lambda dy: KERNELS.gelu_bwd(dy, x, False, stats),
        "residual": lambda dy: KERNELS.residual_bwd(dy, beside, stats),
        "layer_norm": lambda dy: KERNELS.layer_norm_bwd(dy, x, *norm, [True] * 3, stats),
        "add_layer_norm": lambda dy: KERNELS.add_layer_norm_bwd(dy, beside, x, *norm, dtype, [True, False, True, True], stats),
        "probe": lambda dy: KERNELS.probe_bwd(dy, stats, 0),
    }[op]


def lines() -> Iterator[dict]:
    """One result line an op, dtype and kind: its time as a ratio to that of ordinary values in the same round."""
    for op in ("gelu", "layer_norm", "add_layer_norm", "residual", "probe"):
        for dtype in harness.DTYPES:
            call, kinds = backward(op, dtype), gradients(dtype)
            times = harness.time_rounds({name: lambda index, call=call, dy=dy: call(dy) for name, dy in kinds.items()})
            what = {"op": f"{op} values", "direction": "backward", "dtype": str(dtype).removeprefix("torch.")}
            for name in kinds:
                pairs = zip(times[name], times["normal"], strict=True)
                ratio = harness.quantiles([mine / normal for mine, normal in pairs])
                yield {**what, "shape": list(SHAPE), "implementation": name, "ratio_to_normal_values": ratio}
