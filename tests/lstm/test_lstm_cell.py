"""One step of an LSTM against the formula in plain PyTorch."""

import pytest
import torch
from cases import make_case
from checks import (
    TRANSFORMS,
    check_accumulation,
    check_batched_backward,
    check_case,
    check_case_stats,
    check_checkpoint,
    check_compile,
    check_dynamic_batch,
    check_repeatable,
    check_special_values,
    check_threads,
    check_transform,
    check_vmap_stats,
    check_without_gradients,
    with_stats,
)
from lstm_cases import cell_case, layer_inputs, plain_cell
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.ops.lstm_cell import PORTS, lstm_cell_bwd_reference, lstm_cell_fwd_reference
from gradkernels.testing import DTYPES, check_results, check_stats, compare, differentiate, randn

OP = torch.ops.gradkernels
SHAPES = ((0, 3, 5), (1, 1, 1), (1, 7, 17), (3, 4, 16), (5, 40, 65), (2, 3, 130), (70, 9, 33))


@pytest.mark.parametrize("bias", [True, False])
def test_reference(bias):
    case = cell_case(3, 2, 4, torch.float64, bias)
    leaves = [t if t is None else t.requires_grad_() for t in case.inputs]

    def reference(*inputs):
        return lstm_cell_fwd_reference(*inputs)[:2]

    for function in (case.function, reference):
        assert gradcheck(function, leaves, check_forward_ad=True)
        assert gradgradcheck(function, leaves)
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


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_output_used(dtype, used):
    dys = tuple(randn(3, 17, dtype=dtype) if k == used else None for k in range(2))
    case = cell_case(3, 5, 17, dtype, dys=dys)
    results, stats = with_stats(case)
    exact = differentiate(case.eager, case.inputs, dys, torch.float64)
    check_results(results, differentiate(case.eager, case.inputs, dys), exact, case.terms)
    check_stats(stats, PORTS, case.seen(results[1]))


def test_layouts():
    case = cell_case(5, 4, 9)
    strided = tuple(t.t().contiguous().t() for t in case.inputs)
    dys = (case.dys[0].t().contiguous().t(), torch.randn(()).expand(5, 9))
    check_case(type(case)(**{**vars(cell_case(5, 4, 9, dys=dys)), "inputs": strided}))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads(num_threads):
    check_threads(cell_case(131, 9, 150), num_threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_gates(dtype):
    """Preactivations of +-1000: tanh as (1 - e) / (1 + e) would be NaN beyond 44."""
    case = cell_case(4, 3, 18, dtype)
    case.inputs[0].mul_(1000)
    case.inputs[2].add_(500)
    case.terms["d3"] *= 4000
    check_case(case)


def test_backward_twice():
    """Saved gates are not written to: the second backward gives the bits of the first."""
    case = cell_case(4, 3, 18)
    leaves = [t.requires_grad_() for t in case.inputs]
    outputs = case.function(*leaves)
    first, second = (torch.autograd.grad(outputs, leaves, case.dys, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (6,)], ids=str)
def test_frozen_inputs(wanted):
    """What needs no gradient gets none; what is not asked for is not computed, and not measured."""
    case, stats = cell_case(4, 3, 18), gk.new_stats(8)
    expected = differentiate(case.function, case.inputs, case.dys)[1]
    leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(case.inputs)]
    torch.autograd.backward(case.function(*leaves, stats=stats), case.dys)
    for k, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (k not in wanted)
        assert k not in wanted or torch.equal(leaf.grad, expected[k])
    there = ["dh_next", "dc_next", "dh", "dc"] + ["dx"] * (0 in wanted)
    there += [{3: "dweight_ih", 6: "dbias"}[k] for k in wanted if k > 2]
    check_stats(stats, PORTS, {port: d for port, d in case.seen(expected).items() if port in there})


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_stats_extremes(scale):
    check_case_stats(make_case("lstm_cell", 9, 33, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_special_values(dtype):
    check_special_values("lstm_cell", dtype)


def test_stats_repeatable():
    check_repeatable(make_case("lstm_cell", 7, 11))


def test_stats_accumulate():
    check_accumulation("lstm_cell")


def test_no_gradients():
    check_without_gradients(make_case("lstm_cell", 3, 5))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op(dtype, stats):
    inputs, stats = cell_case(3, 4, 5, dtype).inputs, gk.new_stats(8) if stats else None
    torch.library.opcheck(OP.lstm_cell_fwd.default, inputs)
    h_next, c_next, gates = OP.lstm_cell_fwd(*inputs)
    for mask in ([True] * 7, [False] + [True] * 6, [True] * 4 + [False] * 3, [False] * 7):
        arguments = (h_next.sin(), c_next.sin(), *inputs, gates, mask, stats)
        torch.library.opcheck(OP.lstm_cell_bwd.default, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(OP.lstm_cell.default, (*(t.requires_grad_() for t in inputs), stats))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, fresh_compiler):
    check_compile(make_case("lstm_cell", 5, 33), backend)
    assert not fresh_compiler["graph_break"]


def test_compile_dynamic(fresh_compiler):
    check_dynamic_batch("lstm_cell", fresh_compiler)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, stats):
    check_transform("lstm_cell", transform, stats)


def test_vmap_stats():
    check_vmap_stats("lstm_cell")


def test_batched_backward():
    check_batched_backward("lstm_cell")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    check_checkpoint("lstm_cell", use_reentrant)


ERRORS = (
    (dict(x=torch.ones(4)), gk.ArgumentError, r"shapes \(B, D\) and \(4H, H\), got \(4,\) and \(20, 5\)"),
    (dict(weight_hh=torch.ones(20, 4)), gk.ArgumentError, r"shapes \(B, D\) and \(4H, H\), got \(2, 4\) and \(20, 4\)"),
    (dict(x=torch.ones(2, 4).int()), TypeError, r"x must be float32, .*, got torch\.int32"),
    (dict(h=torch.ones(3, 5)), gk.ArgumentError, r"h must have shape \(2, 5\), got \(3, 5\)"),
    (dict(c=torch.ones(2, 6)), gk.ArgumentError, r"c must have shape \(2, 5\), got \(2, 6\)"),
    (dict(weight_ih=torch.ones(20, 3)), gk.ArgumentError, r"weight_ih must have shape \(20, 4\), got \(20, 3\)"),
    (dict(bias_ih=None), gk.ArgumentError, "bias_ih and bias_hh must be given together, got one of them"),
    (dict(c=torch.ones(2, 5).double()), TypeError, "c must be torch.float32 like x, got torch.float64"),
    (dict(h=torch.ones(2, 5, device="meta")), gk.ArgumentError, "h must be on x's device, cpu, got meta"),
    (dict(stats=torch.zeros(4, 1, 8).double()), gk.ArgumentError, r"\(8, slots, 8\), got \(4, 1, 8\)"),
    (dict(stats=torch.zeros(8, 0, 8).double()), gk.ArgumentError, r"stats must have a slot or more, got shape \(8, 0, 8\)"),
)


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    (x, *others, _), _ = layer_inputs(1, 2, 4, 5)
    names = ("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    with pytest.raises(error, match=f"^lstm_cell: .*{message}") as caught:
        gk.lstm_cell(**{**dict(zip(names, (x[0], *others), strict=True)), **arguments})
    assert caught.type is error
