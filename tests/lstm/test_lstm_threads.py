"""lstm_layer on several threads: the bits of one thread, no races, and a child process without its parent's threads."""

import os
import signal

import pytest
import torch
from checks import check_threads, same
from lstm_cases import LAYOUTS, case_of, layer_inputs

import gradkernels as gk
from gradkernels.testing import differentiate, randn

OP = torch.ops.gradkernels


@pytest.mark.parametrize("layout", ["padded", "packed reverse", "projected"])
@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads(num_threads, layout):
    """Steps large enough to be shared: as one thread computes them, to the bit, and the same twice."""
    options = dict(LAYOUTS[layout])
    options = {"P": 100} if "P" in options else options
    if "lengths" in options:
        options["lengths"] = (3,) * 30 + (2,) * 20 + (1,) * 3
    case = case_of(3, 50, 9, 150, **options)
    alone = differentiate(case.function, case.inputs, case.dys)
    check_threads(case, num_threads)
    torch.set_num_threads(num_threads)
    same(differentiate(case.function, case.inputs, case.dys)[0], alone[0])
    torch.set_num_threads(1)
    same(differentiate(case.function, case.inputs, case.dys), alone)


@pytest.mark.parametrize("layout", ["padded", "packed", "projected"])
def test_time_stats(layout):
    """Each thread measures its own units: together what one thread measures of all, but for the order of the sums."""
    options = {"padded": {}, "packed": {"lengths": (3,) * 30 + (2,) * 20}, "projected": {"P": 100}}[layout]
    inputs, batch_sizes = layer_inputs(3, 50, 9, 150, gain=3.0, **options)
    y, *_, gates, cells = OP.lstm_layer_fwd(*inputs, batch_sizes, False)
    dy, tables = randn(*y.shape), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        table = gk.new_time_stats(3)
        OP.lstm_layer_bwd(dy, None, None, *inputs, batch_sizes, y, gates, cells, False, [True] * 8, None, table)
        tables.append(table)
    assert (tables[0][1:] > 0).sum() > 3 * 8
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["padded", "projected"])
def test_threads_wait_for_each_other(layout):
    """More threads than cores, so that each is interrupted anywhere: the states and their gradients keep one thread's bits.

    The gradients vanish and are met by others of any size, so that every kind of step occurs.
    """
    inputs, _ = layer_inputs(12, 40, 9, 150, gain=0.3, **({"P": 100} if layout == "projected" else {}))
    dy = torch.zeros(12, 40, inputs[1].shape[1])
    dy[11], dy[3] = 1e-10 * randn(*dy.shape[1:]), 1e20 * randn(*dy.shape[1:])

    def recurrence(num_threads):
        torch.set_num_threads(num_threads)
        y, h_n, c_n, gates, cells = OP.lstm_layer_fwd(*inputs, None, False)
        gradients = OP.lstm_layer_bwd(dy, None, None, *inputs, None, y, gates, cells, False, [False] * 8, None, None)
        return y, h_n, c_n, gates, cells, *gradients[1:3]

    with torch.no_grad():
        alone = recurrence(1)
        for _ in range(20):
            same(recurrence(8), alone)


def test_fork_after_use():
    """A child process finds no threads of its parent, and computes all the same.

    PyTorch's own operations hang in a child where they are shared by threads: with so few rows none is but the fill with NaN.
    """
    case = case_of(2, 12, 1, 150)
    torch.set_num_threads(2)
    outputs = differentiate(case.function, case.inputs, case.dys)[0]
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch._C._set_grad_enabled(False)
        again = OP.lstm_layer_fwd(*case.inputs, None, False)[:3]
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
