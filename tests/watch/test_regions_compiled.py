"""Every record equals what autograd says of an unwatched twin, in compiled graphs, exported ones, threads and processes."""

import threading

import pytest
import torch
from independent import (
    BATCH,
    INPUTS,
    STEPS,
    Autograd,
    Small,
    batch,
    check,
    checkpointed,
    loss_of,
    same_as_autograd,
    train,
    twins,
)
from torch import nn

import gradkernels as gk

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("options", [{"backend": "aot_eager", "fullgraph": True}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled_after_watch(options):
    """The forwards of a loss are two, one of them in the midst of another's graph; validation in between is no training."""

    def scenario(net, end_step):
        for seed in range(2):
            loss = loss_of(net, seed)
            with torch.no_grad():
                loss_of(net, 5)
            loss.backward()
            loss_of(net, 7).backward()
            end_step()

    check(scenario, Small, lambda net: torch.compile(net, **options))


@pytest.mark.parametrize(("ran", "in_place"), [(False, False), (True, False), (True, True)])
def test_compiled_before_watch(ran, in_place):
    """The model may have run: what the compiler knows of it is not what it is any more."""
    plain, net = twins(Small)
    autograd = Autograd(plain)
    if in_place:
        net.compile(backend="aot_eager")
        model = net
    else:
        model = torch.compile(net, backend="aot_eager")
    if ran:
        loss_of(model).backward()
    watch = gk.watch(model)
    for seed in range(2):
        for one in (plain, model):
            loss_of(one, seed).backward()
        watch.step()
        same_as_autograd(watch, autograd.step())
    watch.close()
    loss_of(model).backward()
    watch = gk.watch(model)
    for one in (plain, model):
        loss_of(one, 1).backward()
    watch.step()
    same_as_autograd(watch, autograd.step())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dynamic_shapes(backend):
    """One graph for several batch sizes and numbers of time steps."""

    def scenario(net, end_step):
        for steps, size in ((5, 2), (7, 3), (3, 5)):
            torch.manual_seed(steps)
            x = torch.randn(steps, size, INPUTS, dtype=torch.float64)
            y = net(x)
            (y * torch.randn_like(y)).sum().backward()
            end_step()

    check(scenario, Small, lambda net: torch.compile(net, backend=backend, dynamic=True, fullgraph=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compiled_checkpoints(use_reentrant):
    def prepare(net):
        net.run = checkpointed(use_reentrant)
        return torch.compile(net, backend="aot_eager")

    check(train, Small, prepare)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """The exported program computes the same; neither exporting nor running it is measured, and training goes on."""
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)

    def scenario(net, end_step):
        for seed in range(2):
            loss = loss_of(net, seed)
            if isinstance(net.lstm, gk.LSTM):
                program = torch.export.export(net, (x,), strict=strict).module()
                torch.testing.assert_close(program(x), net(x))
                program(x).sum().backward()
            loss.backward()
            end_step()

    check(scenario, Small)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
def test_trace():
    """As a program of torch.export."""
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), gk.Residual(nn.Linear(4, 4)))
    watch, x = gk.watch(net), torch.randn(3, 4)
    torch.jit.trace(net, (x,), check_trace=False)(x).sum().backward()
    watch.step()
    assert not watch.records()


def test_backward_in_several_threads():
    """Each thread has a batch of its own; their gradients add up, and none is lost."""
    num_threads, passes = 4, 8

    def scenario(net, end_step):
        def work(index):
            for turn in range(passes):
                x, target = batches[index, turn]
                torch.autograd.grad((net(x) * target).sum(), list(net.parameters()))

        batches = {(i, turn): batch(10 * i + turn, net) for i in range(num_threads) for turn in range(passes)}
        for _ in range(2):
            if isinstance(net.lstm, gk.LSTM):
                threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            else:
                for index in range(num_threads):
                    work(index)
            end_step()

    check(scenario, Small)


class Examples(torch.utils.data.Dataset):
    """Examples that a worker makes with the model itself, by a forward and a backward."""

    def __init__(self, net):
        self.net = net

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = batch(index, self.net)[0].requires_grad_()
        self.net(x).sum().backward()
        return x.detach() + x.grad


def test_forked_workers():
    """What a process measures that was forked while the model is watched stays there; the parent's records are its own."""

    def scenario(net, end_step):
        for _ in range(2):
            loss = loss_of(net)
            if isinstance(net.lstm, gk.LSTM):
                loader = torch.utils.data.DataLoader(Examples(net), num_workers=2, multiprocessing_context="fork")
                assert len(list(loader)) == 4
            loss.backward()
            end_step()

    check(scenario, Small)
