import pytest
import torch
import torch.nn.functional as F
from cases import add_layer_norm_case
from checks import (
    check_case,
    check_repeatable,
    check_threads,
)
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.ops.add_layer_norm import PORTS, add_layer_norm_bwd_reference, add_layer_norm_fwd_reference
from gradkernels.testing import DTYPES, check_stats, compare, differentiate, lay_out, randn

HALVES = (torch.bfloat16, torch.float16)
PAIRS = (*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in HALVES))  # of x and residual
MIXED = PAIRS[4:]
SHAPES = ((0, 5), (5, 1), (1, 7), (3, 33), (2, 760), (7, 1128), (5, 1500), (6, 3000), (1, 4097), (1, 8193), (2, 3, 17))
LAYOUTS = ("transposed", "sliced", "expanded", "scalar")


def full_case(*shape, dtypes=(torch.float32, torch.float32), num_dims=1, mean=0.0, parameter_dtype=None, **dys):
    """A case with weight and bias; `dtypes` of x and residual."""
    columns, parameter_dtype = shape[-num_dims:], parameter_dtype or dtypes[0]
    weight, bias = randn(*columns, dtype=parameter_dtype, mean=1.0), randn(*columns, dtype=parameter_dtype)
    x, residual = randn(*shape, dtype=dtypes[0]), randn(*shape, dtype=dtypes[1], mean=mean)
    return add_layer_norm_case(x, residual, weight, bias, num_dims=num_dims, **dys)


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "neither"])
def test_reference(parameters):
    shapes = ((3, 2, 5), (3, 2, 5), (2, 5), (2, 5))
    x, residual, weight, bias = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    weight = weight if parameters in ("both", "weight") else None
    bias = bias if parameters in ("both", "bias") else None

    def reference(x, residual, weight, bias):
        return add_layer_norm_fwd_reference(x, residual, weight, bias, 2, 1e-5)[:2]

    assert gradcheck(reference, (x, residual, weight, bias), check_forward_ad=True)
    assert gradgradcheck(reference, (x, residual, weight, bias))
    dys = randn(3, 2, 5, dtype=torch.float64), randn(3, 2, 5, dtype=torch.float64)
    leaves = [t for t in (x, weight, bias) if t is not None]
    exact = F.layer_norm(x + residual, (2, 5), weight, bias), x + residual
    y, h, mean, rstd = add_layer_norm_fwd_reference(x, residual, weight, bias, 2, 1e-5)
    compare("y", y.detach(), exact[0].detach(), exact[0].detach(), terms=10.0)
    compare("new_residual", h.detach(), exact[1].detach(), exact[1].detach())
    mask = [True, False, True, True]
    dx, _, *columns = add_layer_norm_bwd_reference(*dys, h, mean, rstd, weight, bias, 2, torch.float64, mask)
    found = [d for d in (dx, *columns) if d.numel()]
    for ours_d, exact_d in zip(found, torch.autograd.grad(exact, leaves, dys), strict=True):
        compare("d", ours_d.detach(), exact_d, exact_d, terms=10.0)


@pytest.mark.parametrize("mean", [0, 10, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_implementation(dtypes, shape, mean):
    check_case(full_case(*shape, dtypes=dtypes, mean=mean))


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("columns", [15, 16, 33, 47])
@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[4]], ids=str)
def test_tails(dtypes, rows, columns):
    check_case(full_case(rows, columns, dtypes=dtypes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided", range(4))
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_layouts(dtypes, strided, layout):
    """One of x, residual, dy and dnew_residual is not contiguous."""
    case = full_case(3, 5, 77, dtypes=dtypes)
    tensors = [case.inputs[0], case.inputs[1], *case.dys]
    tensors[strided] = lay_out(tensors[strided], layout)
    x, residual, dy, dnew_residual = tensors
    check_case(add_layer_norm_case(x, residual, *case.inputs[2:], dy, dnew_residual))
    assert all(y.is_contiguous() for y in gk.add_layer_norm(x, residual, (77,), *case.inputs[2:]))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_normalized_shape(dtypes):
    check_case(full_case(3, 5, 7, 9, dtypes=dtypes, num_dims=2))
    check_case(full_case(7, 9, dtypes=dtypes, num_dims=2))  # no row dimension at all


@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_parameters(dtypes, parameters):
    x, residual, weight, bias = full_case(6, 77, dtypes=dtypes).inputs
    weight, bias = weight if parameters == "weight" else None, bias if parameters == "bias" else None
    check_case(add_layer_norm_case(x, residual, weight, bias))


@pytest.mark.parametrize("shape", [(0, 5), (6, 760), (3, 1128)], ids=str)
@pytest.mark.parametrize("dtypes", [pair for pair in PAIRS if pair[0] in HALVES], ids=str)
def test_float32_parameters(dtypes, shape):
    check_case(full_case(*shape, dtypes=dtypes, parameter_dtype=torch.float32, mean=3.0))


@pytest.mark.parametrize("unused", ["dy", "dnew_residual"])
@pytest.mark.parametrize("shape", [(0, 5), (6, 77), (3, 1128)], ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_one_output_used(dtypes, shape, unused):
    """Only y or only new_residual in the loss: gradients equal the twin's, and the other port stays empty."""
    case = full_case(*shape, dtypes=dtypes, **{unused: None})
    ours = differentiate(case.function, case.inputs, case.dys)
    if unused == "dnew_residual":
        check_case(case)
        return
    assert torch.equal(ours[1][1], case.dys[1])
    assert torch.equal(ours[1][0], case.dys[1].to(dtypes[0]))
    for gradient in ours[1][2:]:  # autograd leaves the twin's out, ours are zero: both mean that y is not in the loss
        assert gradient is None or not gradient.any()
    case_stats = gk.new_stats(5)
    differentiate(lambda *inputs: case.function(*inputs, stats=case_stats), case.inputs, case.dys)
    check_stats(case_stats, PORTS, case.seen(ours[1]))


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_threads(dtypes, num_threads):
    check_threads(full_case(131, 509, dtypes=dtypes), num_threads)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dx_is_rounded_once(dtype):
    """Beside a float32 residual, x's gradient is the residual's, rounded; 16-bit eager rounds the parts before the sum."""
    case = full_case(6, 1128, dtypes=(dtype, torch.float32))
    dx, dresidual = differentiate(case.function, case.inputs, case.dys)[1][:2]
    assert torch.equal(dx, dresidual.to(dtype))


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_stats_repeatable(dtypes):
    check_repeatable(full_case(7, 1128, dtypes=dtypes))


ERRORS = (
    (dict(normalized_shape=()), gk.ArgumentError, r"normalized_shape to be at least 1-dimensional, got \(\)"),
    (
        dict(normalized_shape=(4,)),
        gk.ArgumentError,
        r"Given normalized_shape=\[4\], expected x with shape \[\*, 4\], got \[3, 5\]",
    ),
)


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    arguments = {"x": torch.ones(3, 5), "residual": torch.ones(3, 5), "normalized_shape": (5,), **arguments}
    with pytest.raises(error, match=f"^add_layer_norm: .*{message}") as caught:
        gk.add_layer_norm(**arguments)
    assert caught.type is error
