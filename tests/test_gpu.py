"""What only a GPU can show: CUDA graphs, torch.compile, a second device, no waiting. Run by `make gpu`."""

import copy
from functools import partial

import pytest
import torch
from cases import make_case
from checks import same

import gradkernels as gk
from gradkernels.testing import differentiate

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
    torch.testing.assert_close(torch.ops.gradkernels.fold(stats), torch.ops.gradkernels.fold(eager_stats))
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


def test_no_waiting():
    """A step of training and of watching never waits for the device."""
    model, x = make_model(), torch.randn(32, 64, device="cuda")
    watch = gk.watch(model)
    model(x).square().mean().backward()
    watch.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().mean().backward()
        watch.step()
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


def test_plans():
    """From its third call on a kind of call is repeated by C++: the same bits and statistics, on another stream too."""
    plans_of = pytest.importorskip("gradkernels._C").plans_of
    for op in ("gelu", "layer_norm", "add_layer_norm"):
        case = make_case(op, 33, 264)
        inputs, dys = on_gpu(case)
        stats = [gk.new_stats(len(case.ports), "cuda") for _ in range(6)]
        before = plans_of(f"gradkernels::{op}_bwd")["replays"]
        runs = [differentiate(partial(case.function, stats=table), inputs, dys) for table in stats[:5]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            runs.append(differentiate(partial(case.function, stats=stats[5]), inputs, dys))
        torch.cuda.synchronize()
        assert plans_of(f"gradkernels::{op}_bwd")["replays"] >= before + 3
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    """Kernels run where their tensors are, whatever the current device is."""
    x = torch.randn(64, 512, device="cuda:1", requires_grad=True)
    gk.gelu(x).sum().backward()
    assert x.grad.isfinite().all()
