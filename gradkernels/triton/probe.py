"""A probe on a GPU: one read of the gradient, nothing written but its statistics. Also what takes the rows of a table."""

import torch
import triton
import triton.language as tl

from gradkernels.triton.launch import launch, pointwise, with_strides_of
from gradkernels.triton.launch_cache import register
from gradkernels.triton.reduce import (
    ABS_MAX,
    NUM_FIELDS,
    ROW,
    accumulate,
    accumulator,
    elements_per_access,
    new_accumulator,
    write_stats_flat,
)


@triton.jit(do_not_specialize=["num_vectors", "num_slots", "port"])
def probe_bwd_kernel(
    dy_ptr,
    port,
    num_vectors,
    stats_ptr,
    num_slots,
    TELEMETRY: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Row `port` of the statistics. Grid: programs take the blocks in turn."""
    dtype: tl.constexpr = accumulator(dy_ptr.dtype.element_ty)
    ELEMENTS_PER_ACCESS: tl.constexpr = elements_per_access(dy_ptr.dtype.element_ty)
    numel = num_vectors.to(tl.int64) * VECTOR
    row = new_accumulator(SLOTS, dtype)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        row = accumulate(row, tl.load(dy_ptr + offsets, offsets < numel, other=0.0).to(dtype), ELEMENTS_PER_ACCESS)
    write_stats_flat(row, stats_ptr, port, num_slots, dy_ptr, numel, BLOCK)


@triton.jit(do_not_specialize=["num_slots"])
def take_rows_kernel(stats_ptr, rows_ptr, num_slots, BLOCK: tl.constexpr):
    """rows[r] = the merge of row r's slots, which are then zero. Grid: one program a row."""
    row = tl.program_id(0).to(tl.int64)
    field = tl.arange(0, ROW)
    sums, peaks = tl.zeros([BLOCK, ROW], tl.float64), tl.zeros([BLOCK, ROW], tl.float64)
    for first in range(0, num_slots, BLOCK):
        slots = first + tl.arange(0, BLOCK)
        pointers = stats_ptr + (row * num_slots + slots)[:, None] * NUM_FIELDS + field[None, :]
        mask = (slots < num_slots)[:, None] & (field < NUM_FIELDS)[None, :]
        values = tl.load(pointers, mask, other=0.0)
        tl.store(pointers, tl.zeros_like(values), mask)
        sums, peaks = sums + values, tl.maximum(peaks, values)
    merged = tl.where(field == ABS_MAX, tl.max(peaks, 0), tl.sum(sums, 0))
    tl.store(rows_ptr + row * NUM_FIELDS + field, merged, field < NUM_FIELDS)


def probe_bwd(dy: torch.Tensor, stats: torch.Tensor, port: int) -> None:
    """Adds the statistics of dy to row `port`. One launch."""
    dy = dy if dy.is_contiguous() else with_strides_of(torch.empty_like(dy), dy)
    pointwise(probe_bwd_kernel, dy, stats, dy, port)


def probe_each(stats: torch.Tensor | None, *gradients: torch.Tensor | None) -> None:
    """Adds the statistics of each gradient that is there to the row of its place, where there are rows."""
    for port, gradient in enumerate(gradients):
        if stats is not None and gradient is not None:
            probe_bwd(gradient, stats, port)


def take_rows(stats: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes the rows of a table into `rows`, (ports, fields); its slots are zero afterwards. One launch."""
    num_rows, num_slots, _ = stats.shape
    if num_rows:
        launch(take_rows_kernel, (num_rows,), stats, rows, num_slots, BLOCK=64, num_warps=4)


register("probe_bwd", probe_bwd)
register("take_rows", take_rows)
