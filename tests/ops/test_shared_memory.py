"""No gradient shares memory with another one, with what it came from, or with what was saved: writing into it changes it alone.

test_fallback.py runs this file without the extension, test_triton.py what is quick enough on the Triton kernels.
"""

import gc
import weakref
from itertools import combinations

import pytest
import torch
from cases import make_case
from checks import tuple_of
from descriptions import DESCRIPTIONS

import gradkernels as gk
from gradkernels.ops import OPS
from gradkernels.testing import is_floating, randn


def cases(op):
    """Everything an op has; the smallest sizes, in another dtype; and what takes another way through the op."""
    yield make_case(op, 3, 5)
    yield make_case(op, 1, 1, dtype=torch.float64)
    yield make_case(op, 2, 3, dtype=torch.bfloat16)
    yield from list(DESCRIPTIONS[op].cases().values())[1:]
    yield from (case for name, case in DESCRIPTIONS[op].cases(torch.float16).items() if name.startswith("float32"))


def some_of(items):
    """Every choice of one or more."""
    return [chosen for count in range(1, len(items) + 1) for chosen in combinations(items, count)]


def memory(tensors):
    """The storages of the tensors that have one."""
    return [t.untyped_storage().data_ptr() for t in tensors if is_floating(t) and t.numel()]


def run(case, wanted, used, create_graph, shared):
    """(gradients, storages of all else) where the inputs `wanted` need gradients and the outputs `used` receive one.

    shared: outputs of one shape receive the same tensor.
    """
    saved = []
    inputs = [t.clone() if is_floating(t) else t for t in case.inputs]
    leaves = [inputs[k].requires_grad_() for k in wanted]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = tuple_of(case.function(*inputs))
    dys = [case.dys[k] for k in used]
    if shared:
        dys = [next(d for d in dys if (d.shape, d.dtype) == (dy.shape, dy.dtype)) for dy in dys]
    found = torch.autograd.grad([outputs[k] for k in used], leaves, dys, create_graph=create_graph, allow_unused=True)
    return found, {*memory(inputs), *memory(outputs), *memory(dys), *memory(saved)}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_gradients_have_memory_of_their_own(op, create_graph):
    """Whatever is wanted, and whatever is used; in a backward that is itself recorded, too."""
    for case in cases(op):
        inputs = [k for k, t in enumerate(case.inputs) if is_floating(t)]
        outputs = tuple(range(len(case.dys)))
        choices = [(wanted, outputs) for wanted in some_of(inputs)] + [(inputs, used) for used in some_of(outputs)]
        forms = {(dy.shape, dy.dtype) for dy in case.dys}
        for wanted, used in choices:
            for shared in (False,) if len(forms) == len(case.dys) else (False, True):
                found, others = run(case, wanted, used, create_graph, shared)
                assert all(d is not None for d in found)
                storages = memory(found)
                assert len(storages) == len(set(storages)), f"of {wanted} through {used}: one tensor twice"
                assert others.isdisjoint(storages), f"of {wanted} through {used}: a gradient in memory of something else"


@pytest.mark.parametrize("op", OPS)
def test_halving_all_gradients_halves_each(op):
    case = make_case(op, 3, 5)
    everything = tuple(range(len(case.inputs))), tuple(range(len(case.dys)))
    found, _ = run(case, *everything, create_graph=False, shared=False)
    before = [d.clone() for d in found]
    for d in found:
        d.mul_(0.5)
    for d, whole in zip(found, before, strict=True):
        torch.testing.assert_close(d, whole / 2, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_a_hook_that_zeroes_one_gradient_leaves_the_others(op):
    case = make_case(op, 3, 5)
    for zeroed in (None, *range(len(case.inputs))):
        leaves = [t.clone().requires_grad_() for t in case.inputs]
        if zeroed is not None:
            leaves[zeroed].register_hook(lambda d: d.zero_())
        torch.autograd.backward(tuple_of(case.function(*leaves)), case.dys)
        if zeroed is None:
            expected = [leaf.grad for leaf in leaves]
        for k, (leaf, d) in enumerate(zip(leaves, expected, strict=True)):
            torch.testing.assert_close(leaf.grad, torch.zeros_like(d) if k == zeroed else d, rtol=0, atol=0)


class Hook:
    """A hook that can be referred to weakly."""

    def __call__(self, d):
        return None


@pytest.mark.parametrize("op", OPS)
def test_a_graph_that_is_dropped_is_freed(op):
    """No node holds its own output, which holds the node: not even where an output is saved for the backward."""
    case, hook = make_case(op, 3, 5), Hook()
    before = [t.clone().requires_grad_() for t in case.inputs]
    between = [t.clone() for t in before]
    for t in between:
        t.register_hook(hook)
    outputs, alive = case.function(*between), weakref.ref(hook)
    assert tuple_of(outputs)[0].requires_grad
    del hook, between, outputs, t
    gc.collect()
    assert alive() is None


def test_gradients_of_a_stack_have_memory_of_their_own():
    """Two biases of each layer and direction; what the layers hand on to one another is PyTorch's."""
    module = gk.LSTM(3, 4, num_layers=2, bidirectional=True)
    y, _ = module(randn(5, 2, 3))
    storages = memory(torch.autograd.grad(y, tuple(module.parameters()), torch.randn_like(y)))
    assert len(storages) == len(set(storages)) == 16
