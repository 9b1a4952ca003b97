"""The order of sites: learned from the flow of data, corrected, and learned no longer than that takes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from watched import of_noise, trained

import gradkernels as gk


class Chain(nn.Module):
    """Blocks listed in an order that is not that of the data, some of them left out, run twice or run in part."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("l3", "l0", "l2", "l1")})
        self.order, self.reentrant = range(4), reentrant

    def forward(self, x):
        for index in self.order:
            layer = self.layers[f"l{index}"]
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("first", [(0, 1, 2, 3), (1, 2, 3), (0, 2), (3,), (0, 1, 2, 3, 0, 1, 2, 3), ()])
def test_order_is_learned_and_corrected(first):
    net = Chain()
    watch = gk.watch(net)
    for order in (first, *[range(4)] * 3):
        net.order = order
        net(torch.randn(2, 8, requires_grad=True)).sum().backward()
        watch.step()
    assert [record.site for record in next(iter(watch.depth_profile().values()))] == [f"layers.l{k}" for k in range(4)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_order_under_checkpointing(reentrant):
    net = Chain(reentrant)
    watch = gk.watch(net)
    for _ in range(3):
        with torch.no_grad():
            net(torch.randn(2, 8))
        net(torch.randn(2, 8, requires_grad=True)).sum().backward()
        watch.step()
    assert [record.site for record in watch.stream()] == [f"layers.l{k}" for k in range(4)]
    assert [len(records) for records in watch.depth_profile().values()] == [4]


def test_an_encoder_used_twice():
    """Two views through one encoder: one stack, and no circle."""
    encoder, head = Chain(), nn.Linear(16, 2)

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, head

        def forward(self, a, b):
            return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))

    net = Siamese()
    watch = gk.watch(net)
    for _ in range(3):
        net(torch.randn(2, 8), torch.randn(2, 8)).sum().backward()
        watch.step()
    assert [stack.sites for stack in watch.history.stacks] == [tuple(f"encoder.layers.l{k}" for k in range(4))]


def test_a_block_that_ends_in_a_site():
    """The output of the block is that of its last layer: both are in line, and nothing goes past either."""
    watch = trained(nn.Sequential(*[EndsInNorm() for _ in range(3)]), of_noise, steps=2)
    assert {stack.name for stack in watch.history.stacks} == {"0…2", "0…2.norm"}
    assert not any(any(stack.bypassed) for stack in watch.history.stacks)
    assert [site.name for site in watch.history.sites] == ["0.norm", "0", "1.norm", "1", "2.norm", "2"]


class EndsInNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.linear(x))


class Towers(nn.Module):
    """Two chains of the same names but for a number."""

    def __init__(self):
        super().__init__()
        self.tower0, self.tower1 = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))

    def forward(self, x):
        a = b = x
        for one, two in zip(self.tower0, self.tower1, strict=True):
            a, b = one(a), two(b)
        return a * b


def test_towers_stay_apart_where_a_validation_came_first():
    net = Towers()
    watch = gk.watch(net)
    for _ in range(2):
        with torch.no_grad():
            net(torch.randn(2, 8))
        net(torch.randn(2, 8)).sum().backward()
        watch.step()
    assert [stack.sites for stack in watch.history.stacks] == [tuple(f"tower{t}.{k}" for k in range(3)) for t in range(2)]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(EndsInNorm() for _ in range(3))

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


def test_experts_side_by_side_are_not_in_line():
    """Expert 1 of a layer is followed by expert 1 of the next."""
    watch = trained(nn.Sequential(*[Experts() for _ in range(3)]), of_noise, steps=2)
    names = {stack.name for stack in watch.history.stacks}
    assert {"0…2", *(f"0…2.experts.{k}" for k in range(3))} <= names


def test_learning_ends():
    """No hook stays for it once every module has run, or after some steps where one never does."""
    net = nn.ModuleList([Chain(), nn.Linear(8, 8)])
    watch = gk.watch(net)
    for step in range(12):
        net[0](torch.randn(2, 8)).sum().backward()
        watch.step()
        assert len(net[0].layers["l0"]._forward_hooks) == (2 if step < 9 else 1)
    net[1](net[0](torch.randn(2, 8))).sum().backward()
    watch.step()
    net[1](net[0](torch.randn(2, 8))).sum().backward()
    watch.step()
    assert watch.sites[-1].name == "1"
    assert watch.history.sites[-1].name == "1"


def test_exact_zeros_by_design():
    """The first steps of a branch that starts at zero: nothing is wrong."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 8)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return x + self.b(self.a(x))

    watch = trained(
        nn.Sequential(*[Branch() for _ in range(4)]), lambda model: model(torch.ones(4, 8)).square().mean(), steps=4
    )
    assert not watch.diagnose()
