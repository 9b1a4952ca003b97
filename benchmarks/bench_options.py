"""What each option of `gk.watch` costs in a whole training step: forward, backward, optimizer, `watch.step()`.

A call is LOG_EVERY steps, so that every call holds what is done once in so many. The base is the same model in fused layers
without telemetry, with a scaler where the option has one; "off again" is the base against itself, the noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradkernels as gk
from benchmarks import harness
from gradkernels.demo.models import CONTEXT, MODELS, PLAIN, cross_entropy

BATCH, VOCABULARY, LOG_EVERY = 16, 128, 10


OPTIONS: dict[str, dict[str, Any] | None] = {  # None: not watched
    "off": None,
    "off again": None,
    "default": {},
    "log_every=1": {"log_every": 1},
    "run_dir": {"run_dir": True},
    "scaler, off": None,
    "scaler": {},
}


class Trainer:
    """One model with its optimizer; a call is LOG_EVERY steps."""

    def __init__(self, model: nn.Module, option: str, folder: Path, batches: list[torch.Tensor]) -> None:
        self.model, self.batches = gk.convert(model), batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.scaler = torch.amp.GradScaler("cpu", enabled=option.startswith("scaler"))
        options = OPTIONS[option]
        if options is not None and "run_dir" in options:
            options = {"run_dir": folder / option}
        self.watch = None if options is None else gk.watch(model, self.optimizer, self.scaler, **options)

    def __call__(self, index: int) -> None:
        for step in range(LOG_EVERY):
            batch = self.batches[(index + step) % len(self.batches)]
            self.optimizer.zero_grad(set_to_none=True)
            loss = cross_entropy(self.model, batch)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.watch is not None:
                self.watch.step(loss)


def lines() -> Iterator[dict]:
    """A line a model and option."""
    batches = [torch.randint(VOCABULARY, (BATCH, CONTEXT + 1)) for _ in range(8)]
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            calls = {}
            for option in OPTIONS:
                torch.manual_seed(0)
                calls[option] = Trainer(make(VOCABULARY, PLAIN), option, Path(folder), batches)
            times = harness.time_rounds(calls)
        for option in OPTIONS:
            base = "scaler, off" if option == "scaler" else "off"
            what = {"op": f"watch options {name}", "implementation": option, "direction": "step", "dtype": "float32"}
            yield {**what, "shape": [BATCH, CONTEXT], "ratio_to_eager": harness.ratio(times[option], times[base])}
