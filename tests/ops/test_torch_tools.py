"""Programs of PyTorch that look at the class of a layer: fx, TorchScript, quantization, isinstance, pickle and copies."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

import gradkernels as gk

LAYERS = {
    "LayerNorm": (lambda: nn.LayerNorm(8), (3, 8)),
    "GELU": (lambda: nn.GELU("tanh"), (3, 8)),
    "LSTM": (lambda: nn.LSTM(8, 4, 2, bidirectional=True), (5, 3, 8)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 4), (3, 8)),
}


class Net(nn.Module):
    """The first output of a layer; as torch.fx and TorchScript can read it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.pick = isinstance(layer, nn.LSTM | nn.LSTMCell)

    def forward(self, x):
        return self.layer(x)[0] if self.pick else self.layer(x)


class Scriptable(nn.Module):
    """TorchScript knows one type of output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return request.param, make(), torch.randn(shape)


def test_symbolic_trace(layer):
    """A leaf where torch.nn's layer is one; it measures in the traced model as it did before."""
    _, module, x = layer
    net, plain = Net(module), Net(copy.deepcopy(module))
    watch = gk.watch(net)
    traced = torch.fx.symbolic_trace(net)
    assert [node.op for node in traced.graph.nodes] == [node.op for node in torch.fx.symbolic_trace(plain).graph.nodes]
    torch.testing.assert_close(traced(x), plain(x))
    traced(x.requires_grad_()).sum().backward()
    watch.step()
    assert watch.records()


@pytest.mark.parametrize("module", [gk.Residual(nn.Linear(8, 8)), gk.AddLayerNorm(8)], ids=lambda m: type(m).__name__)
def test_symbolic_trace_of_our_own(module):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, x):
            return self.layer(x) if isinstance(module, gk.Residual) else self.layer(x, x)[1]

    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(Twice())(x), Twice()(x))


def test_script(layer):
    """TorchScript compiles the layer of torch.nn, with the very parameters."""
    _, module, x = layer
    plain = Scriptable(copy.deepcopy(module))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scripted = torch.jit.script(gk.convert(Scriptable(module)))
    torch.testing.assert_close(scripted(x), plain(x))
    assert {p.data_ptr() for p in scripted.parameters()} == {p.data_ptr() for p in module.parameters()}
    assert "__module__" not in copy.copy(module).__prepare_scriptable__().__dict__


def test_script_of_a_watched_model(layer):
    """It is refused, and nothing has changed by that; a closed one is scripted."""
    name, module, x = layer
    net = Scriptable(module)
    watch = gk.watch(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"torch.nn.{name} in the place of a {name} that measures: close\(\)"):
            torch.jit.script(net)
        y = net(x.requires_grad_())
        (y[0] if isinstance(y, tuple) else y).sum().backward()
        watch.step()
        assert watch.records()
    watch.close()
    torch.jit.script(net)


def test_script_of_a_model_with_probes():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    watch = gk.watch(net)
    with pytest.raises(AttributeError, match=r"hooks of a watched model: close\(\) the Watch"):
        torch.jit.script(net)
    watch.close()
    torch.jit.script(net)


@pytest.mark.parametrize("module", [gk.Residual(nn.Linear(8, 8)), gk.AddLayerNorm(8), gk.LSTM(4, 4, zoneout_h=0.1)])
def test_script_without_a_twin(module):
    with pytest.raises(NotImplementedError, match=f"torch.jit.script: {type(module).__name__} "):
        torch.jit.script(module)


def test_isinstance(layer):
    """Of its torch.nn class, so that functions that ask for it find the layer; an LSTM is not, for torch.compile's sake."""
    name, module, _ = layer
    cls = type(module)
    gk.convert(module)
    assert isinstance(module, nn.modules.rnn.RNNBase if name == "LSTM" else cls)
    gk.revert(module)
    assert type(module) is cls
    assert "__module__" not in module.__dict__


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_quantization_says_what_it_passes_by(name):
    cls = getattr(nn, name)
    with pytest.warns(UserWarning, match=f"leaves gradkernels' {name} as it is: call gk.revert"):
        quantize_dynamic(gk.convert(nn.Sequential(cls(8, 8))), {cls})
    quantized = quantize_dynamic(gk.revert(gk.convert(nn.Sequential(cls(8, 8)))), {cls})
    assert type(quantized[0]) is type(quantize_dynamic(nn.Sequential(cls(8, 8)), {cls})[0])


@pytest.mark.parametrize("name", LAYERS)
def test_built_as_torch_builds(name):
    """skip_init reads the constructor's signature."""
    signature = inspect.signature(getattr(nn, name))
    ours = inspect.signature(getattr(gk, name))
    assert [p for p in ours.parameters if not p.startswith("zoneout")] == list(signature.parameters) or name == "LSTM"
    if name != "GELU":
        args = (8,) if name == "LayerNorm" else (8, 4)
        assert type(torch.nn.utils.skip_init(getattr(gk, name), *args)) is getattr(gk, name)


def test_copies(layer):
    """A copy and a pickle are of our class, and compute the same."""
    _, module, x = layer
    net = gk.convert(Net(module))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other.layer) is type(net.layer)
        torch.testing.assert_close(other(x), net(x))
        torch.fx.symbolic_trace(other)
