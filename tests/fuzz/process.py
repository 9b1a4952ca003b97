"""Examples in this process, on the one instruction set that torch has chosen in it."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from fuzz.check import check
from fuzz.norms import AddLayerNorm, LayerNorm, add_layer_norms, layer_norms
from fuzz.pointwise import Gelu, Probe, Residual, gelus, probes, residuals
from fuzz.recurrent import LSTMCell, LSTMLayer, lstm_cells, lstm_layers
from fuzz.tensors import Drawn, Values

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
CAPABILITY_OF = {"AVX2": "avx2", "AVX512": "avx512"}  # as torch shows it: ATEN_CPU_CAPABILITY
ROUND = 100  # examples of an op before the next one's turn
DATABASE = Path(__file__).parents[2] / ".hypothesis" / "examples"


class Tried:
    """Examples counted, and the last one written down before it runs: what is left of a process that crashes."""

    def __init__(self, last_example: Path | None) -> None:
        self.count, self.last, self.file = 0, None, last_example and last_example.open("w")

    def check(self, example: Any) -> None:
        self.count, self.last = self.count + 1, example
        if self.file:
            self.file.seek(0)
            self.file.truncate()
            self.file.write(repr(example))
            self.file.flush()
        check(example)


def fuzz_op(op: str, examples: int, random: bool, tried: Tried) -> None:
    """Checks `examples` examples of an op; where one fails it raises, with the smallest one as the last tried.

    `random`: other examples each time, those that failed before first.
    """

    @settings(
        max_examples=examples,
        derandomize=not random,
        database=DirectoryBasedExampleDatabase(DATABASE) if random else None,
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[op]())
    def check_one(example: Any) -> None:
        tried.check(example)

    check_one.hypothesis.inner_test.__qualname__ = f"fuzz_{op}"  # what failures are saved under, and derandomized by
    check_one()


def repeat(source: str) -> None:
    """Checks the one example that `source` describes."""
    check(eval(source, {word.__name__: word for word in WORDS}))
    print("nothing is wrong")


def how_to_repeat(example: str, capability: str | None = None) -> str:
    """The command line, in tests/, on this instruction set or another."""
    capability = capability or CAPABILITY_OF.get(torch.backends.cpu.get_cpu_capability(), "default")
    return f'ATEN_CPU_CAPABILITY={capability} python -m fuzz --repeat "{example}"'


def fuzz(ops: Sequence[str], examples: int | None, seconds: float | None, last_example: Path | None) -> bool:
    """Checks random examples for `seconds`, or `examples` of each op that are always the same. Whether nothing is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    tried, start, shown = Tried(last_example), time.monotonic(), 0.0
    end = start + seconds if examples is None else start
    turns = itertools.cycle(ops) if examples is None else iter(ops)
    for op in turns:
        try:
            fuzz_op(op, examples or ROUND, examples is None, tried)
        except Exception as error:
            print(f"FAILED after {tried.count} examples: {op}: {type(error).__name__}: {error}\nrepeat it in tests/ with:")
            print(how_to_repeat(repr(tried.last)), flush=True)
            return False
        now = time.monotonic()
        if now - shown > 30:
            shown = now
            print(f"{tried.count} examples in {now - start:.0f} s", flush=True)
        if examples is None and now > end:
            break
    print(f"{tried.count} examples in {time.monotonic() - start:.0f} s, nothing is wrong", flush=True)
    return True
