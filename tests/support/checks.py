"""The checks every op goes through: results, statistics, torch.compile, functorch, checkpointing."""

from functools import partial

import torch
from cases import make_case

import gradkernels as gk
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


def used(function, stats=None):
    """The function with its outputs used: none of them is a view of an input, as residual_fork's are."""
    return lambda *inputs: tuple(1 * y for y in tuple_of(function(*inputs, stats=stats)))


def close(ours, eager):
    """Equal to float64's rounding, whatever the nesting of tuples."""
    if isinstance(ours, tuple):
        for a, b in zip(ours, eager, strict=True):
            close(a, b)
    else:
        compare("value", ours, eager, eager, terms=ours.numel() ** 0.5 * largest(eager))
