"""The plain implementations of measuring: what the kernels add to a table, written down once in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradkernels.telemetry.fields import HIGH_GATE, LARGEST_SQUARED, LOW_GATE, SCALE, SMALLEST_SQUARED


def measure_reference(gradient: torch.Tensor, stats: torch.Tensor, port: int) -> None:
    """Adds every field of `gradient` (any shape and floating dtype) to slot 0 of row `port` of `stats`, which is written."""
    magnitude = gradient.detach().double().abs().flatten()
    finite = magnitude.isfinite()
    zeros = (magnitude == 0).sum()
    magnitude = torch.where(finite, magnitude, 0.0)
    tiny, huge = magnitude < SMALLEST_SQUARED, magnitude > LARGEST_SQUARED
    if gradient.dtype is not torch.float64:
        tiny, huge = torch.zeros_like(tiny), torch.zeros_like(huge)
    sums = (
        torch.tensor(gradient.numel(), device=stats.device),
        torch.tensor(1, device=stats.device),
        torch.where(tiny | huge, 0.0, magnitude).square().sum(),
        torch.where(tiny, magnitude * SCALE, 0.0).square().sum(),
        torch.where(huge, magnitude / SCALE, 0.0).square().sum(),
        torch.cat([magnitude, magnitude.new_zeros(1)]).amax(),
        (~finite).sum(),
        zeros,
    )
    row = torch.stack([value.double() for value in sums])
    torch.ops.gradkernels.add_row.default(row, stats, port)


def measure_steps_reference(
    dh: Sequence[torch.Tensor],
    dc: Sequence[torch.Tensor],
    dh_recurrent: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    time_stats: torch.Tensor,
) -> None:
    """Adds every field of TIME_FIELDS, one tensor a step of each (gates: activated i f g o), to `time_stats`, which is written.

    Of a batch of calls, of vmap or is_grads_batched, nothing is measured: there is no one row that a step of many calls
    belongs to.
    """
    if any(torch._C._functorch.is_legacy_batchedtensor(t) for t in (*dh, *dc, *dh_recurrent, *gates)):
        return
    rows = []
    for t in range(len(dh)):
        norms = [_norm(v[t].detach().double()) for v in (dh, dc, dh_recurrent)]
        i, f, g, o = gates[t].detach().double().chunk(4, -1)
        low, high = LOW_GATE, HIGH_GATE
        counts = (i < low, i > high, f < low, f > high, g.abs() > high, o < low, o > high, f)
        count = torch.tensor(f.numel(), dtype=torch.float64, device=f.device)
        rows.append(torch.stack([*norms, count, *(v.double().sum() for v in counts)]))
    torch.ops.gradkernels.add_steps.default(torch.stack(rows), time_stats)


def _norm(v: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm, right also where the squares leave float64."""
    largest = torch.cat([v.abs().flatten(), v.new_zeros(1)]).amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return (v / scale).square().sum().sqrt() * scale


def without_graph(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient as a number. In most backwards it is one, and is_grads_batched has no rule for detach."""
    return gradient.detach() if gradient.requires_grad else gradient


def with_stats(reference: Callable, ports: Callable) -> Callable:
    """The plain implementation of a backward op `f(*args, stats)` made of `reference(*args)`, which has no telemetry.

    `ports(args, gradients)` lists the gradients in the order of the op's PORTS, None where there is none.
    """

    def backward(*args: Any) -> Any:
        *inputs, stats = args
        gradients = reference(*inputs)
        for port, gradient in enumerate(ports(inputs, gradients) if stats is not None else ()):
            if gradient is not None:
                torch.ops.gradkernels.probe_bwd.default(without_graph(gradient), stats, port)
        return gradients

    return backward
