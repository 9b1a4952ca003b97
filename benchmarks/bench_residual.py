"""The residual connection x + branch(x) around a branch that costs one pass (negation), forward and backward.

Eager's own cost at the fork is one addition by autograd; ours is one op more, which small shapes show.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradkernels as gk
from benchmarks.harness import COMPILED_SHAPES, DTYPES, SHAPES, Case


def cases() -> Iterator[Case]:
    """Every dtype and shape."""
    for dtype in DTYPES:
        for shape in SHAPES:
            yield case(dtype, shape)


def case(dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """Floor: the branch's pass and the add forward; the branch's pass and the sum at the fork backward."""
    stats = gk.new_stats(3)
    variants = {
        "eager": lambda x: x + torch.neg(x),
        "telemetry off": lambda x: gk.residual(x, torch.neg),
        "telemetry on": lambda x: gk.residual(x, torch.neg, stats=stats),
    }
    if shape in COMPILED_SHAPES:
        variants["torch.compile"] = torch.compile(variants["eager"], dynamic=False)
    size = shape[0] * shape[1] * dtype.itemsize
    return Case("residual", dtype, shape, lambda: [torch.randn(shape).to(dtype)], variants, 10 * size)
