"""FSDP2 (`fully_shard`), watched by every rank: shard first, then make the optimizer, then watch.

torchrun --nproc_per_node=2 examples/fsdp.py
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from text import Transformer, batch_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradkernels as gk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--run-dir", default=None, help="where stats.jsonl goes; default: a temporary directory")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("data",))
    torch.manual_seed(0)
    model = Transformer().to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run_dir = options.run_dir or tempfile.mkdtemp()
    watch = gk.watch(model, optimizer, run_dir=run_dir, process_group=mesh.get_group("data"))  # on every rank

    for step in range(options.steps):
        ids = batch_of(step)[rank::ranks].to(device)
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss)  # on every rank
    watch.close()  # on every rank

    if rank == 0:
        print(watch)
        print(f"{len(watch.history)} steps in {run_dir}, findings: {watch.diagnose()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
