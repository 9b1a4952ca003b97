"""One step of an LSTM: i, f, o = sigmoid, g = tanh of x W_ih^T + b_ih + h W_hh^T + b_hh; c' = f c + i g, h' = o tanh(c')."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from gradkernels.autocast import CELLS_IN_REGION, autocast_off, autocast_region
from gradkernels.library import ArgumentError, define_autograd, define_composite, define_kernel, or_empty
from gradkernels.ops.layer_norm import empty_gradient, of_parameters, upcast
from gradkernels.ops.lstm_layer import check_lstm_weights, step_backward, step_forward
from gradkernels.telemetry import check_stats, with_stats

PORTS = ("dh_next", "dc_next", "dx", "dh", "dc", "dweight_ih", "dweight_hh", "dbias")
INPUTS = "Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh"
GRADIENTS = "Tensor dx, Tensor dh, Tensor dc, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih, Tensor dbias_hh"
SCHEMA = f"lstm_cell({INPUTS}, Tensor? stats) -> (Tensor h_next, Tensor c_next)"
SCHEMA_FWD = f"lstm_cell_fwd({INPUTS}) -> (Tensor h_next, Tensor c_next, Tensor gates)"
SCHEMA_BWD = (
    f"lstm_cell_bwd(Tensor? dh_next, Tensor? dc_next, {INPUTS}, Tensor gates, bool[7] output_mask, "
    f"Tensor(a!)? stats) -> ({GRADIENTS})"
)


def lstm_cell_fwd_reference(
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h_next, c_next in x's dtype, computed in float32 (float64 for float64); gates (B, 4H: i f g o, activated) in that."""
    preactivations = upcast(x) @ upcast(weight_ih).mT + upcast(h) @ upcast(weight_hh).mT
    if bias_ih is not None:
        preactivations = preactivations + (upcast(bias_ih) + upcast(bias_hh))
    gates, c_next, h_next = step_forward(preactivations, upcast(c))
    return h_next.to(x.dtype), c_next.to(x.dtype), gates


def lstm_cell_bwd_reference(
    dh_next: torch.Tensor | None,
    dc_next: torch.Tensor | None,
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
    gates: torch.Tensor,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """dx, dh, dc, dweight_ih, dweight_hh, dbias_ih, dbias_hh, in the dtype of what they belong to.

    With dG the gradient of the preactivations: dx = dG W_ih, dh = dG W_hh, dW = dG^T (x or h), dbias = its sum over the rows;
    dc = f (dc_next + dh_next o (1 - tanh^2 c_next)). output_mask: which of them are wanted. The others have no elements, but dh
    and dc, which are measured, come in any case.
    """
    i, f, g, _ = gates.chunk(4, -1)
    c_upcast = upcast(c)
    m = (f * c_upcast + i * g).tanh()
    dh_upcast = torch.zeros_like(m) if dh_next is None else upcast(dh_next)
    dg, _, dc_upcast = step_backward(dh_upcast, 0 if dc_next is None else upcast(dc_next), gates, m, c_upcast)
    dx = (dg @ upcast(weight_ih)).to(x.dtype) if output_mask[0] else None
    dh, dc = (dg @ upcast(weight_hh)).to(x.dtype), dc_upcast.to(x.dtype)
    of_weights = ((dg.mT @ upcast(t)).to(x.dtype) if want else None for t, want in zip((x, h), output_mask[3:5], strict=True))
    of_biases = (dg.sum(0).to(x.dtype) if want and bias_ih is not None else None for want in output_mask[5:7])
    return or_empty(x, dx, dh, dc, *of_weights, *of_biases)


def lstm_cell_fwd_fake(
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous h_next, c_next, gates."""
    gates = x.new_empty(h.shape[0], weight_hh.shape[0], dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    return x.new_empty(h.shape), x.new_empty(c.shape), gates


def lstm_cell_bwd_fake(
    dh_next: torch.Tensor | None,
    dc_next: torch.Tensor | None,
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
    gates: torch.Tensor,
    output_mask: Sequence[bool],
    stats: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Contiguous gradients, of no elements where not wanted."""
    inputs, wanted = (x, h, c, weight_ih, weight_hh, bias_ih, bias_hh), (output_mask[0], True, True, *output_mask[3:])
    return or_empty(x, *(empty_gradient(of, want) for of, want in zip(inputs, wanted, strict=True)))


def _ports(args: list, gradients: tuple) -> tuple:
    dx, dh, dc, *of_weights = gradients
    *of_weights, dbias_ih, dbias_hh = of_parameters(of_weights, args[5:9], args[-1][3:])
    return args[0], args[1], dx if args[-1][0] else None, dh, dc, *of_weights, dbias_hh if dbias_ih is None else dbias_ih


def _differentiable(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return lstm_cell_fwd_reference(*args)[:2]


def _bwd_differentiable(dh_next: Any, dc_next: Any, *args: Any) -> tuple[torch.Tensor, ...]:
    """The backward as a function of the cell's inputs alone: the gates are computed again, and differentiated too."""
    *inputs, output_mask, stats = args
    gates = lstm_cell_fwd_reference(*inputs)[2]
    return _bwd_default(dh_next, dc_next, *inputs, gates, output_mask, stats)


_bwd_default = with_stats(lstm_cell_bwd_reference, _ports)
lstm_cell_fwd = define_kernel(SCHEMA_FWD, lstm_cell_fwd_reference, lstm_cell_fwd_fake)
lstm_cell_bwd = define_kernel(SCHEMA_BWD, _bwd_default, lstm_cell_bwd_fake)
lstm_cell_differentiable = define_composite(
    f"lstm_cell_differentiable({INPUTS}) -> (Tensor h_next, Tensor c_next)", _differentiable
)
lstm_cell_bwd_differentiable = define_composite(
    f"lstm_cell_bwd_differentiable(Tensor? dh_next, Tensor? dc_next, {INPUTS}, bool[7] output_mask, "
    f"Tensor(a!)? stats) -> ({GRADIENTS})",
    _bwd_differentiable,
)


class _LSTMCell(Function):
    """Saves every input, and gates in float32. Its C++ twin is LstmCellBackward in csrc/autograd/lstm_cell.cpp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple:
        return lstm_cell_fwd(*args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.stats = inputs
        gates = output[2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(*tensors, gates)

    @staticmethod
    def backward(ctx: Any, dh_next: Any, dc_next: Any, dgates: Any) -> tuple:
        if dh_next is None and dc_next is None:
            return (None,) * 8
        *tensors, gates = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:7])
        last = (mask, ctx.stats)
        if torch.is_grad_enabled():
            gradients = lstm_cell_bwd_differentiable(dh_next, dc_next, *tensors, *last)
        else:
            gradients = lstm_cell_bwd(dh_next, dc_next, *tensors, gates, *last)
        return *(d if want else None for d, want in zip(gradients, mask, strict=True)), None


_lstm_cell_op = define_autograd(
    SCHEMA, lambda *args: _LSTMCell.apply(*args)[:2], lambda *args: lstm_cell_fwd_reference(*args[:-1])[:2]
)


def lstm_cell(
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    *,
    stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h_next, c_next): c_next = f c + i g, h_next = o tanh(c_next), i f g o the gates of x and h. See the module.

    x: (B, D); float32, float64, bfloat16 or float16, like all the others; computed in float32 (float64). h, c: (B, H).
    weight_ih: (4H, D). weight_hh: (4H, H). bias_ih, bias_hh: (4H,), both or neither.
    stats: statistics tensor (8, slots, 8) for the ports in PORTS, written in backward; dbias is the gradient of either
    bias. None measures nothing.
    Under torch.autocast("cuda") everything but float64 is cast to the region's dtype, as PyTorch's lstm_cell does.
    Raises TypeError for a dtype, ArgumentError for a shape or device that does not fit. Differentiable twice.
    """
    if x.device.type in CELLS_IN_REGION:
        x, h, c, weight_ih, weight_hh, bias_ih, bias_hh = autocast_region(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    if x.dim() != 2 or weight_hh.dim() != 2 or weight_hh.shape[0] != 4 * weight_hh.shape[1]:
        got = f"{tuple(x.shape)} and {tuple(weight_hh.shape)}"
        raise ArgumentError(f"lstm_cell: x and weight_hh must have shapes (B, D) and (4H, H), got {got}")
    if (bias_ih is None) != (bias_hh is None):
        raise ArgumentError("lstm_cell: bias_ih and bias_hh must be given together, got one of them")
    (B, D), (G, H) = x.shape, weight_hh.shape
    shapes = {
        "h": (h, (B, H)),
        "c": (c, (B, H)),
        "weight_ih": (weight_ih, (G, D)),
        "weight_hh": (weight_hh, (G, H)),
        "bias_ih": (bias_ih, (G,)),
        "bias_hh": (bias_hh, (G,)),
    }
    check_lstm_weights("lstm_cell", x, shapes)
    if stats is not None:
        check_stats("lstm_cell", stats, x, PORTS)
    with autocast_off(x):
        return _lstm_cell_op(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, stats)
