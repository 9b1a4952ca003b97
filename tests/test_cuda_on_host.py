"""The body of the CUDA kernels, executed on the host: blocks are threads, barriers and matrix fragments mean what they mean on a
device (tests/device_on_host.h). Each step of a walk is compared with its formula in float64, from what the walk itself gave for
the step before, so that the tolerance is the rounding of one step and no error can hide in an accumulated one.
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

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "cuda_on_host.cpp"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not there to compile the kernels' body")
H100 = (132, 232448)  # multiprocessors, bytes of shared memory a block may have
NUM_SUMS = 11
DTYPES = (torch.bfloat16, torch.float16)
DONE, GIVEN_UP, NO_PLAN = 0, 1, 2
PLAN = ("programs", "M", "local", "unit_warps", "row_warps", "row_tiles", "slices", "groups", "shared_weights", "shared", "cycles")


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
    options = "-std=c++20 -O1 -fPIC -shared -pthread -Wall -Wextra -Werror -ffp-contract=off".split()
    subprocess.run([COMPILER, *options, "-o", library, SOURCE], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


class Layer:
    """One layer with random weights and inputs, and what the walks make of them. `device`: (multiprocessors, shared bytes)."""

    def __init__(self, body, B, H, sizes, dtype=torch.bfloat16, reverse=False, packed=False, device=H100, gain=1.0, shape=None, **more):
        torch.manual_seed(B * H + len(sizes))
        self.body, self.B, self.H, self.sizes, self.dtype, self.reverse = body, B, H, sizes, dtype, reverse
        rows = sum(sizes)
        self.weight = (gain * H**-0.5 * torch.randn(4 * H, H)).to(dtype)
        self.h0, self.c0 = (0.5 * torch.randn(B, H)).to(dtype), 0.5 * torch.randn(B, H)
        self.x = 2 * torch.randn(rows, 4 * H)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        offsets = self.offsets.ctypes.data_as(POINTER(c_int64)) if packed else None
        fields = {"seed": 1, "dawdling": 0, "silent_block": -1, "missing_blocks": 0, "patience_seconds": 120.0} | more
        M, *warps = shape or (0, 0, 0, 0)
        half = dtype is torch.float16
        self.request = Request(len(sizes), B, H, offsets, reverse, half, *device, M, *warps, **fields)

    def plan(self, backward):
        values = (c_int64 * len(PLAN))()
        self.body.plan(byref(self.request), int(backward), values)
        return dict(zip(PLAN, values, strict=True))

    def forward(self):
        """Runs the walk: its return code. Results are NaN where nothing is written."""
        self.gates, self.cells = self.x.clone(), torch.full((len(self.x), self.H), math.nan)
        self.y = torch.full((len(self.x), self.H), math.nan, dtype=self.dtype)
        inputs = (self.weight, self.h0, self.c0, self.gates, self.cells, self.y)
        return self.body.forward(byref(self.request), *map(pointer, inputs))

    def backward(self, dy, dh_n, dc_n, telemetry=True):
        self.dy, self.dh_n, self.dc_n = dy, dh_n, dc_n
        self.dh, self.dc = dh_n.clone(), dc_n.clone()
        self.dgates = torch.full((len(self.x), 4 * self.H), math.nan, dtype=self.dtype)
        T, programs = len(self.sizes), self.plan(True)["programs"]
        self.partials = torch.full((T, programs, NUM_SUMS), math.nan, dtype=torch.float64) if telemetry else None
        self.exponents = torch.full((T,), -(2**30), dtype=torch.int32) if telemetry else None
        inputs = (self.weight, dy, self.c0, self.gates, self.cells, self.dh, self.dc, self.dgates, self.partials, self.exponents)
        return self.body.backward(byref(self.request), *map(pointer, inputs))


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


if __name__ == "__main__":
    subprocess.run([COMPILER, *"-std=c++20 -O1 -g -fPIC -shared -pthread -ffp-contract=off -o /tmp/host.so".split(), SOURCE], check=True)
    lib = ctypes.CDLL("/tmp/host.so")
    import time
    for B, H, T in ((1, 1, 3), (3, 33, 4), (9, 64, 5), (4, 130, 4), (9, 200, 4)):
        for dt in DTYPES:
            l = Layer(lib, B, H, [B] * T, dt)
            t0 = time.time()
            check_forward(l)
            print(B, H, T, dt, l.plan(False), time.time() - t0, flush=True)
