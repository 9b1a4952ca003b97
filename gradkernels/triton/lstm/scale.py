"""The scale in which a gradient is carried back through time: a power of two for each step."""

import triton
import triton.language as tl

from gradkernels.telemetry import fields

EXPONENT_RANGE = tl.constexpr(fields.EXPONENT_RANGE)


@triton.constexpr_function
def max_exponent(dtype):
    """Exponent of a scale in which what comes from outside can still be represented in `dtype`."""
    return fields.MAX_EXPONENT_DOUBLE if dtype == tl.float64 else fields.MAX_EXPONENT_FLOAT


@triton.constexpr_function
def significand_bits(dtype):
    """Explicit ones, of float32 or float64."""
    return 52 if dtype == tl.float64 else 23


@triton.constexpr_function
def bias_of(dtype):
    """What is added to the exponent of float32 or float64."""
    return 1023 if dtype == tl.float64 else 127


@triton.constexpr_function
def bits_of(dtype):
    """The integers of float32's or float64's width."""
    return tl.int64 if dtype == tl.float64 else tl.int32


@triton.jit
def exponent_of(v):
    """The exponent of |v|, of float32 or float64; that of the smallest normal number, less one, for all below."""
    bits = v.to(bits_of(v.dtype), bitcast=True)
    return ((bits >> significand_bits(v.dtype)) & (2 * bias_of(v.dtype) + 1)).to(tl.int32) - bias_of(v.dtype)


@triton.jit
def power_of_two(exponent, dtype: tl.constexpr):
    """2^exponent: exact, also where it is subnormal; 0 where it is too small. At most twice the largest exponent."""
    bias: tl.constexpr = bias_of(dtype)
    first = tl.minimum(tl.maximum(exponent, 1 - bias), bias)
    second = tl.minimum(tl.maximum(exponent - first, 1 - bias), bias)
    shift: tl.constexpr = significand_bits(dtype)
    one = ((first + bias).to(bits_of(dtype)) << shift).to(dtype, bitcast=True)
    return one * ((second + bias).to(bits_of(dtype)) << shift).to(dtype, bitcast=True)


@triton.jit
def choose_exponent(exponent, max_abs, external_max, dtype: tl.constexpr):
    """The exponent of a step's scale, from that of the step after, the largest magnitude carried there, and what comes in.

    Within 2^-EXPONENT_RANGE to 2^EXPONENT_RANGE nothing changes. A gradient that has vanished is scaled up; one that comes in
    beside it keeps the scale so small that it fits.
    """
    limit: tl.constexpr = max_exponent(dtype)
    power = exponent_of(max_abs)
    wanted = tl.where(
        (power < -EXPONENT_RANGE) | (power > EXPONENT_RANGE),
        tl.maximum(0, tl.minimum(exponent - power, exponent + limit)),
        exponent,
    )
    wanted = tl.where((max_abs > 0) & (max_abs < float("inf")), wanted, 0)
    most = tl.where(tl.abs(external_max) < float("inf"), tl.minimum(limit, -exponent_of(external_max) + EXPONENT_RANGE), 0)
    return tl.where(external_max != 0, tl.maximum(0, tl.minimum(wanted, most)), wanted)


@triton.jit
def load_scale(exponents_ptr, max_abs_ptr, external_max_ptr, t, after, num_programs, BLOCK: tl.constexpr):
    """(exponent of step t, by how much it is above that of the step after; factors of what comes in, of what is written, and
    of what leaves the time loop).

    `max_abs` (steps, programs) holds what each program of the step after saw, `external_max` (steps) the largest magnitude that
    comes from outside. There is no step after where after < 0.
    """
    dtype: tl.constexpr = external_max_ptr.dtype.element_ty
    before = tl.load(exponents_ptr + after, after >= 0, other=0)
    external_max = tl.load(external_max_ptr + t)
    peak, count = tl.zeros([BLOCK], dtype), tl.where(after >= 0, num_programs, 0)
    for begin in range(0, count, BLOCK):
        program = begin + tl.arange(0, BLOCK)
        seen = tl.load(max_abs_ptr + after.to(tl.int64) * num_programs + program, program < count, other=0.0)
        peak = tl.maximum(peak, seen)
    max_abs = tl.where(after >= 0, tl.max(peak, 0), external_max)
    exponent = choose_exponent(before, max_abs, external_max, dtype)
    scale_in = tl.where(exponent <= max_exponent(dtype), power_of_two(exponent, dtype), 0.0)
    return exponent, exponent - before, scale_in, power_of_two(-exponent, dtype), power_of_two(-before, dtype)
