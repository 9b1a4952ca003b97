"""Residual add followed by LayerNorm, both results used."""

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
    """Inputs: x, residual, weight and bias, all in one dtype."""
    N = shape[1:]

    def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple:
        new_residual = residual + x
        return F.layer_norm(new_residual, N, weight, bias), new_residual

    return Case(
        "add_layer_norm",
        dtype,
        shape,
        normal(dtype, shape, shape, N, N),
        eager=eager,
        fused=lambda x, residual, weight, bias, **tables: gk.add_layer_norm(x, residual, N, weight, bias, **tables),
        tables=stats("add_layer_norm"),
    )
