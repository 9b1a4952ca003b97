"""torch.autocast: our ops take and give the dtypes that PyTorch's take and give in the same region."""

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkernels as gk
from gradkernels.autocast import CELLS_IN_REGION, NORMS_IN_FLOAT32
from gradkernels.testing import randn

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
PAIRS = [(BF16, F32), (BF16, BF16), (F32, F32), (torch.float16, F32), (F64, F64)]


@contextmanager
def enabled(device, dtype=BF16):
    """An autocast region; torch.autocast itself refuses CUDA where there is none."""
    before = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)
        torch.clear_autocast_cache()


def add_layer_norm(x, residual, shape, weight, bias):
    """gk.add_layer_norm in PyTorch's words."""
    h = residual + x
    return F.layer_norm(h, shape, weight, bias), h


def test_where_pytorch_has_a_rule():
    for devices in (NORMS_IN_FLOAT32, CELLS_IN_REGION):
        assert "cuda" in devices
        assert "cpu" not in devices


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("on", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(("x_dtype", "parameter_dtype"), PAIRS, ids=str)
def test_dtypes(device, on, x_dtype, parameter_dtype):
    """Functions and modules, on tensors without memory."""
    if device == "cuda" and not on and x_dtype is not parameter_dtype:
        pytest.skip("PyTorch's layer_norm takes mixed dtypes on a GPU inside autocast only")
    with torch.no_grad(), FakeTensorMode(), torch.device(device):  # a CPU-only PyTorch has no autograd for CUDA
        x, weight = torch.empty(4, 8, dtype=x_dtype), torch.empty(8, dtype=parameter_dtype)
        norm, ours = (kind(8, dtype=parameter_dtype) for kind in (torch.nn.LayerNorm, gk.LayerNorm))
        add_norm = gk.AddLayerNorm(8, dtype=parameter_dtype)
        with enabled(device) if on else mock.MagicMock():
            assert gk.gelu(x).dtype is F.gelu(x).dtype is x_dtype
            assert gk.layer_norm(x, (8,), weight, weight).dtype is F.layer_norm(x, (8,), weight, weight).dtype
            assert ours(x).dtype is norm(x).dtype
            for residual_dtype in {x_dtype, torch.promote_types(x_dtype, F32)}:
                if device == "cpu" and residual_dtype is not x_dtype:
                    continue  # y is then residual's dtype in PyTorch's words and x's in ours
                if device == "cuda" and not on and residual_dtype is not x_dtype:
                    continue  # as for layer_norm above: the sum and the weight differ
                residual = torch.empty(4, 8, dtype=residual_dtype)
                expected = [t.dtype for t in add_layer_norm(x, residual, (8,), weight, weight)]
                assert [t.dtype for t in gk.add_layer_norm(x, residual, (8,), weight, weight)] == expected
                assert [t.dtype for t in add_norm(x, residual)] == expected


@pytest.fixture
def _rule_on_cpu():
    """The GPU's rule on CPU tensors, so that there are numbers."""
    with mock.patch("gradkernels.autocast.NORMS_IN_FLOAT32", frozenset(("cpu",))), enabled("cpu"):
        yield


def leaf(*sizes, dtype):
    return randn(*sizes, dtype=dtype).requires_grad_()


@pytest.mark.usefixtures("_rule_on_cpu")
@pytest.mark.parametrize(("x_dtype", "parameter_dtype"), PAIRS, ids=str)
def test_numbers(x_dtype, parameter_dtype):
    """y, all gradients in the dtypes of what they are gradients of, and statistics of the gradients that flow: float32."""
    wide = F64 if x_dtype is F64 else F32
    x, weight, bias = leaf(6, 8, dtype=x_dtype), leaf(8, dtype=parameter_dtype), leaf(8, dtype=parameter_dtype)
    dy, stats = randn(6, 8, dtype=wide), gk.new_stats(4)
    y = gk.layer_norm(x, (8,), weight, bias, stats=stats)
    expected = F.layer_norm(x.to(wide), (8,), weight.to(wide), bias.to(wide))
    assert y.dtype is wide
    ours, theirs = (torch.autograd.grad(t, (x, weight, bias), dy) for t in (y, expected))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours, theirs)
    assert [t.dtype for t in ours] == [x_dtype, parameter_dtype, parameter_dtype]
    assert stats[:, 0, 0].tolist() == [48, 48, 8, 8]
    torch.testing.assert_close(stats[0, 0, 2].float(), dy.float().square().sum())


@pytest.mark.usefixtures("_rule_on_cpu")
@pytest.mark.parametrize(("x_dtype", "residual_dtype"), list(itertools.product((BF16, F32), repeat=2)), ids=str)
def test_numbers_of_add_layer_norm(x_dtype, residual_dtype):
    """y is float32 and of the sum before new_residual is rounded, where both are 16-bit: closer to the truth than PyTorch's."""
    x, residual, weight = leaf(6, 8, dtype=x_dtype), leaf(6, 8, dtype=residual_dtype), leaf(8, dtype=F32)
    y, h = gk.add_layer_norm(x, residual, (8,), weight)
    wide = x.float() + residual.float()
    expected = F.layer_norm(wide, (8,), weight), wide.to(torch.promote_types(x_dtype, residual_dtype))
    dys = randn(6, 8), randn(6, 8, dtype=expected[1].dtype)
    torch.testing.assert_close((y, h), expected)
    ours, theirs = (torch.autograd.grad(outputs, (x, residual, weight), dys) for outputs in ((y, h), expected))
    torch.testing.assert_close(ours, theirs)
    assert [t.dtype for t in ours] == [x_dtype, residual_dtype, F32]


@pytest.mark.usefixtures("_rule_on_cpu")
def test_other_errors_stay():
    with pytest.raises(TypeError, match="x must be float32"):
        gk.layer_norm(torch.ones(3, 4, dtype=torch.int32), (4,))
    with pytest.raises(gk.ArgumentError, match="weight"):
        gk.layer_norm(torch.ones(3, 4), (4,), torch.ones(5))


@pytest.mark.usefixtures("_rule_on_cpu")
def test_compile(fresh_compiler):
    """In one graph, with the dtypes of the region."""
    x, weight = randn(6, 8, dtype=BF16), randn(8)
    compiled = torch.compile(lambda x, w: gk.layer_norm(x, (8,), w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), gk.layer_norm(x, (8,), weight))
    assert compiled(x, weight).dtype is F32
    assert not fresh_compiler["graph_break"]


@pytest.mark.parametrize("x_dtype", [BF16, F32, F64], ids=str)
def test_lstm_cell(x_dtype):
    """With the GPU's rule: all in the region's dtype, gradients in their own; float64 as it is. Without: nothing is cast."""
    wide = F64 if x_dtype is F64 else F32
    inputs = [
        leaf(3, 5, dtype=x_dtype),
        *(leaf(*sizes, dtype=wide) for sizes in ((3, 4), (3, 4), (16, 5), (16, 4), (16,), (16,))),
    ]
    narrow = [t if x_dtype is F64 else t.bfloat16() for t in inputs]
    with mock.patch("gradkernels.ops.lstm_cell.CELLS_IN_REGION", frozenset(("cpu",))), enabled("cpu"):
        outputs = gk.lstm_cell(*inputs)
    for a, b in zip(outputs, gk.lstm_cell(*narrow), strict=True):
        assert torch.equal(a, b)
        assert a.dtype is (F64 if x_dtype is F64 else BF16)
    gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(t).cumsum(1) for t in outputs])
    assert [t.dtype for t in gradients] == [t.dtype for t in inputs]
    with enabled("cpu"):
        assert gk.lstm_cell(*(t.float() for t in inputs))[0].dtype is F32
