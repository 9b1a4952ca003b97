"""The checks every op goes through: results, statistics, torch.compile, functorch, checkpointing."""

from functools import partial

import torch
from cases import make_case
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from gradkernels.telemetry import merge_slots
from gradkernels.testing import (
    check_results,
    check_stats,
    compare,
    differentiate,
    is_floating,
    largest,
)

SUMS = {torch.float64: 1e-12}  # relative; 1e-5 where sums of squares are float32 partials
EXTREMES = (
    (torch.float32, 1e-30),
    (torch.float32, 1e-42),  # below the smallest normal float
    (torch.float32, 1e30),
    (torch.float64, 1e-200),
    (torch.float64, 1e200),
    (torch.bfloat16, 1e-30),
    (torch.bfloat16, 1e30),
    (torch.float16, 1e-6),  # dy itself is subnormal and partly zero
    (torch.float16, 1e3),
)


def tuple_of(outputs):
    """Outputs as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def same(ours, others):
    """Asserts that two nested tuples of tensors hold equal bits; NaN equals NaN."""
    for a, b in zip(ours, others, strict=True):
        if isinstance(a, tuple):
            same(a, b)
        elif a is None:
            assert b is None
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def with_stats(case, times=1):
    """(results, stats) of `times` calls with statistics."""
    stats = gk.new_stats(len(case.ports))
    for _ in range(times):
        results = differentiate(partial(case.function, stats=stats), case.inputs, case.dys)
    return results, stats


def check_against_eager(case, ours):
    """Forward and every gradient of `ours`, results of the case's function, against the twin's."""
    eager = differentiate(case.eager, case.inputs, case.dys)
    check_results(ours, eager, differentiate(case.exact or case.eager, case.inputs, case.dys, torch.float64), case.terms)


def check_case(case):
    """Forward and every gradient against eager; the statistics of the same call; neither changes the other."""
    plain = differentiate(case.function, case.inputs, case.dys)
    check_against_eager(case, plain)
    check_case_stats(case, plain)


def check_threads(case, num_threads):
    """On several threads: right, the same bits in two runs, statistics too."""
    torch.set_num_threads(num_threads)
    first, again = with_stats(case), with_stats(case)
    plain = differentiate(case.function, case.inputs, case.dys)
    torch.set_num_threads(1)
    same(first[0], again[0])
    same(first[0], plain)
    assert torch.equal(first[1], again[1])
    check_against_eager(case, plain)
    check_row_by_row(case, *first)


def check_row_by_row(case, results, stats):
    """The statistics of one call equal those of the tensors it returned."""
    dtypes = {t.dtype for t in (*case.inputs, *case.dys) if is_floating(t)}
    check_stats(stats, case.ports, case.seen(results[1]), SUMS.get(*dtypes, 1e-5) if len(dtypes) == 1 else 1e-5)


def check_case_stats(case, plain=None):
    """The statistics of one call are right, and without them the gradients have the same bits."""
    results, stats = with_stats(case)
    same(results, plain or differentiate(case.function, case.inputs, case.dys))
    check_row_by_row(case, results, stats)


def check_repeatable(case):
    """Two runs give equal bits, results and statistics, and statistics accumulate over calls."""
    first, again, twice = with_stats(case), with_stats(case), with_stats(case, times=2)
    same(first[0], again[0])
    assert torch.equal(first[1], again[1])
    check_stats(twice[1], case.ports, {port: [d, d] for port, d in case.seen(twice[0][1]).items()})


def check_accumulation(op):
    """Calls of different sizes merge into one row."""
    cases = [make_case(op, rows, 37, scale=scale) for rows, scale in ((3, 1.0), (50, 1e-3), (1, 7.0))]
    stats, seen = gk.new_stats(len(cases[0].ports)), {}
    for case in cases:
        results = differentiate(partial(case.function, stats=stats), case.inputs, case.dys)
        for port, gradient in case.seen(results[1]).items():
            seen.setdefault(port, []).append(gradient)
    check_stats(stats, cases[0].ports, seen)


def spoil(case):
    """The case with NaN, infinities and zeros of both signs in its incoming gradients."""
    for dy in case.dys:
        flat = dy.view(-1)
        picks = torch.randperm(flat.numel())[: min(40, flat.numel() // 5 * 5)].reshape(5, -1)
        for pick, value in zip(picks, (float("nan"), float("inf"), -float("inf"), 0.0, -0.0), strict=True):
            flat[pick] = value
        flat[-1] = 0.0
        flat[0] = float("nan")
    return case


def check_special_values(op, dtype):
    """NaN, infinities and zeros are counted and kept out of sums; so are tensors of nothing but zeros or NaN."""
    check_case_stats(spoil(make_case(op, 7, 1031, dtype=dtype)))
    for value in (0.0, float("nan"), -float("inf")):
        case = make_case(op, 3, 21, dtype=dtype)
        for dy in case.dys:
            dy.fill_(value)
        check_case_stats(case)


def check_compile(case, backend):
    """torch.compile without graph breaks: the bits of eager mode, statistics included; and without statistics."""
    eager, stats = with_stats(case)
    compiled_stats = torch.zeros_like(stats)
    for table in (compiled_stats, None):
        function = used(case.function, table)
        same(differentiate(torch.compile(function, fullgraph=True, backend=backend), case.inputs, case.dys), eager)
    assert torch.equal(compiled_stats, stats)


def used(function, stats=None):
    """The function with its outputs used: none of them is a view of an input, as residual_fork's are."""
    return lambda *inputs: tuple(1 * y for y in tuple_of(function(*inputs, stats=stats)))


def check_dynamic_batch(op, counters):
    """One graph for every batch size."""
    cases = [make_case(op, rows, 19) for rows in (6, 9, 11)]  # none of them a size of stats, which would share its symbol
    compiled_stats = gk.new_stats(len(cases[0].ports))
    function = torch.compile(used(cases[0].function, compiled_stats), fullgraph=True, dynamic=True, backend="aot_eager")
    for case in cases:
        eager, stats = with_stats(case)
        same(differentiate(function, case.inputs, case.dys), eager)
        assert torch.equal(compiled_stats, stats)
        compiled_stats.zero_()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def loss_of(function, dys):
    """A scalar of all outputs, with gradients `dys`."""

    def loss(*inputs):
        return sum((y * dy).sum() for y, dy in zip(tuple_of(function(*inputs)), dys, strict=True))

    return loss


def close(ours, eager):
    """Equal to float64's rounding, whatever the nesting of tuples."""
    if isinstance(ours, tuple):
        for a, b in zip(ours, eager, strict=True):
            close(a, b)
    else:
        compare("value", ours, eager, eager, terms=ours.numel() ** 0.5 * largest(eager))


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


TRANSFORMS = ("grad", "vmap", "vmap(grad)", "grad(vmap)", "jvp", "jacrev", "hessian")


def check_transform(op, name, stats=False):
    """A functorch transform gives what it gives for the twin."""
    case = make_case(op, 3, 5, dtype=torch.float64)
    function = partial(case.function, stats=gk.new_stats(len(case.ports))) if stats else case.function
    close(transformed(name, function, case), transformed(name, case.eager, case))


def check_vmap_stats(op):
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


def check_batched_backward(op):
    """torch.autograd.grad(is_grads_batched=True), which torch.autograd.functional.jacobian(vectorize=True) runs."""
    case = make_case(op, 3, 5, dtype=torch.float64)
    found = []
    for function in (case.function, case.eager):
        leaves = [t.detach().requires_grad_() for t in case.inputs]
        outputs = tuple_of(function(*leaves))
        dys = [torch.stack([dy, dy.cos()]) for dy in case.dys]
        found.append(torch.autograd.grad(outputs, leaves, dys, is_grads_batched=True))
    close(*found)


def check_checkpoint(op, use_reentrant):
    """Activation checkpointing runs a forward twice and a backward once: gradients and statistics are those without."""
    case, found = make_case(op, 5, 33), []
    for wrap in (lambda function: function, lambda function: partial(checkpoint, function, use_reentrant=use_reentrant)):
        stats = gk.new_stats(len(case.ports))
        leaves = [t.clone().requires_grad_() for t in case.inputs]
        torch.autograd.backward(wrap(used(case.function, stats))(*leaves), case.dys)
        found.append((*(leaf.grad for leaf in leaves), stats))
    same(*found)


def check_without_gradients(case):
    """No gradient wanted, none computed: outputs need none, as the twin's, and nothing is measured."""
    stats = gk.new_stats(len(case.ports))
    outputs = tuple_of(case.function(*case.inputs, stats=stats))
    with torch.no_grad():
        leaves = [t.clone().requires_grad_() if is_floating(t) else t for t in case.inputs]
        outputs += tuple_of(used(case.function, stats)(*leaves))
    assert not any(y.requires_grad for y in outputs)
    assert not stats.any()
