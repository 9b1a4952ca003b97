"""Residual add followed by LayerNorm, both results used, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gradkernels as gk
from benchmarks.harness import COMPILED_SHAPES, DTYPES, SHAPES, Case


def cases() -> Iterator[Case]:
    """Every dtype and shape; residual, weight and bias in x's dtype."""
    for dtype in DTYPES:
        for shape in SHAPES:
            yield case(dtype, shape)


def case(dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """Floor: two tensors in and two out, each way; weight, bias and their gradients; mean and rstd both ways."""
    M, N = shape
    stats = gk.new_stats(5)

    def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple:
        new_residual = residual + x
        return F.layer_norm(new_residual, (N,), weight, bias), new_residual

    variants = {
        "eager": eager,
        "telemetry off": lambda x, residual, weight, bias: gk.add_layer_norm(x, residual, (N,), weight, bias),
        "telemetry on": lambda x, residual, weight, bias: gk.add_layer_norm(x, residual, (N,), weight, bias, stats=stats),
    }
    if shape in COMPILED_SHAPES:
        variants["torch.compile"] = torch.compile(eager, dynamic=False)

    def make_inputs() -> list[torch.Tensor]:
        tensors = [torch.randn(shape), torch.randn(shape), torch.randn(N), torch.randn(N)]
        return [tensor.to(dtype) for tensor in tensors]

    return Case("add_layer_norm", dtype, shape, make_inputs, variants, (8 * M * N + 5 * N) * dtype.itemsize + 16 * M)
