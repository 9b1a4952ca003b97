"""Statistics inside a kernel: a row forms in registers while the gradient does, and goes to the program's slot once.

A row in registers is (square sum, peak, count of nonzero elements), a slot a thread. That is all the hot
loop pays for. Whether it was enough is seen at the end: where the square sum overflowed, may have underflowed, or holds a
NaN or an infinity, the program reads its part of the gradient again and counts exactly, in float64. So a finite gradient
of ordinary size costs five instructions an element and no pass, and every other one is still counted right.
"""

import triton
import triton.language as tl

from gradkernels.telemetry import fields

NUM_FIELDS = tl.constexpr(len(fields.FIELDS))
ROW = tl.constexpr(triton.next_power_of_2(len(fields.FIELDS)))  # as a block of Triton's
NUMEL, OBSERVATIONS, SQUARES, TINY, HUGE, ABS_MAX, NONFINITE, ZEROS = (
    tl.constexpr(fields.FIELDS.index(name))
    for name in (
        "numel",
        "observation_count",
        "square_sum",
        "square_sum_tiny",
        "square_sum_huge",
        "abs_max",
        "nonfinite_count",
        "zero_count",
    )
)
CHUNKS = tl.constexpr(16)  # in which a block is counted exactly: the path seldom taken then needs few registers
# Between these peaks no square over- or underflows enough to be seen in the sum of a program's elements.
LOWEST_PEAK, HIGHEST_PEAK = tl.constexpr(2.0**-52), tl.constexpr(2.0**50)
LOWEST_PEAK_DOUBLE, HIGHEST_PEAK_DOUBLE = tl.constexpr(fields.SMALLEST_SQUARED), tl.constexpr(fields.LARGEST_SQUARED)
SCALE, INVERSE_SCALE = tl.constexpr(fields.SCALE), tl.constexpr(1 / fields.SCALE)


@triton.constexpr_function
def accumulator(dtype):
    """What a tensor of `dtype` is computed and summed in: float32, and float64 for float64."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.constexpr_function
def elements_per_access(dtype):
    """Consecutive elements of `dtype` that a thread loads with one access of 16 bytes."""
    return 128 // dtype.primitive_bitwidth


@triton.jit
def new_accumulator(SLOTS: tl.constexpr, dtype: tl.constexpr):
    """An empty row, with a slot for each thread."""
    zeros = tl.zeros([SLOTS], dtype)
    return zeros, zeros, zeros


@triton.jit
def accumulate(row, v, ELEMENTS_PER_ACCESS: tl.constexpr):
    """The row with tile `v` (as stored, in the accumulator's dtype) added; masked elements must be 0.

    ELEMENTS_PER_ACCESS as of the tensor that the tile was loaded from: then a slot sums up what its thread holds, and nothing
    moves.
    """
    square_sum, peak, nonzero = row
    own = tl.reshape(v, [v.numel // (square_sum.numel * ELEMENTS_PER_ACCESS), square_sum.numel, ELEMENTS_PER_ACCESS])
    square_sum += tl.sum(tl.sum(own * own, 2), 0)
    peak = tl.maximum(peak, tl.max(tl.max(tl.abs(own), 2), 0))
    nonzero += tl.sum(tl.sum(tl.where(tl.abs(own) > 0, 1.0, 0.0).to(own.dtype), 2), 0)  # one FSET; exact up to 2^24 a slot
    return square_sum, peak, nonzero


@triton.jit
def finalize(row, numel):
    """(fields, whether they can be trusted) of a row that saw `numel` elements; fields as `add_to_slot` takes them."""
    square_sum, peak, nonzero = row
    lowest: tl.constexpr = LOWEST_PEAK_DOUBLE if peak.dtype == tl.float64 else LOWEST_PEAK
    highest: tl.constexpr = HIGHEST_PEAK_DOUBLE if peak.dtype == tl.float64 else HIGHEST_PEAK
    squares = tl.sum(square_sum.to(tl.float64), 0)
    max_abs = tl.max(peak, 0).to(tl.float64)
    zeros = numel.to(tl.float64) - tl.sum(nonzero.to(tl.float64), 0)
    in_range = (max_abs >= lowest) & (max_abs <= highest)
    trusted = (squares < float("inf")) & (in_range | (max_abs == 0.0))
    nothing = squares * 0.0
    return (squares, nothing, nothing, max_abs, nothing, zeros), trusted


@triton.jit
def no_fields():
    """The fields of no elements."""
    nothing = tl.program_id(0).to(tl.float64) * 0.0
    return nothing, nothing, nothing, nothing, nothing, nothing


@triton.jit
def recount_exact(fields, v, mask):
    """The fields with tile `v` (any dtype, any values) added, element by element, in float64."""
    middle, tiny, huge, peak, nonfinite, zeros = fields
    magnitude = tl.abs(v.to(tl.float64))
    finite = magnitude < float("inf")
    nonfinite += tl.sum((mask & (finite == 0)).to(tl.float64).ravel(), 0)
    zeros += tl.sum((mask & (magnitude == 0)).to(tl.float64).ravel(), 0)
    magnitude = tl.where(mask & finite, magnitude, 0.0)
    peak = tl.maximum(peak, tl.max(magnitude.ravel(), 0))
    if v.dtype == tl.float64:
        is_tiny, is_huge = magnitude < LOWEST_PEAK_DOUBLE, magnitude > HIGHEST_PEAK_DOUBLE
        scaled_up = tl.where(is_tiny, magnitude * SCALE, 0.0)
        scaled_down = tl.where(is_huge, magnitude * INVERSE_SCALE, 0.0)
        tiny += tl.sum((scaled_up * scaled_up).ravel(), 0)
        huge += tl.sum((scaled_down * scaled_down).ravel(), 0)
        magnitude = tl.where(is_tiny | is_huge, 0.0, magnitude)
    middle += tl.sum((magnitude * magnitude).ravel(), 0)
    return middle, tiny, huge, peak, nonfinite, zeros


@triton.jit
def add_to_slot(stats_ptr, port, slot, num_slots, numel, fields):
    """Adds a program's fields to its slot of row `port`; the first program counts the call."""
    middle, tiny, huge, peak, nonfinite, zeros = fields
    field = tl.arange(0, ROW)
    pointers = stats_ptr + (port * num_slots + slot) * NUM_FIELDS + field
    old = tl.load(pointers, field < NUM_FIELDS)
    value = tl.where(field == NUMEL, numel.to(tl.float64), tl.where(field == OBSERVATIONS, (slot == 0).to(tl.float64), 0.0))
    value = tl.where(field == SQUARES, middle, tl.where(field == TINY, tiny, tl.where(field == HUGE, huge, value)))
    value = tl.where(field == NONFINITE, nonfinite, tl.where(field == ZEROS, zeros, value))
    tl.store(pointers, tl.where(field == ABS_MAX, tl.maximum(old, peak), old + value), field < NUM_FIELDS)


@triton.jit
def my_share(num_items, BLOCK: tl.constexpr):
    """How many of `num_items` items this program saw, when all programs take blocks of them in turn."""
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    num_blocks = tl.cdiv(num_items, BLOCK)
    turns = tl.cdiv(num_blocks - program, num_programs)
    has_last = program + (turns - 1) * num_programs == num_blocks - 1
    return turns * BLOCK - tl.where(has_last, num_blocks * BLOCK - num_items, 0)


@triton.jit
def write_stats_flat(row, stats_ptr, port, num_slots, ptr, numel, BLOCK: tl.constexpr):
    """Puts the row of a flat tensor, read in blocks by all programs in turns, into this program's slot."""
    program, seen = tl.program_id(0).to(tl.int64), my_share(numel, BLOCK)
    fields, trusted = finalize(row, seen)
    if not trusted:
        tl.debug_barrier()
        fields = no_fields()
        for block in range(program, tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            for first in range(0, BLOCK, BLOCK // CHUNKS):
                offsets = block * BLOCK + first + tl.arange(0, BLOCK // CHUNKS)
                mask = offsets < numel
                fields = recount_exact(fields, tl.load(ptr + offsets, mask, other=0.0), mask)
    add_to_slot(stats_ptr, port, program, num_slots, seen, fields)


@triton.jit
def write_stats_rows(
    row,
    stats_ptr,
    port,
    num_slots,
    ptr,
    stride,
    num_rows,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """write_stats_flat for rows of N elements, `stride` apart, taken BLOCK_M rows at a time by all programs in turn."""
    program, seen = tl.program_id(0).to(tl.int64), my_share(num_rows, BLOCK_M) * N
    fields, trusted = finalize(row, seen)
    if not trusted:
        tl.debug_barrier()
        fields = no_fields()
        for block in range(program, tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
            rows = (block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64))[:, None]
            for first in range(0, N, BLOCK_N // CHUNKS):
                cols = first + tl.arange(0, BLOCK_N // CHUNKS)[None, :]
                mask = (rows < num_rows) & (cols < N)
                fields = recount_exact(fields, tl.load(ptr + rows * stride + cols, mask, other=0.0), mask)
    add_to_slot(stats_ptr, port, program, num_slots, seen, fields)
