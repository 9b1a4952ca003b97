"""What only a GPU can show: CUDA graphs, torch.compile, a second device, no waiting. Run by `make gpu`."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from cases import make_case
from checks import same

import gradkernels as gk
from gradkernels.telemetry import merge_slots
from gradkernels.testing import check_results, differentiate, largest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPS = ("gelu", "layer_norm", "add_layer_norm", "residual")


def make_model():
    layers = [torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.GELU()]
    return torch.nn.Sequential(*(copy.deepcopy(layer) for layer in layers * 2), torch.nn.Linear(64, 1)).cuda()


def on_gpu(case):
    """The case's inputs and gradients, on the GPU wherever they were made."""
    inputs, dys = ([t.cuda() if isinstance(t, torch.Tensor) else t for t in group] for group in (case.inputs, case.dys))
    return inputs, dys


@pytest.mark.parametrize("op", OPS)
def test_compile(op, fresh_compiler):
    """Inductor's graph holds the kernels, gives eager's numbers and the same statistics."""
    case = make_case(op, 33, 256)
    inputs, dys = on_gpu(case)
    eager_stats, stats = gk.new_stats(len(case.ports), "cuda"), gk.new_stats(len(case.ports), "cuda")
    eager = differentiate(partial(case.function, stats=eager_stats), inputs, dys)
    compiled = torch.compile(partial(case.function, stats=stats), fullgraph=True)
    ours = differentiate(compiled, inputs, dys)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(merge_slots(stats), merge_slots(eager_stats))
    assert not fresh_compiler["graph_break"]


def test_cuda_graph():
    """A captured training step, replayed: each replay measures what an eager step measures."""
    torch.manual_seed(0)
    model, x = make_model(), torch.randn(32, 64, device="cuda")
    watch = gk.watch(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    watch.step()
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    watch.step()
    expected = [(record.site, record.port, record.norm, record.numel) for record in watch.records()]
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
    for _ in range(2):
        graph.replay()
        watch.step()
        found = [(record.site, record.port, record.norm, record.numel) for record in watch.records()]
        assert [row[:2] for row in found] == [row[:2] for row in expected]
        torch.testing.assert_close([row[2:] for row in found], [row[2:] for row in expected])


def test_steps_that_end_in_a_cuda_graph():
    """Capture and replay need nothing from the user: each replay is a step of its own in the history, with its loss."""
    torch.manual_seed(0)
    model, x = make_model(), torch.randn(32, 64, device="cuda")
    watch = gk.watch(model, history=6, log_every=2)

    def step():
        loss = model(x).square().mean()
        loss.backward()
        watch.step(loss)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for scale in range(1, 6):
        x.mul_(scale)
        graph.replay()
    x.fill_(1.0)
    step()
    history = watch.history
    assert list(history.steps) == [4, 5, 6, 7, 8, 9]
    expected = model(x).square().mean().item()
    torch.testing.assert_close(history.snapshots[-1].loss, expected)
    losses = [snapshot.loss for snapshot in history.snapshots]
    assert len(set(losses)) == len(losses) == 6
    norms = history.column("norm", watch.sites[0].name)
    assert len(set(norms)) == 6
    assert (history.column("observation_count", watch.sites[0].name) == 1).all()


def test_no_waiting():
    """A step of training and of watching never waits for the device, nor does one that is logged."""
    model, x = make_model(), torch.randn(32, 64, device="cuda")
    watch = gk.watch(model, log_every=2)
    for _ in range(4):
        loss = model(x).square().mean()
        loss.backward()
        watch.step(loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            loss = model(x).square().mean()
            loss.backward()
            watch.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeatable():
    """Equal work gives equal bits, statistics too."""
    for op in OPS:
        case = make_case(op, 513, 768)
        inputs, dys = on_gpu(case)
        tables = [gk.new_stats(len(case.ports), "cuda") for _ in range(2)]
        runs = [differentiate(partial(case.function, stats=stats), inputs, dys) for stats in tables]
        same(*runs)
        assert torch.equal(*tables)


def test_no_recompile_for_another_batch():
    from gradkernels.triton.norm import norm_bwd_kernel

    def run(rows):
        x = torch.randn(rows, 512, device="cuda", requires_grad=True)
        gk.layer_norm(x, (512,), torch.ones(512, device="cuda", requires_grad=True)).sum().backward()
        return sum(len(caches[0]) for caches in norm_bwd_kernel.device_caches.values())

    assert run(64) == run(96) == run(1000) == run(3)


def test_launch_cache():
    """From its third call on a call signature is repeated by C++: the same bits and statistics, on another stream too."""
    caches_of = pytest.importorskip("gradkernels._C").caches_of
    for op in ("gelu", "layer_norm", "add_layer_norm"):
        case = make_case(op, 33, 264)
        inputs, dys = on_gpu(case)
        stats = [gk.new_stats(len(case.ports), "cuda") for _ in range(6)]
        before = caches_of(f"gradkernels::{op}_bwd")["replays"]
        runs = [differentiate(partial(case.function, stats=table), inputs, dys) for table in stats[:5]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            runs.append(differentiate(partial(case.function, stats=stats[5]), inputs, dys))
        torch.cuda.synchronize()
        assert caches_of(f"gradkernels::{op}_bwd")["replays"] >= before + 3
        for run, table in zip(runs[1:], stats[1:], strict=True):
            same(run, runs[0])
            assert torch.equal(table, stats[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Dtypes and numbers of PyTorch's layer_norm and gelu in the same region."""
    x = torch.randn(32, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        ours, theirs = gk.layer_norm(x, (64,), weight), torch.nn.functional.layer_norm(x, (64,), weight)
        assert gk.gelu(x).dtype is torch.nn.functional.gelu(x).dtype
        y, h = gk.add_layer_norm(x, x, (64,), weight)
        assert (y.dtype, h.dtype) == (torch.nn.functional.layer_norm(x + x, (64,), weight).dtype, (x + x).dtype)
    assert ours.dtype is theirs.dtype is torch.float32
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(t, (x, weight), dy) for t in (ours, theirs)]
    torch.testing.assert_close(*grads)


LSTMS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 two layers": {"dtype": torch.float16, "num_layers": 2},
    "float32 bidirectional": {"bidirectional": True},
    "float32 projected": {"proj_size": 40},
}


def make_lstm(**options):
    """gk.LSTM of 65 inputs and 200 units, with statistics of its steps."""
    module = gk.LSTM(65, 200, device="cuda", **options)
    for part in module.suffixes:
        setattr(module, f"stats{part}", gk.new_stats(len(module.PORTS), "cuda"))
        setattr(module, f"time_stats{part}", gk.new_time_stats(64, "cuda"))
    return module


def lstm_input(T, B, dtype=torch.float32, packed=False):
    x = torch.randn(T, B, 65, device="cuda", dtype=dtype)
    if not packed:
        return x
    return torch.nn.utils.rnn.pack_padded_sequence(x, torch.linspace(T, max(1, T // 3), B, device="cpu").long())


def lstm_results(module, x, dy=None):
    """((y,), gradients of all weights) for dy, random where there is none."""
    y = module(x)[0]
    y = y if isinstance(y, torch.Tensor) else y.data
    dy = torch.ones_like(y).cumsum(0).sin() if dy is None else dy.to(y.dtype)
    return (y.detach(),), torch.autograd.grad(y, list(module.parameters()), dy)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", LSTMS)
def test_lstm(options, packed):
    """What nn.LSTM computes, no further from float64 than it; equal bits in two runs, statistics too."""
    torch.manual_seed(0)
    module, dtype = make_lstm(**LSTMS[options]), LSTMS[options].get("dtype", torch.float32)
    plain = torch.nn.LSTM(65, 200, device="cuda", **LSTMS[options])
    plain.load_state_dict(module.state_dict())
    x = lstm_input(40, 37, dtype, packed)
    dy = torch.randn(lstm_results(plain, x)[0][0].shape, device="cuda").to(dtype)
    ours = lstm_results(module, x, dy)
    exact = lstm_results(copy.deepcopy(plain).double(), x.to(torch.float64), dy)
    terms = {"y0": 2 * 40**0.5, **{f"d{k}": 4 * (40 * 37) ** 0.5 * largest(dy) for k in range(len(ours[1]))}}
    check_results(ours, lstm_results(plain, x, dy), exact, terms)
    tables = [module.time_stats_l0.clone(), module.stats_l0.clone()]
    for table in (module.time_stats_l0, module.stats_l0):
        table.zero_()
    same(ours, lstm_results(module, x, dy))
    assert torch.equal(tables[0], module.time_stats_l0)
    assert torch.equal(tables[1], module.stats_l0)
    assert (tables[0][1:41, :2] > 0).all()


AT_ONCE = {
    "directions": {"bidirectional": True, "num_layers": 2},
    "directions, dropout": {"bidirectional": True, "num_layers": 2, "dropout": 0.5, "dtype": torch.bfloat16},
    "layers": {"num_layers": 3, "dtype": torch.bfloat16},
    "layers, dropout": {"num_layers": 3, "dropout": 0.5, "dtype": torch.float16},
}


@pytest.mark.parametrize("options", AT_ONCE)
def test_lstm_at_once(options):
    """Parts on streams of their own give what they give one after the other, time after time; statistics too."""
    torch.manual_seed(0)
    module = make_lstm(**AT_ONCE[options])
    x = lstm_input(300, 8, AT_ONCE[options].get("dtype", torch.float32))
    tables = [getattr(module, f"{name}{part}") for name in ("stats", "time_stats") for part in module.suffixes]

    def results():
        torch.manual_seed(1)
        for table in tables:
            table.zero_()
        (y,), gradients = lstm_results(module, x)
        return [y, *gradients, *(table.clone() for table in tables)]

    found = results()
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(found, results(), strict=True))
    if module.dropout:  # whose random numbers are drawn otherwise
        return
    with mock.patch("gradkernels.triton.lstm.stack.schedules_of", return_value=[]):
        expected = results()
    rounding = torch.finfo(x.dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8 * rounding, atol=8 * rounding * theirs.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["one", "at once in eager"])
def test_lstm_compile(fresh_compiler, options):
    """One graph for every length and batch, without breaks; eager's numbers and statistics."""
    torch.manual_seed(0)
    module = make_lstm(**options)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for T, B in ((20, 8), (33, 9), (17, 40)):
        x = lstm_input(T, B)
        torch.testing.assert_close(lstm_results(compiled, x), lstm_results(module, x))
    assert not fresh_compiler["graph_break"]
    assert fresh_compiler["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("packed", [False, True])
def test_lstm_never_waits(packed):
    module, x = make_lstm(dtype=torch.bfloat16), lstm_input(20, 16, torch.bfloat16, packed)
    lstm_results(module, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = module(x)[0]
        (y.data if packed else y).backward(torch.ones_like(y.data if packed else y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["one", "at once"])
def test_lstm_cuda_graph(options):
    """A captured forward and backward, replayed: eager's gradients, and its statistics at each replay."""
    torch.manual_seed(0)
    module, x = make_lstm(**options), lstm_input(20, 16)
    dy = torch.randn(20, 16, 200 * (1 + module.bidirectional), device="cuda")

    def step():
        return torch.autograd.grad(module(x)[0], list(module.parameters()), dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    module.time_stats_l0.zero_()
    expected = [*step(), module.time_stats_l0.clone()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    for _ in range(2):
        module.time_stats_l0.zero_()
        graph.replay()
        same((*gradients, module.time_stats_l0), expected)


def test_lstm_no_recompile_for_another_length_or_batch():
    from gradkernels.triton.lstm import backward, forward

    kernels = [getattr(module, name) for module in (forward, backward) for name in dir(module) if "_kernel" in name]

    def run(T, B, packed):
        lstm_results(make_lstm(), lstm_input(T, B, packed=packed))
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    first = run(16, 32, False)
    assert [run(*shape) for shape in ((1, 1, False), (7, 33, False), (20, 100, False), (16, 17, True))] == [first] * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    """Kernels run where their tensors are, whatever the current device is."""
    x = torch.randn(64, 512, device="cuda:1", requires_grad=True)
    gk.gelu(x).sum().backward()
    assert x.grad.isfinite().all()
