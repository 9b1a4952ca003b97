"""GELU, both forms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gradkernels as gk
from benchmarks.case import Case, grid, normal, stats

OPS = {"gelu": "none", "gelu tanh": "tanh"}


def cases(where: str) -> Iterator[Case]:
    """Every form, dtype and shape."""
    return (case(op, dtype, shape) for op in OPS for dtype, shape in grid(where))


def case(op: str, dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """The only input is x."""
    form = OPS[op]
    return Case(
        op,
        dtype,
        shape,
        normal(dtype, shape),
        eager=lambda x: F.gelu(x, approximate=form),
        fused=lambda x, **tables: gk.gelu(x, form, **tables),
        tables=stats("gelu"),
    )
