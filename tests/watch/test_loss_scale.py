"""What a Watch reads with a GradScaler: the gradients of the loss itself, whichever of update() and step() comes first."""

import copy
import gc
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from histories import decades, history_of
from torch import nn
from torch.amp import GradScaler
from watched import Blocks, X

import gradkernels as gk

ORDERS = ("update first", "step first", "in turns")


def train(order="update first", scale=2.0**12, steps=5, inputs=None, accumulate=1, **options):
    """The history of a run with a scaler whose scale doubles in every step that it does not skip; None: without one."""
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1, enabled=scale is not None)
    watch = gk.watch(model, optimizer, scaler if scaler.is_enabled() else None, **options)
    for step in range(steps):
        for x in (X if inputs is None else inputs[step]).chunk(accumulate):
            loss = model(x).square().mean() / accumulate
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
        first = order == "step first" or (order == "in turns" and step % 2)
        if first:
            watch.step(loss)
        scaler.update()
        if not first:
            watch.step(loss)
    return watch


def same(history, expected):
    for ours, theirs in zip(history.snapshots, expected.snapshots, strict=True):
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5)


@pytest.mark.parametrize("log_every", [1, 10])
@pytest.mark.parametrize("order", ORDERS)
def test_the_gradients_of_the_loss_itself(order, log_every):
    watch = train(order, log_every=log_every)
    same(watch.history, train(scale=None).history)
    assert [snapshot.loss_scale for snapshot in watch.history.snapshots] == [2.0**k for k in range(12, 17)]


def test_time_steps_of_an_lstm():
    profiles = []
    for scale in (None, 2.0**10):
        torch.manual_seed(0)
        lstm = nn.LSTM(4, 4)
        model = nn.Sequential(lstm)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = scale and GradScaler("cpu", init_scale=scale)
        watch = gk.watch(model, optimizer, scaler)
        torch.manual_seed(1)
        loss = model(torch.randn(6, 2, 4))[0].square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        watch.step(loss)
        profiles.append(watch.time_profile()[0])
    np.testing.assert_allclose(profiles[1].dc, profiles[0].dc, rtol=1e-6)
    np.testing.assert_allclose(profiles[1].dh_recurrent, profiles[0].dh_recurrent, rtol=1e-6)
    np.testing.assert_array_equal(profiles[1].input_low, profiles[0].input_low)


@pytest.mark.parametrize("order", ORDERS)
def test_steps_that_are_skipped(order):
    """Marked, counted, and no failure; a gradient that is not finite without a scaler is one."""
    inputs = [X, X, X * math.inf, X, X]
    watch = train(order, inputs=inputs)
    assert [snapshot.skipped for snapshot in watch.history.snapshots] == [False, False, True, False, False]
    assert [snapshot.loss_scale for snapshot in watch.history.snapshots] == [2.0**12, 2.0**13, 2.0**14, 2.0**13, 2.0**14]
    assert watch.history.column("nonfinite_count", watch.sites[0].name)[2]
    assert not watch.diagnose()
    assert "skipped" not in str(watch)
    assert "loss nan, lr 1.00e-01, skipped by the gradient scaler\n" in str(train(order, inputs=inputs[:3], steps=3))
    assert [finding.code for finding in train(scale=None, inputs=inputs[:3], steps=3).diagnose()] == ["NONFINITE"]


def test_a_skipped_step_says_nothing_about_depth():
    """What did not overflow in a step that was skipped is no profile of its gradients."""
    healthy, vanishing = (decades(slope, -0.1, 0.0) for slope in (-0.2, -4.0))
    history = history_of([healthy] * 3 + [vanishing] * 4)
    assert [finding.code for finding in gk.diagnose(history)] == ["VANISHING"]
    history.snapshots.extend([replace(history.snapshots.pop(), skipped=True) for _ in range(4)][::-1])
    assert not gk.diagnose(history)


def test_a_scaler_that_is_off():
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = GradScaler("cpu", enabled=False)
    watch = gk.watch(model, optimizer, scaler)
    scaler.scale(model(X).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    watch.step()
    assert watch.history.snapshots[0].loss_scale == 1.0
    assert not watch.history.snapshots[0].skipped


def test_the_scale_in_a_file(tmp_path):
    watch = train(inputs=[X, X * math.inf, X], steps=3, run_dir=tmp_path)
    watch.close()
    loaded = gk.History.load(tmp_path)
    for ours, theirs in zip(loaded.snapshots, watch.history.snapshots, strict=True):
        assert (ours.loss_scale, ours.skipped) == (theirs.loss_scale, theirs.skipped)


def test_two_optimizers_of_one_scaler():
    """A GAN: each Watch knows whether its own optimizer's step was skipped."""
    models = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    scaler = GradScaler("cpu", init_scale=2.0**4)
    watches = [gk.watch(model, optimizer, scaler) for model, optimizer in zip(models, optimizers, strict=True)]
    for scale in (1.0, math.inf):
        for factor, model, optimizer in zip((scale, 1.0), models, optimizers, strict=True):
            scaler.scale((model(X) * factor).sum()).backward()
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        for watch in watches:
            watch.step()
    assert [[snapshot.skipped for snapshot in watch.history.snapshots] for watch in watches] == [[False, True], [False, False]]


def test_the_scaler_of_another_optimizer():
    model, other = Blocks(), nn.Linear(8, 8)
    optimizer, of_other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    scaler = GradScaler("cpu")
    watch = gk.watch(model, optimizer, scaler)
    scaler.scale(other(X).sum()).backward()
    scaler.step(of_other)
    with pytest.raises(ValueError, match="scaler must be the one that steps optimizer"):
        watch.step()
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler, got SGD"):
        gk.watch(Blocks(), None, of_other)


def test_a_scaler_is_what_it_was():
    """Copies and pickles of a watched one are of its own class, and it is itself again when the last Watch is gone."""
    scaler = GradScaler("cpu", init_scale=8.0)
    with pytest.raises(ValueError, match="sites must match modules"):
        gk.watch(Blocks(), None, scaler, sites=["none such"])
    assert type(scaler) is GradScaler
    watches = [gk.watch(Blocks(), None, scaler) for _ in range(2)]
    assert isinstance(scaler, GradScaler)
    scaler.scale(torch.ones(1))
    for twin in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert type(twin) is GradScaler
        assert twin.get_scale() == 8.0
        assert twin.state_dict() == scaler.state_dict()
    watches[0].close()
    assert type(scaler) is not GradScaler
    del watches
    gc.collect()
    assert type(scaler) is GradScaler


def test_a_new_scale_by_hand():
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    watch = gk.watch(model, optimizer, scaler)
    for scale in (16.0, 2.0):
        scaler.scale(model(X).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update(scale)
        watch.step()
    assert [snapshot.loss_scale for snapshot in watch.history.snapshots] == [4.0, 16.0]


@pytest.mark.parametrize("scale", [None, 2.0**8])
@pytest.mark.parametrize("order", ORDERS)
def test_micro_batches_are_one_batch(order, scale):
    """Eight parts of a batch, whose losses are divided by eight, are what the whole batch is; calls alone are counted apart."""
    whole, parts = (train(order, scale, inputs=[torch.cat([X] * 8)] * 5, accumulate=count) for count in (1, 8))
    for site in whole.sites:
        for field in ("norm", "rms", "abs_max", "numel", "nonfinite_count", "zero_count"):
            for port in set(site.ports) - {"dweight", "dbias"}:
                found, expected = (watch.history.column(field, site.name, port) for watch in (parts, whole))
                np.testing.assert_allclose(found, expected, rtol=1e-5 if field in ("norm", "rms", "abs_max") else 0)
        calls = parts.history.column("observation_count", site.name)
        assert set(calls / whole.history.column("observation_count", site.name)) == {8.0}
