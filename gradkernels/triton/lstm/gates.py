"""What the LSTM's kernels share: the functions of the gates, the product of a step, the sums of a step."""

import triton
import triton.language as tl

from gradkernels.telemetry import fields

NUM_NORMS, NUM_SUMS = tl.constexpr(fields.NUM_NORMS), tl.constexpr(len(fields.TIME_FIELDS) - 1)  # of a step: no gate_count
LOW, HIGH = tl.constexpr(fields.LOW_GATE), tl.constexpr(fields.HIGH_GATE)


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
def square_sum(v):
    """Squares in float64, in which no float32 is too small or too large for them; not yet added up."""
    upcast = v.to(tl.float64)
    return (upcast * upcast).ravel()


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
    low = flag(i < LOW, mask, 0) + flag(i > HIGH, mask, 12) + flag(f < LOW, mask, 24) + flag(f > HIGH, mask, 36)
    high = flag(tl.abs(g) > HIGH, mask, 0) + flag(o < LOW, mask, 12) + flag(o > HIGH, mask, 24)
    forget = tl.where(mask, f, 0.0).to(tl.float64)
    values = (square_sum(dh), square_sum(dc), square_sum(dh_recurrent), low.ravel(), high.ravel(), forget.ravel())
    return tl.reduce(values, 0, add_sums)


@triton.jit
def store_counts(sums_ptr, low, high, forget):
    """Counts and the sum of f to their places among a program's sums."""
    for k in tl.static_range(4):
        tl.store(sums_ptr + NUM_NORMS + k, ((low >> (12 * k)) & 4095).to(tl.float64))
    for k in tl.static_range(3):
        tl.store(sums_ptr + NUM_NORMS + 4 + k, ((high >> (12 * k)) & 4095).to(tl.float64))
    tl.store(sums_ptr + NUM_SUMS - 1, forget)


@triton.jit
def store_sums(sums_ptr, dh, dc, recurrent, i, f, g, o, mask, WITH_DH: tl.constexpr):
    """A program's sums of a step; those of dh are the projection's where there is one."""
    squares_dh, squares_dc, squares_recurrent, low, high, forget = sums_of_gates(dh, dc, recurrent, i, f, g, o, mask)
    if WITH_DH:
        tl.store(sums_ptr, squares_dh)
        tl.store(sums_ptr + 2, squares_recurrent)
    tl.store(sums_ptr + 1, squares_dc)
    store_counts(sums_ptr, low, high, forget)
