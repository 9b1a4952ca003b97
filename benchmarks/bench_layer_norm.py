"""LayerNorm with weight and bias, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gradkernels as gk
from benchmarks.harness import COMPILED_SHAPES, DTYPES, SHAPES, Case


def cases() -> Iterator[Case]:
    """Every dtype and shape; weight and bias in x's dtype."""
    for dtype in DTYPES:
        for shape in SHAPES:
            yield case(dtype, shape)


def case(dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """Floor: read x, write y; read x and dy, write dx; weight, bias and their gradients; mean and rstd both ways."""
    M, N = shape
    stats = gk.new_stats(4)
    variants = {
        "eager": lambda x, weight, bias: F.layer_norm(x, (N,), weight, bias),
        "telemetry off": lambda x, weight, bias: gk.layer_norm(x, (N,), weight, bias),
        "telemetry on": lambda x, weight, bias: gk.layer_norm(x, (N,), weight, bias, stats=stats),
    }
    if shape in COMPILED_SHAPES:
        variants["torch.compile"] = torch.compile(variants["eager"], dynamic=False)

    def make_inputs() -> list[torch.Tensor]:
        return [torch.randn(shape).to(dtype), torch.randn(N).to(dtype), torch.randn(N).to(dtype)]

    return Case("layer_norm", dtype, shape, make_inputs, variants, (5 * M * N + 5 * N) * dtype.itemsize + 16 * M)
