"""Arguments of the raw ops, in one place for what calls them directly: benchmarks/codegen.py and benchmarks/launch_cost.py."""

from __future__ import annotations

from typing import Any

import torch

from gradkernels.ops import OPS
from gradkernels.telemetry import NUM_SLOTS

Calls = dict[str, tuple[Any, ...]]


def tables(op: str, device: torch.device, on: bool = True) -> torch.Tensor | None:
    """Statistics of an op as on a GPU, wherever they are; None where they are off."""
    shape = (len(OPS[op].PORTS), NUM_SLOTS, 8)
    return torch.zeros(shape, dtype=torch.float64, device=device) if on else None


def gelu(x: torch.Tensor, tanh: bool = False, on: bool = True) -> Calls:
    """Like all here: dy has x's values, and no two arguments share memory."""
    return {"gelu_fwd": (x, tanh), "gelu_bwd": (x.clone(), x, tanh, tables("gelu", x.device, on))}


def residual(x: torch.Tensor, on: bool = True) -> Calls:
    """The fork's backward, its only kernel."""
    return {"residual_bwd": (x, x.clone(), tables("residual", x.device, on))}


def probe(x: torch.Tensor) -> Calls:
    """Always with statistics."""
    return {"probe_bwd": (x, tables("probe", x.device), 0)}


def norm(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """mean, rstd, weight and bias."""
    statistic = lambda: x.new_ones(x.shape[0], 1, dtype=torch.float32)  # noqa: E731
    return statistic(), statistic(), x[0].clone(), x[0].clone()


def layer_norm(x: torch.Tensor, on: bool = True) -> Calls:
    """With weight and bias."""
    _, _, *parameters = saved = norm(x)
    backward = (x.clone(), x, *saved, 1, [True] * 3, tables("layer_norm", x.device, on))
    return {"layer_norm_fwd": (x, *parameters, 1, 1e-5), "layer_norm_bwd": backward}


def add_layer_norm(x: torch.Tensor, on: bool = True) -> Calls:
    """The same with a float32 residual."""
    _, _, *parameters = saved = norm(x)
    h = x.to(torch.float32, copy=True)
    last = (*saved, 1, x.dtype, [True] * 4, tables("add_layer_norm", x.device, on))
    return {"add_layer_norm_fwd": (x, h, *parameters, 1, 1e-5), "add_layer_norm_bwd": (x.clone(), h.clone(), h, *last)}


def lstm(H: int, P: int, dtype: torch.dtype, on: bool, B: int = 32, T: int = 2) -> Calls:
    """Tensors without memory; a cell only where there is no projection."""
    make = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    wide, N = torch.float64 if dtype is torch.float64 else torch.float32, P or H
    x, h0, c0, bias, hr = make(T, B, H), make(B, N), make(B, H), make(4 * H), make(P, H) if P else None
    layer = (x, h0, c0, make(4 * H, H), make(4 * H, N), bias, bias, hr, None)
    saved = (make(T, B, N), make(T * B, 4 * H, dtype=wide), make(T * B, H, dtype=wide), False, [True] * 8)
    time_stats = make(1 + T, 12, dtype=torch.float64) if on else None
    found = {
        "lstm_layer_bwd": (make(T, B, N), None, None, *layer, *saved, None, time_stats),
        "lstm_layer_fwd": (*layer, False),
    }
    if not P:
        cell = (x[0], c0, c0, make(4 * H, H), make(4 * H, H), bias, bias)
        backward = (c0, c0, *cell, make(B, 4 * H, dtype=wide), [True] * 7, None)
        found |= {"lstm_cell_fwd": cell, "lstm_cell_bwd": backward}
    return found
