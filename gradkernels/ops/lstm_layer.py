"""One LSTM layer in one direction over padded or packed sequences. Hochreiter and Schmidhuber 1997, with Gers's forget gate.

    i, f, o = sigmoid, g = tanh of x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh, split into i f g o
    c_t = f c_{t-1} + i g,    h_t = o tanh(c_t), times W_hr^T where there is a projection

Rows are time-major. Padded: x is (T, B, D). Packed, as in torch.nn.utils.rnn.PackedSequence: x is (sum of batch_sizes, D), and
step t owns the next batch_sizes[t] rows, of the batch's first sequences. `reverse` goes from the last step to the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from gradkernels.autocast import autocast_off
from gradkernels.library import FLOATS, ArgumentError, define_autograd, define_composite, define_kernel, or_empty
from gradkernels.ops._steps import check_steps, rows_of, rows_per_step
from gradkernels.ops.layer_norm import empty_gradient, of_parameters, upcast
from gradkernels.telemetry import check_stats, check_time_stats, measure_steps_reference, without_graph

PORTS = ("dy", "dx", "dweight_ih", "dweight_hh", "dbias", "dweight_hr")
INPUTS = (
    "Tensor x, Tensor h0, Tensor c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? weight_hr, Tensor? batch_sizes"
)
GRADIENTS = (
    "Tensor dx, Tensor dh0, Tensor dc0, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih, Tensor dbias_hh, "
    "Tensor dweight_hr"
)
STATS = "Tensor(a!)? stats, Tensor(b!)? time_stats"
SCHEMA = f"lstm_layer({INPUTS}, bool reverse, Tensor? stats, Tensor? time_stats) -> (Tensor y, Tensor h_n, Tensor c_n)"
SCHEMA_FWD = f"lstm_layer_fwd({INPUTS}, bool reverse) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
SCHEMA_BWD = (
    f"lstm_layer_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {INPUTS}, Tensor y, Tensor gates, Tensor cells, "
    f"bool reverse, bool[8] output_mask, {STATS}) -> ({GRADIENTS})"
)


def order_of(sizes: list[int], reverse: bool) -> list[int]:
    """The time steps in the order in which the forward pass takes them."""
    return list(range(len(sizes)))[:: -1 if reverse else 1]


def previous_rows(rows: torch.Tensor, initial: torch.Tensor, sizes: list[int], reverse: bool) -> torch.Tensor:
    """For every row (t, b) the row (previous t, b) of `rows`, and row b of `initial` where there is none."""
    steps, pieces, before = rows.split(sizes), [None] * len(sizes), None
    for t in order_of(sizes, reverse):
        active_rows = 0 if before is None else min(sizes[t], sizes[before])
        known = [] if before is None else [steps[before][:active_rows]]
        pieces[t] = torch.cat([*known, initial[active_rows : sizes[t]]])
        before = t
    return torch.cat(pieces)


def step_forward(preactivations: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gates, activated, as i f g o; c_next; h_next before any projection) of one step."""
    i, f, g, o = preactivations.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_next = f * c + i * g
    return torch.cat([i, f, g, o], -1), c_next, o * c_next.tanh()


def step_backward(dm: torch.Tensor, dc_next: Any, gates: torch.Tensor, m: torch.Tensor, c: torch.Tensor) -> tuple:
    """(gradient of the preactivations, total dc_next, dc) from dm, of h_next before any projection; m = tanh(c_next)."""
    i, f, g, o = gates.chunk(4, -1)
    total = dm * o * (1 - m * m) + dc_next
    parts = (total * g * i * (1 - i), total * c * f * (1 - f), total * i * (1 - g * g), dm * m * o * (1 - o))
    return torch.cat(parts, -1), total, total * f


def lstm_layer_fwd_reference(
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
    """y, h_n, c_n in x's dtype; gates (rows, 4H: i f g o, activated) and cells (rows, H) in float32 (float64 for float64).

    Both states are carried in float32 (float64) from step to step, whatever the dtype they are given back in.
    """
    sizes, h, c = rows_per_step(x, h0, batch_sizes), upcast(h0), upcast(c0)
    preactivations = upcast(x) @ upcast(weight_ih).mT
    if bias_ih is not None:
        preactivations = preactivations + (upcast(bias_ih) + upcast(bias_hh))
    steps = rows_of(preactivations).split(sizes)
    ys, gates, cells = ([None] * len(sizes) for _ in range(3))
    for t in order_of(sizes, reverse):
        active_rows = sizes[t]
        gates[t], cells[t], ys[t] = step_forward(steps[t] + h[:active_rows] @ upcast(weight_hh).mT, c[:active_rows])
        if weight_hr is not None:
            ys[t] = ys[t] @ upcast(weight_hr).mT
        h, c = torch.cat([ys[t], h[active_rows:]]), torch.cat([cells[t], c[active_rows:]])
    y = torch.cat(ys).to(x.dtype).reshape(*x.shape[:-1], h.shape[-1])
    return y, h.to(x.dtype), c.to(x.dtype), torch.cat(gates), torch.cat(cells)


def _through_time(
    dy: torch.Tensor | None,
    state: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor | None],
    gates: torch.Tensor,
    cells: torch.Tensor,
    c_previous: torch.Tensor,
    sizes: list[int],
    reverse: bool,
) -> tuple[list, list, list, list, tuple]:
    """(dgates, dh, dc, dh_recurrent) of every step, and (dh0, dc0), from `state` = (dh_n, dc_n), all in float64.

    float64 whatever the dtype, for a gradient vanishes over some hundred steps below the smallest float32.
    """
    (dh, dc), (weight_hh, weight_hr) = state, weights
    external = None if dy is None else dy.double().split(sizes)
    split = [t.double().split(sizes) for t in (gates, cells, c_previous)]
    dgates, dhs, dcs, recurrent = ([None] * len(sizes) for _ in range(4))
    after = 0  # rows of the step after this one, whose part of dh has come through W_hh
    for t in order_of(sizes, not reverse):
        active_rows, (step_gates, step_cells, step_previous) = sizes[t], (part[t] for part in split)
        recurrent[t] = dh[: min(active_rows, after)]
        dhs[t] = dh[:active_rows] if external is None else dh[:active_rows] + external[t]
        dm = dhs[t] if weight_hr is None else dhs[t] @ weight_hr
        dgates[t], dcs[t], before = step_backward(dm, dc[:active_rows], step_gates, step_cells.tanh(), step_previous)
        dh, dc = torch.cat([dgates[t] @ weight_hh, dh[active_rows:]]), torch.cat([before, dc[active_rows:]])
        after = active_rows
    return dgates, dhs, dcs, recurrent, (dh, dc)


def lstm_layer_bwd_reference(
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
    time_stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """dx, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, in the dtype of what they belong to.

    With dG_t the gradient of step t's preactivations: dh_t = dy_t + dG_{t+1} W_hh, dc_t = dc_{t+1} f_{t+1} + dh_t o_t
    (1 - tanh^2 c_t); dx = dG W_ih, dW = dG^T (x or h_{t-1}). output_mask: which of them are wanted. The others have no
    elements, but dh0 and dc0 come in any case.
    """
    sizes = rows_per_step(x, h0, batch_sizes)
    rows, rows_y = rows_of(x).double(), rows_of(y).double()
    state = tuple(torch.zeros_like(s) if d is None else d for d, s in ((dh_n, h0), (dc_n, c0)))
    state = (state[0].double(), state[1].double())
    c_previous = previous_rows(cells.double(), c0.double(), sizes, reverse)
    hr = None if weight_hr is None else weight_hr.double()
    external = None if dy is None else rows_of(dy)
    steps = _through_time(external, state, (weight_hh.double(), hr), gates, cells, c_previous, sizes, reverse)
    dgates, dhs, dcs, recurrent, (dh0, dc0) = steps
    if time_stats is not None:
        measure_steps_reference(dhs, dcs, recurrent, gates.split(sizes), time_stats)
    dg = torch.cat(dgates)
    of_x, _, _, of_ih, of_hh, *of_biases, of_hr = output_mask
    dx = (dg @ weight_ih.double()).reshape(x.shape) if of_x else None
    dweight_ih = dg.mT @ rows if of_ih else None
    dweight_hh = dg.mT @ previous_rows(rows_y, h0.double(), sizes, reverse) if of_hh else None
    dbiases = (dg.sum(0) if want and bias_ih is not None else None for want in of_biases)
    dweight_hr = None
    if of_hr and weight_hr is not None:
        dweight_hr = torch.cat(dhs).mT @ (gates[..., -cells.shape[-1] :].double() * cells.double().tanh())
    found = (dx, dh0, dc0, dweight_ih, dweight_hh, *dbiases, dweight_hr)
    return or_empty(x, *(None if d is None else d.to(x.dtype) for d in found))


def lstm_layer_fwd_fake(
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
) -> tuple[torch.Tensor, ...]:
    """Contiguous y, h_n, c_n, gates, cells."""
    rows, dtype = math.prod(x.shape[:-1]), torch.float64 if x.dtype is torch.float64 else torch.float32
    saved = (x.new_empty(rows, n, dtype=dtype) for n in (weight_hh.shape[0], c0.shape[1]))
    return x.new_empty(*x.shape[:-1], h0.shape[1]), x.new_empty(h0.shape), x.new_empty(c0.shape), *saved


def lstm_layer_bwd_fake(
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
    """Contiguous gradients, of no elements where not wanted."""
    inputs, wanted = (
        (x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr),
        (output_mask[0], True, True, *output_mask[3:]),
    )
    return or_empty(x, *(empty_gradient(of, want) for of, want in zip(inputs, wanted, strict=True)))


def _bwd_default(*args: Any) -> tuple[torch.Tensor, ...]:
    """The reference with its statistics."""
    *tensors, stats, time_stats = args
    output_mask = tensors[-1]
    gradients = lstm_layer_bwd_reference(*tensors, time_stats)
    dx, _, _, *of_weights = gradients
    dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr = of_parameters(of_weights, tensors[6:11], output_mask[3:])
    ports = (tensors[0], dx if output_mask[0] else None, dweight_ih, dweight_hh, dbias_hh if dbias_ih is None else dbias_ih)
    for port, gradient in enumerate((*ports, dweight_hr) if stats is not None else ()):
        if gradient is not None:
            torch.ops.gradkernels.probe_bwd.default(without_graph(gradient), stats, port)
    return gradients


def _differentiable(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return lstm_layer_fwd_reference(*args)[:3]


def _bwd_differentiable(dy: Any, dh_n: Any, dc_n: Any, *args: Any) -> tuple[torch.Tensor, ...]:
    """The backward as a function of the layer's inputs alone: y, gates and cells are computed again and differentiated too."""
    *inputs, reverse, output_mask, stats, time_stats = args
    y, _, _, gates, cells = lstm_layer_fwd_reference(*inputs, reverse)
    return _bwd_default(dy, dh_n, dc_n, *inputs, y, gates, cells, reverse, output_mask, stats, time_stats)


lstm_layer_fwd = define_kernel(SCHEMA_FWD, lstm_layer_fwd_reference, lstm_layer_fwd_fake)
lstm_layer_bwd = define_kernel(SCHEMA_BWD, _bwd_default, lstm_layer_bwd_fake)
lstm_layer_differentiable = define_composite(
    f"lstm_layer_differentiable({INPUTS}, bool reverse) -> (Tensor y, Tensor h_n, Tensor c_n)", _differentiable
)
lstm_layer_bwd_differentiable = define_composite(
    f"lstm_layer_bwd_differentiable(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {INPUTS}, bool reverse, bool[8] output_mask, "
    f"{STATS}) -> ({GRADIENTS})",
    _bwd_differentiable,
)


class _LSTMLayer(Function):
    """Saves every input, y, and gates and cells in float32. Its C++ twin is in csrc/autograd/lstm_layer.cpp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple:
        return lstm_layer_fwd(*args[:-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.reverse, ctx.stats, ctx.time_stats = inputs
        y, _, _, gates, cells = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gates, cells)
        ctx.save_for_backward(*tensors, y, gates, cells)

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, dgates: Any, dcells: Any) -> tuple:
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * 12
        *tensors, y, gates, cells = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:8])
        last = (ctx.reverse, mask, ctx.stats, ctx.time_stats)
        if torch.is_grad_enabled():
            gradients = lstm_layer_bwd_differentiable(dy, dh_n, dc_n, *tensors, *last)
        else:
            gradients = lstm_layer_bwd(dy, dh_n, dc_n, *tensors, y, gates, cells, *last)
        return *(d if want else None for d, want in zip(gradients, mask, strict=True)), None, None, None, None


_lstm_layer_op = define_autograd(
    SCHEMA, lambda *args: _LSTMLayer.apply(*args)[:3], lambda *args: lstm_layer_fwd_reference(*args[:-2])[:3]
)


def check_lstm_weights(op: str, x: torch.Tensor, tensors: dict[str, tuple[torch.Tensor | None, tuple]]) -> None:
    """Raises ArgumentError or TypeError unless each tensor that is there has its shape, and x's dtype and device."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ArgumentError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype is not x.dtype:
            raise TypeError(f"{op}: {name} must be {x.dtype} like x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ArgumentError(f"{op}: {name} must be on x's device, {x.device}, got {tensor.device}")


def check_layer(
    x: torch.Tensor, h0: Any, c0: Any, weights: Sequence, batch_sizes: torch.Tensor | None, stats: Any, time_stats: Any
) -> None:
    """Raises what `lstm_layer` raises."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        expected = "(rows, D) where batch_sizes are given" if packed else "(T, B, D)"
        raise ArgumentError(f"lstm_layer: x must have shape {expected}, got {tuple(x.shape)}")
    check_steps(x, batch_sizes)
    if (bias_ih is None) != (bias_hh is None):
        raise ArgumentError("lstm_layer: bias_ih and bias_hh must be given together, got one of them")
    if weight_hh.dim() != 2 or weight_hh.shape[0] % 4 or h0.dim() != 2:
        got = f"{tuple(weight_hh.shape)} and {tuple(h0.shape)}"
        raise ArgumentError(f"lstm_layer: weight_hh and h0 must have shapes (4H, P) and (B, P), got {got}")
    H, P, B = weight_hh.shape[0] // 4, weight_hh.shape[1], h0.shape[0] if packed else x.shape[1]
    shapes = {
        "h0": (h0, (B, P)),
        "c0": (c0, (B, H)),
        "weight_ih": (weight_ih, (4 * H, x.shape[-1])),
        "weight_hh": (weight_hh, (4 * H, H if weight_hr is None else P)),
        "bias_ih": (bias_ih, (4 * H,)),
        "bias_hh": (bias_hh, (4 * H,)),
        "weight_hr": (weight_hr, (P, H)),
    }
    check_lstm_weights("lstm_layer", x, shapes)
    if stats is not None:
        check_stats("lstm_layer", stats, x, PORTS)
    if time_stats is not None:
        check_time_stats("lstm_layer", time_stats, x)


def lstm_layer(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    weight_hr: torch.Tensor | None = None,
    *,
    batch_sizes: torch.Tensor | None = None,
    reverse: bool = False,
    stats: torch.Tensor | None = None,
    time_stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h_n, c_n) of one LSTM layer in one direction: the h_t of all steps, and the last states. See the module.

    x: (T, B, D), or (sum of batch_sizes, D) packed; any strides; float32, float64, bfloat16 or float16, like all the others.
    h0: (B, P). c0: (B, H). weight_ih: (4H, D). weight_hh: (4H, P). bias_ih, bias_hh: (4H,), both or neither. weight_hr: (P, H),
    or None and P = H. batch_sizes: (T,), int64 on the CPU, not increasing, the first one B. Any size but T may be zero.
    stats: statistics tensor (6, slots, 8) for the ports in PORTS; dbias is the gradient of either bias. time_stats: a tensor
    of `new_time_stats`, see TIME_FIELDS. Both are written in backward; None measures nothing.
    Returns y: (T, B, P) or (rows, P), h_n: (B, P), c_n: (B, H), in x's dtype. Both states are carried in float32 (float64).
    Raises TypeError for a dtype, ArgumentError for a shape or device that does not fit. Differentiable twice.
    """
    check_layer(x, h0, c0, (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), batch_sizes, stats, time_stats)
    args = (x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, stats, time_stats)
    with autocast_off(x):
        return _lstm_layer_op(*args)
