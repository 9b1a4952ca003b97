"""The time loop of an LSTM layer, one launch a step (two with a projection). Formulas: gradkernels/ops/lstm_layer.py.

A program owns BLOCK_M rows of the batch and BLOCK_N units with all four gates: one product with 4 BLOCK_N rows of weight_hh,
then the gates in registers. A step reads the y and cells that the launch before has written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkernels.library import define
from gradkernels.triton.launch import launch_each
from gradkernels.triton.launch_cache import register
from gradkernels.triton.lstm import persistent
from gradkernels.triton.lstm.gates import gates_forward, load_gates, multiply, store_gates
from gradkernels.triton.lstm.sequence import Steps, aligned, tile_of, uses_tf32


@triton.jit(do_not_specialize=["source", "first", "out_first", "num_rows"])
def lstm_fwd_step_kernel(
    h_ptr,
    c_ptr,
    weight_hh_ptr,
    gates_ptr,
    cells_ptr,
    out_ptr,
    source,
    first,
    out_first,
    num_rows,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr,
):
    """gates (activated, in place of the preactivations), cells and h of rows [first, first + num_rows) of all rows.

    h_ptr, c_ptr: the states before, from row `source` on, (rows, P) and (rows, H). out_ptr: from row `out_first` on, y, or with
    a projection o tanh(c) of this step alone. Grid: (blocks of units, blocks of rows).
    """
    dtype: tl.constexpr = gates_ptr.dtype.element_ty
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, 4 * BLOCK_N)
    weight_rows = column // BLOCK_N * H + tl.program_id(0) * BLOCK_N + column % BLOCK_N
    weight_mask = tl.program_id(0) * BLOCK_N + column % BLOCK_N < H
    sums = multiply(
        h_ptr + source.to(tl.int64) * P,
        rows,
        num_rows,
        weight_hh_ptr,
        weight_rows,
        weight_mask,
        tl.zeros([BLOCK_M, 4 * BLOCK_N], dtype),
        P,
        BLOCK_K,
        TF32,
    )
    input_forget, candidate_output = tl.split(tl.permute(tl.reshape(sums, [BLOCK_M, 2, 2, BLOCK_N]), [0, 3, 2, 1]))
    i, f = tl.split(input_forget)
    g, o = tl.split(candidate_output)
    mask = (rows < num_rows)[:, None] & (units < H)[None, :]
    at = first.to(tl.int64) * H + rows[:, None] * H + units[None, :]
    gate = gates_ptr + at + (first + rows)[:, None] * (3 * H)
    before_i, before_f, before_g, before_o = load_gates(gate, H, mask)
    c = tl.load(c_ptr + (source + rows)[:, None] * H + units[None, :], mask, other=0.0)
    i, f, g, o, c_next, out = gates_forward(before_i + i, before_f + f, before_g + g, before_o + o, c)
    store_gates(gate, i, f, g, o, H, mask)
    tl.store(cells_ptr + at, c_next, mask)
    tl.store(out_ptr + (out_first + rows)[:, None] * H + units[None, :], out.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["first", "num_rows"])
def lstm_fwd_project_kernel(
    m_ptr,
    weight_hr_ptr,
    y_ptr,
    first,
    num_rows,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr,
):
    """Rows [first, first + num_rows) of y = m W_hr^T, m = o tanh(c) of this step. Grid: (blocks of outputs, blocks of rows)."""
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    y = multiply(m_ptr, rows, num_rows, weight_hr_ptr, outputs, outputs < P, zeros, H, BLOCK_K, TF32)
    mask = (rows < num_rows)[:, None] & (outputs < P)[None, :]
    tl.store(y_ptr + (first + rows)[:, None] * P + outputs[None, :], y.to(y_ptr.dtype.element_ty), mask)


define(
    "lstm_stepwise_fwd(Tensor(a!) gates, Tensor weight_hh, Tensor? weight_hr, Tensor h0, Tensor c0, Tensor(b!) y, "
    "Tensor(c!) cells, bool reverse, bool tf32) -> ()"
)


def recurrence_forward(
    steps: Steps,
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    y: torch.Tensor,
    cells: torch.Tensor,
    num_concurrent: int = 1,
) -> None:
    """Fills y (rows, P) and cells (rows, H), and activates gates (rows, 4H), on entry the preactivations of x with biases.

    h0 (B, P) and y, the weights too, are in x's dtype: a step's h is rounded to it before the next. c0, cells and gates are
    float32 (float64). In one launch where a persistent kernel takes the case, beside `num_concurrent` - 1 others like it.
    """
    weight_hh, h0 = weight_hh.contiguous(), h0.contiguous()
    weight_hr = None if weight_hr is None else weight_hr.contiguous()
    if persistent.takes(steps, y, weight_hr, c0.shape[1], False, num_concurrent):
        persistent.recurrence_forward(steps, gates, weight_hh, h0, c0, y, cells, num_concurrent)
        return
    args = (gates, weight_hh, weight_hr, aligned(h0), aligned(c0), y, cells)
    tf32 = uses_tf32(y.dtype)
    if steps.batch_sizes is None and steps.B:
        torch.ops.gradkernels.lstm_stepwise_fwd(*args, steps.reverse, tf32)
    else:
        launch_forward(steps, *args, tf32)


def lstm_stepwise_fwd(
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    y: torch.Tensor,
    cells: torch.Tensor,
    reverse: bool,
    tf32: bool,
) -> None:
    """The launches of a padded recurrence: an op, for they follow from its arguments' shapes and can be captured."""
    steps = Steps.padded(gates.shape[0], h0.shape[0], reverse)
    launch_forward(steps, gates, weight_hh, weight_hr, h0, c0, y, cells, tf32)


def launch_forward(
    steps: Steps,
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    y: torch.Tensor,
    cells: torch.Tensor,
    tf32: bool,
) -> None:
    """One launch a step, two with a projection."""
    (B, P), H = h0.shape, c0.shape[1]
    m = None if weight_hr is None else y.new_empty(B, H)
    tile = tile_of(y.dtype, H, P)
    unit_blocks, output_blocks = -(-H // tile["BLOCK_N"]), -(-P // tile["BLOCK_N"])
    launches = []
    for t in steps.order:
        first, size, rows_with_predecessor = steps.first[t], steps.sizes[t], steps.rows_with_predecessor(t)
        groups = [(y, cells, steps.first[steps.previous(t)], 0, rows_with_predecessor)] if rows_with_predecessor else []
        if size > rows_with_predecessor:
            groups.append((h0, c0, rows_with_predecessor, rows_with_predecessor, size - rows_with_predecessor))
        for h, c, source, offset, count in groups:
            out, out_first = (y, first + offset) if m is None else (m, offset)
            args = (h, c, weight_hh, gates, cells, out, source, first + offset, out_first, count)
            launches.append((lstm_fwd_step_kernel, (unit_blocks, -(-count // tile["BLOCK_M"])), args))
        if m is not None:
            grid = (output_blocks, -(-size // tile["BLOCK_M"]))
            launches.append((lstm_fwd_project_kernel, grid, (m, weight_hr, y, first, size)))
    launch_each(launches, H=H, P=P, TF32=tf32, **tile)


register("lstm_stepwise_fwd", lstm_stepwise_fwd)
