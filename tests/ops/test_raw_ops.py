"""torch.ops.gradkernels.* on the CPU, called as no public function does: an error by name, never memory that is not theirs."""

from contextlib import nullcontext, suppress

import pytest
import torch
from cases import make_case
from checks import tuple_of
from lstm_cases import layer_inputs

import gradkernels as gk
from gradkernels.library import _C
from gradkernels.ops import OPS
from gradkernels.telemetry import new_stats, new_time_stats
from gradkernels.testing import randn

pytestmark = pytest.mark.skipif(_C is None, reason="the reference is PyTorch's own ops, which check for themselves")
OP = torch.ops.gradkernels
B, D, H, P, T = 2, 3, 4, 5, 3


def arguments(op, dtype=torch.float32):
    """Arguments that the op takes, by name: everything it has, for rows of 5 elements or an LSTM with a projection."""
    x, weight, bias, row = randn(3, 5, dtype=dtype), randn(5, dtype=dtype), randn(5, dtype=dtype), randn(3, 1)
    norm = {"weight": weight, "bias": bias, "num_dims": 1}
    saved = {"mean": row, "rstd": row.exp()}
    names = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    layer = dict(zip(names, layer_inputs(T, B, D, H, P, dtype=dtype)[0], strict=True))
    (x_cell, h, c, *weights, _), _ = layer_inputs(1, B, D, H, dtype=dtype)
    cell = dict(zip(("x", "h", "c", *names[3:7]), (x_cell[0], h, c, *weights), strict=True))
    return {
        "gelu_fwd": {"x": x, "tanh": False},
        "gelu_bwd": {"dy": x, "x": x, "tanh": False, "stats": new_stats(2)},
        "residual_bwd": {"dskip": x, "dbranch": x, "stats": new_stats(3)},
        "probe_bwd": {"dy": x, "stats": new_stats(4), "port": 3},
        "layer_norm_fwd": {"x": x, **norm, "eps": 1e-5},
        "layer_norm_bwd": {"dy": x, "x": x, **saved, **norm, "output_mask": [True] * 3, "stats": new_stats(4)},
        "add_layer_norm_fwd": {"x": x, "residual": x, **norm, "eps": 1e-5},
        "add_layer_norm_bwd": {
            **{"dy": x, "dnew_residual": x, "new_residual": x, **saved, **norm},
            **{"x_dtype": dtype, "output_mask": [True] * 4, "stats": new_stats(5)},
        },
        "lstm_cell_fwd": cell,
        "lstm_cell_bwd": {
            **{"dh_next": randn(B, H, dtype=dtype), "dc_next": randn(B, H, dtype=dtype), **cell},
            **{"gates": randn(B, 4 * H), "output_mask": [True] * 7, "stats": new_stats(8)},
        },
        "lstm_layer_fwd": {**layer, "batch_sizes": None, "reverse": False},
        "lstm_layer_bwd": {
            **{"dy": randn(T, B, P, dtype=dtype), "dh_n": randn(B, P, dtype=dtype), "dc_n": randn(B, H, dtype=dtype)},
            **{**layer, "batch_sizes": None, "y": randn(T, B, P, dtype=dtype)},
            **{"gates": randn(T * B, 4 * H), "cells": randn(T * B, H), "reverse": False, "output_mask": [True] * 8},
            **{"stats": new_stats(6), "time_stats": new_time_stats(T)},
        },
    }[op]


KERNELS = (
    *("gelu_fwd", "gelu_bwd", "residual_bwd", "probe_bwd", "layer_norm_fwd", "layer_norm_bwd", "add_layer_norm_fwd"),
    *("add_layer_norm_bwd", "lstm_cell_fwd", "lstm_cell_bwd", "lstm_layer_fwd", "lstm_layer_bwd"),
)
BACKWARD = tuple(op for op in KERNELS if op.endswith("_bwd"))
TENSORS = [(op, name) for op in KERNELS for name, value in arguments(op).items() if isinstance(value, torch.Tensor)]


def call(op, **changes):
    """The op with everything as it should be but for `changes`."""
    return getattr(OP, op)(**{**arguments(op), **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", KERNELS)
def test_what_is_right_is_taken(op, dtype):
    getattr(OP, op)(**arguments(op, dtype))


def spoiled(t):
    """{what is wrong: t with that}: a longer and a shorter tensor by either end, one dimension fewer or more, other dtypes."""
    rows = [("a row less", t[1:]), ("a row more", torch.cat([t, t[:1]]))]
    columns = [("a column less", t[..., 1:]), ("a column more", torch.cat([t, t[..., :1]], -1))]
    dims = [("flat", t.flatten()), ("deeper", t[None])]
    dtypes = [(str(dtype), t.to(dtype)) for dtype in (torch.int64, torch.float64, torch.float16) if dtype is not t.dtype]
    return {
        what: value.contiguous()
        for what, value in rows + columns + dims + dtypes
        if value.shape != t.shape or value.dtype != t.dtype
    }


ROWS = frozenset(("a row less", "a row more"))
ANY = ROWS | {"a column less", "a column more", "flat", "deeper", "torch.float64", "torch.float16"}
FREE = {  # what the other arguments leave open
    ("gelu_fwd", "x"): ANY,
    ("probe_bwd", "dy"): ANY,
    ("probe_bwd", "stats"): {"a row more"},
    ("layer_norm_fwd", "x"): ROWS | {"deeper", "torch.float16"},
    ("add_layer_norm_fwd", "x"): {"torch.float16"},
    ("lstm_layer_fwd", "x"): ROWS,
    ("lstm_layer_bwd", "time_stats"): ROWS,
}


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_every_tensor_of_another_shape_or_dtype(op, name):
    for what, wrong in spoiled(arguments(op)[name]).items():
        free = what in FREE.get((op, name), ())
        with nullcontext() if free else pytest.raises((ValueError, TypeError), match=f"^{op}: "):
            call(op, **{name: wrong})


ERRORS = (
    ("gelu_fwd", dict(x=torch.ones(3).int()), TypeError, "x must be Float, Double, BFloat16 or Half, got Int"),
    ("gelu_bwd", dict(dy=randn(3, 4)), ValueError, r"dy must have shape \(3, 5\), got \(3, 4\)"),
    ("gelu_bwd", dict(dy=randn(5)), ValueError, r"dy must have shape \(3, 5\), got \(5,\)"),
    ("gelu_bwd", dict(dy=torch.ones(())), ValueError, r"dy must have shape \(3, 5\), got \(\)"),
    ("gelu_bwd", dict(dy=randn(3, 5).double()), TypeError, "dy must be Float, got Double"),
    ("residual_bwd", dict(dskip=None, dbranch=None), ValueError, "dskip or dbranch must be given, got neither"),
    ("residual_bwd", dict(dbranch=randn(2, 5)), ValueError, r"dbranch must have shape \(3, 5\), got \(2, 5\)"),
    ("residual_bwd", dict(dskip=None, dbranch=torch.ones(3).int()), TypeError, "dbranch must be Float, .*, got Int"),
    ("probe_bwd", dict(port=-1), ValueError, "port must be a row of stats, 0 to 3, got -1"),
    ("probe_bwd", dict(port=4), ValueError, "port must be a row of stats, 0 to 3, got 4"),
    ("probe_bwd", dict(port=99), ValueError, "port must be a row of stats, 0 to 3, got 99"),
    ("probe_bwd", dict(dy=torch.ones(3).bool()), TypeError, "dy must be Float, .*, got Bool"),
    ("layer_norm_fwd", dict(num_dims=0), ValueError, "num_dims must be 1 to the number of dimensions of x, 2, got 0"),
    ("layer_norm_fwd", dict(num_dims=-1), ValueError, "num_dims must be 1 to the number of dimensions of x, 2, got -1"),
    ("layer_norm_fwd", dict(num_dims=3), ValueError, "num_dims must be 1 to the number of dimensions of x, 2, got 3"),
    ("layer_norm_fwd", dict(weight=randn(4)), ValueError, r"weight must have shape \(5,\), got \(4,\)"),
    ("layer_norm_fwd", dict(weight=None, bias=randn(1)), ValueError, r"bias must have shape \(5,\), got \(1,\)"),
    ("layer_norm_fwd", dict(weight=randn(5).double()), TypeError, "weight must be Float, got Double"),
    ("layer_norm_fwd", dict(x=randn(3, 5).double()), TypeError, "weight must be Double, got Float"),
    ("layer_norm_fwd", dict(x=randn(3, 5).half(), bias=randn(5).double()), TypeError, "bias must be Half or Float, got Double"),
    ("layer_norm_bwd", dict(num_dims=2), ValueError, r"weight must have shape \(3, 5\), got \(5,\)"),
    ("layer_norm_bwd", dict(mean=randn(2, 1)), ValueError, r"mean must have shape \(3, 1\), got \(2, 1\)"),
    ("layer_norm_bwd", dict(rstd=randn(3)), ValueError, r"rstd must have shape \(3, 1\), got \(3,\)"),
    ("layer_norm_bwd", dict(rstd=randn(3, 1).double()), TypeError, "rstd must be Float, got Double"),
    ("layer_norm_bwd", dict(mean=randn(1, 1).expand(3, 1)), ValueError, r"mean must be contiguous, got strides \(0, 1\)"),
    ("layer_norm_bwd", dict(dy=randn(3, 6)), ValueError, r"dy must have shape \(3, 5\), got \(3, 6\)"),
    ("add_layer_norm_fwd", dict(residual=randn(3, 1)), ValueError, r"residual must have shape \(3, 5\), got \(3, 1\)"),
    ("add_layer_norm_fwd", dict(residual=randn(3, 5).half()), TypeError, "residual must be Float, got Half"),
    (
        "add_layer_norm_bwd",
        dict(dnew_residual=randn(4, 5)),
        ValueError,
        r"dnew_residual must have shape \(3, 5\), got \(4, 5\)",
    ),
    ("add_layer_norm_bwd", dict(x_dtype=torch.float64), TypeError, "weight must be Double, got Float"),
    ("add_layer_norm_bwd", dict(x_dtype=torch.int32), TypeError, "x_dtype must be Float, .*, got Int"),
    ("add_layer_norm_bwd", dict(x_dtype=torch.float16), TypeError, "dy must be Half, got Float"),
    ("lstm_cell_fwd", dict(x=randn(B, 1, D)), ValueError, r"x must have shape \(B, D\), got \(2, 1, 3\)"),
    ("lstm_cell_fwd", dict(c=randn(1, H)), ValueError, r"c must have shape \(2, 4\), got \(1, 4\)"),
    ("lstm_cell_fwd", dict(bias_hh=None), ValueError, "bias_ih and bias_hh must be given together, got one of them"),
    ("lstm_cell_bwd", dict(dh_next=randn(B, 1)), ValueError, r"dh_next must have shape \(2, 4\), got \(2, 1\)"),
    ("lstm_cell_bwd", dict(gates=randn(1, 4 * H)), ValueError, r"gates must have shape \(2, 16\), got \(1, 16\)"),
    ("lstm_cell_bwd", dict(gates=randn(4 * H, B).t()), ValueError, r"gates must be contiguous, got strides \(1, 2\)"),
    ("lstm_layer_fwd", dict(x=randn(T, D)), ValueError, r"x must have shape \(T, B, D\), got \(3, 3\)"),
    (
        "lstm_layer_fwd",
        dict(batch_sizes=torch.tensor([2, 1])),
        ValueError,
        r"x must have shape \(rows, D\) where .*, got \(3, 2, 3\)",
    ),
    ("lstm_layer_fwd", dict(h0=randn(7, P)), ValueError, r"h0 must have shape \(2, 5\), got \(7, 5\)"),
    ("lstm_layer_fwd", dict(weight_hr=None), ValueError, r"h0 must have shape \(2, 4\), got \(2, 5\)"),
    ("lstm_layer_bwd", dict(y=randn(T, 1, P)), ValueError, r"y must have shape \(3, 2, 5\), got \(3, 1, 5\)"),
    ("lstm_layer_bwd", dict(cells=randn(B, H)), ValueError, r"cells must have shape \(6, 4\), got \(2, 4\)"),
    ("lstm_layer_bwd", dict(gates=randn(6, 16).double()), TypeError, "gates must be Float, got Double"),
    (
        "lstm_layer_bwd",
        dict(time_stats=torch.zeros(0, 12).double()),
        ValueError,
        r"time_stats must have .* \(1 \+ steps, 12\), got \(0, 12\)",
    ),
    ("lstm_layer_bwd", dict(time_stats=torch.zeros(4, 11).double()), ValueError, r"time_stats must have .*, got \(4, 11\)"),
    ("lstm_layer_bwd", dict(time_stats=torch.zeros(12, 4).double().t()), ValueError, "time_stats must be contiguous"),
    ("lstm_layer_bwd", dict(time_stats=torch.zeros(4, 12)), TypeError, "time_stats must be Double, got Float"),
)


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_messages(op, changes, error, message):
    with pytest.raises(error, match=f"^{op}: {message}"):
        call(op, **changes)


def tables(ports):
    """{what is wrong: (a table of statistics with that, the message)}."""
    return {
        "float32": (torch.zeros(ports, 1, 8), "stats must be Double, got Float"),
        "no cells": (torch.zeros(ports, 0, 8).double(), rf"stats must have a slot or more, got shape \({ports}, 0, 8\)"),
        "fields": (torch.zeros(ports, 1, 7).double(), rf"stats must have shape .*, got \({ports}, 1, 7\)"),
        "flat": (torch.zeros(ports, 8).double(), rf"stats must have shape .*, got \({ports}, 8\)"),
        "strides": (torch.zeros(8, 1, ports).double().permute(2, 1, 0), "stats must be contiguous, got strides"),
        "one cell of many": (torch.zeros(ports, 3, 8).double()[:, :1], "stats must be contiguous, got strides"),
    }


@pytest.mark.parametrize("op", BACKWARD)
def test_tables(op):
    ports = len(arguments(op)["stats"])
    for table, message in tables(ports).values():
        with pytest.raises((ValueError, TypeError), match=f"^{op}: {message}"):
            call(op, stats=table)
    for others in () if op == "probe_bwd" else (0, 1, ports - 1, ports + 1):
        with pytest.raises(ValueError, match=rf"^{op}: stats must have shape .* \({ports}, slots, 8\), got \({others}, 1, 8\)"):
            call(op, stats=new_stats(others))


@pytest.mark.parametrize("shape", [(0, 1, 8), (1, 0, 8), (1, 8), (99, 8, 1)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_table_resized_between_forward_and_backward(op, shape):
    case = make_case(op, 3, 5)
    stats = gk.new_stats(len(case.ports))
    leaves = [t.requires_grad_() for t in case.inputs]
    outputs = tuple_of(case.function(*leaves, stats=stats))
    stats.resize_(shape)
    with pytest.raises(ValueError, match=r"^[a-z_]*_bwd: (stats must|port must be a row of stats)"):
        torch.autograd.backward(outputs, case.dys)


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_a_tensor_without_memory(op, name):
    """A meta tensor among the others: what runs is the op's meta kernel, which reads and writes nothing."""
    given = arguments(op)
    before = {other: t.clone() for other, t in given.items() if isinstance(t, torch.Tensor)}
    with suppress(ValueError, RuntimeError):
        getattr(OP, op)(**{**given, name: given[name].to("meta")})
    for other, t in before.items():
        assert torch.equal(given[other], t)
