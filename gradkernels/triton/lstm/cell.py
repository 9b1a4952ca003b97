"""One step of an LSTM on a GPU: the products are PyTorch's, the gates one launch forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gradkernels.library import or_empty
from gradkernels.triton.launch import launch
from gradkernels.triton.launch_cache import register
from gradkernels.triton.lstm.gates import gates_backward, gates_forward, hyperbolic_tangent, load_gates, store_gates
from gradkernels.triton.lstm.sequence import multiply_float32, of_both_biases
from gradkernels.triton.probe import probe_each

BLOCK = 512  # elements of h of a program


@triton.jit
def add_bias(v, bias_ptr, cols, mask):
    """v + bias[cols], or v where there is none."""
    if bias_ptr is not None:
        v += tl.load(bias_ptr + cols, mask, other=0.0).to(v.dtype)
    return v


@triton.jit
def preactivation(gates_ptr, recurrent_ptr, bias_ih_ptr, bias_hh_ptr, at, cols, mask):
    """One gate before its function: the products with x and h, and both biases."""
    v = tl.load(gates_ptr + at, mask, other=0.0) + tl.load(recurrent_ptr + at, mask, other=0.0)
    return add_bias(add_bias(v, bias_ih_ptr, cols, mask), bias_hh_ptr, cols, mask)


@triton.jit(do_not_specialize=["numel"])
def lstm_cell_fwd_kernel(
    gates_ptr,
    recurrent_ptr,
    bias_ih_ptr,
    bias_hh_ptr,
    c_ptr,
    h_next_ptr,
    c_next_ptr,
    numel,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gates (B, 4H), activated, in place of x W_ih^T; h_next and c_next (B, H). Grid: blocks of elements of h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, unit = at < numel, at % H
    gate = at // H * (4 * H) + unit
    i = preactivation(gates_ptr, recurrent_ptr, bias_ih_ptr, bias_hh_ptr, gate, unit, mask)
    f = preactivation(gates_ptr, recurrent_ptr, bias_ih_ptr, bias_hh_ptr, gate + H, unit + H, mask)
    g = preactivation(gates_ptr, recurrent_ptr, bias_ih_ptr, bias_hh_ptr, gate + 2 * H, unit + 2 * H, mask)
    o = preactivation(gates_ptr, recurrent_ptr, bias_ih_ptr, bias_hh_ptr, gate + 3 * H, unit + 3 * H, mask)
    c = tl.load(c_ptr + at, mask, other=0.0).to(i.dtype)
    i, f, g, o, c_next, h_next = gates_forward(i, f, g, o, c)
    store_gates(gates_ptr + gate, i, f, g, o, H, mask)
    tl.store(c_next_ptr + at, c_next.to(c_next_ptr.dtype.element_ty), mask)
    tl.store(h_next_ptr + at, h_next.to(h_next_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["numel"])
def lstm_cell_bwd_kernel(
    dh_next_ptr, dc_next_ptr, c_ptr, gates_ptr, dgates_ptr, dc_ptr, numel, H: tl.constexpr, BLOCK: tl.constexpr
):
    """dG (B, 4H) and dc (B, H); tanh(c_next) is computed again. Grid: blocks of elements of h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    gate = at // H * (4 * H) + at % H
    i, f, g, o = load_gates(gates_ptr + gate, H, mask)
    c = tl.load(c_ptr + at, mask, other=0.0).to(i.dtype)
    dh, dc_next = tl.zeros([BLOCK], i.dtype), tl.zeros([BLOCK], i.dtype)
    if dh_next_ptr is not None:
        dh = tl.load(dh_next_ptr + at, mask, other=0.0).to(i.dtype)
    if dc_next_ptr is not None:
        dc_next = tl.load(dc_next_ptr + at, mask, other=0.0).to(i.dtype)
    di, df, dg, do, dc = gates_backward(dh, dc_next, i, f, g, o, hyperbolic_tangent(f * c + i * g), c)
    store_gates(dgates_ptr + gate, di, df, dg, do, H, mask)
    tl.store(dc_ptr + at, (dc * f).to(dc_ptr.dtype.element_ty), mask)


def lstm_cell_fwd(
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h_next, c_next in x's dtype; gates (B, 4H), activated, in float32 (float64). Two products and one launch."""
    gates, recurrent = multiply_float32(x, weight_ih.t()), multiply_float32(h, weight_hh.t())
    biases = (None if bias is None else bias.contiguous() for bias in (bias_ih, bias_hh))
    h_next, c_next = h.new_empty(h.shape), c.new_empty(c.shape)
    args = (gates, recurrent, *biases, c.contiguous(), h_next, c_next, c.numel())
    launch(lstm_cell_fwd_kernel, (max(1, -(-c.numel() // BLOCK)),), *args, H=c.shape[1], BLOCK=BLOCK, num_warps=4)
    return h_next, c_next, gates


def lstm_cell_bwd(
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
    """The gradients of the inputs: those of `output_mask`, dh, dc. dG is rounded to x's dtype for the products."""
    dg, dc = x.new_empty(gates.shape), c.new_empty(c.shape)
    arriving = (None if d is None else d.contiguous() for d in (dh_next, dc_next))
    args = (*arriving, c.contiguous(), gates, dg, dc, c.numel())
    launch(lstm_cell_bwd_kernel, (max(1, -(-c.numel() // BLOCK)),), *args, H=c.shape[1], BLOCK=BLOCK, num_warps=4)
    of_x, _, _, *of_weights, of_bias_ih, of_bias_hh = output_mask
    dx = torch.mm(dg, weight_ih) if of_x else None
    dh = torch.mm(dg, weight_hh)
    dweight_ih, dweight_hh = (
        multiply_float32(dg.t(), t).to(x.dtype) if want else None for t, want in zip((x, h), of_weights, strict=True)
    )
    dbias = dg.sum(0) if (of_bias_ih or of_bias_hh) and bias_ih is not None else None
    probe_each(stats, dh_next, dc_next, dx, dh, dc, dweight_ih, dweight_hh, dbias)
    return or_empty(x, dx, dh, dc, dweight_ih, dweight_hh, *of_both_biases(dbias, of_bias_ih, of_bias_hh))


register("lstm_cell_fwd", lstm_cell_fwd)
register("lstm_cell_bwd", lstm_cell_bwd)
