"""Twenty steps of an LSTM cell in a loop, forward and backward to x and the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import gradkernels as gk
from benchmarks.harness import Case

STEPS = 20
SHAPES = ((1, 32), (8, 64), (32, 128), (64, 256))  # B, H


def cases() -> Iterator[Case]:
    """Every dtype and shape."""
    for dtype in (torch.float32, torch.float64):
        for shape in SHAPES:
            yield case(dtype, shape)


def case(dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """Floor, for each step: x, h, c and the weights in, h and c out; backward the same with gradients; gates both ways."""
    B, H = shape
    stats = gk.new_stats(8)

    def loop(cell: Callable) -> Callable:
        def run(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h, c = x.new_zeros(B, H), x.new_zeros(B, H)
            for _ in range(STEPS):
                h, c = cell(x, h, c, *weights)
            return h, c

        return run

    variants = {
        "eager": loop(lambda x, h, c, *weights: torch.lstm_cell(x, (h, c), *weights)),
        "telemetry off": loop(gk.lstm_cell),
        "telemetry on": loop(lambda *args: gk.lstm_cell(*args, stats=stats)),
    }

    def make_inputs() -> list[torch.Tensor]:
        shapes = ((4 * H, H), (4 * H, H), (4 * H,), (4 * H,))
        return [torch.randn(B, H).to(dtype), *((torch.randn(s) * H**-0.5).to(dtype) for s in shapes)]

    floor = STEPS * (2 * (8 * H * H + 8 * H) + 16 * B * H) * dtype.itemsize
    return Case("lstm_cell", dtype, shape, make_inputs, variants, floor, flops=3 * 2 * STEPS * B * 8 * H * H)
