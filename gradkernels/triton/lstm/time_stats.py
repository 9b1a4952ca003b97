"""What backward has measured of every step, from its programs' sums into time_stats: one launch per run of equal steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkernels.triton.launch import launch_each
from gradkernels.triton.lstm.backward import BackwardResult
from gradkernels.triton.lstm.gates import NUM_NORMS, NUM_SUMS
from gradkernels.triton.lstm.scale import power_of_two
from gradkernels.triton.lstm.sequence import Steps


@triton.jit(do_not_specialize=["begin", "size", "num_programs", "num_steps", "recorded"])
def lstm_time_stats_kernel(
    partials_ptr,
    exponents_ptr,
    time_stats_ptr,
    begin,
    size,
    num_programs,
    num_steps,
    recorded,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds a call to time_stats, columns as in telemetry.TIME_FIELDS, of steps below `recorded`.

    Grid: steps of `size` rows each, from `begin` on.
    """
    t = begin + tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    there = (column < NUM_SUMS + 1) & (column != NUM_NORMS)  # gate_count, behind the norms, is not among the sums
    sums = tl.zeros([BLOCK, COLUMNS], tl.float64)
    for first in range(0, num_programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        at = (t * num_programs + program)[:, None] * NUM_SUMS + (column - tl.where(column > NUM_NORMS, 1, 0))[None, :]
        sums += tl.load(partials_ptr + at, (program < num_programs)[:, None] & there[None, :], other=0.0)
    total = tl.sum(sums, 0)
    norm = tl.sqrt(tl.where(column < NUM_NORMS, total, 0.0)) * power_of_two(-tl.load(exponents_ptr + t), tl.float64)
    row = time_stats_ptr + (1 + t) * (NUM_SUMS + 1) + column
    written = column < tl.where(t < recorded, NUM_SUMS + 1, 0)
    old = tl.load(row, written, other=0.0)
    larger, smaller = tl.maximum(old, norm), tl.minimum(old, norm)
    ratio = tl.where(larger > 0, smaller / tl.where(larger > 0, larger, 1.0), 0.0)
    finite = (old < float("inf")) & (norm < float("inf"))
    merged = tl.where(finite, larger * tl.sqrt(1.0 + ratio * ratio), old + norm)
    added = old + tl.where(column == NUM_NORMS, (size * H).to(tl.float64), total)
    tl.store(row, tl.where(column < NUM_NORMS, merged, added), written)
    if t == 0:
        tl.store(time_stats_ptr, tl.maximum(tl.load(time_stats_ptr), num_steps.to(tl.float64)))
        tl.store(time_stats_ptr + 1, tl.load(time_stats_ptr + 1) + 1.0)


def record_steps(steps: Steps, result: BackwardResult, H: int, time_stats: torch.Tensor) -> None:
    """Adds the sums of a recurrence to time_stats; steps beyond its size are not recorded, which row 0 shows."""
    launches, recorded = [], time_stats.shape[0] - 1
    for begin, end in steps.runs():
        count = min(end + 1, max(1, recorded)) - begin
        if count > 0:
            where = (begin, steps.sizes[begin], result.partials.shape[1], len(steps.sizes), recorded)
            launches.append((lstm_time_stats_kernel, (count,), (result.partials, result.exponents, time_stats, *where)))
    launch_each(launches, H=H, COLUMNS=triton.next_power_of_2(NUM_SUMS.value + 1), BLOCK=32, num_warps=4)
