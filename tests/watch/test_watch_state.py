"""What a Watch lives through: pauses, copies, pickles, layers that are replaced, optimizers and losses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from watched import Blocks, X, train

import gradkernels as gk


def test_state():
    """Pause, close, copies, pickles, and a part that two models share."""
    net = Blocks()
    watch = train(net, X)
    assert copy.deepcopy(watch) is watch
    with pytest.raises(TypeError, match=r"a Watch cannot be pickled.*watch\.history\.write"):
        pickle.dumps(watch)
    net.watch_of_the_user = watch
    assert train(copy.deepcopy(net), X).records()
    for _ in range(3):
        watch.pause()
        watch.resume()
    train(net, X, watch=watch, steps=1)
    assert {record.observation_count for record in watch.records()} == {1}
    with pytest.raises(RuntimeError, match=r"blocks\.0 is watched already.*watch one module that holds them both"):
        gk.watch(nn.ModuleDict({"blocks": nn.ModuleList([*net.blocks, nn.Linear(8, 8)])}))
    watch.close()
    watch.close()
    watch.pause()
    with pytest.raises(RuntimeError, match=r"resume: this Watch was closed: gk\.watch\(model\) begins anew"):
        watch.resume()
    assert train(net, X).records()


def test_a_layer_that_is_replaced_while_watched():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(8, 2), nn.Linear(2, 8)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    net = Blocks()
    watch = train(net, X)
    for block in net.blocks:
        block.linear = Adapter(block.linear)
    train(net, X, watch=watch)
    assert {record.observation_count for record in watch.records()} == {1}
    assert not watch.diagnose()


def test_the_learning_rate_of_the_step_and_of_every_group():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    groups = [{"params": net[0].parameters(), "lr": 1.0}, {"params": net[1].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    watch = gk.watch(net, optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
        watch.step()
    rates = [snapshot.learning_rates for snapshot in watch.history.snapshots]
    assert rates == [(1.0, 0.5), pytest.approx((0.1, 0.05))]
    assert "lr 1.00e-01 5.00e-02" in str(watch)
    watch.close()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_loss_of_several_elements():
    watch = gk.watch(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"step: loss must be one number, got a tensor of shape \(2,\)"):
        watch.step(torch.zeros(2))
    watch.step(torch.zeros(1, 1))
