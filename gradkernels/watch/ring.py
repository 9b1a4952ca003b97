"""Finished steps where they were measured: a ring of rows on a device, whose place is counted there too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradkernels.telemetry import FIELDS, TIME_FIELDS, take_rows, take_steps

ABSENT = (math.nan, 1.0, 0.0)  # loss, loss scale, more than 0 where the scaler has found what is not finite: where not given
SCALARS = len(ABSENT)
Scalar = torch.Tensor | float | None


class Ring:
    """The last `num_steps` steps of one table, each in one row of float64: the table's rows, time steps, SCALARS.

    Which one is next is counted on the device, so a captured CUDA graph in which a step ends writes another one in each replay.
    """

    def __init__(self, num_steps: int, table: torch.Tensor, time_tables: Sequence[torch.Tensor]) -> None:
        self.table, self.time_tables = table, list(time_tables)
        self.ended = 0  # steps that the host knows of; `count` has those of replays too
        self.widths = [len(table) * len(FIELDS), *(own.numel() for own in time_tables), SCALARS]
        self.values = self._room(num_steps)
        with torch.inference_mode(False):
            self.count = torch.zeros(1, dtype=torch.int64, device=table.device)
            self._absent = torch.tensor(ABSENT, dtype=torch.float64, device=table.device).unbind()

    def put(self, scalars: Sequence[Scalar]) -> bool:
        """Ends a step, and the table starts from zero again. Only launches: nothing waits, nothing depends on the host.

        False while a CUDA graph is captured: what was launched runs in its replays. Where a table of time steps has grown, the
        steps before stay with those who have taken them, and the ring begins anew.
        """
        rows = self.table.new_empty(len(self.table), len(FIELDS))
        take_rows(self.table, rows)
        times = [take_steps(own).flatten() for own in self.time_tables]
        given = [self._scalar(*pair) for pair in zip(scalars, self._absent, strict=True)]
        packed = torch.cat([rows.flatten(), *times, torch.stack(given)])
        if packed.numel() != self.values.shape[1]:
            self.widths = [rows.numel(), *(own.numel() for own in times), SCALARS]
            self.values = self._room(len(self.values))
        self.values.index_copy_(0, self.count % len(self.values), packed[None])
        self.count += 1
        if self.table.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        self.ended += 1
        return True

    def _room(self, num_steps: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(num_steps, sum(self.widths), dtype=torch.float64, device=self.table.device)

    @staticmethod
    def _scalar(value: Scalar, absent: torch.Tensor) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(absent, non_blocking=True).reshape(())
        return absent if value is None else torch.full_like(absent, value)

    def step(self, number: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """(rows, time steps of each LSTM direction, scalars) of a step, counted from 0: views of the ring."""
        rows, *times, scalars = self.values[number % len(self.values)].split(self.widths)
        return rows.view(-1, len(FIELDS)), [part.view(-1, len(TIME_FIELDS)) for part in times], scalars
