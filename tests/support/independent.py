"""What a Watch must say, from autograd alone: hooks on the tensors of a twin in plain PyTorch, of the same weights."""

import copy
import math
from collections import defaultdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkernels as gk

PORT_OF = {  # a parameter's name: the port of its gradient; bias_hh has that of bias_ih
    "weight": "dweight",
    "bias": "dbias",
    "weight_ih_l0": "dweight_ih",
    "weight_hh_l0": "dweight_hh",
    "bias_ih_l0": "dbias",
}
STEPS, BATCH, INPUTS, WIDTH, OUTPUTS = 5, 2, 6, 8, 3


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.mix = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.2))

    def forward(self, x):
        scores = self.mix(self.norm1(x)).mT @ x
        x = x + x @ scores.softmax(-1)
        return x + self.mlp(self.norm2(x))


def run_whole(module, x):
    """module(x)."""
    return module(x)


class Net(nn.Module):
    """Blocks with fused layers, layers without (their outputs are probed), and an LSTM; its gradients have exact zeros.

    run(module, x): how a part of it is run, by checkpointing say.
    """

    PROBES = ("stem", "blocks.0", "blocks.1", "plain.0", "plain.2", "head")

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(INPUTS, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.lstm, self.head, self.run = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS), run_whole

    def forward(self, x):
        x = self.stem(x)
        for part in (*self.blocks, self.plain):
            x = self.run(part, x)
        return self.head(self.run(self.lstm, x)[0])


class Small(nn.Module):
    """A fused layer of each kind and two probes, for what takes long with more; no dropout, whose random numbers are others
    in a compiled graph."""

    PROBES = ("stem", "head")

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Linear(INPUTS, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()
        self.lstm, self.head, self.run = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS), run_whole

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.run(self.lstm, self.act(self.run(self.norm, x)))[0])


def checkpointed(use_reentrant):
    """What runs a module under torch.utils.checkpoint."""
    return lambda module, x: checkpoint(module, x, use_reentrant=use_reentrant)


def twins(make=Net, dtype=torch.float64):
    """Two models of the same weights: one for plain PyTorch, one to be watched."""
    torch.manual_seed(3)
    plain = make().to(dtype)
    return plain, copy.deepcopy(plain)


def batch(seed, like):
    """(x, target) in the dtype of the parameters of `like`."""
    torch.manual_seed(seed)  # of dropout too
    dtype = next(like.parameters()).dtype
    return torch.randn(STEPS, BATCH, INPUTS, dtype=dtype), torch.randn(STEPS, BATCH, OUTPUTS, dtype=dtype)


def loss_of(net, seed=0, like=None):
    """A loss whose gradient is random."""
    x, target = batch(seed, like or net)
    return (net(x) * target).sum() + net(x).square().mean()


class Autograd:
    """The gradients at the sites of a plain model: {(site, port): [one for each backward call]}, and those of time steps.

    Each layer that has a fused one runs on copies of its input and parameters, so that dx and dweight are that call's alone.
    The fused backward of a LayerNorm computes dx in any case.
    """

    def __init__(self, net, probes=None, layers=(nn.LayerNorm, nn.GELU, nn.LSTM)):
        self.found, self.over_time = defaultdict(list), defaultdict(lambda: defaultdict(list))
        for name, module in net.named_modules():
            if isinstance(module, layers):
                module.forward = partial(self._layer, name, module, module.forward)
            elif name in (net.PROBES if probes is None else probes):
                module.register_forward_hook(partial(self._probe, name))

    def _note(self, site, port, tensor):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.found[site, port].append(gradient.detach().clone()))

    def _probe(self, name, module, args, output):
        self._note(name, "dy", output[0] if isinstance(output, tuple) else output)

    def _layer(self, name, module, forward, x):
        x = x * 1
        values = {key: parameter * 1 for key, parameter in module.named_parameters()}
        if isinstance(module, nn.LayerNorm) and any(value.requires_grad for value in values.values()):
            x.requires_grad_()
        if isinstance(module, nn.LSTM):
            name += ".l0"
            y = self._lstm(name, x, *values.values())
        elif isinstance(module, nn.LayerNorm):
            y = F.layer_norm(x, module.normalized_shape, values["weight"], values["bias"], module.eps)
        else:
            y = forward(x)
        for port, tensor in (("dx", x), ("dy", y), *((PORT_OF.get(key), value) for key, value in values.items())):
            if port:
                self._note(name, port, tensor)
        return (y, None) if isinstance(module, nn.LSTM) else y

    def _lstm(self, site, x, weight_ih, weight_hh, bias_ih, bias_hh):
        h = c = x.new_zeros(x.shape[1], weight_hh.shape[1])
        outputs = []
        for t, x_t in enumerate(x):
            i, f, g, o = (x_t @ weight_ih.mT + bias_ih + h @ weight_hh.mT + bias_hh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            for name, state in (("dh", h), ("dc", c)):
                if state.requires_grad:
                    state.register_hook(
                        lambda gradient, key=(name, t): self.over_time[site][key].append(gradient.norm().item())
                    )
            outputs.append(h)
        return torch.stack(outputs)

    def step(self):
        """What came since the last call."""
        found, over_time = dict(self.found), {site: dict(values) for site, values in self.over_time.items()}
        self.found.clear()
        self.over_time.clear()
        return found, over_time


def same_as_autograd(watch, expected):
    """Asserts that the last step of a Watch is what Autograd.step gave: sums to rounding, counts exactly, and nothing else."""
    found, over_time = expected
    records = {(record.site, record.port): record for record in watch.records()}
    assert set(records) == set(found), set(records) ^ set(found)
    for key, gradients in found.items():
        record, tolerance = records[key], 2**12 * max(torch.finfo(gradient.dtype).eps for gradient in gradients)
        everything = torch.cat([gradient.flatten().double() for gradient in gradients])
        finite = everything[everything.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        counts = (record.numel, record.observation_count, record.nonfinite_count, record.zero_count)
        assert counts == (
            everything.numel(),
            len(gradients),
            everything.numel() - finite.numel(),
            int((everything == 0).sum()),
        ), (key, counts)
        norm = finite.norm().item()
        assert math.isclose(record.norm, norm, rel_tol=tolerance), (key, record.norm, norm)
        assert math.isclose(record.rms, norm / math.sqrt(max(finite.numel(), 1)), rel_tol=tolerance), key
        assert math.isclose(record.abs_max, largest, rel_tol=tolerance), key
    profiles = {profile.site: profile for profile in watch.time_profile()}
    assert set(profiles) == set(over_time)
    for site, values in over_time.items():
        for (port, t), norms in values.items():
            np.testing.assert_allclose(getattr(profiles[site], port)[t], math.hypot(*norms), rtol=tolerance)


def check(scenario, make=Net, prepare=lambda net: net, watched=gk.watch, dtype=torch.float64):
    """Runs scenario(net, end_step) on a plain model and on a watched one, which `prepare` gets first, and compares each step.

    Returns the Watch, and how many steps were compared.
    """
    plain, net = twins(make, dtype)
    autograd, steps = Autograd(plain), []
    scenario(plain, lambda: steps.append(autograd.step()))
    watch = watched(net)
    left = iter(steps)

    def end_step():
        watch.step()
        same_as_autograd(watch, next(left))

    scenario(prepare(net), end_step)
    assert steps
    assert not list(left)
    return watch


def train(net, end_step, steps=2):
    """A few steps of Adam."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for seed in range(steps):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        end_step()
