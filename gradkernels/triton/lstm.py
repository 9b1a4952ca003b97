"""What the LSTM's kernels share: the gates' functions, the product of a step, the scale in which a gradient is carried."""

import triton
import triton.language as tl

SPAN = tl.constexpr(32)  # magnitudes from 2^-SPAN to 2^SPAN are carried as they are
NUM_SUMS = tl.constexpr(11)  # of a program's partials of a step: TIME_FIELDS but gate_count


@triton.constexpr_function
def largest_exponent(dtype):
    """Exponent of a scale in which what comes from outside can still be represented in `dtype`."""
    return 900 if dtype == tl.float64 else 100


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
def sigmoid(v):
    """1 / (1 + e^-v); NaN stays NaN."""
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def hyperbolic_tangent(v):
    """tanh v: around zero a series (Moshier, Cephes tanh), elsewhere from e^-2|v|, which cannot overflow. NaN stays NaN."""
    square = v * v
    e = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - e) / (1.0 + e)
    if v.dtype == tl.float64:
        p = (square * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
        q = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square + 4.84406305325125486048e3
        near = v + v * square * (p / q)
    else:
        p = ((square * -5.70498872745e-3 + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
        near = (p * square - 3.33332819422e-1) * square * v + v
    return tl.where(tl.abs(v) > 0.625, tl.where(v < 0, -far, far), near)


@triton.jit
def gates_forward(i, f, g, o, c):
    """(i, f, g, o activated, c_next, h_next before any projection) from the preactivations and c."""
    i, f, g, o = sigmoid(i), sigmoid(f), hyperbolic_tangent(g), sigmoid(o)
    c_next = f * c + i * g
    return i, f, g, o, c_next, o * hyperbolic_tangent(c_next)


@triton.jit
def gates_backward(dh, dc_next, i, f, g, o, m, c):
    """(di, df, dg, do of the preactivations, total dc_next) from dh, of h_next before any projection; m = tanh(c_next)."""
    total = dh * o * (1.0 - m * m) + dc_next
    return total * g * (i * (1.0 - i)), total * c * (f * (1.0 - f)), total * i * (1.0 - g * g), dh * m * (o * (1.0 - o)), total


@triton.jit
def load_gates(ptr, H: tl.constexpr, mask):
    """i, f, g, o, H apart; zeros where masked."""
    i = tl.load(ptr, mask, other=0.0)
    f = tl.load(ptr + H, mask, other=0.0)
    g = tl.load(ptr + 2 * H, mask, other=0.0)
    return i, f, g, tl.load(ptr + 3 * H, mask, other=0.0)


@triton.jit
def store_gates(ptr, i, f, g, o, H: tl.constexpr, mask):
    """i, f, g, o to where load_gates finds them, in the memory's dtype."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr, i.to(dtype), mask)
    tl.store(ptr + H, f.to(dtype), mask)
    tl.store(ptr + 2 * H, g.to(dtype), mask)
    tl.store(ptr + 3 * H, o.to(dtype), mask)


@triton.jit
def multiply(
    a_ptr, rows, num_rows, w_ptr, weight_rows, weight_mask, acc, K: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr
):
    """acc + a w^T: `rows` of a and `weight_rows` of w, both K wide without gaps; zeros for a row that is masked.

    Nothing is read where the first row is beyond `num_rows`.
    """
    depth = tl.where(tl.min(rows, 0) < num_rows, K, 0)
    mask = (rows < num_rows)[:, None]
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * K + k[None, :], mask & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + weight_rows[None, :] * K + k[:, None], weight_mask[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="tf32" if TF32 else "ieee", out_dtype=acc.dtype)
    return acc


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
def choose_exponent(exponent, largest, incoming, dtype: tl.constexpr):
    """The exponent of a step's scale, from that of the step after, the largest magnitude carried there, and what comes in.

    Within 2^-SPAN to 2^SPAN nothing changes. A gradient that has vanished is scaled up; one that comes in beside it keeps
    the scale so small that it fits.
    """
    limit: tl.constexpr = largest_exponent(dtype)
    power = exponent_of(largest)
    wanted = tl.where((power < -SPAN) | (power > SPAN), tl.maximum(0, tl.minimum(exponent - power, exponent + limit)), exponent)
    wanted = tl.where((largest > 0) & (largest < float("inf")), wanted, 0)
    most = tl.where(tl.abs(incoming) < float("inf"), tl.minimum(limit, -exponent_of(incoming) + SPAN), 0)
    return tl.where(incoming != 0, tl.maximum(0, tl.minimum(wanted, most)), wanted)


@triton.jit
def load_scale(exponents_ptr, largest_ptr, incoming_ptr, t, after, num_programs, BLOCK: tl.constexpr):
    """(exponent of step t, by how much it is above that of the step after; factors of what comes in, of what is written, and
    of what leaves the walk).

    `largest` (steps, programs) holds what each program of the step after saw, `incoming` (steps) the largest magnitude that
    comes from outside. There is no step after where after < 0.
    """
    dtype: tl.constexpr = incoming_ptr.dtype.element_ty
    before = tl.load(exponents_ptr + after, after >= 0, other=0)
    incoming = tl.load(incoming_ptr + t)
    peak, count = tl.zeros([BLOCK], dtype), tl.where(after >= 0, num_programs, 0)
    for begin in range(0, count, BLOCK):
        program = begin + tl.arange(0, BLOCK)
        seen = tl.load(largest_ptr + after.to(tl.int64) * num_programs + program, program < count, other=0.0)
        peak = tl.maximum(peak, seen)
    largest = tl.where(after >= 0, tl.max(peak, 0), incoming)
    exponent = choose_exponent(before, largest, incoming, dtype)
    into = tl.where(exponent <= largest_exponent(dtype), power_of_two(exponent, dtype), 0.0)
    return exponent, exponent - before, into, power_of_two(-exponent, dtype), power_of_two(-before, dtype)


@triton.jit
def square_sum(v):
    """Squares in float64, in which no float32 is too small or too large for them; not yet added up."""
    wide = v.to(tl.float64)
    return (wide * wide).ravel()


@triton.jit
def add_sums(a, b, c, d, e, f, g, h, i, j, k, l):  # noqa: E741
    return a + g, b + h, c + i, d + j, e + k, f + l


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def flag(condition, mask, shift: tl.constexpr):
    """A one at bit `shift` where the condition holds: counters of up to 4095 share an integer."""
    return tl.where(condition & mask, 1, 0).to(tl.int64) << shift


@triton.jit
def sums_of_gates(dh, dc, dh_recurrent, i, f, g, o, mask):
    """A program's sums of a step, in one reduction: squares of dh, dc, dh_recurrent; two integers of packed counts; f."""
    low = flag(i < 0.1, mask, 0) + flag(i > 0.9, mask, 12) + flag(f < 0.1, mask, 24) + flag(f > 0.9, mask, 36)
    high = flag(tl.abs(g) > 0.9, mask, 0) + flag(o < 0.1, mask, 12) + flag(o > 0.9, mask, 24)
    forget = tl.where(mask, f, 0.0).to(tl.float64)
    values = (square_sum(dh), square_sum(dc), square_sum(dh_recurrent), low.ravel(), high.ravel(), forget.ravel())
    return tl.reduce(values, 0, add_sums)


@triton.jit
def store_counts(sums_ptr, low, high, forget):
    """Counts and the sum of f to their places among a program's sums."""
    for k in tl.static_range(4):
        tl.store(sums_ptr + 3 + k, ((low >> (12 * k)) & 4095).to(tl.float64))
    for k in tl.static_range(3):
        tl.store(sums_ptr + 7 + k, ((high >> (12 * k)) & 4095).to(tl.float64))
    tl.store(sums_ptr + 10, forget)
