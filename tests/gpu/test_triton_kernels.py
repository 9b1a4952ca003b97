"""The Triton kernels against eager PyTorch: interpreted on CPU tensors, or on a GPU (see on_triton.py).

test_triton.py runs this file in a process of its own. The ops' whole test files run on the kernels in `make slow`.
"""

import mmap
import sys
from functools import partial

import pytest
import torch
from cases import add_layer_norm_case, gelu_case, layer_norm_case, make_case, probe_case, residual_case
from checks import (
    EXTREMES,
    check_accumulation,
    check_case,
    check_case_stats,
    check_repeatable,
    same,
    spoil,
    with_stats,
)

import gradkernels as gk
from gradkernels.telemetry import merge_slots
from gradkernels.testing import DTYPES, differentiate, lay_out, randn

pytestmark = pytest.mark.skipif("on_triton" not in sys.modules, reason="run by test_triton.py in a process of its own")
POINTWISE = ("gelu", "residual", "probe")
NORMS = ("layer_norm", "add_layer_norm")
OPS = (*POINTWISE, *NORMS)
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 1367), (4, 4104)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", POINTWISE)
def test_pointwise(op, dtype, shape):
    """No elements, one, a number that takes the scalar path, several blocks a program."""
    check_case(make_case(op, *shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_tanh(dtype):
    check_case(gelu_case(randn(9, 500, dtype=dtype) * 3, approximate="tanh"))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 3), (19, 48), (7, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NORMS)
def test_rows_in_registers(op, dtype, shape):
    """No rows, one element, fewer columns than a block, whole blocks and a tail of rows."""
    check_case(make_case(op, *shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NORMS)
def test_long_rows(op, dtype):
    """Rows that do not stay in registers, in blocks of columns the last of which is not whole; two blocks of rows a program."""
    check_case(make_case(op, 9, 16600 if op == "layer_norm" else 8300, dtype=dtype))


@pytest.mark.parametrize("columns", [700, 20000])
def test_large_mean(columns):
    """The variance is taken around the mean, in both forms."""
    x, weight, bias = randn(3, columns, mean=1000.0), randn(columns, mean=1.0), randn(columns)
    check_case(layer_norm_case(x, weight, bias))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_residual_and_parameters(dtype):
    x, residual, weight, bias = randn(7, 300, dtype=dtype), randn(7, 300), randn(300, mean=1.0), randn(300)
    check_case(add_layer_norm_case(x, residual, weight, bias))


@pytest.mark.parametrize("missing", ["dy", "dnew_residual", "weight", "bias", "parameters"])
def test_absent_arguments(missing):
    x, residual, weight, bias = randn(6, 70), randn(6, 70), randn(70, mean=1.0), randn(70)
    gone = {"dy": ("weight", "bias"), "parameters": ("weight", "bias")}.get(missing, (missing,))
    weight, bias = (None if name in gone else p for name, p in (("weight", weight), ("bias", bias)))
    check_case(add_layer_norm_case(x, residual, weight, bias, **({missing: None} if missing.startswith("d") else {})))
    if not missing.startswith("d"):
        check_case(layer_norm_case(x, weight, bias))


@pytest.mark.parametrize("missing", ["dskip", "dbranch"])
def test_residual_with_one_gradient(missing):
    check_case(residual_case(randn(3, 50), **{missing: None}))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "scalar"])
def test_layouts(layout):
    """Inputs and gradients of any strides: read in place where rows are consecutive, else copied."""
    x, dy, dtype = randn(6, 10, 33), randn(6, 10, 33), torch.float32
    check_case(gelu_case(lay_out(x, layout), lay_out(dy, layout)))
    check_case(gelu_case(x, lay_out(dy, layout)))
    check_case(residual_case(x, lay_out(dy, layout), dy))
    weight, bias = randn(33, dtype=dtype, mean=1.0), randn(33, dtype=dtype)
    check_case(layer_norm_case(lay_out(x, layout), weight, bias, lay_out(dy, layout)))
    check_case(add_layer_norm_case(x, lay_out(x.flip(0), layout), weight, bias, dy, lay_out(dy, layout)))
    check_case(layer_norm_case(x[:, ::2], weight, bias, dy[:, 1::2]))  # rows with a stride of their own


def rows_far_apart(rows, columns, stride):
    """(rows, columns) of bfloat16, `stride` elements apart, in memory that is only there where it is touched."""
    memory = mmap.mmap(-1, 2 * (rows * stride + columns), flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((rows, columns), (stride, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU can have memory that is not there; a GPU cannot")
def test_offsets_beyond_int32():
    """Rows more than 2^31 elements apart, as a view of a large tensor has them."""
    near = randn(3, 64, dtype=torch.bfloat16)
    x, dy = rows_far_apart(3, 64, 2**30 + 2**29), rows_far_apart(3, 64, 2**30 + 2**29)
    x.copy_(near)
    dy.copy_(near.cos())
    weight, bias = randn(64, dtype=torch.bfloat16, mean=1.0), randn(64, dtype=torch.bfloat16)
    far, close = layer_norm_case(x, weight, bias, dy), layer_norm_case(near, weight, bias, near.cos())
    same(with_stats(far)[0], with_stats(close)[0])
    assert torch.equal(with_stats(far)[1], with_stats(close)[1])


@pytest.mark.parametrize(("dtype", "scale"), EXTREMES, ids=str)
@pytest.mark.parametrize("op", ["gelu", "layer_norm", "probe"])
def test_stats_extremes(op, dtype, scale):
    """Squares that over- or underflow: the exact count takes over."""
    check_case_stats(make_case(op, 5, 40, dtype=dtype, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_stats_special_values(op, dtype):
    check_case_stats(spoil(make_case(op, 5, 130, dtype=dtype)))


@pytest.mark.parametrize("op", NORMS)
def test_stats_special_values_of_long_rows(op):
    check_case_stats(spoil(make_case(op, 2, 8300, dtype=torch.bfloat16)))


@pytest.mark.parametrize("op", OPS)
def test_stats_accumulate_and_repeat(op):
    check_accumulation(op)
    check_repeatable(make_case(op, 5, 37))


def test_stats_of_overflow_to_infinity():
    """A dx beyond float16 is stored as infinity, counted as such, and kept out of the sums."""
    check_case_stats(probe_case(randn(40, dtype=torch.float16) * 1e5))
    check_case_stats(residual_case(randn(40, dtype=torch.float16), *(randn(40, dtype=torch.float16) * 4e4 for _ in range(2))))


def test_programs_beyond_the_cells():
    """No more programs run than a row has cells: with one cell, a table of several sites is written in its own rows."""
    for op, shape, numel in (("gelu", (9, 4096), [9 * 4096] * 2), ("layer_norm", (40, 520), [40 * 520] * 2 + [520] * 2)):
        case = make_case(op, *shape)
        table = torch.zeros(len(case.ports) + 9, 1, 8, dtype=torch.float64)
        differentiate(partial(case.function, stats=table[: len(case.ports)]), case.inputs, case.dys)
        assert table[: len(case.ports), 0, 0].tolist() == numel
        assert not table[len(case.ports) :].any()


def test_cells_of_their_own():
    """Every program adds to its own cell: on a GPU two of them would lose each other's sums in a shared one."""
    case = make_case("gelu", 9, 4096)
    stats = torch.zeros(2, 3, 8, dtype=torch.float64)
    case.function(case.inputs[0].requires_grad_(), stats=stats).backward(case.dys[0])
    assert (stats[:, :, 0] > 0).all()
    assert stats[:, :, 0].sum(1).tolist() == [9 * 4096] * 2
    assert stats[:, :, 1].tolist() == [[1, 0, 0]] * 2  # the first program counts the call


def test_take_rows():
    """One row a port, and an empty table afterwards."""
    stats = torch.rand(7, 133, 8, dtype=torch.float64)
    expected = merge_slots(stats)
    rows = torch.full_like(expected, torch.nan)
    torch.ops.gradkernels.take_rows(stats, rows)
    torch.testing.assert_close(rows, expected)
    assert not stats.any()


def test_modules():
    """A model of modules, watched, on the kernels."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    watch = gk.watch(model)
    model(torch.randn(4, 8)).sum().backward()
    watch.step()
    assert {record.port for record in watch.records()} >= {"dy", "dx", "dweight", "dbias"}
