"""What one training step showed, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from gradkernels.telemetry.fields import COUNTS, FIELDS, SPARSE, TIME_COUNTS, TIME_FIELDS

DIGITS = 6  # of what is measured, in a file; counts are exact
# What json.loads and from_json raise where a line is none of stats.jsonl.
UNREADABLE = (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError)


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
        """The object of its line in stats.jsonl: loss and learning rates exact, what was measured with DIGITS digits.

        A field of the rows is a list in row order; one that is 0 in most rows is an object by row, and absent where it is 0 in
        all of them. Time steps that a table of `new_time_stats` has room for but that no backward came to are left out.
        """
        line = {
            "step": self.step,
            "loss": None if self.loss is None else _exact(self.loss),
            "lr": [_exact(rate) for rate in self.learning_rates],
            "rows": {},
        }
        for name, column in zip(FIELDS, self.values.T, strict=True):
            rows = np.flatnonzero(column)
            if name not in SPARSE:
                line["rows"][name] = _numbers(column, name in COUNTS)
            elif rows.size:
                line["rows"][name] = dict(zip(map(str, rows.tolist()), _numbers(column[rows], name in COUNTS), strict=True))
        line |= {"scale": _exact(self.loss_scale)} if self.loss_scale != 1.0 else {}
        line |= {"skipped": True} if self.skipped else {}
        times = {site: _time_to_json(rows) for site, rows in self.time_values.items() if rows[0, 0]}
        return {**line, "time": times} if times else line

    @classmethod
    def from_json(cls, line: dict, num_rows: int) -> Snapshot:
        """The snapshot of a line of stats.jsonl. Raises one of UNREADABLE where it is none."""
        values = np.zeros((num_rows, len(FIELDS)))
        for index, name in enumerate(FIELDS):
            if name in SPARSE:
                for row, number in line["rows"].get(name, {}).items():
                    values[range(num_rows)[int(row)], index] = number
            else:
                values[:, index] = _column(line["rows"][name], num_rows)
        times = {site: _time_from_json(fields) for site, fields in line.get("time", {}).items()}
        loss = None if line["loss"] is None else float(line["loss"])
        rates, scale = tuple(float(rate) for rate in line["lr"]), float(line.get("scale", 1.0))
        return cls(int(line["step"]), loss, rates, values, times, scale, bool(line.get("skipped", False)))


def _time_to_json(rows: np.ndarray) -> dict:
    """One tensor of `new_time_stats`: its row 0 by name, then each field over the time steps that were recorded."""
    steps, calls = (int(number) for number in rows[0, :2])
    columns = zip(TIME_FIELDS, rows[1 : 1 + steps].T, strict=True)
    return {"steps": steps, "calls": calls} | {name: _numbers(column, name in TIME_COUNTS) for name, column in columns}


def _time_from_json(fields: dict) -> np.ndarray:
    recorded = len(fields[TIME_FIELDS[0]])
    rows = np.zeros((1 + recorded, len(TIME_FIELDS)))
    rows[0, :2] = fields["steps"], fields["calls"]
    for index, name in enumerate(TIME_FIELDS):
        rows[1:, index] = _column(fields[name], recorded)
    return rows


def _column(numbers: list, length: int) -> np.ndarray:
    if len(numbers) != length:
        raise ValueError(f"expected {length} numbers, got {len(numbers)}")
    return np.asarray(numbers, dtype=np.float64)


def _numbers(column: np.ndarray, exact: bool) -> list[float | int | str]:
    """For JSON: whole numbers without a point where that loses nothing, others with DIGITS digits unless `exact`."""
    return [
        int(number)
        if number.is_integer() and (exact or abs(number) < 10**DIGITS)
        else _exact(number if exact else float(f"{number:.{DIGITS}g}"))
        for number in column.tolist()
    ]


def _exact(number: float) -> float | str:
    """For JSON, which has no words for numbers that are not finite: these are strings."""
    return number if math.isfinite(number) else str(number)
