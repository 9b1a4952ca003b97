"""Comparison of recurrent modules with torch's."""

import copy

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import gradkernels as gk
from gradkernels.testing import compare


def flat(outputs):
    """All tensors of nested outputs, packed ones by their data."""
    if isinstance(outputs, PackedSequence):
        return [outputs.data]
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for part in outputs for t in flat(part)]


def results(module, inputs, leaves, retain_graph=False):
    """Outputs and the gradients of `leaves` and all parameters, for random gradients of every output."""
    outputs = flat(module(*inputs))
    generator = torch.Generator().manual_seed(0)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves, *module.parameters()], dys, retain_graph=retain_graph)]


def pair(*args, cls=(gk.LSTM, nn.LSTM), **kwargs):
    """Ours and torch's, drawn from the same seed."""
    modules = []
    for make in cls:
        torch.manual_seed(7)
        modules.append(make(*args, **kwargs))
    return modules


def upcast(value):
    """Nested tensors in float64, leaves again."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return tuple(upcast(part) for part in value)


def check_same(ours, twin, inputs, leaves):
    """torch's outputs and gradients; for 16-bit dtypes, float64's as closely as torch has them."""
    retain_graph = not isinstance(inputs[0], torch.Tensor)  # packing is a graph that both backwards go through
    found, expected = (results(module, inputs, leaves, retain_graph) for module in (ours, twin))
    exact = expected
    if expected[0].dtype.itemsize == 2:
        wide = upcast(inputs)
        exact = results(copy.deepcopy(twin).double(), wide, [t for t in flat(wide) if t.requires_grad])
    for k, (a, b, value) in enumerate(zip(found, expected, exact, strict=True)):
        compare(f"result {k}", a.detach(), b.detach(), value.detach().double(), terms=20.0)
