"""A row as people read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradkernels.telemetry.fields import SCALE


@dataclass(frozen=True)
class Record:
    """One row: what flowed through one port of one site in one step.

    `square_sum` is over the finite elements; for float64 gradients beyond 1e-154 or 1e+154 it leaves float64's range,
    `norm` does not. `dweight` and `dbias` are the gradients of single backward calls: over gradient accumulation their
    rows hold the sum of the squared norms, not the squared norm of the sum.
    """

    site: str
    port: str
    numel: int
    observation_count: int
    square_sum: float
    abs_max: float
    nonfinite_count: int
    zero_count: int
    norm: float

    @property
    def rms(self) -> float:
        """Root mean square of the finite elements; 0 where there are none."""
        finite = self.numel - self.nonfinite_count
        return self.norm / math.sqrt(finite) if finite else 0.0


def norms_of(rows: np.ndarray, rms: bool = False) -> np.ndarray:
    """The norms, or root mean squares, of many rows, (..., len(FIELDS)) -> (...), as record_of has them."""
    numel, _, middle, tiny, huge, _, nonfinite, _ = np.moveaxis(rows, -1, 0)
    with np.errstate(over="ignore"):
        norm = np.hypot(np.hypot(np.sqrt(tiny) / SCALE, np.sqrt(middle)), np.sqrt(huge) * SCALE)
    return norm / np.sqrt(np.maximum(numel - nonfinite, 1.0)) if rms else norm


def record_of(site: str, port: str, row: Sequence[float]) -> Record:
    """The record of one row (len(FIELDS) numbers)."""
    numel, observations, middle, tiny, huge, abs_max, nonfinite, zeros = row
    norm = math.hypot(math.sqrt(tiny) / SCALE, math.sqrt(middle), math.sqrt(huge) * SCALE)
    square_sum = middle + tiny / SCALE / SCALE + huge * SCALE * SCALE
    return Record(site, port, int(numel), int(observations), square_sum, abs_max, int(nonfinite), int(zeros), norm)
