"""What `gradkernels demo` runs: a deep net that does not learn, what its gradients say about it, and the net that follows.

The files it leaves in its output folder: flow.png with both runs, and their steps, before.jsonl and stats.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import nn

from gradkernels.demo.text import BATCH, BEFORE, CONTEXT, PICTURE, Corpus, corpus_of, progress, random_windows
from gradkernels.diagnose import Finding
from gradkernels.implementations import implementations
from gradkernels.telemetry import History
from gradkernels.watch import Watch, watch

STEPS, LEARNING_RATE = 400, 2e-3
DEPTH, WIDTH, WINDOW, EMBEDDING = 12, 128, 16, 16


class Predictor(nn.Module):
    """Logits of the next character from the WINDOW before it: embeddings side by side, DEPTH blocks, a linear head.

    blocks: plain Linear and Sigmoid in turns, or, with `advised`, what the finding about these advises.
    """

    def __init__(self, vocabulary: int, advised: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.stem = nn.Linear(WINDOW * EMBEDDING, WIDTH)
        self.blocks = nn.Sequential(*[AdvisedBlock() if advised else PlainBlock() for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(self.embedding(ids).flatten(-2))))


class PlainBlock(nn.Module):
    """sigmoid(Wx + b), as PyTorch initialises it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(WIDTH, WIDTH), nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.linear(x))


class AdvisedBlock(nn.Module):
    """x + GELU(W norm(x) + b) with He's initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.activation = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()
        nn.init.kaiming_normal_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.activation(self.linear(self.norm(x)))


def run(text: str, source: str, steps: int, steps_file: TextIO, seed: int) -> None:
    """Trains both nets on the same text, prints the table of each, and leaves a picture of both beside `steps_file`."""
    corpus = corpus_of(text)
    print(f"Task: the next character from the {WINDOW} before it; {source}, {len(text):,} characters")
    print(f"Kernels: {implementations()['layer_norm on cpu']}, {torch.get_num_threads()} threads")
    print(f"Entropy of the characters' frequencies: {corpus.entropy:.2f} nats; a net that learns gets below", flush=True)
    start = time.perf_counter()
    print(f"\n1. {DEPTH} layers of Linear and Sigmoid, Adam")
    torch.manual_seed(seed)
    before = train(Predictor(len(corpus.alphabet), advised=False), corpus, steps, seed)
    print(f"\n{before}\n")
    found = [finding for finding in before.diagnose() if finding.until_step is None]
    print("2. The advice taken: GELU with He's initialisation, a norm before each block and")
    print("   a residual connection around it", flush=True)
    after = train(Predictor(len(corpus.alphabet), advised=True), corpus, steps, seed)
    print(f"\n{after}\n")
    losses = [last_loss(watching.history) for watching in (before, after)]
    codes = ", ".join(finding.code for finding in found) or "no finding"
    seconds = time.perf_counter() - start
    print(f"Loss of the last steps: {losses[0]:.2f} before ({codes}), {losses[1]:.2f} after; {seconds:.0f} s.")
    out = Path(steps_file.name).parent
    before.history.write(out / BEFORE)
    steps_file.writelines(f"{line}\n" for line in after.history.lines())
    runs = [(watching.history, watching.diagnose()) for watching in (before, after)]
    picture(runs, corpus.entropy, out / PICTURE)
    print(f"Both runs, picture: {out / PICTURE}\nBoth runs, numbers: {out / BEFORE} {steps_file.name}")


def train(model: Predictor, corpus: Corpus, steps: int, seed: int) -> Watch:
    """The Watch of a training run with Adam at LEARNING_RATE, on batches drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    watching = watch(model, optimizer)
    start = time.perf_counter()
    with progress(steps) as show:
        for step in range(1, steps + 1):
            ids = random_windows(corpus.train, generator).unfold(1, WINDOW + 1, 1)
            loss = F.cross_entropy(model(ids[..., :-1]).flatten(0, 1), ids[..., -1].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watching.step(loss)
            show(step, loss.item(), step * BATCH * (CONTEXT + 1 - WINDOW) / (time.perf_counter() - start))
    return watching


def last_loss(history: History) -> float:
    """The mean loss of the last tenth of the steps."""
    losses = [snapshot.loss for snapshot in history.snapshots]
    recent = losses[-max(1, len(losses) // 10) :]
    return sum(recent) / len(recent)


def picture(runs: Sequence[tuple[History, Sequence[Finding]]], entropy: float, path: Path) -> None:
    """A PNG: the gradient flow of each run, and under it its loss beside the entropy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gradkernels.report.flow import draw_flow

    figure = Figure(figsize=(14, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    flows, losses = figure.subplots(2, len(runs), height_ratios=(3, 1), sharey="row")
    for column, (history, findings) in enumerate(runs):
        draw_flow(figure, flows[column], history, findings, colour_bar=column == len(runs) - 1)
        axes = losses[column]
        axes.plot(history.steps, [snapshot.loss for snapshot in history.snapshots], color="black", linewidth=1.2)
        axes.axhline(entropy, color="grey", linestyle=":", label="entropy of the characters' frequencies")
        axes.set_xlim(history.steps[0] - 0.5, history.steps[-1] + 0.5)
        axes.set_ylim(0, 1.5 * entropy)
        axes.set_xlabel("training step")
        axes.legend(loc="lower left", frameon=False)
    losses[0].set_ylabel("loss, nats a character")
    flows[1].set_ylabel("")
    figure.savefig(path, format="png")
