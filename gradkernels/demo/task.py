"""What `gradkernels demo --task` runs: a task of long time lags, the gradient's reach at step 1, and whether training bears
out what it predicts. Tasks: Hochreiter and Schmidhuber 1997; adding as in Le et al. 2015, arXiv:1504.00941.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import nn

from gradkernels import init
from gradkernels.implementations import implementations
from gradkernels.nn import LSTM
from gradkernels.telemetry import TimeProfile
from gradkernels.watch import Watch, watch

HIDDEN, BATCH, LEARNING_RATE, CLIP = 64, 50, 5e-3, 1.0
RECENT = 20  # batches over which a loss is averaged
INITS = ("default", "forget1", "chrono")
STEPS = 3000
SYMBOLS = 8  # of temporal order: a b c d X Y, and the marks of the beginning and the end
PICTURES = ("profile.png", "time.png")

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """`batch(length, generator)`: inputs (length, BATCH, features) and targets; solved where the mean loss is below `solved`.

    `baseline` is the loss of the best answer that does not look at the input.
    """

    name: str
    features: int
    outputs: int
    batch: Callable[[int, torch.Generator], Batch]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    solved: float
    baseline: float


def adding_batch(length: int, generator: torch.Generator) -> Batch:
    """Uniform numbers, two of them marked, one in either half; the target is the sum of those two."""
    values = torch.rand(length, BATCH, generator=generator)
    marks, half = torch.zeros(length, BATCH), length // 2
    for first, last in ((0, half), (half, length)):
        marks[torch.randint(first, last, (BATCH,), generator=generator), torch.arange(BATCH)] = 1.0
    return torch.stack([values, marks], -1), (values * marks).sum(0)[:, None]


def temporal_order_batch(length: int, generator: torch.Generator) -> Batch:
    """Distractors, with X or Y at a tenth to a fifth and again at a half to three fifths of the length; the class is which."""
    symbols = torch.randint(4, (length, BATCH), generator=generator)
    symbols[0], symbols[-1] = 6, 7
    classes = torch.zeros(BATCH, dtype=torch.long)
    for first, last in ((length // 10, length // 5), (length // 2, 3 * length // 5)):
        which = torch.randint(2, (BATCH,), generator=generator)
        symbols[torch.randint(first, last, (BATCH,), generator=generator), torch.arange(BATCH)] = 4 + which
        classes = 2 * classes + which
    return F.one_hot(symbols, SYMBOLS).float(), classes


TASKS = {
    "adding": Task("adding", 2, 1, adding_batch, F.mse_loss, 0.01, 1 / 6),
    "temporal_order": Task("temporal order", SYMBOLS, 4, temporal_order_batch, F.cross_entropy, 0.05, 1.3863),
}


class Reader(nn.Module):
    """An LSTM that reads a sequence, and a linear answer from its last state."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.lstm = LSTM(task.features, HIDDEN)
        self.head = nn.Linear(HIDDEN, task.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[1][0][-1])


@dataclass(frozen=True)
class Outcome:
    """The profile at step 1 and at every step, the losses, the number of sequences after which the task was solved, and the
    Watch."""

    history: list[TimeProfile]
    losses: list[float]
    sequences: int | None
    watching: Watch


def initialised(task: Task, length: int, name: str, generator: torch.Generator) -> Reader:
    """A Reader with one of INITS; chrono for lags up to `length`."""
    model = Reader(task)
    if name == "forget1":
        init.forget_bias_(model.lstm, 1.0)
    if name == "chrono":
        init.chrono_(model.lstm, max(3, length), generator)
    return model


def training_step(model: Reader, optimizer: torch.optim.Optimizer, watching: Watch, task: Task, batch: Batch) -> float:
    """The loss of one step: forward, backward, clipping, update; the profile is the watch's."""
    x, target = batch
    loss = task.loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    watching.step(loss)
    return loss.item()


def train(
    task: Task, length: int, name: str, steps: int, seed: int, show: Callable[[int, float, Watch], None] | None = None
) -> Outcome:
    """Trains until the mean loss of RECENT batches is below the task's mark, or for `steps` steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = initialised(task, length, name, generator)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    watching = watch(model, optimizer)
    history, losses = [], []
    for step in range(1, steps + 1):
        losses.append(training_step(model, optimizer, watching, task, task.batch(length, generator)))
        history += watching.time_profile()
        if show is not None:
            show(step, statistics.fmean(losses[-RECENT:]), watching)
        if step >= RECENT and statistics.fmean(losses[-RECENT:]) < task.solved:
            return Outcome(history, losses, step * BATCH, watching)
    return Outcome(history, losses, None, watching)


def learnable(profile: TimeProfile) -> bool:
    """What a profile at step 1 predicts: that the gradient gets from the end of a sequence to its beginning."""
    return profile.reach() == profile.steps


def run(name: str, length: int, initialisation: str, steps: int, steps_file: TextIO, seed: int) -> None:
    """Trains, prints the profile at step 1, what it predicts and what came of it.

    Leaves two pictures beside `steps_file`, stats.jsonl.
    """
    from gradkernels.report.time import profile_picture, time_picture

    task, start = TASKS[name], time.perf_counter()
    print(f"Task: {task.name}, {length} time steps, LSTM of {HIDDEN} units, {initialisation} initialisation")
    print(f"Solved at a loss below {task.solved:g}; without looking at the input it is {task.baseline:.4f}")
    print(f"Kernels: {implementations()['lstm_layer on cpu']}, {torch.get_num_threads()} threads", flush=True)

    def show(step: int, loss: float, watching: Watch) -> None:
        if step == 1:
            print_profile(watching.time_profile()[0])
        if step == 1 or step * 10 // steps > (step - 1) * 10 // steps:
            reach = watching.time_profile()[0].reach()
            seconds = time.perf_counter() - start
            print(f"step {step:>{len(str(steps))}}/{steps}  loss {loss:.4f}  reach {reach}  {seconds:.0f} s", flush=True)

    outcome = train(task, length, initialisation, steps, seed, show)
    solved = outcome.sequences is not None
    sequences = f"after {outcome.sequences:,} sequences" if solved else f"within {steps * BATCH:,} sequences"
    print(f"{'Solved' if solved else 'Not solved'} {sequences}, {time.perf_counter() - start:.0f} s.")
    print(f"The prediction of step 1 was {'right' if solved == learnable(outcome.history[0]) else 'wrong'}.")
    steps_file.writelines(f"{line}\n" for line in outcome.watching.history.lines())
    out = Path(steps_file.name).parent
    profile_picture(outcome.history[0], out / PICTURES[0])
    time_picture(outcome.history, out / PICTURES[1])
    print(f"Step 1 over time: {out / PICTURES[0]}\nAll steps over time: {out / PICTURES[1]}")


def print_profile(profile: TimeProfile) -> None:
    """The profile of step 1 at some lags, and what it predicts."""
    print("\nStep 1, gradient over time:\n     lag     |dL/dc|     |dL/dh|  mean of f")
    columns = [profile.by_lag(values) for values in (profile.dc, profile.dh, profile.forget_mean)]
    for lag in sorted({round(share * (profile.steps - 1)) for share in (0, 0.01, 0.03, 0.1, 0.3, 1)}):
        dc, dh, forget = (values[lag] for values in columns)
        print(f"{lag:>8}{dc:>12.2e}{dh:>12.2e}{forget:>11.3f}")
    print(f"Reach {profile.reach()} of {profile.steps}; |dc| first / last step {profile.floor_ratio():.1e}; ", end="")
    print(f"{profile.slope():+.4f} decades a step.")
    will = "it should learn" if learnable(profile) else "it should not learn: the gradient does not get back to step 1"
    print(f"Prediction: {will}.\n", flush=True)
