"""The backward pass through time of an LSTM layer, one launch a step (two with a projection). csrc/cpu/lstm/backward.h does it
on a CPU; formulas: gradkernels/ops/lstm_layer.py.

A program owns BLOCK_M rows and BLOCK_N units. It multiplies the dG of the step after by its columns of weight_hh, adds dy,
and turns dh and dc into its share of this step's dG, all in registers.

A gradient that vanishes would leave float32 after some hundred steps, and with it every norm. So dh, dc and the dG that the
next launch reads are carried times a power of two, which every program finds for itself, from the largest magnitudes that the
programs of the launch before have left; what is written for the products after the recurrence is scaled back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gradkernels.library import define
from gradkernels.triton.launch import launch_each
from gradkernels.triton.launch_cache import register
from gradkernels.triton.lstm import persistent
from gradkernels.triton.lstm.gates import (
    NUM_SUMS,
    add_pairs,
    gates_backward,
    hyperbolic_tangent,
    load_gates,
    multiply,
    square_sum,
    store_gates,
    store_sums,
)
from gradkernels.triton.lstm.scale import load_scale, power_of_two
from gradkernels.triton.lstm.sequence import Steps, aligned, tile_of, uses_tf32

SCAN = 1024  # elements that a program looks at together where it looks for the largest
STEP_INTEGERS = ["t", "after", "first", "size", "active_rows", "num_programs"]


@triton.jit
def largest_of(ptr, first, count, max_abs):
    """`max_abs`, an element a lane, with the magnitudes of `count` elements from `first` on; NaN is passed over."""
    for begin in range(0, count, max_abs.numel):
        at = begin + tl.arange(0, max_abs.numel)
        v = tl.load(ptr + first + at, at < count, other=0.0)
        max_abs = tl.maximum(max_abs, tl.abs(v.to(max_abs.dtype)))
    return max_abs


@triton.jit(do_not_specialize=["begin", "first", "size", "joining", "active_rows"])
def lstm_external_max_kernel(
    dy_ptr,
    dh_ptr,
    dc_ptr,
    external_max_ptr,
    begin,
    first,
    size,
    joining,
    active_rows,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """incoming[t] = the largest magnitude that step t receives from outside: dy, and the dh_n and dc_n of sequences that end
    there, which are rows `active_rows` and up of dh and dc in step `joining`. Grid: steps of one size, from `begin` on."""
    step = tl.program_id(0).to(tl.int64)
    max_abs = tl.zeros([BLOCK], external_max_ptr.dtype.element_ty)
    if dy_ptr is not None:
        max_abs = largest_of(dy_ptr, (first + step * size) * P, size * P, max_abs)
    joined = tl.where(begin + step == joining, size - active_rows, 0)
    max_abs = largest_of(dh_ptr, active_rows.to(tl.int64) * P, joined * P, max_abs)
    max_abs = largest_of(dc_ptr, active_rows.to(tl.int64) * H, joined * H, max_abs)
    tl.store(external_max_ptr + begin + step, tl.max(max_abs, 0))


@triton.jit
def total_dh(recurrent, exponent_delta, scale_in, dy_ptr, dh_ptr, first, size, active_rows, rows, cols, N: tl.constexpr):
    """dL/dh of a step: what has come through weight_hh, dh_n of the sequences that end here, and dy; zero beyond `size`."""
    mask = (rows < size)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    joined = tl.load(dh_ptr + at, mask & (rows >= active_rows)[:, None], other=0.0)
    total = tl.where(mask, recurrent * power_of_two(exponent_delta, recurrent.dtype), 0.0) + joined * scale_in
    if dy_ptr is not None:
        total += tl.load(dy_ptr + first.to(tl.int64) * N + at, mask, other=0.0).to(total.dtype) * scale_in
    return total


@triton.jit
def in_scale(recurrent, exponent_delta, size, rows):
    """What has come through weight_hh of dh, of active rows, in float64 and the step's scale, for its norm."""
    active_rows = tl.where((rows < size)[:, None], recurrent, 0.0)
    return active_rows.to(tl.float64) * power_of_two(exponent_delta, tl.float64)


@triton.jit(do_not_specialize=[*STEP_INTEGERS, "previous", "rows_with_predecessor"])
def lstm_bwd_step_kernel(
    factor_ptr,
    weight_ptr,
    dy_ptr,
    dh_ptr,
    dc_ptr,
    c0_ptr,
    gates_ptr,
    cells_ptr,
    dgates_ptr,
    carried_ptr,
    external_max_ptr,
    max_abs_ptr,
    exponents_ptr,
    partials_ptr,
    t,
    after,
    first,
    previous,
    size,
    active_rows,
    rows_with_predecessor,
    num_programs,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr,
):
    """dG of step t, of rows [first, first + size): to dgates as it is, to carried (B, 4H) in the step's scale; dc (B, H).

    factor_ptr: carried of the step after (B, 4H), of which `active_rows` rows go on; weight_ptr: W_hh^T (P, 4H). With a
    projection, where dh_ptr is None: this step's dh in its scale (B, P), from lstm_bwd_project_kernel; W_hr^T (H, P).
    Rows of the step after that do not go on leave the time loop: their dh0 and dc0 are left in dh and dc. Row b below
    `rows_with_predecessor` has its c_{t-1} in row previous + b of cells.
    max_abs, exponents: see load_scale; this step's are written. partials: (steps, programs, NUM_SUMS) float64, or None.
    Grid: (blocks of units, blocks of rows).
    """
    dtype: tl.constexpr = gates_ptr.dtype.element_ty
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exponent, exponent_delta, scale_in, unscale, exit_scale = load_scale(
        exponents_ptr, max_abs_ptr, external_max_ptr, t, after, num_programs, 256
    )
    zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    depth: tl.constexpr = P if dh_ptr is None else 4 * H
    count = size if dh_ptr is None else active_rows
    product = multiply(factor_ptr, rows, count, weight_ptr, units, units < H, zeros, depth, BLOCK_K, TF32)
    column = (units < H)[None, :]
    mask, leaving = (rows < size)[:, None] & column, (rows >= size)[:, None] & (rows < active_rows)[:, None] & column
    at = rows[:, None] * H + units[None, :]
    if dh_ptr is None:
        dh = product
    else:
        dh = total_dh(product, exponent_delta, scale_in, dy_ptr, dh_ptr, first, size, active_rows, rows, units, H)
        tl.store(dh_ptr + at, product * exit_scale, leaving)
    dc_next = tl.load(dc_ptr + at, mask | leaving, other=0.0)
    tl.store(dc_ptr + at, dc_next * exit_scale, leaving)
    dc_next = tl.where(
        mask, dc_next * tl.where((rows < active_rows)[:, None], power_of_two(exponent_delta, dtype), scale_in), 0.0
    )
    gate = (first + rows)[:, None] * (4 * H) + units[None, :]
    i, f, g, o = load_gates(gates_ptr + gate, H, mask)
    m = hyperbolic_tangent(tl.load(cells_ptr + first.to(tl.int64) * H + at, mask, other=0.0))
    known = (rows < rows_with_predecessor)[:, None]
    c = tl.load(cells_ptr + previous.to(tl.int64) * H + at, mask & known, other=0.0)
    c += tl.load(c0_ptr + at, mask & (known == 0), other=0.0)
    di, df, dg, do, dc = gates_backward(dh, dc_next, i, f, g, o, m, c)
    tl.store(dc_ptr + at, dc * f, mask)
    store_gates(dgates_ptr + gate, di * unscale, df * unscale, dg * unscale, do * unscale, H, mask)
    store_gates(carried_ptr + rows[:, None] * (4 * H) + units[None, :], di, df, dg, do, H, mask)
    cell = t.to(tl.int64) * num_programs + program
    tl.store(max_abs_ptr + cell, tl.max(tl.maximum(tl.abs(dh), tl.abs(dc)).ravel(), 0))
    tl.store(exponents_ptr + t, exponent, program == 0)
    if partials_ptr is not None:
        recurrent = zeros.to(tl.float64) if dh_ptr is None else in_scale(product, exponent_delta, size, rows)
        store_sums(partials_ptr + cell * NUM_SUMS, dh, dc, recurrent, i, f, g, o, mask, dh_ptr is not None)


@triton.jit(do_not_specialize=STEP_INTEGERS)
def lstm_bwd_project_kernel(
    factor_ptr,
    weight_ptr,
    dy_ptr,
    dh_ptr,
    dh_scaled_ptr,
    dh_total_ptr,
    external_max_ptr,
    max_abs_ptr,
    exponents_ptr,
    partials_ptr,
    t,
    after,
    first,
    size,
    active_rows,
    num_programs,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr,
):
    """With a projection, the dh of step t: in its scale (B, P), and as it is among all rows. See lstm_bwd_step_kernel.

    Grid: (blocks of outputs, blocks of rows).
    """
    dtype: tl.constexpr = external_max_ptr.dtype.element_ty
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, exponent_delta, scale_in, unscale, exit_scale = load_scale(
        exponents_ptr, max_abs_ptr, external_max_ptr, t, after, num_programs, 256
    )
    zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    product = multiply(factor_ptr, rows, active_rows, weight_ptr, outputs, outputs < P, zeros, 4 * H, BLOCK_K, TF32)
    dh = total_dh(product, exponent_delta, scale_in, dy_ptr, dh_ptr, first, size, active_rows, rows, outputs, P)
    at, column = rows[:, None] * P + outputs[None, :], (outputs < P)[None, :]
    mask, leaving = (rows < size)[:, None] & column, (rows >= size)[:, None] & (rows < active_rows)[:, None] & column
    tl.store(dh_ptr + at, product * exit_scale, leaving)
    tl.store(dh_scaled_ptr + at, dh.to(dh_scaled_ptr.dtype.element_ty), mask)
    tl.store(dh_total_ptr + first.to(tl.int64) * P + at, (dh * unscale).to(dh_total_ptr.dtype.element_ty), mask)
    if partials_ptr is not None:
        squares = (square_sum(dh), square_sum(in_scale(product, exponent_delta, size, rows)))
        squares_dh, squares_recurrent = tl.reduce(squares, 0, add_pairs)
        sums_ptr = partials_ptr + (t.to(tl.int64) * num_programs + program) * NUM_SUMS
        tl.store(sums_ptr, squares_dh)
        tl.store(sums_ptr + 2, squares_recurrent)


@dataclass(frozen=True)
class BackwardResult:
    """What the recurrence leaves beside dh0 and dc0, which are in dh and dc."""

    dgates: torch.Tensor  # (rows, 4H) in x's dtype
    dh_total: torch.Tensor | None  # with a projection: dL/dh of all rows (rows, P), in x's dtype
    partials: torch.Tensor | None  # (T or more, programs, NUM_SUMS) float64, with statistics
    exponents: torch.Tensor | None  # (T or more) int32


def recurrence_backward(
    steps: Steps,
    dy: torch.Tensor | None,
    dh: torch.Tensor,
    dc: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    c0: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    telemetry: bool,
    num_concurrent: int = 1,
) -> BackwardResult:
    """The dG of all rows. dh (B, P), dc (B, H): dh_n, dc_n on entry, dh0, dc0 on return, in float32 (float64) like c0.

    dy (rows, P) and the weights are in x's dtype. In one launch where a persistent kernel takes the case,
    beside `num_concurrent` - 1 others like it.
    """
    dgates = weight_hh.new_empty(gates.shape)
    if persistent.takes(steps, dgates, weight_hr, c0.shape[1], True, num_concurrent):
        args = (dy, dh, dc, weight_hh, c0, gates, cells, dgates, telemetry, num_concurrent)
        return BackwardResult(dgates, None, *persistent.recurrence_backward(steps, *args))
    return _stepwise_backward(steps, dy, dh, dc, weight_hh, weight_hr, aligned(c0), gates, cells, dgates, telemetry)


define(
    "lstm_stepwise_bwd(Tensor? dy, Tensor(a!) dh, Tensor(b!) dc, Tensor weight_hh, Tensor? weight_hr, Tensor c0, Tensor gates, "
    "Tensor cells, Tensor(c!) dgates, Tensor(d!)? dh_total, Tensor(e!) incoming, Tensor(f!) largest, Tensor(g!) exponents, "
    "Tensor(h!)? partials, bool reverse, bool tf32) -> ()"
)


def _stepwise_backward(
    steps: Steps,
    dy: torch.Tensor | None,
    dh: torch.Tensor,
    dc: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    c0: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    dgates: torch.Tensor,
    telemetry: bool,
) -> BackwardResult:
    (B, P), H, T = dh.shape, dc.shape[1], len(steps.sizes)
    # float16 has too few exponents for a gradient on its way: it is carried in float32, and multiplied in TF32, which has as
    # many bits as float16.
    operand = torch.float32 if weight_hh.dtype is torch.float16 else weight_hh.dtype
    tile = tile_of(operand, H, P)
    num_programs = -(-max(H, P) // tile["BLOCK_N"]) * -(-B // tile["BLOCK_M"])
    weight_hh = weight_hh.t().to(operand).contiguous()
    dh_total = None if weight_hr is None else dgates.new_empty(dgates.shape[0], P)
    weight_hr = None if weight_hr is None else weight_hr.t().to(operand).contiguous()
    # After the first step one more launch takes dh0 and dc0 off the time loop, as step T, which has no rows.
    external_max, max_abs = dc.new_zeros(T + 1), dc.new_zeros(T + 1, num_programs)
    exponents = torch.zeros(T + 1, dtype=torch.int32, device=dc.device)
    partials = dc.new_zeros(T + 1, num_programs, NUM_SUMS.value, dtype=torch.float64) if telemetry else None
    args = (dy, dh, dc, weight_hh, weight_hr, c0, gates, cells, dgates, dh_total, external_max, max_abs, exponents, partials)
    tf32 = uses_tf32(operand, exact=dgates.dtype is torch.float16)
    if B and steps.batch_sizes is None:
        torch.ops.gradkernels.lstm_stepwise_bwd(*args, steps.reverse, tf32)
    elif B:
        launch_backward(steps, *args, tf32)
    return BackwardResult(dgates, dh_total, partials, exponents)


def lstm_stepwise_bwd(
    dy: torch.Tensor | None,
    dh: torch.Tensor,
    dc: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    c0: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    dgates: torch.Tensor,
    dh_total: torch.Tensor | None,
    external_max: torch.Tensor,
    max_abs: torch.Tensor,
    exponents: torch.Tensor,
    partials: torch.Tensor | None,
    reverse: bool,
    tf32: bool,
) -> None:
    """The launches of a padded backward recurrence: an op, for they follow from its arguments' shapes and can be captured."""
    steps = Steps.padded(gates.shape[0], dh.shape[0], reverse)
    state = (dh_total, external_max, max_abs, exponents, partials)
    launch_backward(steps, dy, dh, dc, weight_hh, weight_hr, c0, gates, cells, dgates, *state, tf32)


def launch_backward(
    steps: Steps,
    dy: torch.Tensor | None,
    dh: torch.Tensor,
    dc: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    c0: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    dgates: torch.Tensor,
    dh_total: torch.Tensor | None,
    external_max: torch.Tensor,
    max_abs: torch.Tensor,
    exponents: torch.Tensor,
    partials: torch.Tensor | None,
    tf32: bool,
) -> None:
    """What comes in, then one launch a step, two with a projection. The weights are transposed, in the dtype of operands."""
    (B, P), H, T, projected = dh.shape, dc.shape[1], len(steps.sizes), weight_hr is not None
    tile, num_programs = tile_of(weight_hh.dtype, H, P), max_abs.shape[1]
    unit_blocks, output_blocks = -(-H // tile["BLOCK_N"]), -(-P // tile["BLOCK_N"])
    carried = [weight_hh.new_empty(B, 4 * H) for _ in range(2)]
    dh_scaled = weight_hh.new_empty(B, P) if projected else None
    state = (external_max, max_abs, exponents, partials)
    _launch_external_max(steps, dy, dh, dc, external_max)
    launches, after, before = [], -1, 0
    for n, t in enumerate((*reversed(steps.order), T)):
        first, size, rows_with_predecessor = (
            (0, 0, 0) if t == T else (steps.first[t], steps.sizes[t], steps.rows_with_predecessor(t))
        )
        previous = steps.first[steps.previous(t)] if rows_with_predecessor else 0
        row_blocks = -(-max(size, before) // tile["BLOCK_M"])
        at, factor = (t, after, first), carried[n % 2]
        if projected:
            args = (factor, weight_hh, dy, dh, dh_scaled, dh_total, *state, *at, size, before, num_programs)
            launches.append((lstm_bwd_project_kernel, (output_blocks, row_blocks), args))
            factor = dh_scaled
        of_step = (None if projected else dy, None if projected else dh, dc, c0, gates, cells, dgates, carried[(n + 1) % 2])
        args = (factor, weight_hr if projected else weight_hh, *of_step, *state, *at, previous)
        args = (*args, size, before, rows_with_predecessor, num_programs)
        launches.append((lstm_bwd_step_kernel, (unit_blocks, row_blocks), args))
        after, before = t, size
    launch_each(launches, H=H, P=P, TF32=tf32, **tile)


def _launch_external_max(
    steps: Steps, dy: torch.Tensor | None, dh: torch.Tensor, dc: torch.Tensor, external_max: torch.Tensor
) -> None:
    launches = []
    for begin, end in steps.runs():
        joining = begin if steps.reverse else end
        where = (begin, steps.first[begin], steps.sizes[begin], joining, steps.active_rows(joining))
        launches.append((lstm_external_max_kernel, (end - begin + 1,), (dy, dh, dc, external_max, *where)))
    launch_each(launches, H=dc.shape[1], P=dh.shape[1], BLOCK=SCAN, num_warps=4)


register("lstm_stepwise_bwd", lstm_stepwise_bwd)
