"""The ops of one LSTM layer in one direction on a GPU: what they do is in direction.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkernels.library import or_empty
from gradkernels.ops._steps import rows_of, rows_per_step
from gradkernels.ops.layer_norm import upcast
from gradkernels.triton.launch_cache import register
from gradkernels.triton.lstm.direction import LayerDirection
from gradkernels.triton.lstm.sequence import Steps, last_rows, of_both_biases


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
    steps = Steps.of(rows_per_step(x, h0, batch_sizes), h0.shape[0], reverse, batch_sizes)
    rows, like = rows_of(x), upcast(c0[:0])
    y = x.new_empty(len(rows), h0.shape[1])
    gates, cells = (like.new_empty(len(rows), n) for n in (len(weight_hh), c0.shape[1]))
    weights = [weight_ih, weight_hh, bias_ih, bias_hh, weight_hr]
    LayerDirection(steps, weights, rows, h0, c0, y, gates, cells).forward(0, len(steps.sizes))
    h_n, c_n = last_rows(steps, y), last_rows(steps, cells)
    return y.view(*x.shape[:-1], y.shape[1]), h_n.clone(), c_n.to(x.dtype, copy=True), gates, cells


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
    output_mask: Sequence[bool],
    stats: torch.Tensor | None,
    time_stats: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of the inputs; of no elements where not wanted, but dh0 and dc0. Statistics of both kinds.

    dG is rounded to x's dtype for the products after the recurrence; what is carried from step to step is not.
    """
    steps = Steps.of(rows_per_step(x, h0, batch_sizes), h0.shape[0], reverse, batch_sizes)
    weights = [weight_ih, weight_hh, bias_ih, bias_hh, weight_hr]
    wanted = [want and weight is not None for want, weight in zip(output_mask[3:], weights, strict=True)]
    layer_direction = LayerDirection(steps, weights, rows_of(x), h0, c0, rows_of(y), gates, cells)
    layer_direction.receive(None if dy is None else rows_of(dy).contiguous(), dh_n, dc_n, output_mask[0])
    layer_direction.backward(0, len(steps.sizes), time_stats is not None)
    layer_direction.multiply(wanted)
    layer_direction.record(stats, time_stats)
    dx, (dh0, dc0) = layer_direction.dx, (d.to(x.dtype) for d in layer_direction.state)
    dweight_ih, dweight_hh, dbias, dweight_hr = layer_direction.of_weights
    of_weights = (dweight_ih, dweight_hh, *of_both_biases(dbias, *wanted[2:4]), dweight_hr)
    return or_empty(x, None if dx is None else dx.view(x.shape), dh0, dc0, *of_weights)


# torch.compile does not look into these: it would lay out one launch a step, and build another graph for every length.
register("lstm_layer_fwd", lstm_layer_fwd, opaque=True)
register("lstm_layer_bwd", lstm_layer_bwd, opaque=True)
