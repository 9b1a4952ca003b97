"""What PyTorch makes of every op, once for all: opcheck, torch.compile, torch.func, checkpointing.

An op is here by its description in tests/support/descriptions.py, as in test_every_op.py.
"""

from functools import partial

import pytest
import torch
from cases import make_case
from checks import close, same, tuple_of, used, with_stats
from descriptions import DESCRIPTIONS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from gradkernels.ops import OPS
from gradkernels.telemetry import merge_slots
from gradkernels.testing import DTYPES, differentiate, is_floating

OTHERS = {"tanh": False, "num_dims": 1, "eps": 1e-5, "batch_sizes": None, "reverse": False, "time_stats": None}
TRANSFORMS = ("grad", "vmap", "vmap(grad)", "grad(vmap)", "jvp", "jacrev", "hessian")
every_op = pytest.mark.parametrize("op", OPS)


class Recorder(TorchDispatchMode):
    """`calls`: (op, arguments) of our ops below autograd, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "gradkernels":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def parts_of(case):
    """The case, and it again with one output used alone."""
    outputs = range(len(case.dys))
    alone = [tuple(dy if k == only else None for k, dy in enumerate(case.dys)) for only in outputs]
    return [case, *(case.again(case.inputs, dys) for dys in alone if len(outputs) > 1)]


def calls_of(case, stats):
    """The calls of our ops with all gradients wanted, and with those of the first input and of the last alone."""
    there = [k for k, t in enumerate(case.inputs) if t is not None]
    for part in parts_of(case):
        for wanted in (there, there[:1], there[-1:]):
            leaves = [t if t is None else t.clone().requires_grad_(k in wanted) for k, t in enumerate(case.inputs)]
            recorder = Recorder()
            with recorder:
                outputs = tuple_of(part.function(*leaves, stats=stats))
                pairs = [(y, dy) for y, dy in zip(outputs, part.dys, strict=True) if dy is not None and y.requires_grad]
                torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
            yield from recorder.calls


@pytest.mark.parametrize("stats", [False, True])
@every_op
def test_op(op, stats):
    """The calls that a forward and a backward are made of, in every way through the op."""
    mixed = [case for name, case in DESCRIPTIONS[op].cases(torch.bfloat16).items() if name.startswith("float32")]
    for case in (*DESCRIPTIONS[op].cases().values(), *mixed):
        checked = set()
        for called, args in calls_of(case, gk.new_stats(len(case.ports)) if stats else None):
            form = (called, *(a if isinstance(a, bool) else a is None for a in args))
            if form not in checked:
                torch.library.opcheck(called, args, test_utils=("test_schema", "test_faketensor"))
            checked.add(form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stats", [False, True])
@every_op
def test_op_in_dtypes(op, stats, dtype):
    """The op that users call, with all of opcheck, and the calls it is made of, without the slow part of it."""
    case, recorder = make_case(op, 3, 5, dtype=dtype), Recorder()
    table = gk.new_stats(len(case.ports)) if stats or op == "probe" else None
    with recorder:
        differentiate(partial(case.function, stats=table), case.inputs, case.dys)
    given = {**OTHERS, "stats": table, **{n: t.clone() for n, t in zip(DESCRIPTIONS[op].names, case.inputs, strict=True)}}
    called = getattr(torch.ops.gradkernels, DESCRIPTIONS[op].function.__name__).default
    for t in given.values():
        if is_floating(t) and t is not table:
            t.requires_grad_()
    torch.library.opcheck(called, tuple(given[argument.name] for argument in called._schema.arguments))
    for call, args in recorder.calls:
        torch.library.opcheck(call, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        if dtype is torch.float32 and op in ("gelu", "layer_norm", "residual", "probe"):
            torch.library.opcheck(call, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_op
def test_compile(op, backend, fresh_compiler):
    """torch.compile without graph breaks: the bits of eager mode, statistics included; and without statistics."""
    mixed = [case for name, case in DESCRIPTIONS[op].cases(torch.bfloat16).items() if name == "float32 residual"]
    for case in (make_case(op, 5, 33), *mixed):
        eager, stats = with_stats(case)
        compiled_stats = torch.zeros_like(stats)
        for table in (compiled_stats, None):
            compiled = torch.compile(used(case.function, table), fullgraph=True, backend=backend)
            same(differentiate(compiled, case.inputs, case.dys), eager)
        assert torch.equal(compiled_stats, stats)
        assert not fresh_compiler["graph_break"]


@every_op
def test_compile_dynamic(op, fresh_compiler):
    """One graph for every batch size."""
    cases = [make_case(op, rows, 19) for rows in (6, 9, 11)]  # none of them a size of stats, which would share its symbol
    compiled_stats = gk.new_stats(len(cases[0].ports))
    function = torch.compile(used(cases[0].function, compiled_stats), fullgraph=True, dynamic=True, backend="aot_eager")
    for case in cases:
        eager, stats = with_stats(case)
        same(differentiate(function, case.inputs, case.dys), eager)
        assert torch.equal(compiled_stats, stats)
        compiled_stats.zero_()
    assert not fresh_compiler["graph_break"]
    assert fresh_compiler["stats"]["unique_graphs"] == 1


def loss_of(function, dys):
    """A scalar of all outputs, with gradients `dys`."""

    def loss(*inputs):
        return sum((y * dy).sum() for y, dy in zip(tuple_of(function(*inputs)), dys, strict=True))

    return loss


def transformed(name, function, case):
    """What the functorch transform `name` makes of `function`; its first argument is batched."""
    loss, inputs, every = loss_of(function, case.dys), case.inputs, tuple(range(len(case.inputs)))
    batched = (torch.stack([inputs[0], inputs[0].cos(), -inputs[0]], 1), *inputs[1:])
    in_dims = (1, *[None] * (len(inputs) - 1))
    if name == "grad":
        return torch.func.grad(loss, argnums=every)(*inputs)
    if name == "vmap":
        return torch.func.vmap(function, in_dims=in_dims)(*batched)
    if name == "vmap(grad)":
        return torch.func.vmap(torch.func.grad(loss, argnums=every), in_dims=in_dims)(*batched)
    if name == "grad(vmap)":
        total = lambda *inputs: torch.func.vmap(loss, in_dims=in_dims)(*inputs).sum()  # noqa: E731
        return torch.func.grad(total, argnums=every)(*batched)
    if name == "jvp":
        return torch.func.jvp(function, inputs, tuple(t.sin() for t in inputs))
    if name == "jacrev":
        return torch.func.jacrev(function)(*inputs)
    return torch.func.hessian(loss)(*inputs)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@every_op
def test_transforms(op, transform, stats):
    """A functorch transform gives what it gives for the twin."""
    case = make_case(op, 3, 5, dtype=torch.float64)
    function = partial(case.function, stats=gk.new_stats(len(case.ports))) if stats else case.function
    close(transformed(transform, function, case), transformed(transform, case.eager, case))


@every_op
def test_vmap_stats(op):
    """Under vmap(grad) a row sees the gradients of the whole batch: a site's dx is as large as the batch's."""
    case = make_case(op, 3, 5, dtype=torch.float64)
    stats = gk.new_stats(len(case.ports))
    gradients = transformed("vmap(grad)", partial(case.function, stats=stats), case)
    rows, port = merge_slots(stats), "dx" if "dx" in case.ports else "dy"
    numel = rows[case.ports.index(port), 0].item()
    assert numel == gradients[0].numel()
    if port == "dx":
        square_sum = rows[case.ports.index(port), 2]
        close(square_sum, gradients[0].square().sum())


@every_op
def test_batched_backward(op):
    """torch.autograd.grad(is_grads_batched=True), which torch.autograd.functional.jacobian(vectorize=True) runs."""
    case = make_case(op, 3, 5, dtype=torch.float64)
    found = []
    for function in (case.function, case.eager):
        leaves = [t.detach().requires_grad_() for t in case.inputs]
        outputs = tuple_of(function(*leaves))
        dys = [torch.stack([dy, dy.cos()]) for dy in case.dys]
        found.append(torch.autograd.grad(outputs, leaves, dys, is_grads_batched=True))
    close(*found)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_op
def test_checkpoint(op, use_reentrant):
    """Activation checkpointing runs a forward twice and a backward once: gradients and statistics are those without."""
    case, found = make_case(op, 5, 33), []
    for wrap in (lambda function: function, lambda function: partial(checkpoint, function, use_reentrant=use_reentrant)):
        stats = gk.new_stats(len(case.ports))
        leaves = [t.clone().requires_grad_() for t in case.inputs]
        torch.autograd.backward(wrap(used(case.function, stats))(*leaves), case.dys)
        found.append((*(leaf.grad for leaf in leaves), stats))
    same(*found)
