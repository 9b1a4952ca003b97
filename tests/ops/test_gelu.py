import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import gelu_case
from checks import (
    check_case,
    check_case_stats,
)
from mpmath import mp
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.ops.gelu import gelu_bwd_reference, gelu_fwd_reference
from gradkernels.testing import DTYPES, check_stats, compare, differentiate, lay_out, randn

FORMS = ("none", "tanh")
SHAPES = ((0, 5), (), (1,), (7, 3), (4095,), (4097,), (8193,), (3, 1500), (2, 3, 5, 7), (11, 1531))
LAYOUTS = (
    ("transposed", "contiguous"),
    ("sliced", "contiguous"),
    ("channels_last", "contiguous"),
    ("contiguous", "transposed"),
    ("contiguous", "sliced"),
    ("contiguous", "channels_last"),
    ("channels_last", "channels_last"),
    ("transposed", "transposed"),
    ("contiguous", "expanded"),
    ("channels_last", "scalar"),
)


@pytest.mark.parametrize("form", FORMS)
def test_reference(form):
    x = randn(4, 9, dtype=torch.float64).mul(2).requires_grad_()
    dy = torch.randn_like(x)
    assert gradcheck(lambda x: gelu_fwd_reference(x, form == "tanh"), (x,), check_forward_ad=True)
    assert gradgradcheck(lambda x: gelu_fwd_reference(x, form == "tanh"), (x,))
    exact = F.gelu(x, approximate=form).detach()
    compare("y", gelu_fwd_reference(x, form == "tanh").detach(), exact, exact)
    (exact,) = torch.autograd.grad(F.gelu(x, approximate=form), x, dy)
    compare("dx", gelu_bwd_reference(dy, x, form == "tanh").detach(), exact, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementation(dtype, shape, form):
    check_case(gelu_case(randn(*shape, dtype=dtype).mul(2), approximate=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layout", "dy_layout"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, layout, dy_layout, form):
    x, dy = randn(2, 3, 37, 41, dtype=dtype), randn(2, 3, 37, 41, dtype=dtype)
    case = gelu_case(lay_out(x, layout), lay_out(dy, dy_layout), form)
    check_case(case)
    dense = case.inputs[0].is_contiguous() or layout in ("channels_last", "transposed")
    assert gk.gelu(case.inputs[0], form).stride() == (case.inputs[0].stride() if dense else x.stride())


def test_offset_storage():
    base, dy = randn(5001), randn(5001)
    for start in (1, 3):
        check_case(gelu_case(base[start:], dy[start:]))


def exact_gelu(x, form):
    """(y, dx for dy = 1, the sum of magnitudes in dx) at one x, to 40 digits; float64 alone cancels in the left tail."""
    mp.dps, x = 40, mpmath.mpf(x)
    if form == "none":
        probability, slope = mpmath.ncdf(x), x * mpmath.npdf(x)
    else:
        scale = mpmath.sqrt(8 / mpmath.pi)
        probability = 1 / (1 + mpmath.exp(-scale * (x + mpmath.mpf("0.044715") * x**3)))
        slope = x * probability * (1 - probability) * scale * (1 + 3 * mpmath.mpf("0.044715") * x**2)
    return float(x * probability), float(probability + slope), float(probability + abs(slope))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype, form):
    """In every interval of x of width 1 errors are at most eager's, relative to each value: the tails count too."""
    x = torch.cat([torch.linspace(-10, 10, 2000), torch.logspace(-7, 0, 100), -torch.logspace(-7, 0, 100)]).to(dtype)
    y, dx, dx_terms = torch.tensor([exact_gelu(v, form) for v in x.tolist()], dtype=torch.float64).T
    results = [
        differentiate(function, (x,), (torch.ones_like(x),))
        for function in (lambda x: gk.gelu(x, form), lambda x: F.gelu(x, approximate=form))
    ]
    info, interval = torch.finfo(dtype), x.double().floor()
    for name, exact, terms, parts in (("y", y, y.abs(), 0), ("dx", dx, dx_terms, 1)):
        ours, eager = ((r[parts][0].double() - exact).abs() / (info.eps * terms.clamp(min=info.tiny)) for r in results)
        for start in interval.unique().tolist():
            inside = (interval == start) & (terms > info.tiny)
            if inside.any():
                exponent = start**2 / 2  # e^(-x^2/2) rounds its exponent, relative to which it is exact
                bound = 1.5 * eager[inside].max() + (2 + exponent if info.bits > 16 else 1)
                assert ours[inside].max() <= bound, f"{name} at {start}: {ours[inside].max():.1f} ulp, allowed {bound:.1f}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_inputs(dtype, form):
    """Zeros of both signs, the ends of the range, NaN; at an infinity eager gives NaN or the limit, by form and dtype."""
    info = torch.finfo(dtype)
    finite = [0.0, -0.0, info.max, -info.max, info.tiny, -info.tiny, 100.0, -100.0]
    x = torch.tensor([math.nan, math.inf, -math.inf, *finite] * 5, dtype=dtype)
    ours, eager = (
        differentiate(function, (x,), (torch.full_like(x, 0.75),))
        for function in (lambda x: gk.gelu(x, form), lambda x: F.gelu(x, approximate=form))
    )
    limits = (x.clamp(min=0), 0.75 * (x > 0))
    for value, eager_value, limit in zip((ours[0][0], ours[1][0]), (eager[0][0], eager[1][0]), limits, strict=True):
        assert value[x.isnan()].isnan().all()
        sure = eager_value.isfinite()
        compare("finite", value[sure], eager_value[sure], eager_value[sure].double())
        unsure = ~sure & ~x.isnan() & ~value.isnan()
        assert torch.equal(value[unsure], limit[unsure].to(dtype))
    assert torch.equal(ours[0][0][x == 0].signbit(), x[x == 0].signbit())


def test_stats_mixed_magnitudes():
    dy = torch.full((3 * 4096 + 5,), 1e-30)
    dy[4096:8192] *= 1e20
    dy[8192:8200] = 1e25
    check_case_stats(gelu_case(torch.rand_like(dy), dy))
    wide = torch.full((3 * 4096 + 5,), 1e-200, dtype=torch.float64)
    wide[:4096], wide[5000], wide[-1] = 1e200, 1.0, 1e-300
    check_case_stats(gelu_case(torch.rand_like(wide), wide))


def test_stats_underflow():
    """A gradient that float16 rounds to zero counts as zero: statistics are of what is stored."""
    dy = torch.full((4099,), 6e-8, dtype=torch.float16)
    x = torch.linspace(-4, 4, 4099).to(torch.float16)
    stats = gk.new_stats(2)
    _, (dx,) = differentiate(lambda x: gk.gelu(x, stats=stats), (x,), (dy,))
    assert 0 < (dx == 0).sum() < dx.numel()
    check_stats(stats, ("dy", "dx"), {"dy": dy, "dx": dx})


def test_errors():
    with pytest.raises(
        gk.ArgumentError, match=r"^gelu: approximate argument must be either none or tanh, got 'sigmoid'"
    ) as caught:
        gk.gelu(randn(3, 5), "sigmoid")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
