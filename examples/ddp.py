"""DistributedDataParallel, watched by every rank: what rank 0 prints is of the whole batch, whatever the number of ranks.

torchrun --nproc_per_node=2 examples/ddp.py
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from text import Transformer, batch_of
from torch.nn.parallel import DistributedDataParallel

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
    torch.manual_seed(0)
    model = Transformer().to(device)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-3)
    run_dir = options.run_dir or tempfile.mkdtemp()
    watch = gk.watch(model, optimizer, run_dir=run_dir, desync_every=5)  # on every rank; rank 0 writes the file

    for step in range(options.steps):
        ids = batch_of(step)[rank::ranks].to(device)
        loss = parallel(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss)  # on every rank; each tenth step all of them exchange what they measured
    watch.close()  # on every rank: exchanges the rest

    if rank == 0:
        print(watch)
        print(f"{len(watch.history)} steps in {run_dir}, findings: {watch.diagnose()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
