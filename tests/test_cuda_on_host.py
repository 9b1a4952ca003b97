"""The body of the CUDA kernels, executed on the host: blocks are threads, barriers and matrix fragments mean what they mean on
a device (tests/device_on_host.h). Each step forward is compared with its formula in float64, from what the walk itself gave for
the step before, so that the tolerance is the rounding of one step. The walk back is compared as a whole, with dG rounded as the
walk rounds it.
"""

import ctypes
import math
import shutil
import subprocess
import time
from ctypes import POINTER, Structure, byref, c_double, c_int32, c_int64
from pathlib import Path

import numpy as np
import pytest
import torch

from gradkernels.ops.lstm_layer import order_of, previous_rows, step_backward, step_forward

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "cuda_on_host.cpp"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not there to compile the kernels' body")
H100 = (132, 232448)  # multiprocessors, bytes of shared memory a block may have
NUM_SUMS = 11
DTYPES = (torch.bfloat16, torch.float16)
DONE, GIVEN_UP, NO_PLAN = 0, 1, 2
PLAN = ("programs", "M", "local", "unit_warps", "row_warps", "row_tiles")
PLAN = (*PLAN, "slices", "groups", "shared_weights", "shared_bytes", "cycles")


class Request(Structure):
    """Its twin is in tests/cuda_on_host.cpp."""

    _fields_ = (
        [(name, c_int64) for name in ("T", "B", "H")]
        + [("offsets", POINTER(c_int64))]
        + [(name, c_int32) for name in ("reverse", "half", "sms", "shared_bytes", "M", "unit_warps", "row_warps", "row_tiles")]
        + [(name, c_int32) for name in ("seed", "dawdling", "silent_block", "missing_blocks")]
        + [("patience_seconds", c_double)]
    )


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """The kernels' body as a library of the host."""
    library = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    options = ["-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    subprocess.run([COMPILER, *options, "-o", library, SOURCE], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def plan_of(body, request, backward):
    """How the walk would be laid out: {name in PLAN: number}."""
    values = (c_int64 * len(PLAN))()
    body.plan(byref(request), int(backward), values)
    return dict(zip(PLAN, values, strict=True))


class Layer:
    """One layer with random weights and inputs on an H100, and what the walks make of them. `more`: fields of Request."""

    def __init__(self, body, B, H, sizes, dtype=torch.bfloat16, reverse=False, packed=False, gain=1.0, **more):
        torch.manual_seed(B * H + len(sizes))
        self.body, self.B, self.H, self.sizes, self.dtype, self.reverse = body, B, H, sizes, dtype, reverse
        rows = sum(sizes)
        self.weight = (gain * H**-0.5 * torch.randn(4 * H, H)).to(dtype)
        self.h0, self.c0 = (0.5 * torch.randn(B, H)).to(dtype), 0.5 * torch.randn(B, H)
        self.x = 2 * torch.randn(rows, 4 * H)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        offsets = self.offsets.ctypes.data_as(POINTER(c_int64)) if packed else None
        fields = {"seed": 1, "dawdling": 0, "silent_block": -1, "missing_blocks": 0, "patience_seconds": 120.0} | more
        self.request = Request(len(sizes), B, H, offsets, reverse, dtype is torch.float16, *H100)
        for name, value in fields.items():
            setattr(self.request, name, value)

    def plan(self, backward):
        return plan_of(self.body, self.request, backward)

    def forward(self):
        """Runs the walk: its return code. Results are NaN where nothing is written."""
        self.gates, self.cells = self.x.clone(), torch.full((len(self.x), self.H), math.nan)
        self.y = torch.full((len(self.x), self.H), math.nan, dtype=self.dtype)
        inputs = (self.weight, self.h0, self.c0, self.gates, self.cells, self.y)
        return self.body.forward(byref(self.request), c_int64(len(self.x)), *map(pointer, inputs))

    def backward(self, dy, dh_n, dc_n, telemetry=True):
        self.dy, self.dh_n, self.dc_n = dy, dh_n, dc_n
        self.dh, self.dc = dh_n.clone(), dc_n.clone()
        self.dgates = torch.full((len(self.x), 4 * self.H), math.nan, dtype=self.dtype)
        T, programs = len(self.sizes), self.plan(True)["programs"]
        self.partials = torch.full((T, programs, NUM_SUMS), math.nan, dtype=torch.float64) if telemetry else None
        self.exponents = torch.full((T,), -(2**30), dtype=torch.int32) if telemetry else None
        inputs = (self.weight, dy, self.c0, self.gates, self.cells)
        outputs = (self.dh, self.dc, self.dgates, self.partials, self.exponents)
        return self.body.backward(byref(self.request), c_int64(len(self.x)), *map(pointer, (*inputs, *outputs, None)), 0, 0)


def check_forward(layer):
    """Every step against its formula, from the y and cells of the step before; y may differ by one rounding."""
    assert layer.forward() == DONE
    h = previous_rows(layer.y.double(), layer.h0.double(), layer.sizes, layer.reverse)
    c = previous_rows(layer.cells.double(), layer.c0.double(), layer.sizes, layer.reverse)
    gates, cells, y = step_forward(layer.x.double() + h @ layer.weight.double().mT, c)
    rounding = 4 * layer.H**0.5 * 2.0**-24
    assert (layer.gates - gates).abs().max() <= rounding
    assert (layer.cells - cells).abs().max() <= 4 * rounding
    assert ((layer.y - y).abs() <= 4 * rounding + torch.finfo(layer.dtype).eps / 2 * y.abs()).all()


def walk_back(layer):
    """(dgates, dh, dc, dh_recurrent of every step, dh0, dc0) in float64, but dG is passed on in the walk's dtype.

    A power of two is put on dG before it is rounded, as large as the step allows: what the walk's own scale is for.
    """
    sizes, order = layer.sizes, order_of(layer.sizes, not layer.reverse)
    gates, cells = (v.double().split(sizes) for v in (layer.gates, layer.cells))
    before = previous_rows(layer.cells.double(), layer.c0.double(), sizes, layer.reverse).split(sizes)
    dy = None if layer.dy is None else layer.dy.double().split(sizes)
    dh, dc, weight, live = layer.dh_n.double(), layer.dc_n.double(), layer.weight.double(), 0
    dgates, dhs, dcs, recurrent = ([None] * len(sizes) for _ in range(4))
    for t in order:
        size = sizes[t]
        recurrent[t] = dh[: min(size, live)]
        dhs[t] = dh[:size] if dy is None else dh[:size] + dy[t]
        dgates[t], dcs[t], carried = step_backward(dhs[t], dc[:size], gates[t], cells[t].tanh(), before[t])
        largest = dgates[t].abs().max().item()
        scale = 2.0 ** -math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
        passed_on = (dgates[t] * scale).to(layer.dtype).double() / scale
        dh = torch.cat([passed_on @ weight, dh[size:]])
        dc = torch.cat([carried, dc[size:]])
        live = size
    return dgates, dhs, dcs, recurrent, dh, dc


def norm_of(v):
    """The Euclidean norm, also of what is too small to be squared."""
    largest = v.abs().max().item() if v.numel() else 0.0
    return (v / largest).norm().item() * largest if largest else 0.0


def check_backward(layer):
    """All outputs against walk_back. What differs is roundings of dG that fall the other way, each at most eps / 2 of it."""
    dgates, dhs, dcs, recurrent, dh0, dc0 = walk_back(layer)
    eps = torch.finfo(layer.dtype).eps
    smallest = torch.finfo(layer.dtype).smallest_normal * eps
    for t, (found, expected) in enumerate(zip(layer.dgates.double().split(layer.sizes), dgates, strict=True)):
        step = max(expected.abs().max().item(), dhs[t].abs().max().item(), dcs[t].abs().max().item())
        error = eps * (expected.abs() + step) + smallest
        beyond = expected.abs() + error >= torch.finfo(layer.dtype).max  # an infinity there is right
        assert (((found - expected).abs() <= error) | (beyond & found.isinf())).all(), t
    for found, expected in ((layer.dh, dh0), (layer.dc, dc0)):
        # float16 has no exponents to keep a row's digits beside one that is thousands of times as large.
        largest = expected.abs().max() if layer.dtype is torch.float16 else expected.abs().amax(1, True)
        assert ((found - expected).abs() <= 4 * eps * largest + 2.0**-149).all()
    if layer.partials is None:
        return
    assert not layer.partials.isnan().any()
    sums = layer.partials.sum(1)
    for t in range(len(layer.sizes)):
        for k, exact in enumerate((dhs[t], dcs[t], recurrent[t])):
            norm = math.ldexp(math.sqrt(sums[t, k].item()), -layer.exponents[t].item())
            assert norm == pytest.approx(norm_of(exact), rel=2 * eps, abs=1e-150 * norm_of(dhs[t])), (t, k)
        i, f, g, o = layer.gates.split(layer.sizes)[t].chunk(4, -1)
        counts = (i < 0.1, i > 0.9, f < 0.1, f > 0.9, g.abs() > 0.9, o < 0.1, o > 0.9)
        assert sums[t, 3:10].tolist() == [count.sum().item() for count in counts], t
        assert sums[t, 10].item() == pytest.approx(f.double().sum().item(), rel=1e-6), t


def gradients(layer, scale=1.0, dy=True):
    """Random (dy, dh_n, dc_n)."""
    rows, B, H = sum(layer.sizes), layer.B, layer.H
    return (scale * torch.randn(rows, H)).to(layer.dtype) if dy else None, scale * torch.randn(B, H), scale * torch.randn(B, H)


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
def test_walks(body, shape, dtype, reverse):
    B, H, sizes = SHAPES[shape]
    layer = Layer(body, B, H, sizes, dtype, reverse, packed="packed" in shape)
    assert layer.plan(False)["local"] == layer.plan(True)["local"] == (H <= 128)
    check_forward(layer)
    assert layer.backward(*gradients(layer)) == DONE
    check_backward(layer)


# (M, unit warps, row warps, row tiles), and a device as large as that takes: what the planner would choose for sizes too large
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
    plan = layer.plan(backward)
    assert plan["groups"] == 2
    assert (plan["shared_weights"] > 0) == ("beyond" in shape)
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
    dhs = walk_back(layer)[1]
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
    assert 0 < norm_of(walk_back(layer)[3][4]) < 1e-20
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
    assert layer.plan(True)["groups"] == 2
    assert layer.backward(*gradients(layer, dy=False)) == DONE
    assert 0 < norm_of(walk_back(layer)[1][2]) < 1e-160
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
    for name, value in (trouble | {"patience_seconds": 0.5}).items():
        setattr(layer.request, name, value)
    start = time.monotonic()
    assert (layer.backward(*given) if backward else layer.forward()) == GIVEN_UP
    assert time.monotonic() - start < 60


def test_plans(body):
    """What fits: all of H up to 2048 at a small batch on an H100, nothing that is more than the device holds."""

    def programs(B, H, device=H100, backward=False):
        return plan_of(body, Request(B=B, H=H, sms=device[0], shared_bytes=device[1]), backward)["programs"]

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
