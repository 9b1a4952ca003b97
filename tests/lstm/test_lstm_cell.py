"""One step of an LSTM against the formula in plain PyTorch."""

import pytest
import torch
from checks import (
    check_case,
)
from lstm_cases import cell_case, layer_inputs, plain_cell
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.ops.lstm_cell import lstm_cell_bwd_reference, lstm_cell_fwd_reference
from gradkernels.testing import DTYPES, compare

SHAPES = ((0, 3, 5), (1, 1, 1), (1, 7, 17), (3, 4, 16), (5, 40, 65), (2, 3, 130), (70, 9, 33))


@pytest.mark.parametrize("bias", [True, False])
def test_reference(bias):
    case = cell_case(3, 2, 4, torch.float64, bias)
    leaves = [t if t is None else t.requires_grad_() for t in case.inputs]

    def reference(*inputs):
        return lstm_cell_fwd_reference(*inputs)[:2]

    assert gradcheck(reference, leaves, check_forward_ad=True)
    assert gradgradcheck(reference, leaves)
    exact = plain_cell(*leaves)
    for found, value in zip(reference(*leaves), exact, strict=True):
        compare("y", found.detach(), value.detach(), value.detach(), terms=10.0)
    gates = lstm_cell_fwd_reference(*leaves)[2]
    found = [d for d in lstm_cell_bwd_reference(*case.dys, *leaves, gates, [True] * 6 + [False]) if d.numel()]
    there = [leaf for leaf in leaves[:6] if leaf is not None]
    for ours, value in zip(found, torch.autograd.grad(exact, there, case.dys), strict=True):
        compare("d", ours.detach(), value, value, terms=10.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementation(dtype, shape, bias):
    check_case(cell_case(*shape, dtype=dtype, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_gates(dtype):
    """Preactivations of +-1000: tanh as (1 - e) / (1 + e) would be NaN beyond 44."""
    case = cell_case(4, 3, 18, dtype)
    case.inputs[0].mul_(1000)
    case.inputs[2].add_(500)
    case.terms["d3"] *= 4000
    check_case(case)


ERRORS = (
    (dict(x=torch.ones(4)), gk.ArgumentError, r"shapes \(B, D\) and \(4H, H\), got \(4,\) and \(20, 5\)"),
    (dict(bias_ih=None), gk.ArgumentError, "bias_ih and bias_hh must be given together, got one of them"),
)


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    (x, *others, _), _ = layer_inputs(1, 2, 4, 5)
    names = ("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    with pytest.raises(error, match=f"^lstm_cell: .*{message}") as caught:
        gk.lstm_cell(**{**dict(zip(names, (x[0], *others), strict=True)), **arguments})
    assert caught.type is error
