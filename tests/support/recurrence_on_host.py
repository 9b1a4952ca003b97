"""The recurrences of csrc/cuda on the host, through tests/cuda_emulator/cuda_on_host.cpp, and what they are compared with.

Each step forward is compared with its formula in float64, from what the recurrence itself gave for the step before, so that the
tolerance is the rounding of one step. The backward recurrence is compared as a whole, with dG rounded as the recurrence rounds
it.
"""

import ctypes
import math
import shutil
import subprocess
from ctypes import POINTER, Structure, byref, c_double, c_int32, c_int64
from pathlib import Path

import numpy as np
import pytest
import torch

from gradkernels.ops.lstm_layer import order_of, previous_rows, step_backward, step_forward

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "cuda_emulator" / "cuda_on_host.cpp"
COMPILER = shutil.which("g++")
H100 = (132, 232448)  # multiprocessors, bytes of shared memory a block may have
NUM_SUMS = 11
DTYPES = (torch.bfloat16, torch.float16)
DONE, GIVEN_UP, NO_PLAN = 0, 1, 2
TILING = ("programs", "M", "local", "unit_warps", "row_warps", "row_tiles")
TILING = (*TILING, "slices", "groups", "shared_weights", "shared_bytes", "cycles")


class Request(Structure):
    """Its twin is in tests/cuda_emulator/cuda_on_host.cpp."""

    _fields_ = (
        [(name, c_int64) for name in ("T", "B", "H")]
        + [("offsets", POINTER(c_int64))]
        + [(name, c_int32) for name in ("reverse", "half", "sms", "shared_bytes", "M", "unit_warps", "row_warps", "row_tiles")]
        + [(name, c_int32) for name in ("seed", "dawdling", "silent_block", "missing_blocks")]
        + [("timeout_seconds", c_double)]
    )


def build(folder):
    """The kernels' body as a library of the host, made in `folder`."""
    if COMPILER is None:
        pytest.skip("g++ is not there to compile the kernels' body")
    library = folder / "cuda_on_host.so"
    options = ["-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    subprocess.run([COMPILER, *options, "-o", library, SOURCE], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def tiling_of_request(body, request, backward):
    """How the recurrence would be laid out: {name in TILING: number}."""
    values = (c_int64 * len(TILING))()
    body.tiling(byref(request), int(backward), values)
    return dict(zip(TILING, values, strict=True))


class Layer:
    """One layer with random weights and inputs on an H100, and what the recurrences make of them. `more`: fields of Request."""

    def __init__(self, body, B, H, sizes, dtype=torch.bfloat16, reverse=False, packed=False, gain=1.0, **more):
        torch.manual_seed(B * H + len(sizes))
        self.body, self.B, self.H, self.sizes, self.dtype, self.reverse = body, B, H, sizes, dtype, reverse
        rows = sum(sizes)
        self.weight = (gain * H**-0.5 * torch.randn(4 * H, H)).to(dtype)
        self.h0, self.c0 = (0.5 * torch.randn(B, H)).to(dtype), 0.5 * torch.randn(B, H)
        self.x = 2 * torch.randn(rows, 4 * H)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        offsets = self.offsets.ctypes.data_as(POINTER(c_int64)) if packed else None
        fields = {"seed": 1, "dawdling": 0, "silent_block": -1, "missing_blocks": 0, "timeout_seconds": 120.0} | more
        self.request = Request(len(sizes), B, H, offsets, reverse, dtype is torch.float16, *H100)
        for name, value in fields.items():
            setattr(self.request, name, value)

    def tiling(self, backward):
        return tiling_of_request(self.body, self.request, backward)

    def forward(self):
        """Runs the recurrence: its return code. Results are NaN where nothing is written."""
        self.gates, self.cells = self.x.clone(), torch.full((len(self.x), self.H), math.nan)
        self.y = torch.full((len(self.x), self.H), math.nan, dtype=self.dtype)
        inputs = (self.weight, self.h0, self.c0, self.gates, self.cells, self.y)
        return self.body.forward(byref(self.request), c_int64(len(self.x)), *map(pointer, inputs))

    def backward(self, dy, dh_n, dc_n, telemetry=True):
        self.dy, self.dh_n, self.dc_n = dy, dh_n, dc_n
        self.dh, self.dc = dh_n.clone(), dc_n.clone()
        self.dgates = torch.full((len(self.x), 4 * self.H), math.nan, dtype=self.dtype)
        T, programs = len(self.sizes), self.tiling(True)["programs"]
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


def backward_reference(layer):
    """(dgates, dh, dc, dh_recurrent of every step, dh0, dc0) in float64, but dG is passed on in the recurrence's dtype.

    A power of two is put on dG before it is rounded, as large as the step allows: what the recurrence's own scale is for.
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
    """All outputs against backward_reference. Roundings of dG may fall the other way, each at most eps / 2 of it."""
    dgates, dhs, dcs, recurrent, dh0, dc0 = backward_reference(layer)
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
