"""Training in several processes: what a Watch has merged, against one process with the whole batch. See test_merge.py."""

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradkernels as gk
from gradkernels.telemetry.fields import FIELDS, NONFINITE, NUM_NORMS, NUMEL

STEPS, BATCH, T, D = 4, 32, 5, 12
OF_ACTIVATIONS = ("dy", "dx", "dskip", "dbranch", "dnew_residual")
OFF = torch.amp.GradScaler("cpu", enabled=False)  # what it is asked to do is done as without a scaler
COUNTS = ("numel", "nonfinite_count", "zero_count")


class Net(nn.Module):
    """An LSTM, three blocks, and a head: fused layers with and without time steps, a probe."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(D, D, batch_first=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(D, 3)
        self.without = ()

    def forward(self, x):
        h, _ = self.lstm(x)
        for index, block in enumerate(self.blocks):
            h = h if index in self.without else h + block(h)
        return self.head(h)


def build(seed=0):
    torch.manual_seed(seed)
    return Net()


def batches(steps=STEPS, length=T):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, length, D, generator=generator) for _ in range(steps)]


def loss_of(model, x):
    return model(x).square().mean()


def train(watch, model, optimizer, parts, scaler=OFF, no_sync=nullcontext):
    """Steps over lists of micro-batches, each loss divided by how many there are."""
    for micro_batches in parts:
        losses = []
        for index, x in enumerate(micro_batches):
            with no_sync() if index < len(micro_batches) - 1 else nullcontext():
                loss = loss_of(model, x) / len(micro_batches)
                losses.append(loss.detach())
                scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        watch.step(sum(losses))


def share(x, rank, size):
    return x.chunk(size)[rank]


def alone(parts):
    """The history of one process with whole batches: of a group of its own."""
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = gk.watch(model, optimizer, process_group=groups[dist.get_rank()])
    train(watch, model, optimizer, parts)
    return watch


def same(merged, expected, rtol=1e-5, counts=COUNTS):
    """Every number of every activation's gradient, over all steps: norms and extremes to `rtol`, counts exactly."""
    assert [s.step for s in merged.snapshots] == [s.step for s in expected.snapshots]
    for site in expected.sites:
        for port in site.ports:
            if port in OF_ACTIVATIONS:
                for field in ("norm", "rms", "abs_max"):
                    found, value = merged.column(field, site.name, port), expected.column(field, site.name, port)
                    np.testing.assert_allclose(found, value, rtol, err_msg=f"{site.name} {port} {field}")
                for field in counts:
                    found, value = merged.column(field, site.name, port), expected.column(field, site.name, port)
                    np.testing.assert_array_equal(found, value, err_msg=f"{site.name} {port} {field}")
    for ours, theirs in zip(merged.snapshots, expected.snapshots, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol)
        for name, rows in theirs.time_values.items():
            length = 1 + int(rows[0, 0])
            assert ours.time_values[name][0, 0] == rows[0, 0]
            columns = slice(None) if counts is COUNTS else slice(NUM_NORMS)  # gates: rounded ones pass a limit earlier or later
            found = ours.time_values[name][1:length, columns]
            np.testing.assert_allclose(found, rows[1:length, columns], rtol, err_msg=f"{name} over time")


def data_parallel(accumulate=1, scaler=None, **options):
    rank, size, model = dist.get_rank(), dist.get_world_size(), build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**scaler) if scaler else OFF
    watch = gk.watch(model, optimizer, scaler if scaler.is_enabled() else None, log_every=2)
    parallel = DistributedDataParallel(model, **options)
    parts = [list(share(x, rank, size).chunk(accumulate)) for x in batches()]
    train(watch, parallel, optimizer, parts, scaler, parallel.no_sync)
    same(watch.history, alone([[x] for x in batches()]).history)
    assert not watch.desync()


def fully_sharded(reshard=True, dtype=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rank, size, model = dist.get_rank(), dist.get_world_size(), build()
    watch = gk.watch(model, log_every=2)
    policy = MixedPrecisionPolicy(param_dtype=dtype) if dtype else MixedPrecisionPolicy()
    options = {"mesh": init_device_mesh("cpu", (size,)), "reshard_after_forward": reshard, "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(watch, model, optimizer, [[share(x, rank, size)] for x in batches()])
    rounded = {"rtol": 0.1, "counts": ("numel", "nonfinite_count")} if dtype else {}
    same(watch.history, alone([[x] for x in batches()]).history, **rounded)
    assert not watch.desync()


def tensor_parallel():
    """Merged over the data-parallel group alone, so a module that every tensor-parallel process has counts once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    size, model = dist.get_world_size(), build()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"1": ColwiseParallel(output_layouts=Replicate())})
    watch = gk.watch(model, log_every=2, process_group=mesh.get_group("data"))
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rank = mesh.get_local_rank("data")
    train(watch, model, optimizer, [[share(x, rank, size // 2)] for x in batches()])
    same(watch.history, alone([[x] for x in batches()]).history)
    assert not watch.desync()


def uneven():
    """Ranks with other numbers of micro-batches: their rows add up, and nobody waits for anybody else."""
    rank, size, model = dist.get_rank(), dist.get_world_size(), build()
    watch = gk.watch(model, log_every=STEPS)
    x = batches(1)[0]
    for _ in range(STEPS):
        for _ in range(1 + rank):
            loss_of(model, x).backward()
        watch.step()
    rows, calls = watch.history.snapshots[-1].values, sum(range(1, size + 1))
    assert rows[:, FIELDS.index("observation_count")].max() == calls
    assert rows[0, NUMEL] % calls == 0


def skipped_site():
    """A block that one process alone runs counts as what that process saw."""
    rank, size, model = dist.get_rank(), dist.get_world_size(), build()
    model.without = () if rank == 0 else (1,)
    watch = gk.watch(model, log_every=1)
    for x in batches():
        loss_of(model, share(x, rank, size)).backward()
        watch.step()
    history = watch.history
    numel = BATCH // size * T * D
    assert set(history.column("numel", "blocks.1.0")) == {numel}
    assert set(history.column("numel", "blocks.2.0")) == {numel * size}


def time_steps_of_other_lengths():
    """Each process has sequences of its own length; a step is that of those that reach it."""
    rank, size, model = dist.get_rank(), dist.get_world_size(), build()
    watch = gk.watch(model, log_every=2)
    lengths = [300 * (other + 1) for other in range(size)]  # more than there is room for at first
    for _ in range(STEPS):
        loss_of(model, batches(1, lengths[rank])[0]).backward()
        watch.step()
    profile = watch.time_profile()[0]
    assert profile.steps == lengths[-1]
    counts = [sum(length > t for length in lengths) * BATCH * D for t in range(lengths[-1])]
    np.testing.assert_array_equal(profile.gate_count, counts)
    assert np.isfinite(profile.dc).all()


def drift():
    """Weights that differ in one process are named, and a warning says so; one has the same elements in another order."""
    rank, model = dist.get_rank(), build()
    watch = gk.watch(model, log_every=1, desync_every=2)
    with torch.no_grad():
        model.blocks[1][0].weight[3] += 1e-7 if rank == 1 else 0.0
        if rank == 1:
            model.head.bias.copy_(model.head.bias.flip(0))
    names = ["blocks.1.0.weight", "head.bias"]
    assert watch.desync() == names
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in batches():
            loss_of(model, x).backward()
            watch.step()
    said = [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
    assert len(said) == 2
    assert names[0] in said[0]


def without_reduction():
    """Gradients that nobody averages: the parameters drift apart in the first step."""
    rank, size, model = dist.get_rank(), dist.get_world_size(), build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = gk.watch(model, optimizer, log_every=1)
    train(watch, model, optimizer, [[share(x, rank, size)] for x in batches(1)])
    assert len(watch.desync()) == len(list(model.parameters()))


def other_sites():
    model = build()
    watch = gk.watch(model, sites=["blocks.0*"] if dist.get_rank() else ["blocks.1*"], log_every=1)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="must watch the same sites"):
        watch.step()


def group_without_this_process():
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        gk.watch(build(), process_group=group).close()
        return
    with pytest.raises(ValueError, match="process_group must hold this process"):
        gk.watch(build(), process_group=group)


def overflow():
    """A step that a scaler skips is skipped for all, and no failure."""
    rank, size, model = dist.get_rank(), dist.get_world_size(), build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    watch = gk.watch(model, optimizer, scaler, log_every=1)
    parallel = DistributedDataParallel(model)
    parts = [[share(x, rank, size)] for x in batches()]
    parts[1] = [parts[1][0] * (float("inf") if rank == 1 else 1.0)]
    train(watch, parallel, optimizer, parts, scaler)
    assert [snapshot.skipped for snapshot in watch.history.snapshots] == [False, True, False, False]
    assert watch.history.snapshots[1].values[:, NONFINITE].any()
    assert not [finding for finding in watch.diagnose() if finding.code == "NONFINITE"]


def closing():
    """What has not been logged is not read, for nobody else takes part; closing logs it."""
    model = build()
    watch = gk.watch(model, log_every=3)
    for step, x in enumerate(batches()):
        assert step or "2 steps" not in str(watch)
        loss_of(model, x).backward()
        watch.step()
        assert step != 1 or "2 steps have ended, and none is logged yet" in str(watch)
    assert len(watch.history) == 3
    watch.close()
    assert len(watch.history) == 4


def two_watches():
    """Two Watches in one process merge each for itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    models = [build(), build()]
    watches = [gk.watch(model, log_every=2) for model in models]
    for x in batches():
        for model, watch in zip(models, watches, strict=True):
            loss_of(model, share(x, rank, size)).backward()
            watch.step()
    np.testing.assert_array_equal(watches[0].history.snapshots[-1].values, watches[1].history.snapshots[-1].values)


CASES = {
    "DDP": data_parallel,
    "DDP, accumulation": lambda: data_parallel(accumulate=8),
    "DDP, scaler": lambda: data_parallel(scaler=10),
    "DDP, accumulation and scaler": lambda: data_parallel(accumulate=8, scaler=16),
    "DDP, gradients as views": lambda: data_parallel(gradient_as_bucket_view=True),
    "DDP, static graph": lambda: data_parallel(static_graph=True),
    "FSDP": fully_sharded,
    "FSDP, parameters stay": lambda: fully_sharded(reshard=False),
    "FSDP, bfloat16": lambda: fully_sharded(dtype=torch.bfloat16),
    "tensor parallel": tensor_parallel,
    "uneven": uneven,
    "a site one process skips": skipped_site,
    "lengths": time_steps_of_other_lengths,
    "drift": drift,
    "no reduction": without_reduction,
    "other sites": other_sites,
    "group without this process": group_without_this_process,
    "overflow": overflow,
    "closing": closing,
    "two watches": two_watches,
}


def main(rank, size, folder):
    """Runs every case as one of `size` processes."""
    run_cases(CASES, rank, size, folder)
