"""GELU, both forms, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gradkernels as gk
from benchmarks.harness import COMPILED_SHAPES, DTYPES, SHAPES, Case

OPS = {"gelu": "none", "gelu tanh": "tanh"}


def cases() -> Iterator[Case]:
    """Every form, dtype and shape."""
    for op, approximate in OPS.items():
        for dtype in DTYPES:
            for shape in SHAPES:
                yield case(op, approximate, dtype, shape)


def case(op: str, approximate: str, dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """Floor: read x, write y; read x and dy, write dx."""
    stats = gk.new_stats(2)
    variants = {
        "eager": lambda x: F.gelu(x, approximate=approximate),
        "telemetry off": lambda x: gk.gelu(x, approximate),
        "telemetry on": lambda x: gk.gelu(x, approximate, stats=stats),
    }
    if shape in COMPILED_SHAPES:
        variants["torch.compile"] = torch.compile(variants["eager"], dynamic=False)
    size = shape[0] * shape[1] * dtype.itemsize
    return Case(op, dtype, shape, lambda: [torch.randn(shape).to(dtype)], variants, 5 * size)
