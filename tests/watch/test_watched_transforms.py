"""Watched models under transforms of their gradients: vectorized jacobians, batched gradients, per-sample gradients."""

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, jacrev, vmap

import gradkernels as gk


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


class AddNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = gk.AddLayerNorm(4)

    def forward(self, x):
        return sum(self.norm(x, 2 * x))


NETS = {
    "layer_norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "gelu": (nn.GELU, (3, 4)),
    "gelu tanh": (lambda: nn.GELU("tanh"), (3, 4)),
    "lstm": (lambda: First(nn.LSTM(4, 4, 2, bidirectional=True)), (3, 2, 4)),
    "lstm_cell": (lambda: First(nn.LSTMCell(4, 4)), (3, 4)),
    "residual": (lambda: gk.Residual(nn.Linear(4, 4)), (3, 4)),
    "add_layer_norm": (AddNorm, (3, 4)),
    "probes": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (3, 4)),
}


@pytest.fixture(params=NETS)
def watched(request):
    """(a watched model, the same model unwatched, x, the Watch)."""
    make, shape = NETS[request.param]
    torch.manual_seed(0)
    plain = make().double()
    net = make().double()
    net.load_state_dict(plain.state_dict())
    return net, plain, torch.randn(shape, dtype=torch.float64), gk.watch(net)


def per_sample(net, x):
    """Gradients of each example's own loss with respect to every parameter, or to x where there is none."""
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return functional_call(net, parameters, (x,)).square().sum()

    if not parameters:
        return (vmap(grad(lambda x: net(x).square().sum()))(torch.stack([x, 2 * x])),)
    return tuple(vmap(grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, 2 * x])).values())


def one_by_one(net, x):
    """The same one example after the other: torch.nn's LSTM has no vmap."""
    found = []
    for example in (x.clone().requires_grad_(), (2 * x).requires_grad_()):
        found.append(torch.autograd.grad(net(example).square().sum(), list(net.parameters()) or [example]))
    return tuple(torch.stack(gradients) for gradients in zip(*found, strict=True))


def batched(net, x):
    """Two backward passes of one graph at once."""
    x = x.detach().requires_grad_()
    y = net(x)
    return torch.autograd.grad(y, [x, *net.parameters()], torch.stack([y.detach().cos(), y.detach()]), is_grads_batched=True)


TRANSFORMS = {
    "vectorized jacobian": lambda net, x: (jacobian(net, x, vectorize=True),),
    "jacrev": lambda net, x: (jacrev(net)(x),),
    "is_grads_batched": batched,
    "per-sample gradients": per_sample,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(watched, transform):
    """The numbers of the model that nobody watches, before a step, after one, and paused; steps count what steps measure."""
    net, plain, x, watch = watched
    expected = (one_by_one if transform is per_sample else transform)(plain, x)

    def step():
        net(x.clone().requires_grad_()).sum().backward()
        watch.step()
        records = watch.records()
        return [(r.site, r.port, r.numel) for r in records], [r.norm for r in records]

    first = step()
    for action in (lambda: None, watch.step, watch.pause):
        action()
        torch.testing.assert_close(transform(net, x), expected)
    watch.step()
    watch.resume()
    rows, norms = step()
    assert rows == first[0]
    assert norms == pytest.approx(first[1])


def test_is_grads_batched_counts_every_gradient():
    """A batch of gradients is a larger gradient; time steps have no place for it."""
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))
    watch = gk.watch(net)
    y = net(torch.randn(3, 4))
    torch.autograd.grad(y, list(net.parameters()), torch.ones(5, 3, 4), is_grads_batched=True)
    watch.step()
    numels = {(record.site, record.port): record.numel for record in watch.records()}
    assert numels[("2", "dy")] == 60
    assert numels[("1", "dx")] == 60
    assert numels[("2", "dweight")] == 20


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd(fresh_compiler):
    """It takes hooks written in C++ of one kind alone: those of probes measure there what they measure elsewhere."""
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
    watch, x = gk.watch(net), torch.randn(4, 8)

    def step():
        net(x).square().sum().backward()
        watch.step()
        return [(record.site, record.observation_count, record.norm) for record in watch.records()]

    expected = step()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        assert step() == expected
    assert len(expected) == 3
