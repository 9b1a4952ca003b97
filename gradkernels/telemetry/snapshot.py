"""What one training step showed, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from gradkernels.telemetry.fields import FIELDS, OBSERVATIONS


@dataclass(frozen=True)
class Snapshot:
    """One finished training step: plain numbers.

    step: counted from 1. loss: None where none was given. learning_rates: one for each parameter group of the optimizer, none
    without one. values: float64 (rows, len(FIELDS)), the rows of `History.sites`. time_values: by site, the tensor of
    `new_time_stats` of an LSTM's layer and direction as an array, (1 + steps, len(TIME_FIELDS)).
    loss_scale: what a GradScaler had multiplied the loss by; values and time_values are divided by it. skipped: whether the
    scaler has left the optimizer's step out, because a gradient was not finite.
    """

    step: int
    loss: float | None
    learning_rates: tuple[float, ...]
    values: np.ndarray
    time_values: dict[str, np.ndarray] = field(default_factory=dict)
    loss_scale: float = 1.0
    skipped: bool = False

    @property
    def nbytes(self) -> int:
        """The memory of its arrays."""
        return self.values.nbytes + sum(array.nbytes for array in self.time_values.values())

    def to_json(self) -> dict:
        """What `from_json` makes the same snapshot of: rows that nothing flowed through are left out."""
        seen = np.flatnonzero(self.values[:, OBSERVATIONS])
        return {
            "step": self.step,
            "loss": _to_json(self.loss),
            "lr": [_to_json(rate) for rate in self.learning_rates],
            "rows": [[int(row), *map(float, self.values[row])] for row in seen],
            "scale": self.loss_scale,
            "skipped": self.skipped,
            "time": {site: rows.tolist() for site, rows in self.time_values.items()},
        }

    @classmethod
    def from_json(cls, line: dict, num_rows: int) -> Snapshot:
        """The snapshot of a line of stats.jsonl. Raises KeyError, TypeError or ValueError where it is none."""
        values = np.zeros((num_rows, len(FIELDS)))
        for row, *fields in line["rows"]:
            values[row] = fields
        times = {site: np.asarray(rows, dtype=np.float64) for site, rows in line["time"].items()}
        rates = tuple(_from_json(rate) for rate in line["lr"])
        return cls(line["step"], _from_json(line["loss"]), rates, values, times, line["scale"], line["skipped"])


def _to_json(value: float | None) -> float | str | None:
    """JSON has no words for numbers that are not finite."""
    return value if value is None or math.isfinite(value) else str(value)


def _from_json(value: float | str | None) -> float | None:
    return None if value is None else float(value)
