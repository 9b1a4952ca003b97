"""The gradient over the time steps of an LSTM: what one direction of one layer measured in one training step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from gradkernels.telemetry.fields import TIME_FIELDS

VANISHED = 1e-3  # of the largest |dc|: what `reach` calls gone
GATES = TIME_FIELDS[TIME_FIELDS.index("input_low") : TIME_FIELDS.index("output_high") + 1]


@dataclass(frozen=True)
class TimeProfile:
    """Float64 arrays of length T, element t about time step t; see gradkernels.telemetry.TIME_FIELDS for the definitions.

    `dh`, `dc`: norms of the total dL/dh_t and dL/dc_t over all live sequences; `dh_recurrent`: of the part of dh that comes
    from the step after. `gate_count`: live sequences times H; `input_low` to `output_high`: how many elements of i, f, o are
    below 0.1 or above 0.9, and of |g| above 0.9; `forget_mean`: the mean of f. Several backward calls within a training step
    merge: norms as those of one larger batch. NaN where a step was not recorded (see `gk.LSTM`), or in `forget_mean` where
    nothing was seen.

    A lag counts steps backward from where the direction ends: lag 0 is t = T - 1, and t = 0 where direction is "reverse".
    """

    site: str
    layer: int
    direction: str
    dh: np.ndarray
    dc: np.ndarray
    dh_recurrent: np.ndarray
    gate_count: np.ndarray
    input_low: np.ndarray
    input_high: np.ndarray
    forget_low: np.ndarray
    forget_high: np.ndarray
    candidate_high: np.ndarray
    output_low: np.ndarray
    output_high: np.ndarray
    forget_mean: np.ndarray

    @property
    def steps(self) -> int:
        """T."""
        return len(self.dh)

    def by_lag(self, values: np.ndarray) -> np.ndarray:
        """An array of this profile in the order of the lag."""
        return values if self.direction == "reverse" else values[::-1]

    def reach(self) -> int:
        """The smallest lag at which |dc| is below VANISHED of the largest |dc|, and stays below; T where there is none.

        "Stays": with a loss at every step |dc| at a small lag can be low by chance, and at larger lags high again.
        """
        dc = self.by_lag(self.dc)
        largest = np.nanmax(dc, initial=0.0)
        alive = np.flatnonzero(~(dc < VANISHED * largest)) if largest > 0 else np.zeros(0, dtype=int)
        return int(alive[-1]) + 1 if alive.size else 0

    def floor_ratio(self) -> float:
        """|dc| at the largest lag over |dc| at lag 0; NaN where that is 0."""
        dc = self.by_lag(self.dc)
        return float(dc[-1] / dc[0]) if dc[0] else math.nan

    def slope(self) -> float:
        """Decades by which |dc| changes per step of lag (negative: it vanishes), by least squares; NaN below two steps.

        Steps at which |dc| is 0, or not finite, are left out.
        """
        dc = self.by_lag(self.dc)
        lags = np.flatnonzero(np.isfinite(dc) & (dc > 0))
        return float(np.polyfit(lags, np.log10(dc[lags]), 1)[0]) if lags.size > 1 else math.nan


def profile_of(site: str, suffix: str, time_stats: torch.Tensor | np.ndarray) -> TimeProfile | None:
    """The TimeProfile in a CPU tensor, or its array, of `new_time_stats`, None where no backward has written to it.

    suffix: "_l<layer>", and "_reverse" after it for that direction.
    """
    rows = np.asarray(time_stats)
    steps = int(rows[0, 0])
    if steps == 0:
        return None
    table = np.full((steps, len(TIME_FIELDS)), np.nan)
    recorded = min(steps, len(rows) - 1)
    table[:recorded] = rows[1 : 1 + recorded]
    fields = {name: table[:, column].copy() for column, name in enumerate(TIME_FIELDS)}
    count, total = fields["gate_count"], fields.pop("forget_sum")
    fields["forget_mean"] = np.divide(total, count, out=np.full(steps, np.nan), where=count > 0)
    layer, _, reverse = suffix.removeprefix("_l").partition("_")
    return TimeProfile(site, int(layer), "reverse" if reverse else "forward", **fields)
