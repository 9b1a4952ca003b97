import pytest
import torch
import torch.nn.functional as F
from cases import layer_norm_case
from checks import (
    check_case,
    check_case_stats,
    with_stats,
)
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.ops.layer_norm import PORTS, layer_norm_bwd_reference, layer_norm_fwd_reference
from gradkernels.testing import DTYPES, check_stats, compare, differentiate, lay_out, randn

HALVES = (torch.bfloat16, torch.float16)
SHAPES = (
    (0, 5),
    (5, 1),
    (1, 1),
    (1, 7),
    (3, 33),
    (2, 760),
    (7, 1128),
    (5, 1500),
    (6, 3000),
    (1, 4097),
    (1, 8193),
    (13, 64),
    (2, 3, 17),
)
LAYOUTS = (
    ("transposed", "contiguous"),
    ("sliced", "contiguous"),
    ("contiguous", "transposed"),
    ("contiguous", "sliced"),
    ("transposed", "transposed"),
    ("contiguous", "expanded"),
    ("sliced", "scalar"),
)


def full_case(*shape, dtype, num_dims=1, mean=0.0, parameter_dtype=None):
    """A case with weight and bias, weight around 1."""
    columns, parameter_dtype = shape[-num_dims:], parameter_dtype or dtype
    weight, bias = randn(*columns, dtype=parameter_dtype, mean=1.0), randn(*columns, dtype=parameter_dtype)
    return layer_norm_case(randn(*shape, dtype=dtype, mean=mean), weight, bias, num_dims=num_dims)


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "neither"])
def test_reference(parameters):
    x, weight, bias = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 2, 5), (2, 5), (2, 5)))
    weight = weight if parameters in ("both", "weight") else None
    bias = bias if parameters in ("both", "bias") else None

    def reference(x, weight, bias):
        return layer_norm_fwd_reference(x, weight, bias, 2, 1e-5)[0]

    assert gradcheck(reference, (x, weight, bias), check_forward_ad=True)
    assert gradgradcheck(reference, (x, weight, bias))
    dy, leaves = randn(3, 2, 5, dtype=torch.float64), [t for t in (x, weight, bias) if t is not None]
    exact = F.layer_norm(x, (2, 5), weight, bias)
    y, mean, rstd = layer_norm_fwd_reference(x, weight, bias, 2, 1e-5)
    compare("y", y.detach(), exact.detach(), exact.detach(), terms=10.0)
    found = [d for d in layer_norm_bwd_reference(dy, x, mean, rstd, weight, bias, 2, [True] * 3) if d.numel()]
    for ours_d, exact_d in zip(found, torch.autograd.grad(exact, leaves, dy), strict=True):
        compare("d", ours_d.detach(), exact_d, exact_d, terms=10.0)


@pytest.mark.parametrize("mean", [0, 10, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementation(dtype, shape, mean):
    check_case(full_case(*shape, dtype=dtype, mean=mean))


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("columns", [15, 16, 17, 31, 33, 47, 65])
def test_tails(rows, columns):
    check_case(full_case(rows, columns, dtype=torch.float32))


@pytest.mark.parametrize(("layout", "dy_layout"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, layout, dy_layout):
    case = full_case(3, 5, 77, dtype=dtype)
    x, weight, bias = case.inputs
    x, dy = lay_out(x, layout), lay_out(case.dys[0], dy_layout)
    check_case(layer_norm_case(x, lay_out(weight, "sliced"), lay_out(bias, "scalar"), dy))
    assert gk.layer_norm(x, (77,), weight, bias).is_contiguous()


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalized_shape(dtype, num_dims):
    check_case(full_case(3, 5, 7, 9, dtype=dtype, num_dims=num_dims))
    check_case(full_case(*(5, 7, 9)[-num_dims:], dtype=dtype, num_dims=num_dims))  # no row dimension at all


@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters(dtype, parameters):
    case = full_case(6, 77, dtype=dtype)
    x, weight, bias = case.inputs
    check_case(layer_norm_case(x, weight if parameters == "weight" else None, bias if parameters == "bias" else None))


@pytest.mark.parametrize("shape", [(0, 5), (5, 1), (6, 760), (3, 1128)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_parameters(dtype, shape):
    check_case(full_case(*shape, dtype=dtype, parameter_dtype=torch.float32, mean=3.0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parameters_of_two_dtypes(dtype):
    """torch.nn.functional does not take these together: the twin computes in float32 and rounds."""
    x, weight, bias, dy = randn(6, 77, dtype=dtype), randn(77), randn(77, dtype=dtype), randn(6, 77, dtype=dtype)

    def eager(x, weight, bias):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), (77,), weight.to(wide), bias.to(wide)).to(x.dtype)

    case = layer_norm_case(x, weight, bias, dy)
    check_case(type(case)(**{**vars(case), "eager": eager}))


def test_large_eps_and_constant_rows():
    """A row without variance: rstd is 1 / sqrt(eps), and dx as large as that."""
    x = randn(5, 33)
    x[1], x[3] = 7.0, 0.0
    for eps in (1e-12, 1e-5, 0.3):
        check_case(layer_norm_case(x, randn(33, mean=1), randn(33), eps=eps))


def test_weight_gradient_is_better_than_eagers():
    """bfloat16 dweight and dbias are summed in float32 and rounded once; eager sums them in bfloat16."""
    case = full_case(2048, 768, dtype=torch.bfloat16, mean=8.0)
    ours, eager, exact = (
        differentiate(function, case.inputs, case.dys, dtype)[1]
        for function, dtype in ((case.function, None), (case.eager, None), (case.eager, torch.float64))
    )
    for k in (1, 2):
        error, eager_error = ((d[k].double() - exact[k]).norm() / exact[k].norm() for d in (ours, eager))
        assert error < eager_error / 2
        assert error < torch.finfo(torch.bfloat16).eps / 2


def test_stats_special_inputs():
    """NaN and infinities in x reach dx and dweight, and are counted there alone."""
    case = full_case(9, 131, dtype=torch.float32)
    case.inputs[0][2, 5], case.inputs[0][4, 130] = float("nan"), float("inf")
    check_case_stats(case)
    (y,), (dx, dweight, _) = differentiate(case.function, case.inputs, case.dys)
    for t in (y, dx):
        assert t[[2, 4]].isnan().all()
        assert t[[0, 1, 3, 5, 6, 7, 8]].isfinite().all()
    assert dweight.isnan().all()


def test_stats_of_long_constant_rows():
    """Equal addends round the same way each time: the worst case of a float32 sum of squares, and that of a mean loss."""
    x = randn(8, 65_536)
    dy = torch.full_like(x, 1.1e-3)
    case = layer_norm_case(x, None, None, dy)
    results, stats = with_stats(case)
    check_stats(stats, PORTS, case.seen(results[1]), relative=1e-5)


ERRORS = (
    (dict(normalized_shape=()), gk.ArgumentError, r"normalized_shape to be at least 1-dimensional, got \(\)"),
    (
        dict(normalized_shape=(4,)),
        gk.ArgumentError,
        r"Given normalized_shape=\[4\], expected x with shape \[\*, 4\], got \[3, 5\]",
    ),
    (dict(normalized_shape=(2, 3, 5)), gk.ArgumentError, r"Given normalized_shape=\[2, 3, 5\], expected x with shape"),
    (
        dict(x=torch.ones(3, 5).half(), bias=torch.ones(5).bfloat16()),
        TypeError,
        "bias must be torch.float16 like x, .* got torch.bfloat16",
    ),
    (
        dict(x=torch.ones(3, 5).double(), weight=torch.ones(5)),
        TypeError,
        "weight must be torch.float64 like x, .* got torch.float32",
    ),
)


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    arguments = {"x": torch.ones(3, 5), "normalized_shape": (5,), **arguments}
    with pytest.raises(error, match=f"^layer_norm: .*{message}") as caught:
        gk.layer_norm(**arguments)
    assert caught.type is error
