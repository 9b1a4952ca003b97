"""convert, revert and the modules: what changes in a model and what does not."""

import copy
import functools
import io
import pickle
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
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
    reasons = {layer.site: (layer.layer, layer.reason) for layer in gk.uncovered(gk.convert(net))}
    assert reasons["4"][0] == "Subclassed"
    assert re.fullmatch(r"its forward computes something else: y differs by \d\S* on a trial input", reasons["4"][1])
    assert reasons["5"] == ("BatchNorm1d", "no fused kernel for this layer")
    assert reasons["replaced"] == ("GELU", "its forward was replaced on the instance")
    assert reasons["tanh"][0] == "Tanh"
    assert set(reasons) == {"4", "5", "replaced", "tanh"}


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


class Exp(nn.Module):
    def forward(self, weight):
        return weight.exp()


def replace_forward(layer):
    inner = layer.forward
    layer.forward = lambda *args: inner(*args)


def keep_old_forward(layer):
    """As accelerate does."""
    layer._old_forward = layer.forward
    layer.forward = functools.update_wrapper(lambda *args: layer._old_forward(*args), layer._old_forward)


def derive(layer):
    layer.__class__ = type("Derived", (type(layer),), {"forward": lambda self, *args: super(type(self), self).forward(*args)})


def first_weight(layer):
    return next(name for name, _ in layer.named_parameters() if "weight" in name)


# What somebody may do to a converted layer -> the reason that revert gives, or None where it takes the layer back.
CHANGES = {
    "parametrize": (lambda layer: parametrize.register_parametrization(layer, first_weight(layer), Exp()), "parametrized"),
    "weight_norm": (lambda layer: parametrizations.weight_norm(layer, first_weight(layer)), "parametrized"),
    "spectral_norm": (lambda layer: parametrizations.spectral_norm(layer.eval(), first_weight(layer)), "parametrized"),
    "parametrize, weight_hh": (lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"), "parametrized"),
    "old weight_norm": (lambda layer: nn.utils.weight_norm(layer, first_weight(layer)), None),
    "old spectral_norm": (lambda layer: nn.utils.spectral_norm(layer.eval(), first_weight(layer)), None),
    "prune": (lambda layer: prune.l1_unstructured(layer, first_weight(layer), 0.5), None),
    "forward": (replace_forward, "forward was replaced"),
    "_old_forward": (keep_old_forward, "forward was replaced"),
    "class": (derive, "class was changed"),
    "hook": (lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,)), None),
}
LAYERS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 4)),
    "GELU": (nn.GELU, (3, 4)),
    "LSTM": (lambda: nn.LSTM(4, 4, 2, bidirectional=True), (5, 2, 4)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 4), (3, 4)),
    "subclass": (lambda: Channels(4), (2, 4, 3, 5)),
}
CASES = [
    (layer, change)
    for layer in LAYERS
    for change in CHANGES
    if not (layer == "GELU" and change not in ("forward", "_old_forward", "class", "hook"))
    and not (layer in ("LayerNorm", "subclass") and change == "old spectral_norm")
    and not (layer != "LSTM" and change == "parametrize, weight_hh")
]


def changed(layer, change):
    torch.manual_seed(0)
    net = gk.convert(nn.Sequential(nn.Identity(), LAYERS[layer][0]()).double())
    CHANGES[change][0](net[1])
    return net


def train(net, shape, steps=3):
    """The outputs of some training steps, and the parameters after them."""
    generator, outputs = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True), *net.parameters()], 0.1)
    for _ in range(steps):
        x = torch.randn(shape, generator=generator).to(next(net.parameters(), torch.zeros(())).dtype).requires_grad_()
        y = net(x)
        y = y[0] if isinstance(y, tuple) else y
        optimizer.zero_grad()
        y.backward(torch.randn(y.shape, generator=generator).to(y))
        optimizer.step()
        outputs += [y.detach(), x.grad]
    return outputs, dict(net.named_parameters())


@pytest.mark.parametrize(("layer", "change"), CASES)
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_revert_of_a_changed_layer(layer, change):
    """Function and training stay, whether the layer was taken back or left; what is left is named once."""
    shape, reason = LAYERS[layer][1], CHANGES[change][1]
    expected, parameters = train(changed(layer, change), shape)
    net = changed(layer, change)
    net(torch.randn(shape).double())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gk.revert(net)
    assert len(caught) == (reason is not None)
    if reason is not None:
        assert re.search(rf"revert: .* 1 \(\w+\): .*{reason}", str(caught[0].message))
    assert isinstance(net[1], gk.nn._Measuring) == (reason is not None)
    got, after = train(net, shape)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(after, parameters)


def test_parameters_of_a_changed_lstm_have_effect():
    net, x = changed("LSTM", "parametrize, weight_hh"), torch.randn(5, 2, 4).double()
    with pytest.warns(UserWarning, match="parametrized"):
        gk.revert(net)
    before = net(x)[0]
    with torch.no_grad():
        net[1].parametrizations.weight_hh_l0.original0.mul_(5)
    assert not torch.allclose(net(x)[0], before)


@pytest.mark.parametrize("layer", ["LayerNorm", "LSTM", "subclass"])
def test_revert_follows_when_the_change_is_taken_back(layer):
    undo = {
        "parametrize": lambda module: parametrize.remove_parametrizations(module, first_weight_of(module)),
        "forward": lambda module: delattr(module, "forward"),
        "class": lambda module: setattr(module, "__class__", type(module).__bases__[0]),
    }

    def first_weight_of(module):
        return next(iter(module.parametrizations))

    for change, take_back in undo.items():
        net = changed(layer, change)
        with pytest.warns(UserWarning, match="stay as they are"):
            gk.revert(net)
        take_back(net[1])
        x = torch.randn(LAYERS[layer][1]).double()
        fused = net(x)
        gk.revert(net)
        assert type(net[1]) is type(LAYERS[layer][0]())
        torch.testing.assert_close(net(x), fused)
        train(net, x.shape)


def test_revert_names_all_layers_in_one_warning():
    net = gk.convert(nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.LayerNorm(4)))
    net[0].forward = net[0].forward
    net.kept = net[2].forward
    with pytest.warns(
        UserWarning, match=r"0 \(LayerNorm\): its forward was replaced.*; 2 \(LayerNorm\): an attribute"
    ) as caught:
        gk.revert(net)
    assert len(caught) == 1
    assert type(net[1]) is nn.GELU
    net.kept(net(torch.randn(2, 4)))


def test_revert_after_the_original_class_was_set():
    net = gk.convert(nn.Sequential(nn.LayerNorm(4)))
    net[0].__class__ = nn.LayerNorm
    gk.revert(net)
    assert type(net[0]) is nn.LayerNorm
    assert not any("gradkernels" in name for name in vars(net[0]))


class Plain(nn.LayerNorm):
    """Another constructor, another name for the argument, an attribute more."""

    def __init__(self, channels, eps=1e-6, affine=True, **kwargs):
        super().__init__(channels, eps, affine, **kwargs)
        self.note = ["kept"]

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Inherits(nn.LayerNorm):
    pass


class Channels(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Casts(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Single(nn.LayerNorm):
    def forward(self, x):
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Gelu(nn.GELU):
    def forward(self, x):
        return nn.functional.gelu(x, approximate=self.approximate)


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
        assert not isinstance(layer, gk.nn._Measuring)
        assert "differs by" in gk.uncovered(nn.Sequential(layer))[0].reason
        return
    assert isinstance(layer, gk.GELU if cls is Gelu else gk.LayerNorm)
    assert isinstance(layer, cls)
    assert repr(layer) == repr(plain)
    assert gk.uncovered(layer) == []
    last = getattr(layer, "normalized_shape", (4,))
    for shape in [(2, *last, 7, 9), (0, *last, 1, 2)] if cls is Channels else [(7, *last), (5, 9, *last), last, (0, *last)]:
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


class Gain(nn.LayerNorm):
    """The same at first, while its gain is one."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class Running(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class InEval(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x) * 1.001


class OwnEps(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)


class Detached(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias.detach(), self.eps)


class Straight(nn.LayerNorm):
    """y of a LayerNorm, dx of the identity."""

    def forward(self, x):
        return super().forward(x).detach() + x - x.detach()


class ByRank(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if x.dim() == 4 else super().forward(x)


class Widens(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).float()


class Narrows(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.bfloat16().to(x.dtype))


class Dense(nn.LayerNorm):
    """The numbers of Channels in another layout."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class RootMeanSquare(nn.LayerNorm):
    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class ByHand(nn.LayerNorm):
    """A LayerNorm, to which autocast does something else."""

    def forward(self, input):
        x = input.float() - input.float().mean(-1, keepdim=True)
        y = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (y * self.weight + self.bias).to(input.dtype)


class Two(nn.LayerNorm):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Holds(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.after = nn.Identity()

    def forward(self, x):
        return self.after(super().forward(x))


class Pair(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x), x


class Stats(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.stats = []


class Fast(nn.LayerNorm):
    """In the dtype of an autocast region."""

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Quick(nn.GELU):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class OtherFormula(nn.GELU):
    """What its approximate says is not what it does."""

    def forward(self, x):
        return nn.functional.gelu(x, approximate="tanh")


class Formula(nn.GELU):
    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


class Clipped(nn.GELU):
    def forward(self, x):
        return super().forward(x).clamp(-10, 10)


class Noisy(nn.GELU):
    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Gain, "differs by"),
        (Running, "differs by"),
        (InEval, "y differs by"),
        (OwnEps, "differs by"),
        (Detached, "dbias has dtype NoneType on a trial input, not float32"),
        (Straight, "dx differs by"),
        (ByRank, "that a fused one does not|differs by"),
        (Widens, "y has dtype float32 on a trial input, not bfloat16"),
        (Narrows, "y differs by"),
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


class Counting(nn.LayerNorm):
    """Writes wherever a forward can: buffers, attributes, random numbers."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen, self.number = [], 0

    def forward(self, input):
        self.calls += 1
        self.number += 1
        self.seen.append(input.shape)
        torch.rand(1)
        return super().forward(input)


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_trial_leaves_no_trace(context):
    layer = Counting(6).eval()
    layer.weight.requires_grad_(False)
    layer.bias.grad = torch.ones(6)
    layer.register_forward_hook(lambda *args: pytest.fail("a hook was called"))
    values = {name: value.clone() for name, value in layer.state_dict().items()}
    versions = [parameter._version for parameter in layer.parameters()]
    random, grad = torch.get_rng_state(), layer.bias.grad
    with context():
        gk.convert(layer)
    assert isinstance(layer, gk.LayerNorm)
    assert (layer.seen, layer.number, layer.training) == ([], 0, False)
    assert all(torch.equal(value, values[name]) for name, value in layer.state_dict().items())
    assert [parameter._version for parameter in layer.parameters()] == versions
    assert layer.bias.grad is grad
    assert torch.equal(grad, torch.ones(6))
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random)


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
    net = nn.Sequential(nn.LSTM(4, 4), nn.LayerNorm(4), nn.GELU(), nn.LSTM(4, 4))
    parametrizations.weight_norm(net[0], "weight_hh_l0")
    parametrize.register_parametrization(net[1], "weight", Exp())
    net[2].forward = lambda input: input
    prune.l1_unstructured(net[3], "weight_ih_l0", 0.5)
    before, x = [type(module) for module in net[:3]], torch.randn(5, 2, 4)
    expected = net[3](x)
    gk.convert(net)
    assert [type(module) for module in net[:3]] == before
    assert [(layer.site, layer.reason) for layer in gk.uncovered(net)] == [
        ("0", "its parameters are parametrized"),
        ("1", "its parameters are parametrized"),
        ("2", "its forward was replaced on the instance"),
    ]
    assert type(net[3]) is gk.LSTM
    torch.testing.assert_close(net[3](x), expected)


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
        layer = type(cls, (nn.Module,), {"__module__": module})()
        x = torch.randn(5)
        torch.testing.assert_close(gk.convert(layer)(x), nn.functional.gelu(x, approximate=approximate))
        assert type(layer) is gk.GELU
        gk.revert(layer)
        assert type(layer).__name__ == cls
        assert "approximate" not in vars(layer)
