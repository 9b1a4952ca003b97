import pytest
import torch
from cases import probe_case
from checks import (
    check_case,
    check_case_stats,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from gradkernels.telemetry import measure_reference
from gradkernels.testing import DTYPES, check_stats, randn

SHAPES = ((0, 5), (), (1,), (7, 3), (4095,), (4097,), (8193,), (3, 1500), (2, 3, 5, 7), (11, 1531))
PORTS = ("dy",)
OP = torch.ops.gradkernels


def test_reference():
    x, stats = randn(3, 5, dtype=torch.float64).requires_grad_(), gk.new_stats(1)
    assert gradcheck(lambda x: gk.probe(x, stats=stats).sin(), (x,), check_forward_ad=True)
    assert gradgradcheck(lambda x: gk.probe(x, stats=stats).sin(), (x,))
    assert gk.probe(x, stats=stats) is x or torch.equal(gk.probe(x, stats=stats), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementation(dtype, shape):
    check_case(probe_case(randn(*shape, dtype=dtype)))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 33, 4095, 4096, 4097, 8191, 8192, 8193, 24577])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_its_reference(dtype, size):
    """Every field, with zeros, NaN and infinities in each block; into a row that is not the first."""
    dy = randn(size, dtype=dtype)
    dy[::7], dy[3::11], dy[5::13], dy[9::4096] = 0.0, float("nan"), float("inf"), -float("inf")
    ours, reference = gk.new_stats(3), gk.new_stats(3)
    OP.probe_bwd(dy, ours, 1)
    measure_reference(dy, reference, 1)
    check_stats(ours, ("dskip", "dbranch", "dx"), {"dbranch": dy})
    check_stats(reference, ("dskip", "dbranch", "dx"), {"dbranch": dy})


def test_gradient_of_all_uses():
    """What is measured is the gradient that reaches x, summed over its uses before and after the probe."""
    leaf, dys, stats = randn(3, 5).requires_grad_(), (randn(3, 5), randn(3, 5)), gk.new_stats(1)
    x = leaf * 1
    torch.autograd.backward((3 * gk.probe(x, stats=stats), x.exp()), dys)
    check_stats(stats, PORTS, {"dy": leaf.grad})


def test_in_place_writes_stay_what_they_were():
    leaf, dy, stats = randn(3, 5).requires_grad_(), randn(3, 5), gk.new_stats(1)
    gk.probe(leaf * 1, stats=stats).mul_(3).backward(dy)
    assert torch.equal(leaf.grad, 3 * dy)


def test_leaf_probed_every_step():
    """A leaf that lives through many steps is observed once a backward call, not once for every probe it ever met."""
    leaf, stats, dys = randn(3, 5).requires_grad_(), gk.new_stats(1), [randn(3, 5) for _ in range(3)]
    for dy in dys:
        (1 * gk.probe(leaf, stats=stats)).backward(dy)
    check_stats(stats, PORTS, {"dy": dys})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_block_that_begins_with_a_probe(use_reentrant):
    """The probed tensor was made outside the block, whose forward runs twice and backward once."""
    leaf, dy, stats = randn(3, 5).requires_grad_(), randn(3, 5), gk.new_stats(1)
    checkpoint(lambda x: gk.probe(x, stats=stats).sin(), leaf * 1, use_reentrant=use_reentrant).backward(dy)
    check_stats(stats, PORTS, {"dy": dy * leaf.detach().cos()})


def test_forward_without_gradients_leaves_no_probe():
    """An evaluation under no_grad between two training steps adds nothing to what the backward measures."""
    leaf, dy, stats = randn(3, 5).requires_grad_(), randn(3, 5), gk.new_stats(1)
    x = leaf * 1
    with torch.no_grad():
        gk.probe(x, stats=stats)
    gk.probe(x, stats=stats).backward(dy)
    check_stats(stats, PORTS, {"dy": dy})


def test_stats_of_infinite_sums():
    """Finite float32 elements whose squares are not: the sum is exact all the same."""
    dy = torch.full((5000,), 3e38)
    dy[17] = 1e-38
    check_case_stats(probe_case(randn(5000), dy))


@pytest.mark.parametrize("bits", [0x7F81, -0x7F, 0x7FC0], ids=["signalling", "negative signalling", "quiet"])
def test_stats_of_nan_among_zeros(bits):
    """A NaN of any kind hides no zero beside it."""
    dy = torch.zeros(100, dtype=torch.int16)
    dy[50] = bits
    check_case_stats(probe_case(randn(100, dtype=torch.bfloat16), dy.view(torch.bfloat16)))
