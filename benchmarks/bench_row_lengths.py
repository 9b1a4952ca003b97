"""LayerNorm and add+LayerNorm over a million elements in rows of any length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks import bench_add_layer_norm, bench_layer_norm
from benchmarks.case import DTYPES, Case

NUMEL = 2**20
LENGTHS = (1, 2, 3, 5, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 384, 500, 511)
LENGTHS += (512, 513, 768, 1000, 1023, 1024, 1025, 1500, 2047, 2048, 2049, 3000, 4095, 4096, 4097, 4100)


def cases(where: str) -> Iterator[Case]:
    """Both ops, every dtype and length, the same everywhere."""
    for module in (bench_layer_norm, bench_add_layer_norm):
        for dtype in DTYPES:
            for N in LENGTHS:
                case = module.case(dtype, (NUMEL // N, N))
                yield replace(case, op=f"{case.op} rows", compiled=False)
