"""Every record equals what autograd says of an unwatched twin: checkpointing, compiled graphs, shared and frozen parts, and
what else runs between the steps of a training."""

import copy
import io
import pickle

import pytest
import torch
from independent import (
    INPUTS,
    WIDTH,
    Autograd,
    Block,
    Net,
    batch,
    check,
    checkpointed,
    loss_of,
    same_as_autograd,
    train,
    twins,
)
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import gradkernels as gk


def test_training():
    check(train)


def twice(net, end_step):
    """One graph, two backward passes."""
    for seed in range(2):
        loss = loss_of(net, seed)
        loss.backward(retain_graph=True)
        loss.backward()
        end_step()


def running(run):
    """What has the parts of a Net run by `run`."""

    def prepare(net):
        net.run = run
        return net

    return prepare


def nested(module, x):
    return checkpoint(lambda x: checkpoint(module, x, use_reentrant=False), x, use_reentrant=False)


@pytest.mark.parametrize("run", [checkpointed(True), checkpointed(False), nested], ids=["reentrant", "not", "nested"])
@pytest.mark.parametrize("scenario", [train, twice])
def test_checkpoint(run, scenario):
    check(scenario, prepare=running(run))


class Shared(Net):
    """One block, one chain and one LSTM, each used twice."""

    PROBES = ("stem", "block", "plain.0", "plain.2", "head")

    def __init__(self):
        super().__init__()
        del self.blocks
        self.block = Block()

    def forward(self, x):
        x = self.stem(x)
        for part in (self.block, self.plain) * 2:
            x = self.run(part, x)
        return self.head(self.run(self.lstm, self.run(self.lstm, x)[0])[0])


@pytest.mark.parametrize("run", [None, checkpointed(True), checkpointed(False)], ids=["plain", "reentrant", "not"])
def test_modules_used_twice(run):
    sites = [*Shared.PROBES, "block.norm1", "block.norm2", "block.mlp.1", "lstm"]
    check(
        train,
        Shared,
        prepare=running(run) if run else lambda net: net,
        watched=lambda net: gk.watch(net, sites=sites),
    )


class Finite(nn.Module):
    """Passes gradients on with a NaN and an infinity in them."""

    def forward(self, x):
        y = x * 1
        if y.requires_grad:
            y.register_hook(lambda dy: torch.cat([dy.new_tensor([torch.nan, torch.inf]), dy.flatten()[2:]]).view_as(dy))
        return y


class Broken(Net):
    def __init__(self):
        super().__init__()
        self.plain.append(Finite())

    def forward(self, x):
        return self.head(self.plain(self.blocks[1](self.blocks[0](self.stem(x)))))


@pytest.mark.parametrize("run", [None, checkpointed(False)])
def test_values_that_are_not_finite(run):
    check(lambda net, end_step: (loss_of(net).backward(), end_step()), Broken)


def validate(net, context):
    was = net.training
    with context():
        for mode in (False, True):
            net.train(mode)
            loss_of(net, 9)
    net.train(was)


@pytest.mark.parametrize("run", [None, checkpointed(True), checkpointed(False)], ids=["plain", "reentrant", "not"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_validation_between_steps(context, run):
    """Without gradients, and with a graph that no backward goes through; also in the middle of a step."""

    def scenario(net, end_step):
        validate(net, context)
        for seed in range(2):
            loss = loss_of(net, seed)
            validate(net, context)
            loss.backward()
            validate(net, context)
            loss_of(net, 7).backward()
            end_step()
            validate(net, context)
            end_step()

    check(scenario, prepare=running(run) if run else lambda net: net)


class Prompt(nn.Module):
    """Returns a parameter, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x):
        return self.prompt


def test_a_tensor_that_only_a_validation_has_seen():
    """What a block returns without gradients is measured by no backward, though it has a gradient elsewhere."""
    net = nn.Sequential(Prompt(), nn.Linear(WIDTH, WIDTH))
    watch = gk.watch(net)
    with torch.no_grad():
        net(0)
    net[0].prompt.sum().backward()
    watch.step()
    assert not watch.records()


def test_parts_frozen_and_unfrozen():
    """What is frozen, and what lies before it, has no gradient until it is unfrozen."""

    def scenario(net, end_step):
        biases = [parameter for name, parameter in net.named_parameters() if "bias" in name]
        for trained in (net.blocks[1:].parameters(), net.plain.parameters(), net.head.parameters(), biases, net.parameters()):
            net.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            train(net, end_step)

    check(scenario)


def test_autograd_grad():
    """Backward goes as far as the inputs that were asked for, and no further."""

    def scenario(net, end_step):
        for wanted in (net.parameters(), net.head.parameters(), net.plain.parameters(), net.blocks[1].mlp.parameters()):
            torch.autograd.grad(loss_of(net), list(wanted))
            end_step()
        x, target = batch(0, net)
        x.requires_grad_()
        torch.autograd.grad((net(x) * target).sum(), x)
        loss_of(net).backward(inputs=list(net.blocks[0].mlp.parameters()))
        end_step()

    check(scenario)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search):
    """As many observations as the closure ran."""

    def scenario(net, end_step):
        net.eval()
        optimizer = torch.optim.LBFGS(net.parameters(), 0.01, max_iter=3, line_search_fn=line_search)

        def closure():
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean()
            loss.backward()
            return loss

        for seed in range(2):
            x, target = batch(seed, net)
            optimizer.step(closure)
            end_step()

    check(scenario)


def test_functional_call():
    """With parameters that a step of gradient descent on the model's own has made: both passes count."""

    def scenario(net, end_step):
        for seed in range(2):
            own = dict(net.named_parameters())
            gradients = torch.autograd.grad(loss_of(net, seed), list(own.values()))
            values = {name: own[name] - 0.1 * gradient for name, gradient in zip(own, gradients, strict=True)}
            x, target = batch(seed + 5, net)
            (functional_call(net, values, (x,)) * target).sum().backward()
            end_step()

    check(scenario)


def test_two_optimizers():
    """A generator and a discriminator: the generator's loss goes through both, the discriminator's through itself alone."""

    class Gan(nn.Module):
        PROBES = tuple(f"{part}.{name}" for part in ("generator", "discriminator") for name in Net.PROBES)

        def __init__(self):
            super().__init__()
            self.generator, self.discriminator = Net(), Net()
            self.generator.head = nn.Linear(WIDTH, INPUTS)

    def scenario(net, end_step, every_turn):
        generator, discriminator = net.generator, net.discriminator
        optimizers = [torch.optim.Adam(part.parameters(), 1e-2) for part in (generator, discriminator)]
        for seed in range(2):
            x, target = batch(seed, net)
            fake = generator(x)
            optimizers[1].zero_grad()
            ((discriminator(fake.detach()) - discriminator(x)) * target).sum().backward()
            optimizers[1].step()
            if every_turn:
                end_step()
            optimizers[0].zero_grad()
            (discriminator(fake) * target).sum().backward()
            optimizers[0].step()
            end_step()

    for every_turn in (False, True):
        check(lambda net, end_step, every_turn=every_turn: scenario(net, end_step, every_turn), Gan)


def test_several_models():
    """Two watched models whose steps alternate, one of which the other's loss goes through; and a third, closed midway."""
    plain, ours = zip(*(twins() for _ in range(3)), strict=True)
    for net, other in zip(plain, ours, strict=True):
        with torch.no_grad():
            for own, theirs in zip(net.parameters(), other.parameters(), strict=True):
                theirs.copy_(own.normal_(0, 0.3))
    autograds, watches = [Autograd(net) for net in plain], [gk.watch(net) for net in ours]
    for turn in range(4):
        for nets in (plain, ours):
            x, target = batch(turn, nets[0])
            first = nets[0](x)
            (first * target).sum().backward(retain_graph=True)
            second = nets[1](torch.cat([first, first], -1))
            loss_of(nets[2], turn).backward()
            (second * target).sum().backward()
        if turn == 2:
            watches[2].close()
        for index, (autograd, watch) in enumerate(zip(autograds, watches, strict=True)):
            if index == 0 or (index == 1 and turn % 2) or (index == 2 and turn < 2):
                watch.step()
                same_as_autograd(watch, autograd.step())


def copies_of(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(buffer, weights_only=False),
        AveragedModel(net),
        AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    )


def test_copies():
    """They train beside the model and are measured nowhere; each can be watched, and closing that leaves the model's Watch."""

    def scenario(net, end_step):
        for seed in range(2):
            others = copies_of(net) if isinstance(net.lstm, gk.LSTM) else ()
            loss = loss_of(net, seed)
            for other in others:
                loss_of(other, seed + 5).backward()
                if isinstance(other, AveragedModel):
                    other.update_parameters(net)
            loss.backward()
            end_step()

    check(scenario)
    plain, net = twins()
    gk.watch(net).close()
    watch = gk.watch(net)
    for other in copies_of(net):
        twin = copy.deepcopy(plain)
        autograd, second = Autograd(twin), gk.watch(other)
        for model in (twin, other):
            loss_of(model, 1).backward()
        second.step()
        same_as_autograd(second, autograd.step())
        second.close()
    watch.step()
    assert not watch.records()
    autograd = Autograd(plain)
    for model in (plain, net):
        loss_of(model).backward()
    watch.step()
    same_as_autograd(watch, autograd.step())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    def scenario(net, end_step):
        start = copy.deepcopy(net.state_dict())
        train(net, end_step, 1)
        loss = loss_of(net, 3)
        if assign:
            loss.backward()
        net.load_state_dict({name: value * 0.5 for name, value in start.items()}, assign=assign)
        net.requires_grad_(True)
        train(net, end_step, 2)

    check(scenario)


def test_another_dtype_and_device():
    def scenario(net, end_step):
        start = copy.deepcopy(net.state_dict())
        for dtype in (torch.float32, torch.float64):
            loss_of(net, 4).backward()
            net.zero_grad()
            net.to(dtype).to("cpu").load_state_dict(start)
            loss_of(net, 5).backward()
            end_step()

    check(scenario)
