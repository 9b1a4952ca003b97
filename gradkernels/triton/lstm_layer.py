"""One LSTM layer in one direction on a GPU. The products that know no time are PyTorch's: x W_ih^T before the walk through
time, dx and the gradients of the weights after it; the walks are in lstm_forward.py and lstm_backward.py.
"""

from __future__ import annotations

import torch

from gradkernels.ops.layer_norm import widen
from gradkernels.ops.lstm_layer import rows_of, step_sizes
from gradkernels.triton.lstm_backward import WalkedBack, walk_backward
from gradkernels.triton.lstm_forward import walk_forward
from gradkernels.triton.lstm_steps import Steps, last_rows, multiply_wide, preactivations, previous_rows
from gradkernels.triton.lstm_time_stats import record_steps
from gradkernels.triton.probe import probe_bwd


def lstm_layer_fwd(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
    weight_hr: torch.Tensor | None,
    batch_sizes: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, h_n, c_n in x's dtype; gates (rows, 4H), activated, and cells (rows, H) in float32 (float64).

    c is carried in float32, h in x's dtype, in which tensor cores multiply.
    """
    steps = Steps.of(step_sizes(x, h0, batch_sizes), h0.shape[0], reverse, batch_sizes)
    rows, P = rows_of(x), h0.shape[1]
    bias = None if bias_ih is None else widen(bias_ih) + widen(bias_hh)
    gates = preactivations(rows, weight_ih, bias)
    y, cells = x.new_empty(rows.shape[0], P), gates.new_empty(rows.shape[0], c0.shape[1])
    projection = None if weight_hr is None else weight_hr.contiguous()
    walk_forward(steps, gates, weight_hh.contiguous(), projection, h0.contiguous(), widen(c0).contiguous(), y, cells)
    h_n, c_n = last_rows(steps, y), last_rows(steps, cells)
    return y.view(*x.shape[:-1], P), h_n.clone(), c_n.to(x.dtype, copy=True), gates, cells


def lstm_layer_bwd(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
    weight_hr: torch.Tensor | None,
    batch_sizes: torch.Tensor | None,
    y: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    reverse: bool,
    inputs: bool,
    weights: bool,
    stats: torch.Tensor | None,
    time_stats: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dweight_hr; no elements where not wanted. Statistics of both kinds.

    dG is rounded to x's dtype for the products after the walk; what is carried from step to step is not.
    """
    steps = Steps.of(step_sizes(x, h0, batch_sizes), h0.shape[0], reverse, batch_sizes)
    rows, dtype, H = rows_of(x), x.dtype, c0.shape[1]
    dh, dc = (
        torch.zeros_like(s, dtype=cells.dtype, memory_format=torch.contiguous_format)
        if d is None
        else d.to(cells.dtype, memory_format=torch.contiguous_format, copy=True)
        for d, s in ((dh_n, h0), (dc_n, c0))
    )
    rows_dy = None if dy is None else rows_of(dy).contiguous()
    walked = walk_backward(
        steps, rows_dy, dh, dc, weight_hh, weight_hr, widen(c0).contiguous(), gates, cells, time_stats is not None
    )
    dx = torch.mm(walked.dgates, weight_ih).view(x.shape) if inputs else None
    of_weights = (None,) * 4
    if weights:
        of_weights = weight_gradients(steps, walked, rows, rows_of(y), h0, gates, cells, bias_ih is not None)
    if time_stats is not None:
        record_steps(steps, walked, H, time_stats)
    if stats is not None:
        record(stats, dy, dx, *of_weights)
    dx, *of_weights = (x.new_empty(0) if d is None else d for d in (dx, *of_weights))
    return dx, dh.to(dtype), dc.to(dtype), *of_weights


def weight_gradients(
    steps: Steps,
    walked: WalkedBack,
    x: torch.Tensor,
    y: torch.Tensor,
    h0: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    bias: bool,
) -> tuple[torch.Tensor | None, ...]:
    """dweight_ih, dweight_hh, dbias, dweight_hr of a walk: products over the rows of all steps. None without such a weight."""
    dg, dtype = walked.dgates, x.dtype
    dweight_ih = multiply_wide(dg.t(), x).to(dtype)
    dweight_hh = multiply_wide(dg.t(), previous_rows(steps, y, h0)).to(dtype)
    dbias, dweight_hr = dg.sum(0) if bias else None, None
    if walked.dh_total is not None:
        m = (gates[:, -cells.shape[1] :] * cells.tanh()).to(dtype)
        dweight_hr = multiply_wide(walked.dh_total.t(), m).to(dtype)
    return dweight_ih, dweight_hh, dbias, dweight_hr


def record(stats: torch.Tensor, *gradients: torch.Tensor | None) -> None:
    """Adds the statistics of each gradient that is there to its row, in the order of PORTS."""
    for port, gradient in enumerate(gradients):
        if gradient is not None:
            probe_bwd(gradient, stats, port)
