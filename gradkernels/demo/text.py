"""What `gradkernels demo --model` runs: a small model learns a text while its gradients are watched; tables, times, pictures.

The files it leaves in its output folder: flow.png, the gradient over depth and training, stats.jsonl, one line a step, and for
an LSTM profile.png and time.png, the gradient over the time steps of its last layer, in the last step and in all of them.
"""

from __future__ import annotations

import math
import statistics
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from gradkernels.demo.models import CONTEXT, MODELS, PLAIN, cross_entropy, generate
from gradkernels.implementations import implementations
from gradkernels.telemetry import TimeProfile
from gradkernels.watch import Watch, watch

BATCH, LEARNING_RATE, WARM_UP, CLIP = 16, 3e-3, 20, 1.0
KINDS = 255  # characters that have a symbol of their own; all others share one
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
SHORTEST, LONGEST = 2 * (CONTEXT + 1), 20_000_000  # characters of a text
ROUNDS = 16  # of the timing
VARIANTS = ("telemetry on", "telemetry off", "telemetry off, again", "plain PyTorch")
BEFORE = "before.jsonl"  # the steps of the run that failed, see story.py
PICTURE, STEPS, PROFILE, TIME = "flow.png", "stats.jsonl", "profile.png", "time.png"


@dataclass(frozen=True)
class Corpus:
    """A text as symbol numbers: the first nine tenths train, the rest (at least one window) validates.

    `entropy` is that of the symbols by frequency alone, in nats: the loss of a model that knows nothing of order.
    `folded` counts the kinds of character that share the unknown symbol.
    """

    alphabet: str
    train: torch.Tensor
    validation: torch.Tensor
    entropy: float
    folded: int


def read_text(path: str | None) -> str:
    """The text of a file, LONGEST characters of it at most; the documentation that Python ships with, without its
    tables, where path is None.

    Raises ValueError, saying what was expected and what came, where there is no such text or fewer than SHORTEST characters.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ValueError("expected a file, as this Python comes without its documentation, got none") from None
        lines = "\n".join(topics.values()).split("\n")
        return "\n".join(line for line in lines if not line.lstrip().startswith(("|", "+-", "+=")))
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(LONGEST)
    except OSError as error:
        raise ValueError(f"expected a readable text file, got {path!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got {path!r}: {error.reason} at byte {error.start}") from None
    if len(text) < SHORTEST:
        came = f"{len(text)} characters" if text else "an empty file"
        raise ValueError(f"expected a text of at least {SHORTEST} characters, got {path!r}: {came}")
    return text


def open_output(folder: str) -> TextIO:
    """stats.jsonl in `folder`, which is created, open for writing; files of an earlier demo are gone. Raises OSError."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name in (PICTURE, PROFILE, TIME, BEFORE):
        (out / name).unlink(missing_ok=True)
    return (out / STEPS).open("w", encoding="utf-8")


def corpus_of(text: str) -> Corpus:
    """The Corpus of a text of at least SHORTEST characters."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le", "replace")), dtype=torch.int32)
    kinds, ids, counts = points.unique(return_inverse=True, return_counts=True)
    alphabet = [chr(point) for point in kinds.tolist()]
    folded = max(0, len(kinds) - KINDS)
    if folded:
        kept = counts.argsort(descending=True, stable=True)[:KINDS].sort().values
        symbols = torch.full_like(counts, KINDS)
        symbols[kept] = torch.arange(KINDS)
        ids = symbols[ids]
        alphabet = [*(alphabet[kind] for kind in kept.tolist()), UNKNOWN]
    frequency = ids.bincount() / len(ids)
    held_out = max(len(ids) // 10, CONTEXT + 1)
    entropy = -float((frequency * frequency.log()).sum())
    return Corpus("".join(alphabet), ids[:-held_out], ids[-held_out:], abs(entropy), folded)


def run(text: str, source: str, steps: int, steps_file: TextIO, seed: int, name: str) -> None:
    """Trains the model `name`, prints what was found and timed, and leaves pictures beside `steps_file`, stats.jsonl."""
    from gradkernels.report.flow import flow_picture

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    corpus = corpus_of(text)
    model = MODELS[name](len(corpus.alphabet))
    optimizer = optimizer_of(model)
    watching = watch(model, optimizer)
    print_setting(corpus, f"{source}, {len(text):,} characters", model)
    train(model, optimizer, watching, corpus, steps, generator)
    print_learned(model, corpus, generator)
    print(f"\n{watching}\n", flush=True)
    history = watching.history
    steps_file.writelines(f"{line}\n" for line in history.lines())
    profiles = [history.time_profiles(step=step)[-1] for step in history.steps] if watching.time_profile() else []
    picture = Path(steps_file.name).with_name(PICTURE)
    flow_picture(history, watching.diagnose(), picture)
    print_times(times(model, optimizer, watching, corpus, min(ROUNDS, steps), generator))
    print(f"\nGradient flow, picture: {picture}\nGradient flow, numbers: {steps_file.name}")
    if profiles:
        show_time(profiles, picture.parent)


def show_time(profiles: list[TimeProfile], out: Path) -> None:
    """Prints how far the last step's gradient reached, and leaves its picture and that of all steps in `out`."""
    from gradkernels.report.time import profile_picture, time_picture

    last = profiles[-1]
    print(f"Gradient over time at {last.site}: reach {last.reach()} of {last.steps}, mean of f {last.forget_mean.mean():.2f}")
    profile_picture(last, out / PROFILE)
    time_picture(profiles, out / TIME)
    print(f"Gradient over time, pictures: {out / PROFILE} {out / TIME}")


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW on the parameters of `model`."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)


def learning_rate(step: int, steps: int) -> float:
    """A linear warm-up over WARM_UP steps, then half a cosine down to a tenth."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return LEARNING_RATE * min(1.0, step / WARM_UP) * (0.1 + 0.9 * cosine)


def random_windows(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """BATCH windows of CONTEXT + 1 ids from anywhere in `ids`."""
    starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1), generator=generator)
    return ids[starts + torch.arange(CONTEXT + 1)]


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one step: forward, backward, clipping, update."""
    loss = cross_entropy(model, ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    watching: Watch,
    corpus: Corpus,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Trains a watched model; progress goes to the terminal."""
    start = time.perf_counter()
    with progress(steps) as show:
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss = training_step(model, optimizer, random_windows(corpus.train, generator))
            watching.step(loss)
            show(step, float(loss), step * BATCH * CONTEXT / (time.perf_counter() - start))


def progress(steps: int) -> Any:
    """A context whose value `show(step, loss, tokens_per_second)` moves a bar, or prints plain lines off a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        return nullcontext(plain_progress(steps))
    figures = "loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"
    bar = Progress(TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn(figures), console=console)
    task = bar.add_task("training", total=steps, loss=math.nan, speed=0.0)

    class Bar:
        def __enter__(self) -> Callable[[int, float, float], None]:
            bar.start()
            return lambda step, loss, speed: bar.update(task, completed=step, loss=loss, speed=speed)

        def __exit__(self, *error: object) -> None:
            bar.stop()

    return Bar()


def plain_progress(steps: int) -> Callable[[int, float, float], None]:
    """A `show` that prints the first step and then a line each tenth of the steps."""

    def show(step: int, loss: float, speed: float) -> None:
        if step == 1 or step * 10 // steps > (step - 1) * 10 // steps:
            print(f"step {step:>{len(str(steps))}}/{steps}  loss {loss:.3f}  {speed:,.0f} tokens/s", flush=True)

    return show


def print_setting(corpus: Corpus, text: str, model: torch.nn.Module) -> None:
    """What is trained on what, and which implementation runs."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"Model: {model.DESCRIPTION}, {parameters:,} parameters")
    print(f"Text: {text}, {len(corpus.alphabet)} different")
    if corpus.folded:
        print(f"  (the {corpus.folded} rarest beyond {KINDS} share one unknown symbol)")
    print(f"Kernels: {implementations()['layer_norm on cpu']}, {torch.get_num_threads()} threads", flush=True)


def print_learned(model: torch.nn.Module, corpus: Corpus, generator: torch.Generator) -> None:
    """The validation loss beside the entropy of the characters, and a sample."""
    count = min(8 * BATCH, len(corpus.validation) // (CONTEXT + 1))
    windows = corpus.validation[: count * (CONTEXT + 1)].view(count, CONTEXT + 1)
    with torch.no_grad():
        loss = float(torch.stack([cross_entropy(model, window[None]) for window in windows]).mean())
    for name, nats in (("\nValidation loss", loss), ("Entropy of the characters' frequencies", corpus.entropy)):
        print(f"{name}: {nats:.3f} nats/char, {nats / math.log(2):.3f} bits/char")
    ids = generate(model, corpus.train[: CONTEXT // 2], 200, generator)
    print("Sample, after the beginning of the text:")
    for line in "".join(corpus.alphabet[index] for index in ids.tolist()).split("\n"):
        visible = "".join(character if character.isprintable() else " " for character in line)
        wide = any(unicodedata.east_asian_width(character) in "WF" for character in visible)
        print("\n".join(textwrap.wrap(visible, 38 if wide else 76, initial_indent="  ", subsequent_indent="  ")))


def times(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    watching: Watch,
    corpus: Corpus,
    rounds: int,
    generator: torch.Generator,
) -> dict[str, list[float]]:
    """Milliseconds of training steps: each round takes a step of every variant on the same batch, in changing order.

    "telemetry on" includes watch.step(); "off" is the paused watch, twice, so that the noise shows; "plain PyTorch" is the
    same model, with the same weights, out of torch.nn layers. All of them go on training.
    """
    plain = type(model)(len(corpus.alphabet), PLAIN)
    plain.load_state_dict(model.state_dict())
    plain_optimizer = optimizer_of(plain)
    for group in plain_optimizer.param_groups:
        group["lr"] = optimizer.param_groups[0]["lr"]
    measured: dict[str, list[float]] = {variant: [] for variant in VARIANTS}

    def once(variant: str, ids: torch.Tensor) -> float:
        (watching.resume if variant == "telemetry on" else watching.pause)()
        trained, its_optimizer = (plain, plain_optimizer) if variant == "plain PyTorch" else (model, optimizer)
        start = time.perf_counter()
        loss = training_step(trained, its_optimizer, ids)
        if variant == "telemetry on":
            watching.step(loss)
        return 1e3 * (time.perf_counter() - start)

    once("plain PyTorch", random_windows(corpus.train, generator))
    for number in range(rounds):
        ids = random_windows(corpus.train, generator)
        first = number // 2 % len(VARIANTS)
        order = VARIANTS[first:] + VARIANTS[:first]
        for variant in order[:: -1 if number % 2 else 1]:
            measured[variant].append(once(variant, ids))
    watching.resume()
    return measured


def print_times(measured: dict[str, list[float]]) -> None:
    """Medians, their ratios, and how far two measurements of the same thing lie apart."""
    on, off, again, plain = (measured[variant] for variant in VARIANTS)
    rounds = len(on)
    print(f"Training step of {BATCH} x {CONTEXT} characters, median of interleaved rounds ({rounds}):")
    for name, values in (("telemetry on", on), ("telemetry off", off + again), ("plain PyTorch", plain)):
        print(f"  {name:<20}{statistics.median(values):>8.1f} ms")
    noise = f"  noise; p20 to p80 of the rounds: {_spread(off, again)}"
    for name, values, others, note in (
        ("on / off", on, off + again, ""),
        ("on / plain PyTorch", on, plain, ""),
        ("off / off", off, again, noise),
    ):
        print(f"  {name:<20}{statistics.median(values) / statistics.median(others):>8.3f}{note}", flush=True)


def _spread(values: list[float], others: list[float]) -> str:
    """The 20th and the 80th percentile of the ratios of two lists, element by element."""
    ratios = sorted(value / other for value, other in zip(values, others, strict=True))
    low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.8))
    return f"{low:.2f} to {high:.2f}"
