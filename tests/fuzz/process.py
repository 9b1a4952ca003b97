"""Examples in this process, on the one instruction set that torch has chosen in it."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz.check import check
from fuzz.norms import AddLayerNorm, LayerNorm, add_layer_norms, layer_norms
from fuzz.pointwise import Gelu, Probe, Residual, gelus, probes, residuals
from fuzz.recurrent import LSTMCell, LSTMLayer, lstm_cells, lstm_layers
from fuzz.tensors import Drawn, Values
from hypothesis import HealthCheck, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import FlakyFailure

STRATEGIES = {
    "gelu": gelus,
    "layer_norm": layer_norms,
    "add_layer_norm": add_layer_norms,
    "residual": residuals,
    "lstm_layer": lstm_layers,
    "lstm_cell": lstm_cells,
    "probe": probes,
}
WORDS = (Gelu, Residual, Probe, LayerNorm, AddLayerNorm, LSTMLayer, LSTMCell, Drawn, Values)
ROUND = 100  # examples of an op before the next one's turn
DATABASE = Path(__file__).parents[2] / ".hypothesis" / "examples"


class Tried:
    """Examples counted, and the last one written down before it runs: what is left of a process that crashes."""

    def __init__(self, last_example: Path | None) -> None:
        self.count, self.shown = 0, time.monotonic()
        self.file = last_example and last_example.open("w", buffering=1)

    def check(self, example: Any) -> None:
        if self.file:
            self.file.seek(0)
            self.file.truncate()
            self.file.write(repr(example))
            self.file.flush()
        self.count += 1
        check(example)


def fuzz_op(op: str, examples: int, random: bool, tried: Tried) -> None:
    """Checks `examples` examples of an op. `random`: others each time, those that failed before first."""
    database = DirectoryBasedExampleDatabase(DATABASE) if random else None

    @settings(
        max_examples=examples,
        derandomize=not random,
        database=database,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(STRATEGIES[op]())
    def check_one(example: Any) -> None:
        tried.check(example)

    # What hypothesis saves failures under, and derandomizes by.
    check_one.hypothesis.inner_test.__qualname__ = f"fuzz {op}"
    check_one()


def report(op: str, error: BaseException) -> None:
    """Prints what failed, the smallest example of it, and how to repeat it."""
    errors = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
    for one in errors:
        print(f"FAILED {op}: {type(one).__name__}: {one}")
        for note in getattr(one, "__notes__", ()):
            print(f"    {note}")


def repeat(source: str) -> None:
    """Checks the one example that `source` describes."""
    check(eval(source, {word.__name__: word for word in WORDS}))
    print("nothing wrong")


def fuzz(ops: list[str], examples: int | None, seconds: float | None, last_example: Path | None) -> int:
    """Checks a fixed set of `examples` examples of each op, or random ones for `seconds`. The number of failures, at most 1."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    tried, start = Tried(last_example), time.monotonic()

    def show() -> None:
        print(f"{tried.count} examples in {time.monotonic() - start:.0f} s", flush=True)

    turns: Callable = lambda: seconds is None or time.monotonic() - start < seconds  # noqa: E731
    while turns():
        for op in ops:
            try:
                fuzz_op(op, examples or ROUND, examples is None, tried)
            except (Exception, BaseExceptionGroup, FlakyFailure) as error:
                report(op, error)
                show()
                return 1
            if not turns():
                break
            if time.monotonic() - tried.shown > 30:
                tried.shown = time.monotonic()
                show()
        if seconds is None:
            break
    show()
    sys.stdout.flush()
    return 0
