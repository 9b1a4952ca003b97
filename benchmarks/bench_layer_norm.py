"""LayerNorm with weight and bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gradkernels as gk
from benchmarks.case import Case, grid, normal, stats


def cases(where: str) -> Iterator[Case]:
    """Every dtype and shape."""
    return (case(dtype, shape) for dtype, shape in grid(where))


def case(dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """Inputs: x, weight and bias, all in one dtype."""
    N = shape[1:]
    return Case(
        "layer_norm",
        dtype,
        shape,
        normal(dtype, shape, N, N),
        eager=lambda x, weight, bias: F.layer_norm(x, N, weight, bias),
        fused=lambda x, weight, bias, **tables: gk.layer_norm(x, N, weight, bias, **tables),
        tables=stats("layer_norm"),
    )
