"""convert, revert and the modules: what changes in a model and what does not."""

import copy
import io
import pickle
import re

import pytest
import torch
from derived_layers import Exp, Plain, train
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import gradkernels as gk
from gradkernels.integrations import timm


class Subclassed(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


def model():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU("tanh"), nn.Linear(8, 8), Subclassed(8), nn.BatchNorm1d(8))


def gradients(net, x, dy):
    net.zero_grad()
    net(x).backward(dy)
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_convert_changes_classes_only():
    net = model()
    before = dict(net.named_parameters())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert gk.convert(net) is net
    assert [type(module) for module in net] == [nn.Linear, gk.LayerNorm, gk.GELU, nn.Linear, Subclassed, nn.BatchNorm1d]
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert list(net.state_dict()) == list(state)
    assert isinstance(net[1], nn.LayerNorm)
    assert isinstance(net[2], nn.GELU)
    assert net[2].approximate == "tanh"


def test_convert_keeps_the_numbers_and_revert_the_classes():
    net = model()
    x, dy = torch.randn(16, 6), torch.randn(16, 8)
    classes = [type(module) for module in net]
    expected = gradients(net, x, dy)
    converted = gradients(gk.convert(net), x, dy)
    for got, want in zip(converted, expected, strict=True):
        torch.testing.assert_close(got, want)
    gk.revert(gk.convert(net))
    assert [type(module) for module in net] == classes
    for got, want in zip(gradients(net, x, dy), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_revert_leaves_own_modules():
    net = nn.Sequential(gk.LayerNorm(4), nn.LayerNorm(4))
    gk.revert(gk.convert(net))
    assert [type(module) for module in net] == [gk.LayerNorm, nn.LayerNorm]


def test_uncovered_names_the_reason():
    net = model()
    net.add_module("replaced", nn.GELU())
    net.replaced.forward = lambda x: x
    net.add_module("tanh", nn.Tanh())
    net.add_module("single", type("RmsNormFp32", (nn.Module,), {})())  # timm's names
    reasons = {layer.site: (layer.layer, layer.reason) for layer in gk.uncovered(gk.convert(net))}
    assert reasons["4"][0] == "Subclassed"
    assert re.fullmatch(r"its forward computes something else: y differs by \d\S* on a trial input", reasons["4"][1])
    assert reasons["5"] == ("BatchNorm1d", "no fused kernel for this layer")
    assert reasons["replaced"] == ("GELU", "its forward was replaced on the instance")
    assert reasons["tanh"][0] == "Tanh"
    assert set(reasons) == {"4", "5", "replaced", "tanh", "single"}


def test_parametrized_layer_is_left_alone():
    net = nn.Sequential(nn.LayerNorm(4))
    nn.utils.parametrizations.weight_norm(net[0], dim=None)
    before = type(net[0])
    assert type(gk.convert(net)[0]) is before
    assert gk.uncovered(net)[0].site == "0"


@pytest.mark.parametrize(
    ("make", "twin"),
    [
        (lambda cls: cls(5, eps=1e-3), (gk.LayerNorm, nn.LayerNorm)),
        (lambda cls: cls((2, 5), elementwise_affine=False), (gk.LayerNorm, nn.LayerNorm)),
        (lambda cls: cls(5, bias=False), (gk.LayerNorm, nn.LayerNorm)),
        (lambda cls: cls(5, dtype=torch.float64), (gk.LayerNorm, nn.LayerNorm)),
        (lambda cls: cls(), (gk.GELU, nn.GELU)),
        (lambda cls: cls(approximate="tanh"), (gk.GELU, nn.GELU)),
    ],
)
def test_modules_are_their_twins(make, twin):
    ours, theirs = make(twin[0]), make(twin[1])
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 5, dtype=next((p.dtype for p in theirs.parameters()), torch.float32))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_copies_do_not_measure():
    net = nn.Sequential(gk.LayerNorm(4), gk.Residual(nn.Linear(4, 4)))
    watch = gk.watch(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[0].stats is None
        assert other[1].stats is None
    assert net[0].stats is not None
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    assert not any("stats" in name for name in net.state_dict())
    watch.close()


def test_add_layer_norm_and_residual_modules():
    norm, x, residual = gk.AddLayerNorm(6), torch.randn(4, 6), torch.randn(4, 6)
    y, stream = norm(x, residual)
    torch.testing.assert_close(stream, x + residual)
    torch.testing.assert_close(y, nn.functional.layer_norm(x + residual, (6,), norm.weight, norm.bias))
    block = gk.Residual(nn.Linear(6, 6))
    torch.testing.assert_close(block(x), x + block.branch(x))
    with pytest.raises(gk.ArgumentError, match=r"residual_add: branch must have skip's shape, \(4, 6\), got \(4, 3\)"):
        gk.Residual(nn.Linear(6, 3))(x)


def test_training_equals_plain_pytorch():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1))
    fused = gk.convert(copy.deepcopy(plain))
    losses = {}
    for name, net in (("plain", plain), ("fused", fused)):
        optimizer, generator = torch.optim.AdamW(net.parameters(), 1e-2), torch.Generator().manual_seed(0)
        losses[name] = []
        for _ in range(50):
            x = torch.randn(32, 8, generator=generator)
            loss = (net(x) - x[:, :1].sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["plain"][-1] < 0.5 * losses["plain"][0]
    torch.testing.assert_close(torch.tensor(losses["fused"]), torch.tensor(losses["plain"]), rtol=1e-4, atol=0)


def test_shared_layer():
    norm = nn.LayerNorm(4)
    net = gk.convert(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": Plain(4)}))
    assert net["a"] is net["b"][0]
    assert type(norm) is gk.LayerNorm
    gk.revert(net)
    assert type(norm) is nn.LayerNorm
    assert type(net["c"]) is Plain


def wrapped_in_ddp(net):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(net)


WRAPPERS = {
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "module.compile": lambda net: net.compile(backend="eager") or net,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": wrapped_in_ddp,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_model(wrapper):
    """Converted and reverted inside its wrapper, before and after it has run."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Plain(4), nn.GELU())
    expected = train(copy.deepcopy(inner), (3, 4), 9)[0]
    try:
        net, outputs = WRAPPERS[wrapper](inner), []
        steps = torch.Generator().manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for step in range(9):
            if step % 3:
                (gk.convert if step % 3 == 1 else gk.revert)(net)
                assert isinstance(inner[1], gk.LayerNorm) == (step % 3 == 1)
            x = torch.randn(3, 4, generator=steps).requires_grad_()
            y = net(x)
            optimizer.zero_grad()
            y.backward(torch.randn(3, 4, generator=steps))
            optimizer.step()
            outputs += [y.detach(), x.grad]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    torch.testing.assert_close(outputs, expected)


def test_layers_changed_before_convert():
    """Parametrized layers and replaced forwards are left and listed; what works by hooks is fused."""
    net = nn.Sequential(nn.LSTM(4, 4), nn.LayerNorm(4), nn.GELU(), nn.LSTM(4, 4), Plain(4))
    parametrizations.weight_norm(net[0], "weight_hh_l0")
    parametrize.register_parametrization(net[1], "weight", Exp())
    net[2].forward = lambda input: input
    prune.l1_unstructured(net[3], "weight_ih_l0", 0.5)
    prune.l1_unstructured(net[4], "weight", 0.5)
    before, x = [type(module) for module in net[:3]], torch.randn(5, 2, 4)
    expected = net[4](net[3](x)[0])
    gk.convert(net)
    assert [type(module) for module in net[:3]] == before
    assert [(layer.site, layer.reason) for layer in gk.uncovered(net)] == [
        ("0", "its parameters are parametrized"),
        ("1", "its parameters are parametrized"),
        ("2", "its forward was replaced on the instance"),
    ]
    assert type(net[3]) is gk.LSTM
    assert isinstance(net[4], gk.LayerNorm)
    y = net[4](net[3](x)[0])
    torch.testing.assert_close(y, expected)
    y.backward(torch.randn(y.shape))
    assert all(
        module.get_parameter(name).grad is not None for module, name in ((net[3], "weight_ih_l0_orig"), (net[4], "weight_orig"))
    )


def test_forward_of_its_class_on_the_instance():
    """As accelerate leaves it behind when its hooks are taken off: nothing was replaced."""
    net, x = nn.Sequential(nn.LayerNorm(4), Plain(4)), torch.randn(3, 4)
    for layer in net:
        layer.forward = layer.forward
    expected = net(x)
    gk.convert(net)
    assert all(isinstance(layer, gk.LayerNorm) for layer in net)
    torch.testing.assert_close(net(x), expected)
    for layer in net:
        layer.forward = layer.forward
    gk.revert(net)
    assert [type(layer) for layer in net] == [nn.LayerNorm, Plain]
    assert not any("forward" in vars(layer) for layer in net)


def test_own_attribute_stats():
    layer = nn.LayerNorm(4)
    layer.stats = {"mine": 1}
    assert type(gk.convert(layer)) is nn.LayerNorm
    assert gk.uncovered(layer)[0].reason == "it has an attribute stats of its own"


def test_optimizer_and_names_through_convert_and_revert():
    """The same parameter objects, names and keys; an optimizer made before goes on."""
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Plain(4), nn.LSTM(4, 4))
    optimizer, x = torch.optim.AdamW(net.parameters()), torch.randn(3, 4)
    names, keys = dict(net.named_parameters()), list(net.state_dict())
    for number, change in enumerate((lambda net: net, gk.convert, gk.revert, gk.convert, gk.revert), 1):
        change(net)
        assert all(parameter is names[name] for name, parameter in net.named_parameters())
        assert list(net.state_dict()) == keys
        net(x)[0].sum().backward()
        optimizer.step()
        assert {int(state["step"]) for state in optimizer.state.values()} == {number}
        other = copy.deepcopy(net)
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other(x), net(x))
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), net(x))


def test_known_activations_of_timm():
    """By their names, for timm is not installed here."""
    for name, approximate in timm.GELU_CLASSES.items():
        module, _, cls = name.rpartition(".")
        original = type(cls, (nn.Module,), {"__module__": module, "forward": lambda self, input: input})
        layer, x = original(), torch.randn(5)
        described = repr(layer)
        torch.testing.assert_close(gk.convert(layer)(x), nn.functional.gelu(x, approximate=approximate))
        assert isinstance(layer, gk.GELU)
        assert isinstance(layer, original)
        assert repr(layer) == described
        gk.revert(layer)
        assert type(layer) is original
        assert "approximate" not in vars(layer)


@pytest.mark.parametrize("function", [gk.convert, gk.revert])
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got list"):
        function([nn.GELU()])
