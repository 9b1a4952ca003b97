"""The body of the CUDA kernels, executed on the host: blocks are threads, barriers and matrix fragments mean what they mean on
a device (tests/cuda_emulator/device_on_host.h).
"""

import math
import time
from ctypes import c_int64

import pytest
import torch
from recurrence_on_host import (
    DONE,
    DTYPES,
    GIVEN_UP,
    H100,
    Layer,
    Request,
    backward_reference,
    check_backward,
    check_forward,
    gradients,
    norm_of,
    pointer,
    tiling_of_request,
)

SHAPES = {
    "one of everything": (1, 1, [1] * 3),
    "one block": (3, 17, [3] * 7),
    "one block, odd": (5, 33, [5] * 40),
    "one block, two groups": (9, 64, [9] * 2),
    "one block, all registers": (2, 128, [2] * 3),
    "grid, odd": (4, 129, [4] * 7),
    "grid, one step": (1, 130, [1]),
    "grid, groups": (11, 136, [11] * 3),
    "grid, long": (3, 130, [3] * 40),
    "packed": (5, 33, [5, 5, 4, 4, 2, 1, 1]),
    "packed, groups": (19, 65, [19, 12, 12, 8, 7, 1]),
    "packed, grid": (10, 130, [10, 9, 9, 2, 1]),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_recurrences(body, shape, dtype, reverse):
    B, H, sizes = SHAPES[shape]
    layer = Layer(body, B, H, sizes, dtype, reverse, packed="packed" in shape)
    assert layer.tiling(False)["local"] == layer.tiling(True)["local"] == (H <= 128)
    check_forward(layer)
    assert layer.backward(*gradients(layer)) == DONE
    check_backward(layer)


# (M, unit warps, row warps, row tiles), and a device as large as that takes: what the chooser would choose for sizes too large
# for a test. The last number of `device` is large enough for W_hh, or forces part of it out of the registers.
BY_HAND = {
    "warps over units": (False, (2, 2, 1, 1), 140),
    "warps over rows": (False, (2, 1, 2, 2), 140),
    "rows in turns": (False, (2, 1, 1, 3), 140),
    "wide tiles": (False, (4, 1, 1, 1), 140),
    "wide tiles, beyond the registers": (False, (4, 2, 2, 2), 200),
    "beyond the registers": (False, (2, 1, 8, 8), 260),
    "back, warps over units": (True, (1, 2, 1, 1), 140),
    "back, warps over rows": (True, (1, 1, 4, 4), 140),
    "back, wide tiles": (True, (2, 1, 1, 1), 140),
    "back, wide tiles, both": (True, (2, 2, 1, 1), 140),
    "back, beyond the registers": (True, (1, 1, 4, 4), 260),
}


@pytest.mark.parametrize("shape", BY_HAND)
def test_every_shape_of_a_block(body, shape):
    backward, by_hand, H = BY_HAND[shape]
    tiles = by_hand[-1]
    B = 8 * tiles + 3  # a second group, whose rows are not all there
    layer = Layer(body, B, H, [B, B, B - 4], packed=True)
    if backward:
        check_forward(layer)
    layer.request.M, layer.request.unit_warps, layer.request.row_warps, layer.request.row_tiles = by_hand
    tiling = layer.tiling(backward)
    assert tiling["groups"] == 2
    assert (tiling["shared_weights"] > 0) == ("beyond" in shape)
    if backward:
        assert layer.backward(*gradients(layer)) == DONE
        check_backward(layer)
    else:
        check_forward(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [20, 132])
def test_without_dy(body, H, dtype):
    layer = Layer(body, 3, H, [3] * 5, dtype)
    check_forward(layer)
    assert layer.backward(*gradients(layer, dy=False)) == DONE
    check_backward(layer)


@pytest.mark.parametrize("H", [20, 132])
def test_without_telemetry_the_same_bits(body, H):
    layer = Layer(body, 3, H, [3] * 5)
    check_forward(layer)
    given = gradients(layer)
    found = []
    for telemetry in (True, False):
        assert layer.backward(*given, telemetry) == DONE
        found.append([tensor.clone() for tensor in (layer.dgates.view(torch.int16), layer.dh, layer.dc)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-40, 1e10, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [20, 132])
def test_vanishing_and_large(body, H, dtype, scale):
    """dh_n and dc_n of any size vanish by many decades more, or explode: the norm of every step is right."""
    layer = Layer(body, 9, H, [9] * (40 if H < 128 else 20), dtype, gain=3.0 if scale > 1 else 0.2)
    layer.x -= 2.0 if scale < 1 else 0.0
    check_forward(layer)
    assert layer.backward(*gradients(layer, scale, dy=False)) == DONE
    dhs = backward_reference(layer)[1]
    shrunk = dhs[0].norm() / dhs[-1].norm()
    assert shrunk < 1e-7 if scale < 1 else shrunk > 1e-15
    check_backward(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [20, 132])
def test_two_losses(body, H, dtype):
    """What has come back through time is measured beside a dy that is 1e20 times as large."""
    layer = Layer(body, 3, H, [3] * 20, dtype, gain=0.05)
    layer.x.view(-1, 4, H)[:, 1] -= 8.0
    check_forward(layer)
    dy, dh_n, dc_n = gradients(layer)
    dy.view(20, 3, H)[[*range(4), *range(5, 19)]] = 0
    assert layer.backward(dy, 0 * dh_n, 0 * dc_n) == DONE
    assert 0 < norm_of(backward_reference(layer)[3][4]) < 1e-20
    check_backward(layer)


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("H", [20, 132])
def test_rows_that_come_and_go_while_others_vanish(body, H, reverse):
    """Rows that begin or end at a step are in no scale yet, or leave it."""
    layer = Layer(body, 20, H, list(range(20, 0, -1)), packed=True, reverse=reverse, gain=0.05)
    layer.x.view(-1, 4, H)[:, 1] -= 8.0
    check_forward(layer)
    assert layer.backward(*gradients(layer, 1e-25, dy=False)) == DONE
    assert layer.exponents[[4, 5, 6]].ne(0).all()
    check_backward(layer)


def test_groups_far_apart(body):
    """Groups of rows have scales of their own. One that is not there yet, or that has just begun, spoils no other's norm."""
    layer = Layer(body, 9, 20, [9, 9] + [8] * 23, packed=True, gain=0.1)
    layer.x.view(-1, 4, 20)[:, 1] -= 30.0
    layer.x.view(-1, 4, 20)[:, 0] -= 20.0
    check_forward(layer)
    assert layer.tiling(True)["groups"] == 2
    assert layer.backward(*gradients(layer, dy=False)) == DONE
    assert 0 < norm_of(backward_reference(layer)[1][2]) < 1e-160
    check_backward(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("H", [20, 132])
def test_not_finite(body, H, value, dtype):
    """What is not finite stays in its sequence, and ends in NaN, not in waiting for ever."""
    layer = Layer(body, 3, H, [3] * 5, dtype)
    check_forward(layer)
    dy, dh_n, dc_n = gradients(layer)
    dy[7, 5] = value  # step 2, sequence 1
    assert layer.backward(dy, dh_n, dc_n) == DONE
    dgates = layer.dgates.view(5, 3, -1)
    assert not layer.dh[1].isfinite().any()
    assert not dgates[:2, 1].isfinite().all()
    assert not layer.partials.sum(1)[:3, 0].isfinite().any()
    for untouched in (layer.dh[[0, 2]], dgates[:, [0, 2]], dgates[3:], layer.partials[3:]):
        assert untouched.isfinite().all()


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_blocks_that_dawdle(body, reverse):
    """The same bits whoever is late: all that one block reads of another has been waited for."""
    found = []
    for seed in range(4):
        layer = Layer(body, 10, 132, [10, 10, 9, 9, 9, 2, 1], reverse=reverse, packed=True, dawdling=2, seed=seed)
        check_forward(layer)
        assert layer.backward(*gradients(layer)) == DONE
        check_backward(layer)
        outputs = (layer.y.view(torch.int16), layer.gates, layer.dgates.view(torch.int16), layer.dh, layer.dc, layer.partials)
        found.append([tensor.clone() for tensor in outputs])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("trouble", [{"silent_block": 3}, {"missing_blocks": 1}], ids=["silent", "missing"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nobody_waits_for_ever(body, backward, trouble):
    """A block that never arrives, and a grid that is too small, end with an error."""
    layer = Layer(body, 3, 140, [3] * 4)
    check_forward(layer)
    given = gradients(layer)
    for name, value in (trouble | {"timeout_seconds": 0.5}).items():
        setattr(layer.request, name, value)
    start = time.monotonic()
    assert (layer.backward(*given) if backward else layer.forward()) == GIVEN_UP
    assert time.monotonic() - start < 60


def test_tilings(body):
    """What fits: all of H up to 2048 at a small batch on an H100, nothing that is more than the device holds."""

    def programs(B, H, device=H100, backward=False):
        return tiling_of_request(body, Request(B=B, H=H, sms=device[0], shared_bytes=device[1]), backward)["programs"]

    for H in (1, 64, 128, 129, 256, 768, 1024, 1500, 2048):
        for B in (1, 8, 16, 32):
            for backward in (False, True):
                found = programs(B, H, backward=backward)
                assert found in range(1, H100[0] + 1), (B, H)
    for B, H, device in ((16, 4224, H100), (1024, 768, H100), (16, 768, (7, H100[1])), (16, 128, (132, 8192))):
        assert programs(B, H, device) == programs(B, H, device, True) == 0


def test_conversions(body):
    """The host layer's own rounding is torch's."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for half, dtype in enumerate(DTYPES):
        values = bits.view(dtype).float()
        values = torch.cat([values, values * 1.0001, values * (1 + torch.finfo(dtype).eps / 2)])
        found = torch.empty(len(values), dtype=torch.int16)
        body.convert(half, c_int64(len(values)), pointer(values), pointer(found))
        assert torch.equal(found.view(dtype).float().nan_to_num(nan=7.5), values.to(dtype).float().nan_to_num(nan=7.5))
