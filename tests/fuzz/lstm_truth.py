"""The backward pass of an LSTM in float64, written from the formula, and with every number how far off it may be when computed.

dh_t = dy_t + dG_{t+1} W_hh,  dc_t = dc_{t+1} f_{t+1} + dh_t o_t (1 - tanh^2 c_t),  dG_t: the gradient of the preactivations
dx = dG W_ih,  dW_ih = dG^T x,  dW_hh = dG^T h_{t-1},  dbias = the sum of dG;  with a projection dh_t W_hr is in dh_t's place
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuzz.compare import floor, rounding, sum_error
from gradkernels.ops.lstm_layer import order_of, previous_rows


@dataclass
class Near:
    """Numbers, and how far off each may be where they are computed in what a tensor of `dtype` is computed in."""

    value: torch.Tensor
    error: torch.Tensor
    dtype: torch.dtype

    def near(self, value: torch.Tensor, error: torch.Tensor) -> Near:
        """Others, after one more operation. What is NaN or infinite is compared without an error.

        Below the normal numbers a product of three factors rounds by a floor twice, and the truth itself in float64 too.
        """
        rounded = rounding(self.dtype) * value.abs() + 4 * floor(self.dtype)
        return Near(value, (error + rounded).nan_to_num(0.0, 0.0, 0.0), self.dtype)

    def __add__(self, other: Near) -> Near:
        return self.near(self.value + other.value, self.error + other.error)

    def __getitem__(self, rows: slice) -> Near:
        return Near(self.value[rows], self.error[rows], self.dtype)

    def times(self, factor: torch.Tensor, factor_error: torch.Tensor | float = 0.0) -> Near:
        """Elementwise products with a factor that takes two roundings, and is off by factor_error besides."""
        off = factor_error + 2 * rounding(self.dtype) * factor.abs() + 2 * floor(self.dtype)
        error = self.error * factor.abs() + self.value.abs() * off
        return self.near(self.value * factor, error)

    def matmul(self, matrix: torch.Tensor, matrix_error: float = 0.0) -> Near:
        """The matrix product. Each element of the matrix may be off by matrix_error."""
        value, factor = (t.nan_to_num(0.0, 0.0, 0.0).abs() for t in (self.value, matrix))
        size, error = value @ factor, self.error @ factor + matrix_error * value.sum(1, keepdim=True)
        count = matrix.shape[0]
        return self.near(self.value @ matrix, error + sum_error(self.dtype, count) * size + count * floor(self.dtype))

    @property
    def mT(self) -> Near:
        return Near(self.value.mT, self.error.mT, self.dtype)


def joined(*parts: Near) -> Near:
    """The rows of all parts."""
    return Near(torch.cat([p.value for p in parts]), torch.cat([p.error for p in parts]), parts[0].dtype)


@dataclass
class Inputs:
    """What a backward pass reads, in float64: rows of x, y and so on, and how many of them each step has."""

    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
    weight_hr: torch.Tensor | None
    y: torch.Tensor
    gates: torch.Tensor
    cells: torch.Tensor
    dy: torch.Tensor | None
    dh_n: torch.Tensor | None
    dc_n: torch.Tensor | None
    sizes: list[int]
    reverse: bool
    dtype: torch.dtype
    cells_error: float = 0.0  # where cells are not saved but computed again


@dataclass
class Step:
    """The gradients of one step's states: in total, and of h what came from the step after alone."""

    dh: Near
    dc: Near
    recurrent: Near
    dgates: Near
    dc_before: Near


def step_back(dh: Near, recurrent: Near, dc: Near, saved: tuple, p: Inputs) -> Step:
    """One step: `dh` all of it, `dc` what came from the step after. saved: gates, cells, and the cells before."""
    gates, cells, c = saved
    H, eps = cells.shape[1], rounding(p.dtype)
    i, f, g, o = (gates[:, k * H : (k + 1) * H] for k in range(4))
    m = cells.tanh()
    dm = dh if p.weight_hr is None else dh.matmul(p.weight_hr)
    m_error = 4 * eps * m.abs() + p.cells_error
    total = dm.times(o * (1 - m * m), (4 * eps + 2 * m_error) * o) + dc
    parts = (
        total.times(g * i * (1 - i)),
        total.times(c).times(f * (1 - f)),  # c may be so small that a product with f is not exact
        total.times(i * (1 - g * g), 2 * eps * i),
        dm.times(m * o * (1 - o), m_error * o * (1 - o)),
    )
    dgates = Near(torch.cat([part.value for part in parts], 1), torch.cat([part.error for part in parts], 1), p.dtype)
    return Step(dh, total, recurrent, dgates, total.times(f))


def backward_reference(p: Inputs) -> tuple[dict[str, Near], list[Step]]:
    """(every gradient, every step in order of time)."""
    exactly = lambda value: Near(value, torch.zeros_like(value), p.dtype)  # noqa: E731
    dh, dc = (exactly(torch.zeros_like(s) if d is None else d) for d, s in ((p.dh_n, p.h0), (p.dc_n, p.c0)))
    h_before, c_before = (previous_rows(t, first, p.sizes, p.reverse) for t, first in ((p.y, p.h0), (p.cells, p.c0)))
    gates, cells, c_steps = (t.split(p.sizes) for t in (p.gates, p.cells, c_before))
    steps, after = [None] * len(p.sizes), 0
    for t in order_of(p.sizes, not p.reverse):
        active_rows = p.sizes[t]
        recurrent, whole = dh[: min(active_rows, after)], dh[:active_rows]
        if p.dy is not None:
            whole = whole + exactly(p.dy.split(p.sizes)[t])
        steps[t] = step_back(whole, recurrent, dc[:active_rows], (gates[t], cells[t], c_steps[t]), p)
        dh = joined(steps[t].dgates.matmul(p.weight_hh), dh[active_rows:])
        dc = joined(steps[t].dc_before, dc[active_rows:])
        after = active_rows
    dgates = joined(*(step.dgates for step in steps))
    found = {
        "dx": dgates.matmul(p.weight_ih),
        "dh0": dh,
        "dc0": dc,
        "dweight_ih": dgates.mT.matmul(p.x),
        "dweight_hh": dgates.mT.matmul(h_before),
        "dbias": dgates.mT.matmul(torch.ones(len(p.x), 1, dtype=torch.float64)),
    }
    if p.weight_hr is not None:
        H = p.cells.shape[1]
        projected = p.gates[:, 3 * H :] * p.cells.tanh()
        found["dweight_hr"] = joined(*(step.dh for step in steps)).mT.matmul(projected, 2 * floor(p.dtype))
    return found, steps


def time_fields(step: Step, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fields, errors) of one step, in the order of telemetry.TIME_FIELDS."""
    H = step.dc.value.shape[1]
    i, f, g, o = (gates[:, k * H : (k + 1) * H] for k in range(4))
    near = (step.dh, step.dc, step.recurrent)
    norms, errors = ([norm(getattr(d, part)) for d in near] for part in ("value", "error"))
    counts = (i < 0.1, i > 0.9, f < 0.1, f > 0.9, g.abs() > 0.9, o < 0.1, o > 0.9, f)
    fields = [*norms, float(f.numel()), *(float(count.double().sum()) for count in counts)]
    return torch.tensor(fields, dtype=torch.float64), torch.tensor([*errors, *[0.0] * 9], dtype=torch.float64)


def norm(values: torch.Tensor) -> float:
    """The Euclidean norm, also where squares leave float64."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest * float((values / largest).square().sum().sqrt()) if 0 < largest < float("inf") else largest
