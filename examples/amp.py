"""Mixed precision with a GradScaler: what is read is divided by the loss scale, and the steps that it skips are marked.

python examples/amp.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from text import Transformer, batch_of

import gradkernels as gk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--run-dir", default=None, help="where stats.jsonl goes; default: a temporary directory")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Transformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20)  # too high: the first steps are skipped
    run_dir = options.run_dir or tempfile.mkdtemp()
    watch = gk.watch(model, optimizer, scaler, run_dir=run_dir)

    for step in range(options.steps):
        ids = batch_of(step).to(device)
        with torch.autocast(device, dtype=torch.float16):
            loss = model(ids)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        watch.step(loss)  # the loss itself, not the scaled one
    watch.close()

    print(watch)
    last = watch.history.snapshots[-1]
    skipped = [snapshot.step for snapshot in watch.history.snapshots if snapshot.skipped]
    print(f"loss scale {last.loss_scale:g}, steps skipped: {skipped or 'none'}")
    print(f"{len(watch.history)} steps in {run_dir}, findings: {watch.diagnose()}")


if __name__ == "__main__":
    main()
