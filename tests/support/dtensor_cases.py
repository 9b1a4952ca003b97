"""What test_dtensor.py checks, in the two processes that it starts: `main` runs every case in each of them.

A case is a function of the mesh that raises where something is wrong. Both processes draw the same numbers, so each knows the
whole tensors that its own parts are of.
"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dtensor_ops import VARIANTS, B, D, H, P, T, check_op, spread
from ranks import run_cases
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import gradkernels as gk

DTYPES = (torch.float32, torch.float64)
PLACEMENTS = {"S0": Shard(0), "S1": Shard(1), "S2": Shard(2), "R": Replicate(), "P": Partial()}


def variant(name, where, mesh):
    """One op on one placement of x, with gradients of every placement, in both dtypes."""
    op = VARIANTS[name]
    for dtype in DTYPES:
        for of_dy in (None, Replicate(), Partial(), Shard(1)):
            check_op(op, mesh, PLACEMENTS[where], dtype, of_dy)


def uneven(rows, mesh):
    """Three rows in two processes, and one, so that the second has none."""
    for name, op in VARIANTS.items():
        if name not in ("lstm_layer_packed", "layer_norm_of_two"):
            inputs = {name: tuple(rows if size == B else size for size in shape) for name, shape in op.inputs.items()}
            for placement in (Shard(0), Shard(1)):
                check_op(replace(op, inputs=inputs, twin=None), mesh, placement, torch.float32)


def sharded_weights(mesh):
    """A weight is put together wherever it is needed."""
    for op in VARIANTS.values():
        for placement in (Shard(0), Shard(1), Replicate()):
            check_op(replace(op, twin=None), mesh, placement, torch.float32, of_weights=Shard(0))


def two_dimensions(mesh):
    """Rows are shared out along one dimension of the mesh, and along the other each process does the same."""
    for shape in ((2, 1), (1, 2)):
        wide = init_device_mesh("cpu", shape)
        x, weight, dy = torch.randn(T, B, D), torch.randn(D), torch.randn(T, B, D)
        ours = distribute_tensor(x, wide, [Shard(0), Shard(2)]).requires_grad_()
        ours_weight = distribute_tensor(weight, wide, [Replicate()] * 2).requires_grad_()
        y = gk.layer_norm(ours, (D,), ours_weight)
        assert y.placements == (Shard(0), Replicate())
        y.backward(distribute_tensor(dy, wide, y.placements))
        assert ours_weight.grad.placements == (Partial(), Replicate())
        x.requires_grad_()
        weight.requires_grad_()
        F.layer_norm(x, (D,), weight).backward(dy)
        torch.testing.assert_close(ours.grad.full_tensor(), x.grad)
        torch.testing.assert_close(ours_weight.grad.full_tensor(), weight.grad)


def some_processes(mesh):
    """What is not on this process's mesh is nothing here, and what is on two is refused."""
    first = DeviceMesh("cpu", [0])
    for module in (gk.LayerNorm(D), gk.GELU()):
        x = distribute_tensor(torch.randn(B, D), first, [Shard(0)]).requires_grad_()
        y = distribute_module(module, first)(x)
        y.backward(distribute_tensor(torch.randn(B, D), first, [Shard(0)]))
        assert y.shape == x.grad.shape == (B, D)
        assert x.grad.to_local().shape == y.to_local().shape == ((B, D) if dist.get_rank() == 0 else (0,))
    wide = distribute_tensor(torch.randn(D), init_device_mesh("cpu", (2, 1)), [Replicate()] * 2)
    with pytest.raises(RuntimeError, match="all DTensors must be on one mesh"):
        gk.layer_norm(spread(torch.randn(B, D), mesh, Shard(0)), (D,), wide)


def network():
    """A block of a transformer without its attention, that any mesh knows how to share out."""
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D), nn.LayerNorm(D))


def parallel(net, mesh):
    """Sequence parallelism around tensor parallelism."""
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "4": SequenceParallel(),
    }
    return parallelize_module(net, mesh, plan)


def check_network(mesh, ours, step=lambda: None):
    """Two steps of training give the same losses, gradients and placements as torch.nn's layers under the same plan."""
    theirs = parallel(gk.revert(copy.deepcopy(ours)), mesh)
    ours = parallel(ours, mesh)
    assert isinstance(ours[0], gk.LayerNorm)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (theirs, ours)]
    for _ in range(2):
        x, target, losses = torch.randn(2, B, D), torch.randn(2, B, D), []
        for net, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append((net(spread(x, mesh, Shard(1))).full_tensor() - target).square().mean())
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0])
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.grad.placements == other.grad.placements
            torch.testing.assert_close(one.grad.full_tensor(), other.grad.full_tensor())
        step()
        for optimizer in optimizers:
            optimizer.step()


def converted(mesh):
    check_network(mesh, gk.convert(network()))


def watched(mesh):
    """Each process has the records of its own part: half the tokens at a norm, half the channels between the linear layers."""
    ours, groups = gk.convert(network()), [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    watch = gk.watch(ours, process_group=groups[dist.get_rank()])
    check_network(mesh, ours, watch.step)
    numel = {(record.site, record.port): record.numel for record in watch.records()}
    expected = {"dy": B * D, "dx": B * D, "dweight": D, "dbias": D}
    assert {port: numel["0", port] for port in expected} == expected
    assert {port: numel["4", port] for port in expected} == expected
    assert numel["2", "dx"] == 2 * B * D


def watched_in_one_process(mesh):
    """Measuring communicates nothing, so the other process need not take part until steps are merged."""
    ours = gk.convert(network())
    if dist.get_rank() == 0:
        gk.watch(ours)
    check_network(mesh, ours)
    partial_sum = spread(torch.randn(B, D), mesh, Partial()).requires_grad_()
    stats = gk.new_stats(1) if dist.get_rank() == 0 else None
    gk.probe(1 * partial_sum, stats=stats).backward(spread(torch.randn(B, D), mesh, Partial()))


def lstm_modules(mesh):
    """torch.nn's refuse DTensors; ours share out the batch."""
    for make, shape, batch in (
        (partial(gk.LSTM, D, H, 2, bidirectional=True, proj_size=P), (T, B, D), 1),
        (partial(gk.LSTM, D, H, batch_first=True), (B, T, D), 0),
        (partial(gk.LSTMCell, D, H), (B, D), 0),
    ):
        single, x = make(), torch.randn(shape)
        for parameter in single.parameters():
            dist.broadcast(parameter.data, 0)
        ours, own = distribute_module(copy.deepcopy(single), mesh), spread(x, mesh, Shard(batch)).requires_grad_()
        x.requires_grad_()
        y, other = ours(own)[0], single(x)[0]
        assert y.placements == (Shard(batch),)
        dy = torch.randn_like(other)
        y.backward(spread(dy, mesh, Shard(batch)))
        other.backward(dy)
        for one, whole in zip((own, *ours.parameters()), (x, *single.parameters()), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), whole.grad)


def twice(mesh):
    """Double backward."""
    x = torch.randn(B, D, dtype=torch.float64)
    for function, ports in ((gk.gelu, 2), (lambda x, stats: gk.layer_norm(x, (D,), stats=stats), 4)):
        results = []
        for leaf in (x.clone().requires_grad_(), spread(x, mesh, Shard(0)).requires_grad_()):
            y = function(leaf, stats=gk.new_stats(ports))
            (dx,) = torch.autograd.grad(y.sin().sum(), leaf, create_graph=True)
            results += torch.autograd.grad(dx.sin().sum(), leaf)
        torch.testing.assert_close(results[1].full_tensor(), results[0])


def without_gradients(mesh):
    x = torch.randn(B, D)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = gk.gelu(spread(x, mesh, Shard(0)), stats=gk.new_stats(2))
            assert y.placements == (Shard(0),)
            torch.testing.assert_close(y.full_tensor(), gk.gelu(x))


def mixed(mesh):
    """Plain tensors beside DTensors are refused, unless they are said to be replicas."""
    x, weight = torch.randn(B, D), torch.randn(D)
    ours, ours_weight = spread(x, mesh, Shard(0)), spread(weight, mesh, Replicate())
    for function in (F.layer_norm, gk.layer_norm):
        for tensors in ((ours, (D,), weight), (x, (D,), ours_weight)):
            with pytest.raises(RuntimeError, match=r"layer_norm.*got mixed torch.Tensor and DTensor"):
                function(*tensors)
            with implicit_replication():
                y = function(*tensors)
            torch.testing.assert_close(y.full_tensor(), F.layer_norm(x, (D,), weight))


def in_place(mesh):
    """The two results of a fork share memory, as they do of a plain tensor."""
    _, branch = gk.residual_fork(1 * spread(torch.randn(B, D), mesh, Shard(0)).requires_grad_())
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        branch.relu_()


def compiled(mesh):
    """One graph, with statistics."""
    x, dy = torch.randn(B, D), torch.randn(B, D)
    leaf = x.clone().requires_grad_()
    F.gelu(F.layer_norm(leaf, (D,))).backward(dy)
    net = nn.Sequential(gk.LayerNorm(D, elementwise_affine=False), gk.GELU())
    net[1].stats = gk.new_stats(2)
    ours = spread(x, mesh, Shard(0)).requires_grad_()
    torch.compile(net, backend="aot_eager", fullgraph=True)(ours).backward(spread(dy, mesh, Shard(0)))
    torch.testing.assert_close(ours.grad.full_tensor(), leaf.grad)
    assert net[1].stats[:, 0, 0].tolist() == [B * D / 2] * 2


CASES = {f"{name}-{where}": partial(variant, name, where) for name in VARIANTS for where in PLACEMENTS}
CASES = {case: run for case, run in CASES.items() if "-S2" not in case or len(VARIANTS[case.split("-")[0]].inputs["x"]) == 3}
CASES.update({f"uneven-{rows}": partial(uneven, rows) for rows in (3, 1)})
ALONE = (
    sharded_weights,
    two_dimensions,
    some_processes,
    converted,
    watched,
    watched_in_one_process,
    lstm_modules,
    twice,
    without_gradients,
    mixed,
    in_place,
    compiled,
)
CASES.update({case.__name__: case for case in ALONE})


def main(rank, size, folder):
    """Runs every case as one of the processes of a mesh."""
    run_cases(CASES, rank, size, folder, lambda: (init_device_mesh("cpu", (size,)),))
