"""Numbers at the edges: infinities, rows shorter than a vector or longer than a float can sum, what float64 can hold."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import gradkernels as gk
from gradkernels.telemetry import merge_slots, record_of

OPS = torch.ops.gradkernels


def measured(gradient):
    """The record of a gradient, by the probe."""
    stats = gk.new_stats(1)
    OPS.probe_bwd(gradient, stats, 0)
    return record_of("site", "dy", merge_slots(stats)[0].tolist())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gelu_of_infinities(dtype, approximate):
    """PyTorch's float64 answers, forward and backward, at places of a vector and of a row's end.

    In float32 and bfloat16 F.gelu makes infinity of a single +infinity, and NaN of one among several elements.
    """
    x = torch.zeros(37, dtype=dtype)
    x[0], x[5], x[33], x[36], x[9] = (float(v) for v in ("inf", "-inf", "inf", "-inf", "nan"))
    found = []
    for gelu, leaf in ((gk.gelu, x.clone()), (F.gelu, x.double())):
        y = gelu(leaf.requires_grad_(), approximate=approximate)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for ours, exact in zip(*found, strict=True):
        assert_close(ours, exact.to(x.dtype), equal_nan=True)


@pytest.mark.parametrize("value", [1e152, 1e300, 1e-152, 1e-300])
def test_norm_of_float64(value):
    """Finite for finite gradients of several blocks, whose squares leave float64's range."""
    count = 40_000
    assert measured(torch.full((count,), value, dtype=torch.float64)).norm == pytest.approx(
        value * count**0.5, rel=1e-12, abs=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_of_many_beside_a_larger_one(dtype):
    """Squares that together count, and of which none is a normal number of what they are summed in."""
    one, others = (2.0**-62, 2.0**-75) if dtype is torch.float32 else (2.0**-490, 2.0**-536)
    values = torch.full((9000,), others, dtype=dtype)
    values[::512] = one
    assert measured(values).norm == pytest.approx(torch.linalg.vector_norm(values.double() / one).item() * one, rel=1e-6, abs=0)


@pytest.mark.parametrize("last", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("before", [1e-300, 1e-140, 1e140, 1e300])
def test_norm_of_float64_that_changes(before, last):
    """Blocks that are measured in the scale of the block before, which is far from their own."""
    values = (math.inf, before, last)
    finite = math.hypot(before, last) * 9000**0.5
    assert measured(torch.cat([torch.full((9000,), v, dtype=torch.float64) for v in values])).norm == pytest.approx(
        finite, rel=1e-12, abs=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 2, 3, 5, 8, 15, 31, 33, 63])
def test_norm_of_short_rows(N, dtype):
    """Equal elements, so that every rounding of a sum goes the same way."""
    M, stats = 100_000 // N, gk.new_stats(4)
    x, dy = torch.randn(M, N).to(dtype), torch.full((M, N), 1.1).to(dtype)
    _, mean, rstd = OPS.layer_norm_fwd(x, None, None, 1, 1e-5)
    OPS.layer_norm_bwd(dy, x, mean, rstd, None, None, 1, [True] * 3, stats)
    row = merge_slots(stats)[0]
    assert row[2].item() == pytest.approx(dy.double().square().sum().item(), rel=1e-5)


def test_long_rows():
    """Mean and variance of a row of three million columns, far from zero: no worse than PyTorch's."""
    x = torch.randn(1, 3_000_000) + 10
    _, mean, rstd = OPS.layer_norm_fwd(x, None, None, 1, 0.0)
    exact = x.double().var(correction=0).rsqrt().item()
    eager = torch.native_layer_norm(x, (x.shape[1],), None, None, 0.0)[2].item()
    assert abs(rstd.item() - exact) <= 1.5 * abs(eager - exact) + 2e-7 * exact
    assert mean.item() == pytest.approx(x.double().mean().item(), rel=2e-7)


def test_many_rows():
    """Column sums over a million rows of one sign, which a float alone cannot add up."""
    x, dy = torch.randn(1_000_000, 2), torch.full((1_000_000, 2), 1.1)
    weight = torch.ones(2)
    _, mean, rstd = OPS.layer_norm_fwd(x, weight, weight, 1, 1e-5)
    dbias = OPS.layer_norm_bwd(dy, x, mean, rstd, weight, weight, 1, [True] * 3, None)[2]
    folded = 1024  # rows at most between two folds into float64, each of them rounded the same way
    assert_close(dbias.double(), dy.double().sum(0), rtol=folded * 2.0**-24, atol=0)


def test_no_columns():
    """The gradient of a weight without elements keeps its shape."""
    x, weight = torch.randn(4, 3, 0), torch.randn(3, 0, requires_grad=True)
    (dweight,) = torch.autograd.grad(gk.layer_norm(x, (3, 0), weight).sum(), weight)
    assert dweight.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 700, 5000, 20_001])
def test_signalling_nan(dtype, place):
    """It is counted, and hides neither zeros nor the largest magnitude, wherever it is."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    gradient = torch.ones(20_003, dtype=dtype)
    gradient[::7] = 0
    infinite = torch.tensor(float("inf"), dtype=dtype).view(bits)
    gradient.view(bits)[place] = infinite + 1
    record = measured(gradient)
    zeros = (gradient == 0).sum().item()
    assert (record.nonfinite_count, record.zero_count, record.abs_max) == (1, zeros, 1.0)
    assert record.norm == pytest.approx((20_003 - zeros - 1) ** 0.5, rel=1e-5, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_that_change(dtype):
    """Blocks of ordinary, tiny, huge and not finite elements after one another."""
    parts = [torch.randn(9000) * scale for scale in (1.0, 1e-30, 1e25, 1e-3)]
    parts[2][17] = float("nan")
    gradient = torch.cat(parts).to(dtype)
    finite = gradient.double()[gradient.isfinite()]
    record = measured(gradient)
    assert record.nonfinite_count == 1
    assert record.norm == pytest.approx(finite.norm().item(), rel=1e-5, abs=0)
    assert record.abs_max == finite.abs().max().item()
    assert measured(gradient[9000:18_000]).norm == pytest.approx(parts[1].to(dtype).double().norm().item(), rel=1e-5, abs=0)
