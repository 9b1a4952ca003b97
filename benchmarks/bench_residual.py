"""The residual connection x + branch(x) around a branch that costs one pass (halving).

Eager's own cost at the fork is one addition by autograd; ours is one op more, which small shapes show.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradkernels as gk
from benchmarks.case import Case, grid, normal, stats


def cases(where: str) -> Iterator[Case]:
    """Every dtype and shape."""
    return (case(dtype, shape) for dtype, shape in grid(where))


def case(dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """The only input is x."""
    return Case(
        "residual",
        dtype,
        shape,
        normal(dtype, shape),
        eager=lambda x: x + 0.5 * x,
        fused=lambda x, **tables: gk.residual(x, lambda x: 0.5 * x, **tables),
        tables=stats("residual"),
    )
