"""What the walks of csrc/cuda do at the edges, on the host: beside what is not finite or only zeros, behind the last unit."""

import math

import pytest
import torch
from test_cuda_on_host import DONE, DTYPES, Layer, body, check_backward, check_forward, gradients, pytestmark, walk_back

from gradkernels.ops.lstm_layer import step_forward

__all__ = ["body", "pytestmark"]


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
    assert layer.plan(True)["groups"] == 2
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
    dh0 = walk_back(layer)[4]  # float32's 1 - tanh(c)^2 leaves dc few digits
    assert ((layer.dh - dh0).abs() <= 4 * torch.finfo(torch.float16).eps * dh0.abs().max()).all()


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
