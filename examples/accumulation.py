"""Gradient accumulation: micro-batches merge into one step, with the norms that the whole batch has at once.

python examples/accumulation.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from text import Transformer, batch_of

import gradkernels as gk

PORTS = ("dx", "dy")  # gradients of activations; dweight and dbias are those of each backward call


def train(steps: int, micro_batches: int, run_dir: str | None) -> gk.Watch:
    """Trains from the same beginning on the same batches, each in `micro_batches` backwards."""
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = gk.watch(model, optimizer, run_dir=run_dir)
    for step in range(steps):
        whole_loss = 0.0
        for ids in batch_of(step).chunk(micro_batches):
            loss = model(ids) / micro_batches
            loss.backward()
            whole_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(whole_loss)  # once per optimizer step
    watch.close()
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--run-dir", default=None, help="where stats.jsonl goes; default: a temporary directory")
    options = parser.parse_args()

    run_dir = options.run_dir or tempfile.mkdtemp()
    watch = train(options.steps, 4, run_dir)
    print(watch)
    print(f"{len(watch.history)} steps in {run_dir}, findings: {watch.diagnose()}\n")

    whole = train(options.steps, 1, None)
    pairs = [pair for pair in zip(watch.records(), whole.records(), strict=True) if pair[0].port in PORTS]
    difference = max(abs(own.norm / other.norm - 1) for own, other in pairs)
    print(f"Step {options.steps}: norms of 4 micro-batches and of the whole batch differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
