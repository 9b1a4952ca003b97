"""What the tests of a Watch share: blocks that return their output in many ways, and a few steps of training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gradkernels as gk

X = torch.randn(5, 8)


def train(net, *args, steps=3, watch=None):
    watch = watch or gk.watch(net)
    for _ in range(steps):
        total(net(*args)).backward()
        watch.step()
    return watch


def trained(model, loss_of, *, steps=8, lr=1e-3):
    """The Watch of a model after some steps of Adam on loss_of(model)."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    watch = gk.watch(model, optimizer)
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss)
    return watch


def of_noise(model):
    return model(torch.randn(4, 8)).square().mean()


def total(value):
    if isinstance(value, torch.Tensor):
        return value.abs().sum() if value.is_complex() else value.square().sum()
    return sum(total(item) for item in value if isinstance(item, torch.Tensor | tuple | list))


@dataclass
class Output:
    weights: Any
    hidden: torch.Tensor


WRAP = {
    "tuple": (lambda y: (y, 3), lambda out: out[0]),
    "none first": (lambda y: (None, y), lambda out: out[1]),
    "dict": (lambda y: {"mask": None, "hidden": y}, lambda out: out["hidden"]),
    "dataclass": (lambda y: Output(None, y), lambda out: out.hidden),
    "nested": (lambda y: [(None, {"hidden": y})], lambda out: out[0][1]["hidden"]),
    "complex": (lambda y: torch.complex(y, -y), lambda out: out.real),
    "integers first": (lambda y: (torch.zeros(2, dtype=torch.long), y), lambda out: out[1]),
}


class Block(nn.Module):
    def __init__(self, wrap=None):
        super().__init__()
        self.norm, self.linear, self.wrap = nn.LayerNorm(8), nn.Linear(8, 8), wrap

    def forward(self, x):
        y = x + self.linear(self.norm(x))
        return WRAP[self.wrap][0](y) if self.wrap else y


class Blocks(nn.Module):
    def __init__(self, wrap=None, detached=None):
        super().__init__()
        self.blocks, self.wrap, self.detached, self.skipped = nn.ModuleList(Block(wrap) for _ in range(4)), wrap, detached, ()

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index in self.skipped:
                continue
            x = block(x)
            if self.wrap:
                x = WRAP[self.wrap][1](x)
            if index == self.detached:
                x = x.detach()
        return x
