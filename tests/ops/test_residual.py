import itertools

import pytest
import torch
from cases import residual_case
from checks import (
    check_case,
    check_case_stats,
)
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.ops.residual import PORTS, residual_bwd_reference
from gradkernels.testing import DTYPES, check, check_stats, differentiate, lay_out, randn

SHAPES = ((0, 5), (), (1,), (7, 3), (4095,), (4097,), (8193,), (3, 1500), (2, 3, 5, 7), (11, 1531))


def test_reference():
    x = randn(3, 5, dtype=torch.float64).requires_grad_()
    dskip, dbranch = randn(3, 5, dtype=torch.float64), randn(3, 5, dtype=torch.float64)
    assert gradcheck(lambda x: gk.residual(x, torch.sin), (x,), check_forward_ad=True)
    assert gradgradcheck(lambda x: gk.residual(x, torch.sin), (x,))
    assert torch.equal(residual_bwd_reference(dskip, dbranch), dskip + dbranch)
    assert torch.equal(residual_bwd_reference(dskip, None), dskip)
    assert torch.equal(residual_bwd_reference(None, dbranch), dbranch)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementation(dtype, shape):
    case = residual_case(randn(*shape, dtype=dtype))
    check_case(case)
    dx = differentiate(case.function, case.inputs, case.dys)[1][0]
    assert torch.equal(dx, sum(case.dys))  # one addition, rounded once


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(0, 5), (7, 37), (5, 1531)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(dtype, shape, layout):
    """y = x + branch(x), and the ports see what reaches the skip, the branch's input, and their sum."""
    x, dy, weight = lay_out(randn(*shape, dtype=dtype), layout), randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    check(lambda x, w: gk.residual(x, lambda h: h.sin() * w), lambda x, w: x + x.sin() * w, (x, weight), (dy,))
    stats = gk.new_stats(3)
    _, (dx,) = differentiate(lambda x: gk.residual(x, lambda h: h.sin() * weight, stats=stats), (x,), (dy,))
    _, (dbranch,) = differentiate(lambda x: x.sin() * weight, (x,), (dy,))
    check_stats(stats, PORTS, {"dskip": dy, "dbranch": dbranch, "dx": dx})


def test_nested_and_deep():
    """A stack of residual blocks gives the gradients of the plain stack, and each fork its own statistics."""
    x, dy, weights = randn(4, 8), randn(4, 8), [randn(8, 8).mul(0.3) for _ in range(3)]
    tables = [gk.new_stats(3) for _ in weights]

    def ours(x, *weights):
        for stats, w in zip(tables, weights, strict=True):
            x = gk.residual(x, lambda h, w=w: gk.residual(h @ w, torch.tanh), stats=stats)
        return x

    def eager(x, *weights):
        for w in weights:
            h = x @ w
            x = x + (h + h.tanh())
        return x

    check(ours, eager, (x, *weights), (dy,), dict.fromkeys(("y0", "d0", "d1", "d2", "d3"), 100.0))
    for below, above in itertools.pairwise(tables):  # dx of a block is dskip of the one before it
        assert torch.equal(below[PORTS.index("dskip")], above[PORTS.index("dx")])


def test_outputs_share_memory_and_refuse_writes():
    """Writing into one output would change the other: autograd raises, and without autograd both are x itself."""
    leaf = randn(3, 5).requires_grad_()
    for which in (0, 1):
        outputs = gk.residual_fork(leaf * 1)
        with pytest.raises(RuntimeError, match="view"):
            outputs[which].mul_(2)
    x = leaf * 1
    skip, branch = gk.residual_fork(x)
    assert skip.data_ptr() == branch.data_ptr() == x.data_ptr()


def test_branch_that_writes_in_place():
    with pytest.raises(RuntimeError, match="view"):
        gk.residual(randn(3, 5).requires_grad_() * 1, lambda h: h.relu_())


def test_input_changed_after_the_fork():
    """Nothing is saved, so x may be overwritten afterwards where its users do not need it."""
    leaf, dskip, dbranch = randn(3, 5).requires_grad_(), randn(3, 5), randn(3, 5)
    skip, branch = gk.residual_fork(leaf)
    (dx,) = torch.autograd.grad((3 * skip, 5 * branch), leaf, (dskip, dbranch))
    assert torch.equal(dx, 3 * dskip + 5 * dbranch)


def test_incoming_gradients_are_not_touched():
    """dx never shares memory with a gradient that came in: a hook may scale either of them in place."""
    for dys in ((randn(3, 5), None), (None, randn(3, 5)), (randn(3, 5), randn(3, 5))):
        kept = [dy if dy is None else dy.clone() for dy in dys]
        _, (dx,) = differentiate(gk.residual_fork, (randn(3, 5),), dys)
        dx.zero_()
        assert all(dy is None or torch.equal(dy, before) for dy, before in zip(dys, kept, strict=True))


def test_stats_of_cancelling_gradients():
    """dskip = -dbranch: dx is exactly zero in every element, and counted so."""
    dskip = randn(4099)
    check_case_stats(residual_case(randn(4099), dskip, -dskip))


def test_stats_of_overflow():
    """Two finite float16 gradients whose sum is infinite: counted in dx alone."""
    dskip = torch.full((33,), 6e4, dtype=torch.float16)
    case = residual_case(randn(33, dtype=torch.float16), dskip, dskip)
    assert differentiate(case.function, case.inputs, case.dys)[1][0].isinf().all()
    check_case_stats(case)


def test_compile(fresh_compiler):
    """The fork's outputs are views, so the graph's outputs are made of them, as a model's are."""
    x, dy, weight = randn(5, 7), randn(5, 7), randn(7, 7)
    tables = gk.new_stats(3), gk.new_stats(3)
    eager, compiled = (lambda x, w, stats=stats: gk.residual(x, lambda h: h @ w, stats=stats) for stats in tables)
    found = differentiate(torch.compile(compiled, fullgraph=True, backend="aot_eager"), (x, weight), (dy,))
    for ours, expected in zip(found, differentiate(eager, (x, weight), (dy,)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(*tables)
    assert not fresh_compiler["graph_break"]


ERRORS = (
    (lambda x: gk.residual(x.bool(), torch.sin), TypeError, r"residual_fork: x must be float32, .*, got torch\.bool"),
    (lambda x: gk.residual(x, lambda h: h[:1]), gk.ArgumentError, r"residual_add: .* skip's shape, \(3, 5\), got \(1, 5\)"),
    (
        lambda x: gk.residual_add(x, x[0]),
        gk.ArgumentError,
        r"residual_add: branch must have skip's shape, \(3, 5\), got \(5,\)",
    ),
    (
        lambda x: gk.residual(x, lambda h: h.half()),
        TypeError,
        "residual_add: branch must be torch.float32 like skip, got torch.float16",
    ),
    (
        lambda x: gk.residual_add(x, x.to("meta")),
        gk.ArgumentError,
        "residual_add: branch must be on skip's device, cpu, got meta",
    ),
)


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(randn(3, 5))
    assert caught.type is error
