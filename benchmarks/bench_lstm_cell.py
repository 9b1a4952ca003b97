"""Twenty steps of an LSTM cell in a loop, gradients to x and the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import gradkernels as gk
from benchmarks.case import Case, flops_of, stats

STEPS = 20
SHAPES = ((1, 32), (8, 64), (32, 128), (64, 256))  # B, H


def cases(where: str) -> Iterator[Case]:
    """Every dtype and shape, the same everywhere."""
    return (case(dtype, shape) for dtype in (torch.float32, torch.float64) for shape in SHAPES)


def case(dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """Inputs: x, the same in all steps, and nn.LSTMCell's parameters."""
    B, H = shape

    def loop(cell: Callable, x: torch.Tensor, *weights: torch.Tensor, **tables: torch.Tensor) -> tuple:
        h, c = (torch.zeros(B, H, dtype=x.dtype, device=x.device) for _ in range(2))
        for _ in range(STEPS):
            h, c = cell(x, h, c, *weights, **tables)
        return h, c

    def make_inputs(device: torch.device) -> list[torch.Tensor]:
        x = torch.randn(shape, device=device).to(dtype)
        return [x, *nn.LSTMCell(H, H, device=device, dtype=dtype).parameters()]

    return Case(
        "lstm_cell",
        dtype,
        shape,
        make_inputs,
        eager=lambda *inputs: loop(lambda x, h, c, *weights: torch.lstm_cell(x, (h, c), *weights), *inputs),
        fused=lambda *inputs, **tables: loop(gk.lstm_cell, *inputs, **tables),
        tables=stats("lstm_cell"),
        compiled=False,
        flops=flops_of(STEPS * B, make_inputs),
    )
