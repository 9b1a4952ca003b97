"""Subclasses of nn.LayerNorm and nn.GELU: fused where a trial shows that they compute the same."""

import copy
import io
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from derived_layers import (
    Absolute,
    ByHand,
    ByRank,
    Casts,
    Channels,
    Channels1d,
    Clipped,
    Counting,
    Dense,
    Detached,
    Downcasts,
    Drawing,
    Fast,
    Formula,
    Gain,
    Gelu,
    Holds,
    InEval,
    Inherits,
    Noisy,
    OtherFormula,
    OwnEps,
    Pair,
    Plain,
    Quick,
    RootMeanSquare,
    Running,
    Single,
    Stats,
    Straight,
    Two,
    Upcasts,
)
from torch import nn

import gradkernels as gk

SAME = [
    lambda: Plain(6),
    lambda: Plain(6, 1e-3),
    lambda: Plain(6, affine=False),
    lambda: Plain(6, bias=False),
    lambda: Plain((3, 4)),
    lambda: Inherits(5),
    lambda: Channels(6),
    lambda: Channels(6, elementwise_affine=False),
    lambda: Channels(3, eps=1e-2),
    lambda: Channels1d(6, eps=1e-12),
    lambda: Casts(6),
    lambda: Single(6),
    lambda: Single(6, bias=False),
    lambda: Gelu(),
    lambda: Gelu("tanh"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("make", SAME)
def test_subclass_that_computes_the_same(make, dtype):
    """It is fused, with the numbers of its own forward on inputs other than those of the trial."""
    torch.manual_seed(0)
    layer = make().to(dtype)
    plain = copy.deepcopy(layer)
    cls = type(layer)
    gk.convert(layer)
    if cls is Single and dtype is torch.float64:
        assert not isinstance(layer, gk.nn.FusedModule)
        assert "differs by" in gk.uncovered(nn.Sequential(layer))[0].reason
        return
    assert isinstance(layer, gk.GELU if cls is Gelu else gk.LayerNorm)
    assert isinstance(layer, cls)
    assert repr(layer) == repr(plain)
    assert gk.uncovered(layer) == []
    last = getattr(layer, "normalized_shape", (4,))
    shapes = [(7, *last), (5, 9, *last), last, (0, *last)]
    shapes = {Channels: [(2, *last, 7, 9), (0, *last, 1, 2)], Channels1d: [(2, *last, 7), (3, *last, 1)]}.get(cls, shapes)
    for shape in shapes:
        results = []
        for module in (plain, layer):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).mul_(3).add_(1).to(dtype).requires_grad_()
            y = module(x=x) if cls in (Plain, Channels) else module(x)
            y.backward(torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype))
            results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
            module.zero_grad()
        assert results[0][0].stride() == results[1][0].stride()
        rtol = 32 * torch.finfo(dtype).eps
        for want, have in zip(*results, strict=True):
            torch.testing.assert_close(
                have, want, rtol=rtol, atol=rtol * max(want.abs().amax().item() if want.numel() else 0, 1)
            )
    gk.revert(layer)
    assert type(layer) is cls
    assert layer.__dict__.keys() == plain.__dict__.keys()


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Gain, "differs by"),
        (Running, "differs by"),
        (Absolute, "differs by"),
        (Counting, "does more than compute: it writes to"),
        (InEval, "y differs by"),
        (OwnEps, "differs by"),
        (Detached, "dbias has dtype NoneType on a trial input, not float32"),
        (Straight, "dx differs by"),
        (ByRank, "that a fused one does not|differs by"),
        (Upcasts, "y has dtype float32 on a trial input, not bfloat16"),
        (Downcasts, "y differs by"),
        (Dense, "y has shape and strides"),
        (RootMeanSquare, "y differs by"),
        (ByHand, "does not call torch.nn.functional"),
        (Two, "takes other arguments than one tensor"),
        (Holds, "holds other layers"),
        (Pair, "tuple"),
        (Stats, "attribute stats of its own"),
        (Fast, "y has dtype"),
        (Quick, "y differs by 0.02"),
        (OtherFormula, "differs by"),
        (Formula, "does not call torch.nn.functional"),
        (Clipped, "y differs by"),
        (Noisy, "y differs by"),
    ],
)
def test_subclass_that_computes_something_else(cls, reason):
    """It is left as it is, and the reason is in the list."""
    layer = cls() if issubclass(cls, nn.GELU) else cls(6)
    before, random = dict(vars(layer)), torch.get_rng_state()
    net = gk.convert(nn.Sequential(layer))
    assert type(layer) is cls
    assert vars(layer) == before
    assert torch.equal(torch.get_rng_state(), random)
    (left,) = [entry for entry in gk.uncovered(net) if entry.site == "0"]
    assert re.search(reason, left.reason), left.reason


def test_trial_on_other_values_of_eps():
    """Where its own eps is the layer's it computes the same."""
    assert isinstance(gk.convert(OwnEps(6, eps=1e-6)), gk.LayerNorm)


@pytest.mark.parametrize(
    "context", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")]
)
@pytest.mark.parametrize("cls", [Counting, Drawing])
def test_the_trial_leaves_no_trace(context, cls):
    layer = cls(6).eval()
    layer.weight.requires_grad_(False)
    layer.bias.grad = torch.ones(6)
    layer.register_forward_hook(lambda *args: pytest.fail("a hook was called"))
    values = {name: value.clone() for name, value in layer.state_dict().items()}
    versions = [parameter._version for parameter in layer.parameters()]
    random, grad = torch.get_rng_state(), layer.bias.grad
    with context():
        gk.convert(layer)
    assert isinstance(layer, gk.LayerNorm) == (cls is Drawing)
    assert cls is Drawing or (layer.seen, layer.number) == ([], 0)
    assert not layer.training
    assert all(torch.equal(value, values[name]) for name, value in layer.state_dict().items())
    assert [parameter._version for parameter in layer.parameters()] == versions
    assert layer.bias.grad is grad
    assert torch.equal(grad, torch.ones(6))
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("shape", "fused"), [((1,), False), ((2,), False), ((3,), True), ((3, 1), True), ((2**16 + 1,), False)]
)
def test_length_of_rows(shape, fused):
    """Too short, and all that a trial shows is rounding; too long, and it takes long. torch.nn's own need no trial."""
    net = gk.convert(nn.Sequential(Inherits(shape), nn.LayerNorm(shape)))
    assert [isinstance(layer, gk.LayerNorm) for layer in net] == [fused, True]
    expected = [] if fused else [f"a subclass is tried with 3 to 65536 elements per row, not with {shape[0]}"]
    assert [layer.reason for layer in gk.uncovered(net)] == expected


def test_meta_device():
    """A subclass cannot be tried there; a torch.nn layer need not be."""
    net = nn.Sequential(Plain(4, device="meta"), nn.LayerNorm(4, device="meta"))
    gk.convert(net)
    assert [type(module) for module in net] == [Plain, gk.LayerNorm]
    assert [layer.reason for layer in gk.uncovered(net)] == [
        "on the meta device its forward cannot be tried: convert it where it has values"
    ]
    assert isinstance(gk.convert(net.to_empty(device="cpu"))[0], gk.LayerNorm)


def test_copies_of_a_fused_subclass():
    """Copies, pickles and saved models are of the same class, compute the same, and revert."""
    net, x = gk.convert(nn.Sequential(Channels(4), Plain(3), Gelu())), torch.randn(2, 4, 3, 3)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert [type(module) for module in other] == [type(module) for module in net]
        assert other[1].note == ["kept"]
        assert other[1].note is not net[1].note
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
        gk.revert(other)
        assert [type(module) for module in other] == [Channels, Plain, Gelu]
        torch.testing.assert_close(other(x), net(x))
    assert type(gk.convert(Channels(7))) is type(net[0])


def test_tools_on_a_fused_subclass():
    """Watched, compiled, traced by torch.fx, and scripted as the class it was."""
    net, x = nn.Sequential(Channels(4), Plain(3)), torch.randn(2, 4, 3, 3, requires_grad=True)
    expected = copy.deepcopy(net)(x)
    watch = gk.watch(net)
    net(x).sum().backward()
    watch.step()
    assert {(record.site, record.port) for record in watch.records()} >= {("0", "dweight"), ("1", "dx")}
    watch.close()
    assert [node.op for node in torch.fx.symbolic_trace(net).graph.nodes].count("call_module") == 2
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.jit.script(gk.convert(nn.Sequential(Inherits(3))))(x), nn.LayerNorm(3)(x))


def test_subclasses_of_transformers():
    """The same class in two layouts; and one that scales by weight + 1."""
    pytest.importorskip("transformers")
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    layers = [ConvNextLayerNorm(4, data_format=layout) for layout in ("channels_last", "channels_first")]
    net = nn.Sequential(*layers, NemotronLayerNorm1P(4))
    x = torch.randn(2, 4, 3, 4)
    expected = net(x)
    assert [isinstance(layer, gk.LayerNorm) for layer in gk.convert(net)] == [True, True, False]
    torch.testing.assert_close(net(x), expected)
    assert [layer.site for layer in gk.uncovered(net)] == ["2"]
