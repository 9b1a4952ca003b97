"""GELU on a GPU. One program goes through blocks of consecutive elements; the formulas are those of csrc/cpu/gelu.cpp.

exact  y = x P(x), P the standard normal distribution function;  dx = dy (P(x) + x p(x))
tanh   y = x S(u), S the sigmoid function, u = 2 sqrt(2 / pi) (x + 0.044715 x^3);  dx = dy (S + x S (1 - S) u')
"""

import torch
import triton
import triton.language as tl

from gradkernels.triton.launch import pointwise, with_strides_of
from gradkernels.triton.launch_cache import register
from gradkernels.triton.reduce import accumulate, accumulator, elements_per_access, new_accumulator, write_stats_flat

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scaled_tail(x, BITS: tl.constexpr):
    """P(-|x|) e^(x^2/2), by minimax fits with |x| mapped to [0, 1).

    float32: in v = a |x| / (1 + a |x|), relative error 1.3e-8, the constant exact, so that P is right around zero too.
    16-bit dtypes: in r = 1 / (1 + a |x|) for |x| < 7, beyond which P(-|x|) < 2e-12; relative error 4.9e-6, a hundredth of
    the rounding of y. There 1 / w is rsqrt(w^2), one instruction where a division is six.
    """
    if BITS == 16:
        w = tl.abs(x) * 0.35 + 1.0
        r = tl.rsqrt(w * w)
        q = r * -0.10488727 + 0.299105094
        q = q * r - 0.0108203922
        q = q * r + 0.184001457
        q = q * r + 0.132082481
        q = q * r + 0.000516185542
    else:
        scaled = tl.minimum(tl.abs(x) * 0.3252691328525543, 8.0)
        v = scaled / (scaled + 1.0)
        q = v * 0.0245537443 - 0.0743048896
        q = q * v + 0.0436499362
        q = q * v + 0.0344996589
        q = q * v + 0.0734963146
        q = q * v - 0.14697347
        q = q * v - 0.364873422
        q = q * v + 1.13646128
        q = q * v - 1.22649957
        q = q * v + 0.5
    return q


@triton.jit
def normal(x, BITS: tl.constexpr):
    """(P(x), P(x) + x p(x)) of a standard normal, one exponential for both.

    With e = e^(-x^2/2), P(-|x|) = e q and p(x) = c e: so the slope is e (q - c |x|) on the left and 1 minus that on the
    right.
    """
    if x.dtype == tl.float64:
        value = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752440))
        slope = value + x * (tl.exp(-0.5 * x * x) * 0.39894228040143267794)
    else:
        q = scaled_tail(x, BITS)
        e = tl.exp2(x * (x * (-0.5 * LOG2_E)))
        left, left_slope = e * q, e * (q - tl.abs(x) * 0.3989422804)
        value = tl.where(x > 0, 1.0 - left, left)
        slope = tl.where(x > 0, 1.0 - left_slope, left_slope)
    return value, slope


@triton.jit
def sigmoid(x):
    """(S(u), S + x S (1 - S) u') at u = u(x). S is 0 or 1 to rounding beyond the limit, where x leaves the second term."""
    limit: tl.constexpr = 30.0 if x.dtype == tl.float64 else 11.0
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))  # NaN stays NaN
    square = x * x
    u = x * (square * 0.07135481627260025 + 1.5957691216057308)
    if x.dtype == tl.float64:
        e = tl.exp(-u)
        s = 1.0 / (1.0 + e)
    else:
        e = tl.exp2(u * -LOG2_E)
        s = tl.rsqrt((1.0 + e) * (1.0 + e))  # 0 where the square overflows: there S < 2^-63
    return s, s + x * (tl.minimum(e, 1e18) * s * s) * (square * 0.21406444881780073 + 1.5957691216057308)


@triton.jit(do_not_specialize=["num_vectors", "num_slots"])
def gelu_fwd_kernel(
    x_ptr,
    y_ptr,
    num_vectors,
    stats_ptr,
    num_slots,
    TANH: tl.constexpr,
    TELEMETRY: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """y = x P(x) or x S(u). Grid: one program a block. There is nothing to measure in a forward."""
    numel = num_vectors.to(tl.int64) * VECTOR
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    x = tl.load(x_ptr + offsets, mask, other=0.0).to(accumulator(x_ptr.dtype.element_ty))
    value, _ = sigmoid(x) if TANH else normal(x, x_ptr.dtype.element_ty.primitive_bitwidth)
    tl.store(y_ptr + offsets, (x * value).to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_vectors", "num_slots"])
def gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    num_vectors,
    stats_ptr,
    num_slots,
    TANH: tl.constexpr,
    TELEMETRY: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """dx = dy times the derivative at x. Grid: programs take the blocks in turn; without statistics one program a block."""
    dtype: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    ELEMENTS_PER_ACCESS: tl.constexpr = elements_per_access(x_ptr.dtype.element_ty)
    numel = num_vectors.to(tl.int64) * VECTOR
    dy_acc, dx_acc = new_accumulator(SLOTS, dtype), new_accumulator(SLOTS, dtype)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < numel
        x = tl.load(x_ptr + offsets, mask, other=0.0).to(dtype)
        dy = tl.load(dy_ptr + offsets, mask, other=0.0).to(dtype)
        _, slope = sigmoid(x) if TANH else normal(x, x_ptr.dtype.element_ty.primitive_bitwidth)
        dx = (dy * slope).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offsets, dx, mask)
        if TELEMETRY:
            dy_acc = accumulate(dy_acc, dy, ELEMENTS_PER_ACCESS)
            dx_acc = accumulate(dx_acc, dx.to(dtype), ELEMENTS_PER_ACCESS)
    if TELEMETRY:
        write_stats_flat(dy_acc, stats_ptr, 0, num_slots, dy_ptr, numel, BLOCK)
        write_stats_flat(dx_acc, stats_ptr, 1, num_slots, dx_ptr, numel, BLOCK)


def gelu_fwd(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """y, with x's shape, dtype and strides. One launch."""
    y = torch.empty_like(x)
    pointwise(gelu_fwd_kernel, y, None, with_strides_of(y, x), y, TANH=tanh)
    return y


def gelu_bwd(dy: torch.Tensor, x: torch.Tensor, tanh: bool, stats: torch.Tensor | None) -> torch.Tensor:
    """dx, with x's shape, dtype and strides; the statistics of dy and dx. One launch."""
    dx = torch.empty_like(x)
    pointwise(gelu_bwd_kernel, dx, stats, with_strides_of(dx, dy), with_strides_of(dx, x), dx, TANH=tanh)
    return dx


register("gelu_fwd", gelu_fwd)
register("gelu_bwd", gelu_bwd)
