"""One LSTM layer in one direction, against torch.lstm and against a loop over single sequences."""

import pytest
import torch
from checks import (
    check_case,
    check_case_stats,
    same,
)
from lstm_cases import LAYOUTS, case_of, check_time_stats, expected_steps, layer_case, layer_inputs, plain_layer
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.ops.lstm_layer import lstm_layer_fwd_reference
from gradkernels.testing import DTYPES, check_results, compare, differentiate, randn

SHAPES = ((1, 1, 1, 1), (3, 2, 5, 17), (2, 7, 3, 65), (4, 13, 40, 33), (5, 1, 4, 16), (2, 6, 3, 130))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference(layout):
    options = dict(LAYOUTS[layout])
    reverse = options.pop("reverse", False)
    if "lengths" in options:
        options["lengths"] = (3, 2, 2)
    inputs, batch_sizes = layer_inputs(3, 2, 2, 4, dtype=torch.float64, **options)
    leaves = [t if t is None else t.requires_grad_() for t in inputs]

    def reference(*inputs):
        return lstm_layer_fwd_reference(*inputs, batch_sizes, reverse)[:3]

    assert gradcheck(reference, leaves, check_forward_ad=True)
    assert gradgradcheck(reference, leaves, fast_mode=True)
    for found, exact in zip(reference(*leaves), plain_layer(*leaves, batch_sizes, reverse), strict=True):
        compare("y", found.detach(), exact.detach(), exact.detach(), terms=10.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementation(dtype, layout):
    check_case(case_of(dtype=dtype, **LAYOUTS[layout]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_implementation_shapes(dtype, shape):
    check_case(case_of(*shape, dtype=dtype))


@pytest.mark.parametrize("rows", range(1, 14))
def test_tails(rows):
    """Every height of a register tile, and every number of vectors of columns."""
    check_case(case_of(2, rows, 3, 16 * (rows % 6) + 1 + rows))


def test_layouts():
    """Inputs and gradients with any strides."""
    inputs, _ = layer_inputs(5, 3, 4, 9)
    case = layer_case(inputs)
    x, *others = inputs
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1), *(t if t is None else t.t().contiguous().t() for t in others)]
    dys = (case.dys[0].transpose(0, 1).contiguous().transpose(0, 1), *case.dys[1:])
    check_case(layer_case(tuple(strided), dys=dys))
    check_case(layer_case(inputs, dys=(torch.randn(()).expand(5, 3, 9), *case.dys[1:])))


def test_empty_batch():
    inputs, _ = layer_inputs(3, 0, 4, 5)
    y, gradients = differentiate(gk.lstm_layer, inputs, (torch.zeros(3, 0, 5), None, None))
    assert [t.shape for t in y] == [(3, 0, 5), (0, 5), (0, 5)]
    assert [None if d is None else d.shape for d in gradients] == [None if t is None else t.shape for t in inputs]
    assert not any(d.any() for d in gradients if d is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_gates(dtype):
    """Preactivations of +-1000: tanh as (1 - e) / (1 + e) would be NaN beyond 44."""
    inputs, _ = layer_inputs(4, 3, 5, 18, dtype=dtype)
    inputs = (1000 * inputs[0], *inputs[1:])
    check_case(layer_case(inputs))
    state = (inputs[1], torch.full_like(inputs[2], 500.0))
    check_case(layer_case((inputs[0], *state, *inputs[3:])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values(dtype):
    """NaN and infinities in one sequence reach that sequence alone, all weights, and the counts of dx."""
    case = case_of(5, 6, 3, 20, dtype=dtype)
    case.inputs[0][2, 1, 0], case.dys[0][3, 4, 7] = float("nan"), float("inf")
    (y, *_), gradients = differentiate(case.function, case.inputs, case.dys)
    assert y[2:, 1].isnan().all()
    assert y[:2].isfinite().all()
    assert y[:, [0, 2, 3, 4, 5]].isfinite().all()
    assert gradients[0][:, [0, 2, 3, 5]].isfinite().all()
    assert not gradients[0][:4, 4].isfinite().any()
    assert gradients[4].isnan().any()
    check_case_stats(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_stats_through_time(dtype, layout):
    """Every field of every step; gradients have the same bits without."""
    options = dict(LAYOUTS[layout])
    reverse = options.pop("reverse", False)
    gain = 1.0 if dtype is torch.bfloat16 else 3.0  # which would enlarge every rounding in turn
    inputs, batch_sizes = layer_inputs(7, 4, 5, 19, dtype=dtype, gain=gain, **options)
    time_stats = gk.new_time_stats(9)
    case = layer_case(inputs, batch_sizes, reverse, time_stats=time_stats)
    results = differentiate(case.function, case.inputs, case.dys)
    check_time_stats(time_stats, expected_steps(inputs, case.dys, batch_sizes, reverse), dtype)
    same(results, differentiate(layer_case(inputs, batch_sizes, reverse, case.dys).function, case.inputs, case.dys))


@pytest.mark.parametrize("layout", ["padded", "packed", "packed reverse", "projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stats_of_vanishing_gradients(dtype, layout):
    """A loss at the end alone, |dh| down to 1e-60: far below the smallest float32. The gradients are those without."""
    options = dict(LAYOUTS[layout])
    reverse = options.pop("reverse", False)
    if "lengths" in options:
        options["lengths"] = (90, 90, 60)
    inputs, batch_sizes = layer_inputs(90, 3, 2, 8, dtype=dtype, gain=0.2, **options)
    inputs = tuple(t if t is None else t - 0.8 * (k in (5, 6)) for k, t in enumerate(inputs))  # f is small
    time_stats = gk.new_time_stats(90)
    P = 3 if "P" in options else 8
    y = torch.zeros((*inputs[0].shape[:-1], P), dtype=dtype)
    dys = (y, 1e-20 * randn(3, P, dtype=dtype), 1e-20 * randn(3, 8, dtype=dtype))
    case = layer_case(inputs, batch_sizes, reverse, dys, time_stats=time_stats)
    results = differentiate(case.function, case.inputs, case.dys)
    exact = differentiate(case.exact, case.inputs, case.dys, torch.float64)
    for found, value in zip(results[1], exact[1], strict=True):  # back in their own scale, subnormal or zero as may be
        if found is not None:
            torch.testing.assert_close(found, value.to(dtype), rtol=1e-3, atol=1e-42)
    expected = expected_steps(inputs, dys, batch_sizes, reverse)
    assert min(expected["dc"]) < 1e-60
    check_time_stats(time_stats, expected, dtype)
    same(results, differentiate(layer_case(inputs, batch_sizes, reverse, dys).function, case.inputs, case.dys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stats_of_losses_far_apart(dtype):
    """What has vanished meets gradients of any other size on its way: nothing overflows, nothing is lost."""
    inputs, _ = layer_inputs(60, 3, 2, 17, dtype=dtype, gain=0.3)
    dy = torch.zeros(60, 3, 17, dtype=dtype)
    for t, size in ((59, 1e-10), (55, 1e30), (30, 1e-25), (20, 1.0), (19, 1e25), (1, 1e-38)):
        dy[t] = size * randn(3, 17)
    time_stats = gk.new_time_stats(60)
    case = layer_case(inputs, dys=(dy, None, None), time_stats=time_stats)
    check_results(
        differentiate(case.function, inputs, case.dys),
        differentiate(plain_layer, inputs, case.dys),
        differentiate(plain_layer, inputs, case.dys, torch.float64),
        {k: 1e31 for k in ("d0", "d1", "d2", "d3", "d4", "d5", "d6")} | {f"y{k}": 16.0 for k in range(3)},
    )
    check_time_stats(time_stats, expected_steps(inputs, case.dys), dtype)


def test_stats_of_steps_merge():
    """Two calls in one row are one call of a larger batch; steps beyond the room are not recorded, and row 0 says so."""
    inputs, _ = layer_inputs(5, 4, 3, 6)
    dys = layer_case(inputs).dys
    time_stats, whole = gk.new_time_stats(3), gk.new_time_stats(8)
    differentiate(layer_case(inputs, dys=dys, time_stats=whole).function, inputs, dys)
    for half in (slice(0, 2), slice(2, 4)):
        part = (inputs[0][:, half], inputs[1][half], inputs[2][half], *inputs[3:])
        part_dys = (dys[0][:, half], dys[1][half], dys[2][half])
        differentiate(layer_case(part, dys=part_dys, time_stats=time_stats).function, part, part_dys)
    assert time_stats[0, :2].tolist() == [5, 2]
    torch.testing.assert_close(time_stats[1:], whole[1:4], rtol=1e-6, atol=0)


ERRORS = (
    (dict(x=torch.ones(3, 4)), gk.ArgumentError, r"x must have shape \(T, B, D\), got \(3, 4\)"),
    (dict(x=torch.ones(0, 2, 4)), gk.ArgumentError, "Expected sequence length to be larger than 0 in RNN"),
    (dict(bias_hh=None), gk.ArgumentError, "bias_ih and bias_hh must be given together, got one of them"),
    (dict(batch_sizes=torch.ones(3).long()), gk.ArgumentError, r"x must have shape \(rows, D\) where batch_sizes are given"),
    (dict(time_stats=torch.zeros(4, 12)), TypeError, "time_stats must be float64, got torch.float32"),
    (dict(time_stats=torch.zeros(4, 8).double()), gk.ArgumentError, r"time_stats must have shape .*, got \(4, 8\)"),
    (dict(time_stats=torch.zeros(12, 4).double().t()), gk.ArgumentError, "time_stats must be contiguous"),
)


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    names = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    with pytest.raises(error, match=f"^lstm_layer: .*{message}") as caught:
        gk.lstm_layer(**{**dict(zip(names, layer_inputs(3, 2, 4, 5)[0], strict=True)), **arguments})
    assert caught.type is error


@pytest.mark.parametrize("sizes", [(2, 2), (1, 2), (2, 3), (2, 0), (2, 1, 1)], ids=str)
def test_bad_batch_sizes(sizes):
    inputs, _ = layer_inputs(0, 0, 4, 5, lengths=(2, 1))
    with pytest.raises(ValueError, match=r"^lstm_layer: batch_sizes must"):
        gk.lstm_layer(*inputs, batch_sizes=torch.tensor(sizes))
