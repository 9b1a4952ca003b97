"""What the recurrences of csrc/cuda do at the edges: beside what is not finite or only zeros, behind the last unit."""

import math

import pytest
import torch
from recurrence_on_host import (
    DONE,
    DTYPES,
    Layer,
    backward_reference,
    check_backward,
    check_forward,
    gradients,
    norm_of,
)

from gradkernels.ops.lstm_layer import step_forward


def outputs(layer):
    return [tensor.clone() for tensor in (layer.dgates.view(len(layer.sizes), layer.B, -1), layer.dh[None], layer.dc[None])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("H", [20, 132])
def test_beside_what_is_not_finite(body, H, value, dtype):
    """Other sequences get what they get without it: its magnitude is in no scale."""
    layer = Layer(body, 3, H, [3] * 5, dtype)
    check_forward(layer)
    dy, dh_n, dc_n = gradients(layer)
    assert layer.backward(dy, dh_n, dc_n) == DONE
    clean = outputs(layer)
    dy[7, 5] = value  # step 2, sequence 1
    assert layer.backward(dy, dh_n, dc_n) == DONE
    for found, expected in zip(outputs(layer), clean, strict=True):
        error = (found - expected)[:, [0, 2]].abs().double()
        assert error.max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_has_no_scale(body, value):
    layer = Layer(body, 3, 20, [3] * 5)
    check_forward(layer)
    dy, dh_n, dc_n = gradients(layer, 1e-20)
    assert layer.backward(dy, dh_n, dc_n) == DONE
    assert layer.exponents.gt(0).all()
    dy[7, 5] = value
    assert layer.backward(dy, dh_n, dc_n) == DONE
    assert layer.exponents.gt(0).tolist() == [False, False, False, True, True]
    assert layer.exponents[:3].eq(0).all()


def test_a_group_of_zeros_beside_a_large_one(body):
    """Its sums stay zeros when the others' scale is brought down."""
    layer = Layer(body, 9, 20, [9] * 4)
    check_forward(layer)
    assert layer.tiling(True)["groups"] == 2
    given = gradients(layer, 1e30, dy=False)
    for tensor in given[1:]:
        tensor[8] = 0
    assert layer.backward(*given) == DONE
    assert layer.exponents.lt(0).all()
    check_backward(layer)


@pytest.mark.parametrize("B", [3, 9], ids=["one group", "two groups"])
@pytest.mark.parametrize("H", [20, 132])
def test_only_zeros(body, H, B):
    layer = Layer(body, B, H, [B] * 4)
    check_forward(layer)
    assert layer.backward(*gradients(layer, 0.0)) == DONE
    assert layer.exponents.eq(0).all()
    check_backward(layer)


def test_dc_far_above_dh(body):
    """float16's scale is chosen by the larger of both: dG of a large dc, through a W_hh that lets little through, is finite."""
    layer = Layer(body, 3, 20, [3] * 6, torch.float16, gain=1e-4)
    check_forward(layer)
    _, dh_n, dc_n = gradients(layer)
    assert layer.backward(None, 0 * dh_n, dc_n) == DONE
    assert layer.dh.isfinite().all()
    check_backward(layer)


def test_dh_far_above_dc(body):
    """The same where tanh(c) is flat, so that dh goes on through the o gate alone."""
    layer = Layer(body, 3, 20, [3] * 2, torch.float16)
    layer.c0.fill_(9.0)
    layer.x.view(-1, 4, 20)[:, 1] = 8.0
    check_forward(layer)
    _, dh_n, dc_n = gradients(layer)
    assert layer.backward(None, dh_n, 0 * dc_n) == DONE
    dh0 = backward_reference(layer)[4]  # float32's 1 - tanh(c)^2 leaves dc few digits
    assert ((layer.dh - dh0).abs() <= 4 * torch.finfo(torch.float16).eps * dh0.abs().max()).all()


def test_one_scale_whoever_is_late(body):
    """A block that is late to look at the flags of a round finds that round's magnitudes, though another is a round ahead."""
    found = []
    for seed in range(8):
        layer = Layer(body, 3, 40, [3] * 20, torch.float16, gain=0.1, seed=seed, dawdling=3)
        layer.request.M = layer.request.unit_warps = layer.request.row_warps = layer.request.row_tiles = 1
        assert layer.tiling(True)["programs"] == 3
        any_states(layer)
        layer.gates.view(-1, 4, 40)[:, 1] *= 0.1
        assert layer.backward(*gradients(layer, dy=False)) == DONE
        assert layer.exponents.unique().numel() > 10
        check_backward(layer)
        found.append([tensor.clone() for tensor in (layer.dgates, layer.dh, layer.dc, layer.exponents, layer.partials)])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def any_states(layer):
    """Gates and cells that no forward recurrence has left, so that a large W_hh makes gradients grow."""
    layer.gates = 0.3 + 0.4 * torch.rand(len(layer.x), 4 * layer.H)
    layer.cells = torch.randn(len(layer.x), layer.H)


@pytest.mark.parametrize("dtype", DTYPES)
def test_growth(body, dtype):
    """What grows at every step is scaled down: float16's exchange stays finite where the result is."""
    layer = Layer(body, 3, 20, [3] * 12, dtype, gain=30.0)
    any_states(layer)
    assert layer.backward(*gradients(layer, dy=False)) == DONE
    assert backward_reference(layer)[1][0].abs().max() > 1e6
    assert layer.dh.isfinite().all()
    check_backward(layer)


def test_growth_beyond_float32_beside_zeros(body):
    layer = Layer(body, 3, 20, [3] * 20, gain=30.0)
    any_states(layer)
    _, dh_n, dc_n = gradients(layer, 1e30)
    dh_n[1] = dc_n[1] = 0
    assert layer.backward(None, dh_n, dc_n) == DONE
    assert not layer.dh[[0, 2]].isfinite().any()
    assert layer.dh[1].eq(0).all()
    assert layer.dgates.view(20, 3, -1)[:, 1].eq(0).all()


def dc_alone(body, steps, dtype=torch.bfloat16):
    """A layer whose W_hh is 0 and whose gates are halves: what is carried is dc, times f."""
    layer = Layer(body, 3, 20, [3] * steps, dtype, gain=0.0)
    layer.gates, layer.cells = torch.full_like(layer.x, 0.5), torch.randn(3 * steps, 20)
    return layer, layer.gates.view(steps, 3, 4, 20)[:, :, 1]


# dtype, power of two of dc_n, whether a dy of 1.5 comes to the second step: exponents in the order of the recurrence.
EXPONENTS = [
    (torch.bfloat16, 20, False, [0, 0, 0, 0]),
    (torch.bfloat16, -20, False, [0, 0, 0, 0]),
    (torch.bfloat16, 40, False, [-40, -40, -40, -40]),
    (torch.bfloat16, -40, False, [40, 40, 40, 40]),
    (torch.bfloat16, -40, True, [40, 32, 32, 32]),
    (torch.float16, 2, False, [0, 0, 0, 0]),
    (torch.float16, 20, False, [-16, -16, -16, -16]),
    (torch.float16, -20, False, [24, 24, 24, 24]),
    (torch.float16, -20, True, [24, 7, 7, 7]),
]


@pytest.mark.parametrize(("dtype", "power", "comes", "exponents"), EXPONENTS)
def test_scales(body, dtype, power, comes, exponents):
    """bfloat16 is scaled beyond 2^32 either way only, float16's largest magnitude is kept between 2 and 256."""
    layer, f = dc_alone(body, 4, dtype)
    f.fill_(1.0)
    dy, zero = torch.zeros(12, 20, dtype=dtype), torch.zeros(3, 20)
    dy[6:9] = 1.5 * comes
    assert layer.backward(dy, zero, zero + 1.5 * 2.0**power) == DONE
    assert layer.exponents.flip(0).tolist() == exponents
    check_backward(layer)


def test_down_to_subnormals_in_one_step(body):
    """No factor is infinite, however far the largest magnitude falls."""
    layer, f = dc_alone(body, 3)
    f[2] = 1e-39
    zero = torch.zeros(3, 20)
    assert layer.backward(None, zero, zero + 1.5) == DONE
    assert layer.dc.isfinite().all()
    check_backward(layer)


def test_a_small_gradient_after_a_large_one_that_ended(body):
    """Where nothing is carried on, the next step's scale is its own."""
    layer, f = dc_alone(body, 4)
    f.zero_()
    dy, zero = torch.zeros(12, 20), torch.zeros(3, 20)
    dy[9:], dy[:3] = 1e30, 1e-30
    assert layer.backward(dy.to(layer.dtype), zero, zero) == DONE
    check_backward(layer)


def test_a_small_dy_beside_smaller_gradients(body):
    """A dy that float32 hardly holds is not lost in the scale of what has come back through time, which is far smaller."""
    layer = Layer(body, 3, 20, [3] * 40, gain=0.05)
    layer.x.view(-1, 4, 20)[:, 1] -= 8.0
    check_forward(layer)
    dy, dh_n, dc_n = gradients(layer, 1e-25)
    dy.zero_()
    dy.view(40, 3, 20)[4] = 1e-39
    assert layer.backward(dy, dh_n, dc_n) == DONE
    assert 0 < norm_of(backward_reference(layer)[3][4]) < 1e-50
    check_backward(layer)


@pytest.mark.parametrize("H", [20, 33, 132])
def test_weights_that_are_not_finite(body, H):
    """They stay in their own row of the product: none is read behind the end of another row."""
    layer = Layer(body, 3, H, [3])
    layer.weight[[1, 2 * H + 5], [0, 3]] = math.nan
    assert layer.forward() == DONE
    found = (layer.gates, layer.cells, layer.y)
    expected = step_forward(layer.x.double() + layer.h0.double() @ layer.weight.double().mT, layer.c0.double())
    for given, exact in zip(found, expected, strict=True):
        assert 0 < exact.isnan().sum() < exact.numel() / 4
        assert torch.equal(given.isnan(), exact.isnan())
