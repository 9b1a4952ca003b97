"""Nested derivatives: whatever torch.func and double backward make of our ops equals what they make of PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from lstm_cases import plain_cell, plain_layer

import gradkernels as gk

grad, vmap = torch.func.grad, torch.vmap
N = 5


def ops():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, N, generator=generator, dtype=torch.float64)
    recurrent = torch.randn(4 * N, N, generator=generator, dtype=torch.float64) / N
    weights, state = (recurrent, recurrent.flip(0), None, None), (weight.expand(2, N), bias.expand(2, N))

    def layer(function):
        return lambda x: function(torch.stack([x, x.sin()], 1).squeeze(-2)[-3:, :2], *state, *weights, None)[0]

    return {
        "lstm_layer": (layer(gk.lstm_layer), layer(plain_layer)),
        "lstm_cell": (
            lambda x: sum(gk.lstm_cell(x, x.sin(), x.cos(), *weights)),
            lambda x: sum(plain_cell(x, x.sin(), x.cos(), *weights)),
        ),
        "gelu": (gk.gelu, F.gelu),
        "gelu tanh": (lambda x: gk.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
        "layer_norm": (lambda x: gk.layer_norm(x, (N,), weight, bias), lambda x: F.layer_norm(x, (N,), weight, bias)),
        "add_layer_norm": (
            lambda x: sum(gk.add_layer_norm(x, x.sin(), (N,), weight, bias)),
            lambda x: F.layer_norm(x + x.sin(), (N,), weight, bias) + x + x.sin(),
        ),
        "residual": (lambda x: gk.residual(x, torch.sin), lambda x: x + x.sin()),
        "probe": (lambda x: gk.probe(x * x, stats=gk.new_stats(1)), lambda x: x * x),
    }


def double_backward(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((f(x) ** 2).sum(), x, create_graph=True)
    return torch.autograd.grad((first**2).sum(), x)[0]


# Losses are not linear in the op's output: a derivative lost between two levels then shows.
NESTED = {
    "double backward": double_backward,
    "grad of grad": lambda f, x: grad(lambda u: (grad(lambda v: (f(v) ** 2).sum())(u) ** 2).sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda v: (f(v) ** 2).sum())(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(lambda v: (f(v) ** 2).sum()))(x),
    "jvp of grad": lambda f, x: torch.func.jvp(grad(lambda v: (f(v) ** 3).sum()), (x,), (x.cos(),))[1],
    "vmap of grad": lambda f, x: vmap(grad(lambda v: (f(v) ** 2).sum()))(x[:, None]),
    "grad of vmap": lambda f, x: grad(lambda u: (vmap(f)(u[:, None]) ** 2).sum())(x),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(x[None, :, None]),
}


@pytest.mark.parametrize("transform", NESTED)
@pytest.mark.parametrize("op", ops())
def test_nested_derivatives(op, transform):
    ours, twin = ops()[op]
    x = torch.randn(3, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(NESTED[transform](ours, x), NESTED[transform](twin, x), rtol=1e-9, atol=1e-11)
