"""Rows of LayerNorm on a GPU, shared by layer_norm and add_layer_norm: the kernels.

x_hat = (h - mean) rstd,  y = x_hat weight + bias;  h = x, or residual + x as it is stored
g = dy weight,  dh = rstd (g - mean(g) - x_hat mean(g x_hat)) [+ dnew_residual],  dweight = sum_M(dy x_hat), dbias = sum_M(dy)

Two forms of each: rows held in registers, and rows read in blocks of columns where they are too long for that. N and eps
are constants of a model and of a kernel; M is neither. A row in front of `write_stats_rows` is dL/d(...) of one port.
"""

import triton
import triton.language as tl

from gradkernels.triton.reduce import (
    accumulate,
    add_to_slot,
    elements_per_access,
    new_accumulator,
    no_fields,
    recount_exact,
    write_stats_rows,
)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def load_h(x_ptr, residual_ptr, new_residual_ptr, x_at, residual_at, h_at, mask, dtype: tl.constexpr):
    """h in `dtype`: x, or residual + x, which is stored and rounded to what was stored."""
    h = tl.load(x_ptr + x_at, mask, other=0.0).to(dtype)
    if residual_ptr is not None:
        stored = (tl.load(residual_ptr + residual_at, mask, other=0.0).to(dtype) + h).to(residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + h_at, stored, mask)
        h = stored.to(dtype)
    return h


@triton.jit
def store_y(y_ptr, y_at, x_hat, weight_ptr, bias_ptr, cols, mask, N: tl.constexpr):
    """y = x_hat weight + bias."""
    y = x_hat
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + cols, cols < N, other=0.0).to(y.dtype)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + cols, cols < N, other=0.0).to(y.dtype)
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    new_residual_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xm,
    stride_rm,
    num_rows,
    N: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y, new_residual, mean, rstd of BLOCK_M rows in registers; the variance is a second pass over them. Grid: M / BLOCK_M."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, cols = row[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask, at = (rows < num_rows) & (cols < N), rows * N + cols
    h = load_h(x_ptr, residual_ptr, new_residual_ptr, rows * stride_xm + cols, rows * stride_rm + cols, at, mask, dtype)
    mean = tl.sum(h, 1) / N
    centred = tl.where(mask, h - mean[:, None], 0.0)
    correction = tl.sum(centred, 1) / N  # the mean's rounding, which a large offset would otherwise show
    centred = tl.where(mask, centred - correction[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N + EPS)
    tl.store(mean_ptr + row, mean + correction, row < num_rows)
    tl.store(rstd_ptr + row, rstd, row < num_rows)
    store_y(y_ptr, at, centred * rstd[:, None], weight_ptr, bias_ptr, cols, mask, N)


@triton.jit(do_not_specialize=["num_rows"])
def norm_fwd_looped_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    new_residual_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xm,
    stride_rm,
    num_rows,
    N: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """norm_fwd_kernel for long rows: blocks of columns, each with its own two passes, merged (Chan et al. 1979); then y."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    mean, squares = tl.zeros([BLOCK_M], dtype), tl.zeros([BLOCK_M], dtype)
    for first in range(0, N, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)[None, :]
        mask, at = (rows < num_rows) & (cols < N), rows * N + cols
        x_at, residual_at = rows * stride_xm + cols, rows * stride_rm + cols
        h = load_h(x_ptr, residual_ptr, new_residual_ptr, x_at, residual_at, at, mask, dtype)
        count = tl.minimum(N - first, BLOCK_N)
        block_mean = tl.sum(h, 1) / count
        centred = tl.where(mask, h - block_mean[:, None], 0.0)
        correction = tl.sum(centred, 1) / count
        centred = tl.where(mask, centred - correction[:, None], 0.0)
        delta = block_mean + correction - mean
        mean += delta * count / (first + count)
        squares += tl.sum(centred * centred, 1) + delta * delta * first * count / (first + count)
    rstd = 1.0 / tl.sqrt(squares / N + EPS)
    tl.store(mean_ptr + row, mean, row < num_rows)
    tl.store(rstd_ptr + row, rstd, row < num_rows)
    tl.debug_barrier()
    for first in range(0, N, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)[None, :]
        mask, at = (rows < num_rows) & (cols < N), rows * N + cols
        if residual_ptr is not None:
            h = tl.load(new_residual_ptr + at, mask, other=0.0).to(dtype)
        else:
            h = tl.load(x_ptr + rows * stride_xm + cols, mask, other=0.0).to(dtype)
        store_y(y_ptr, at, (h - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, cols, mask, N)


@triton.jit
def load_g(dy_ptr, h_ptr, weight, dy_at, h_at, mean, rstd, mask):
    """(dy, x_hat, g): what every term of the backward is made of; masked elements of dy and g are 0."""
    x_hat = (tl.load(h_ptr + h_at, mask, other=0.0).to(mean.dtype) - mean) * rstd
    dy = tl.zeros_like(x_hat) if dy_ptr is None else tl.load(dy_ptr + dy_at, mask, other=0.0).to(mean.dtype)
    return dy, x_hat, dy * weight


@triton.jit
def load_weight(weight_ptr, cols, N: tl.constexpr, dtype: tl.constexpr):
    """The weight, or 1."""
    if weight_ptr is None:
        weight = tl.full(cols.shape, 1.0, dtype)
    else:
        weight = tl.load(weight_ptr + cols, cols < N, other=0.0).to(dtype)
    return weight


@triton.jit
def store_dh(dh_upcast, dh_ptr, dx_ptr, at, mask):
    """Stores dh, and dx, the same in x's dtype, where x gets its own; returns dh as stored, in the accumulator's dtype."""
    dh = dh_upcast.to(dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + at, dh, mask)
    if dx_ptr is not None:
        tl.store(dx_ptr + at, dh_upcast.to(dx_ptr.dtype.element_ty), mask)
    return tl.where(mask, dh.to(dh_upcast.dtype), 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def norm_bwd_kernel(
    dy_ptr,
    dnew_residual_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dh_ptr,
    dx_ptr,
    partials_ptr,
    stats_ptr,
    stride_dym,
    stride_drm,
    stride_hm,
    num_rows,
    num_slots,
    N: tl.constexpr,
    DX_PORT: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dh, the program's share of dweight and dbias, the statistics of dy, dnew_residual and dh.

    Grid: persistent programs, which take BLOCK_M rows at a time in turn and keep their sums over rows in registers; each
    writes them to its row of partials (2, programs, N) at the end.
    """
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)[None, :]
    weight = load_weight(weight_ptr, cols, N, dtype)
    dweight, dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype), tl.zeros([BLOCK_M, BLOCK_N], dtype)
    ELEMENTS_PER_ACCESS: tl.constexpr = elements_per_access((h_ptr if dy_ptr is None else dy_ptr).dtype.element_ty)
    # Of two orders that form the same numbers, the one in which 128 registers are enough on every GPU.
    DY_FIRST: tl.constexpr = False if dx_ptr is None else dx_ptr.dtype == dh_ptr.dtype
    empty = new_accumulator(SLOTS, dtype)
    dy_acc, dnew_residual_acc, dh_acc = empty, empty, empty
    for block in tl.range(program, tl.cdiv(num_rows, BLOCK_M), num_programs, num_stages=STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        rows = row[:, None]
        mask, at = (rows < num_rows) & (cols < N), rows * N + cols
        mean = tl.load(mean_ptr + row, row < num_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, row < num_rows, other=0.0)[:, None]
        dy, x_hat, g = load_g(dy_ptr, h_ptr, weight, rows * stride_dym + cols, rows * stride_hm + cols, mean, rstd, mask)
        sum_g, sum_gx = tl.reduce((g, g * x_hat), 1, _add_pairs)
        dh_upcast = rstd * (g - (sum_g / N)[:, None] - x_hat * (sum_gx / N)[:, None])
        if dnew_residual_ptr is not None:
            dnew_residual = tl.load(dnew_residual_ptr + rows * stride_drm + cols, mask, other=0.0).to(dtype)
            dh_upcast += dnew_residual
            if stats_ptr is not None:
                dnew_residual_acc = accumulate(dnew_residual_acc, dnew_residual, ELEMENTS_PER_ACCESS)
        dh = store_dh(dh_upcast, dh_ptr, dx_ptr, at, mask)
        if DWEIGHT:
            dweight += dy * x_hat
        if DBIAS:
            dbias += dy
        if stats_ptr is not None:
            if dy_ptr is not None and DY_FIRST:
                dy_acc = accumulate(dy_acc, dy, ELEMENTS_PER_ACCESS)
            dh_acc = accumulate(dh_acc, dh, ELEMENTS_PER_ACCESS)
            if dy_ptr is not None and not DY_FIRST:
                dy_acc = accumulate(dy_acc, dy, ELEMENTS_PER_ACCESS)
    column, last = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N) < N
    if DWEIGHT:
        tl.store(partials_ptr + program * N + column, tl.sum(dweight, 0), last)
    if DBIAS:
        tl.store(partials_ptr + (num_programs + program) * N + column, tl.sum(dbias, 0), last)
    if stats_ptr is not None:
        if dy_ptr is not None:
            write_stats_rows(dy_acc, stats_ptr, 0, num_slots, dy_ptr, stride_dym, num_rows, N, BLOCK_M, BLOCK_N)
        if dnew_residual_ptr is not None:
            write_stats_rows(
                dnew_residual_acc, stats_ptr, 1, num_slots, dnew_residual_ptr, stride_drm, num_rows, N, BLOCK_M, BLOCK_N
            )
        write_stats_rows(dh_acc, stats_ptr, DX_PORT, num_slots, dh_ptr, N, num_rows, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def norm_bwd_looped_kernel(
    dy_ptr,
    dnew_residual_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dh_ptr,
    dx_ptr,
    partials_ptr,
    stats_ptr,
    stride_dym,
    stride_drm,
    stride_hm,
    num_rows,
    num_slots,
    N: tl.constexpr,
    DX_PORT: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """norm_bwd_kernel for long rows: the row sums in one pass over blocks of columns, dh in a second, which finds the rows
    in the L2 cache; the program's row of partials is in L2 too, and is read and written once for BLOCK_M rows."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    ELEMENTS_PER_ACCESS: tl.constexpr = elements_per_access((h_ptr if dy_ptr is None else dy_ptr).dtype.element_ty)
    empty = new_accumulator(SLOTS, dtype)
    dy_acc, dnew_residual_acc, dh_acc = empty, empty, empty
    for block in range(program, tl.cdiv(num_rows, BLOCK_M), num_programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        rows = row[:, None]
        mean = tl.load(mean_ptr + row, row < num_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, row < num_rows, other=0.0)[:, None]
        sums_g, sums_gx = tl.zeros([BLOCK_M, BLOCK_N], dtype), tl.zeros([BLOCK_M, BLOCK_N], dtype)
        for first in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            cols = first + tl.arange(0, BLOCK_N)[None, :]
            mask, weight = (rows < num_rows) & (cols < N), load_weight(weight_ptr, cols, N, dtype)
            _, x_hat, g = load_g(dy_ptr, h_ptr, weight, rows * stride_dym + cols, rows * stride_hm + cols, mean, rstd, mask)
            sums_g, sums_gx = sums_g + g, sums_gx + g * x_hat
        sum_g, sum_gx = tl.reduce((sums_g, sums_gx), 1, _add_pairs)
        tl.debug_barrier()
        for first in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            column = first + tl.arange(0, BLOCK_N)
            cols = column[None, :]
            mask, at, weight = (rows < num_rows) & (cols < N), rows * N + cols, load_weight(weight_ptr, cols, N, dtype)
            dy, x_hat, g = load_g(dy_ptr, h_ptr, weight, rows * stride_dym + cols, rows * stride_hm + cols, mean, rstd, mask)
            dh_upcast = rstd * (g - (sum_g / N)[:, None] - x_hat * (sum_gx / N)[:, None])
            if dnew_residual_ptr is not None:
                dnew_residual = tl.load(dnew_residual_ptr + rows * stride_drm + cols, mask, other=0.0).to(dtype)
                dh_upcast += dnew_residual
                if stats_ptr is not None:
                    dnew_residual_acc = accumulate(dnew_residual_acc, dnew_residual, ELEMENTS_PER_ACCESS)
            dh = store_dh(dh_upcast, dh_ptr, dx_ptr, at, mask)
            if stats_ptr is not None:
                dh_acc = accumulate(dh_acc, dh, ELEMENTS_PER_ACCESS)
                if dy_ptr is not None:
                    dy_acc = accumulate(dy_acc, dy, ELEMENTS_PER_ACCESS)
            if DWEIGHT:
                add_partial(partials_ptr, program, program < block, column, tl.sum(dy * x_hat, 0), N)
            if DBIAS:
                add_partial(partials_ptr, num_programs + program, program < block, column, tl.sum(dy, 0), N)
    if stats_ptr is not None:
        if dy_ptr is not None:
            write_stats_rows(dy_acc, stats_ptr, 0, num_slots, dy_ptr, stride_dym, num_rows, N, BLOCK_M, BLOCK_N)
        if dnew_residual_ptr is not None:
            write_stats_rows(
                dnew_residual_acc, stats_ptr, 1, num_slots, dnew_residual_ptr, stride_drm, num_rows, N, BLOCK_M, BLOCK_N
            )
        write_stats_rows(dh_acc, stats_ptr, DX_PORT, num_slots, dh_ptr, N, num_rows, N, BLOCK_M, BLOCK_N)


@triton.jit
def add_partial(partials_ptr, slot, has_value, column, value, N: tl.constexpr):
    """Adds to row `slot` of partials, which holds a value from the program's second block on."""
    pointers = partials_ptr + slot * N + column
    before = tl.where(has_value, tl.load(pointers, column < N, other=0.0), 0.0)
    tl.store(pointers, before + value, column < N)


@triton.jit(do_not_specialize=["num_partials", "num_slots"])
def norm_finalize_kernel(
    partials_ptr,
    dweight_ptr,
    dbias_ptr,
    stats_ptr,
    num_partials,
    num_slots,
    N: tl.constexpr,
    FIRST_PORT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight or dbias: the sum of the partials, in their order, with its statistics. Grid: (blocks of columns, 2)."""
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < N
    finalize = tl.zeros([BLOCK_P, BLOCK_N], partials_ptr.dtype.element_ty)
    for first in range(0, num_partials, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (which * num_partials + p).to(tl.int64)[:, None] * N + column[None, :]
        finalize += tl.load(partials_ptr + at, (p < num_partials)[:, None] & mask[None, :], other=0.0)
    if which == 0:
        if dweight_ptr is not None:
            finish_column(tl.sum(finalize, 0), dweight_ptr, stats_ptr, FIRST_PORT, num_slots, column, mask, N, BLOCK_N)
    else:
        if dbias_ptr is not None:
            finish_column(tl.sum(finalize, 0), dbias_ptr, stats_ptr, FIRST_PORT + 1, num_slots, column, mask, N, BLOCK_N)


@triton.jit
def finish_column(total, ptr, stats_ptr, port, num_slots, column, mask, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores a block of dweight or dbias and counts it: there is little of it, so exactly."""
    value = total.to(ptr.dtype.element_ty)
    tl.store(ptr + column, value, mask)
    if stats_ptr is not None:
        seen = tl.minimum(N - tl.program_id(0) * BLOCK_N, BLOCK_N)
        add_to_slot(stats_ptr, port, tl.program_id(0).to(tl.int64), num_slots, seen, recount_exact(no_fields(), value, mask))
