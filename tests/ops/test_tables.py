"""Tables of statistics that several threads write, grow and take at once: nothing is lost, and counts are exact."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from cases import make_case
from checks import tuple_of

import gradkernels as gk
from gradkernels.library import _C
from gradkernels.ops import OPS
from gradkernels.ops.lstm_layer import lstm_layer_bwd_reference, lstm_layer_fwd_reference
from gradkernels.telemetry import FIELDS, NUM_NORMS, make_room, measure_reference, take_rows, take_steps

OP = torch.ops.gradkernels
THREADS = 4
PASSES = 1 if _C is None else 20  # the references take a hundred times as long


def together(*works):
    """Runs works at the same time, a thread each, and raises what one of them raises."""
    barrier = threading.Barrier(len(works))

    def run(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


def repeat(call, times):
    for _ in range(times):
        call()


def go_back(case, stats, calls, passes):
    """Goes back through `calls` nodes, again and again: they do not wait for the interpreter in between."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in case.inputs]
    outputs = [1 * y for _ in range(calls) for y in tuple_of(case.function(*leaves, stats=stats))]
    wanted = [leaf for leaf in leaves if leaf is not None]
    repeat(lambda: torch.autograd.grad(outputs, wanted, case.dys * calls, retain_graph=True), passes)


@pytest.mark.parametrize("op", OPS)
def test_shared_stats(op):
    """One table of several threads holds what one thread would have written."""
    case, passes, calls = make_case(op, 1, 2), PASSES, 200 if op != "probe" else 1
    shared, alone = gk.new_stats(len(case.ports)), gk.new_stats(len(case.ports))
    together(*[partial(go_back, case, shared, calls, passes)] * 3)
    repeat(partial(go_back, case, alone, calls, passes), 3)
    counts = [k for k in range(shared.shape[-1]) if FIELDS[k].endswith(("numel", "count"))]
    assert torch.equal(shared[..., counts], alone[..., counts])
    assert (shared[:, 0, 1] == 3 * passes * calls).all()
    torch.testing.assert_close(shared, alone, rtol=1e-6, atol=0)  # a product's last bits depend on where its operands lie


def test_shared_row():
    """Little else than writes, of which there are many."""
    stats, passes, calls = gk.new_stats(2), 6 * PASSES, 1000 if _C else 100

    def work():
        x = torch.ones(1, requires_grad=True)
        y = torch.stack([gk.gelu(x, stats=stats) for _ in range(calls)]).sum()
        repeat(partial(torch.autograd.grad, y, x, retain_graph=True), passes)

    together(*[work] * 3)
    n = 3 * passes * calls
    assert stats[0, 0].tolist() == [n, n, n, 0, 0, 1, 0, 0]
    assert stats[1, 0, :2].tolist() == [n, n]


def test_reference_and_kernel_share_a_row():
    """The reference, which runs where a gradient is differentiated again, writes under the same lock."""
    dy, stats, calls = torch.tensor([3.0, 0.0]), gk.new_stats(1), 300
    works = [partial(measure_reference, dy, stats, 0), partial(OP.probe_bwd, dy, stats, 0)] * 2
    together(*[partial(repeat, work, calls) for work in works])
    assert stats.flatten().tolist() == [8 * calls, 4 * calls, 36 * calls, 0, 0, 3, 0, 4 * calls]


def taken(take, writers, calls):
    """What take() finds from the first of `calls` calls of each writer to the last, and once more after it."""
    left, found = threading.Semaphore(0), []

    def write(call):
        repeat(call, calls)
        left.release()

    def read():
        done = 0
        while done < len(writers):
            done += left.acquire(blocking=False)
            found.append(take())

    together(read, *[partial(write, call) for call in writers])
    return [*found, take()]


def test_taken_while_written():
    """The takes of a table add up to everything that was written into it. Its rows are so many that a take takes a while."""
    table, passes, calls = gk.new_stats(2000 if _C else 2), PASSES, 100
    case = make_case("gelu", 1, 2)
    write = partial(go_back, case, table[:2], calls, 5)
    rows = torch.stack(taken(lambda: rows_of(table)[:2], [write] * THREADS, passes))
    n = THREADS * passes * calls * 5
    assert rows.sum(0)[:, :2].tolist() == [[2 * n, n], [2 * n, n]]
    torch.testing.assert_close(rows[:, 0, 2].sum(), n * case.dys[0].double().square().sum(), rtol=1e-6, atol=0)
    assert not table.any()


def rows_of(table):
    rows = torch.empty(table.shape[0], len(FIELDS), dtype=torch.float64)
    take_rows(table, rows)
    return rows


def layer_backward(T, time_stats, reference=False):
    """A function that runs lstm_layer's backward over T steps, of 2 rows and 3 units each."""
    x, state, weights = torch.randn(T, 2, 1), torch.zeros(2, 3), (torch.randn(12, 1), torch.randn(12, 3))
    inputs, last = (x, state, state, *weights, None, None, None, None), (False, [False] * 8)
    y, _, _, gates, cells = lstm_layer_fwd_reference(*inputs, False)
    args = (torch.randn_like(y), None, None, *inputs, y, gates, cells, *last)
    if reference:
        return lambda: lstm_layer_bwd_reference(*args, time_stats)
    return lambda: OP.lstm_layer_bwd(*args, None, time_stats)


def test_time_stats_taken_while_written():
    """Counts of the kernel's and the reference's calls; the table grows as it is taken, and late steps are then there."""
    time_stats, calls = gk.new_time_stats(2), 60
    writers = [layer_backward(5, time_stats), layer_backward(5, time_stats), layer_backward(5, time_stats, reference=True)]
    found = taken(partial(take_steps, time_stats), writers, calls)
    total = sum(rows[:3] for rows in found)
    assert max(rows[0, 0] for rows in found) == 5
    assert total[0, 1] == 3 * calls
    assert total[1:, 3].tolist() == [3 * calls * 6] * 2
    assert time_stats.shape[0] == 6
    assert not time_stats.any()


def test_shared_time_stats():
    """One table of several threads holds what one thread would have written."""
    shared, alone = gk.new_time_stats(4), gk.new_time_stats(4)
    x, state = torch.randn(4, 2, 1), torch.zeros(2, 3)
    weights, dy = (torch.randn(12, 1), torch.randn(12, 3)), torch.randn(4, 2, 3)

    def go_back(time_stats, calls=200 if _C else 30, passes=PASSES):
        leaf = weights[0].clone().requires_grad_()
        ys = [gk.lstm_layer(x, state, state, leaf, weights[1], time_stats=time_stats)[0] for _ in range(calls)]
        repeat(lambda: torch.autograd.grad(ys, leaf, [dy] * calls, retain_graph=True), passes)

    together(*[partial(go_back, shared)] * 3)
    repeat(partial(go_back, alone), 3)
    assert shared[0].tolist() == alone[0].tolist()
    assert torch.equal(shared[1:, NUM_NORMS:-1], alone[1:, NUM_NORMS:-1])
    torch.testing.assert_close(shared, alone, rtol=1e-6, atol=0)


def grow(time_stats, lengths):
    for length in lengths:
        make_room(time_stats, length)


def test_grown_while_written():
    """Longer and longer sequences make room while backwards of others write: nothing is lost, no memory is let go too soon."""
    calls, longest = 10 * PASSES, 3000
    for _ in range(5):
        time_stats = gk.new_time_stats(30)
        works = [partial(repeat, layer_backward(30, time_stats), calls) for _ in range(THREADS - 1)]
        together(partial(grow, time_stats, range(30, longest)), *works)
        assert time_stats.shape[0] == longest
        assert time_stats[0].tolist()[:2] == [30, (THREADS - 1) * calls]
        assert (time_stats[1:31, NUM_NORMS] == 6 * (THREADS - 1) * calls).all()
        assert not time_stats[31:].any()


def test_module_of_several_threads():
    """A module whose threads see sequences of ever more lengths: every step of every call is counted."""
    module = gk.LSTM(2, 3)
    module.time_stats_l0, calls = gk.new_time_stats(4), 60

    def work(seed):
        for k in range(calls):
            module(torch.randn(1 + (7 * k + seed) % 90, 2, 2))[0].sum().backward(inputs=list(module.parameters()))

    lengths = [1 + (7 * k + seed) % 90 for seed in range(THREADS) for k in range(calls)]
    together(*[partial(work, seed) for seed in range(THREADS)])
    table = module.time_stats_l0
    assert table[0].tolist()[:2] == [max(lengths), len(lengths)]
    expected = [6.0 * sum(length > t for length in lengths) for t in range(max(lengths))]
    assert table[1:, NUM_NORMS].tolist() == expected


def test_probe_of_several_threads():
    """Threads that probe one tensor at once leave it one hook."""
    for _ in range(200):
        x, stats = torch.randn(3, requires_grad=True), gk.new_stats(1)
        together(*[partial(gk.probe, x, stats=stats)] * THREADS)
        x.sum().backward()
        assert stats[0, 0, 1] == 1


def test_room():
    """What is there stays, what is new is zero, and a table never shrinks."""
    table = gk.new_time_stats(3)
    table += 1
    for steps, rows in ((2, 4), (3, 4), (6, 7), (1, 7)):
        make_room(table, steps)
        assert table.shape == (rows, 12)
    assert (table[:4] == 1).all()
    assert not table[4:].any()


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (OP.take_rows, lambda: (torch.rand(3, 2, 8, dtype=torch.float64), torch.rand(3, 8, dtype=torch.float64))),
        (OP.add_row, lambda: (torch.rand(8, dtype=torch.float64), torch.rand(2, 1, 8, dtype=torch.float64), 1)),
        (OP.add_steps, lambda: (torch.rand(3, 12, dtype=torch.float64), torch.rand(3, 12, dtype=torch.float64))),
        (OP.make_room, lambda: (torch.rand(3, 12, dtype=torch.float64), 2)),
        (OP.take_steps, lambda: (torch.rand(3, 12, dtype=torch.float64),)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_op(op, args):
    torch.library.opcheck(op.default, args())
