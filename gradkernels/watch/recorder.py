"""The way of finished steps into the history: scaled back, merged over processes, copied to the host, `log_every` at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gradkernels.telemetry import Snapshot
from gradkernels.watch.merge import Batch, check_same_sites, group_of, merge
from gradkernels.watch.ring import ABSENT, Scalar
from gradkernels.watch.tables import Tables, TakenStep, values_of


@dataclass
class Ended:
    """A step that has ended: its number, whether a loss was given, the learning rates, and what was measured."""

    step: int
    has_loss: bool
    rates: Sequence[Any]
    taken: TakenStep


class Recorder:
    """Ends steps without waiting, and hands them to `keep` as Snapshots, in their order; none of them where it only is read.

    Every `log_every` steps those that have ended are logged: divided by their loss scale, merged over the processes of a group,
    and copied to the host, all of it enqueued; `read` waits for them. In a group only logged steps are read, for merging is
    what all processes do at the same time.
    """

    def __init__(
        self, tables: Tables, keep: Callable[[list[Snapshot]], None], log_every: int, process_group: dist.ProcessGroup | None
    ) -> None:
        self.tables, self.log_every = tables, log_every
        self.finished = self.num_logs = 0
        self._keep, self._group, self._merged = keep, process_group, False
        self._checked = False  # whether all processes watch the same sites
        self._ended: list[Ended] = []
        self._logged: list[tuple[list[Ended], Batch | None, torch.cuda.Event | None]] = []

    def end_step(self, rates: Sequence[Any], scalars: Sequence[Scalar]) -> bool:
        """Enqueues a step; whether that made it a logging step. scalars: see Ring, None where there is none."""
        self._catch_up()
        if len(self._ended) >= self.log_every:  # steps of replays: before their slots are written over
            self.log()
        taken = self.tables.take(scalars)
        if taken is None:
            return False
        self.finished += 1
        self._ended.append(Ended(self.finished, scalars[0] is not None, rates, taken))
        if len(self._ended) < self.log_every:
            return False
        self.log()
        return True

    def log(self) -> None:
        """Logs the steps that have ended. In a group, every process must call it at the same time.

        Where the group is gone, nobody can be asked for the other parts of these steps: they are left out.
        """
        self._catch_up()
        self._settle()
        self.num_logs += 1
        steps, self._ended = self._ended, []
        group = self._merging()
        if not steps or (group is None and self._merged):
            return
        if group is None and all(step.taken.plain for step in steps):
            self._logged.append((steps, None, None))
        else:
            batch = self._batch(steps)
            batch.divide(batch.scalars[:, 1].clone())
            if group is not None:
                if not self._checked:
                    self._checked = True
                    check_same_sites([site.name for site in self.tables.sites], batch.values.device, group)
                batch = merge(batch, group)
            self._logged.append((steps, *_to_host(batch)))
        if self._logged[-1][2] is None:
            self._settle()

    def read(self) -> None:
        """Hands over what has ended, and waits for it."""
        if self._merging() is None:
            self.log()
        else:
            self._catch_up()
        self._settle()
        self._keep([])

    def _catch_up(self) -> None:
        """Adds the steps that replays of a captured graph, where there is one, have ended unseen: waits for the device then."""
        if not self.tables.captured:
            return
        count, takens = self.tables.replayed()
        overwritten = max(0, len(self._ended) + count - self.tables.num_steps) if count else 0
        self._ended = self._ended[overwritten:]
        self.finished += count
        for number, taken in enumerate(takens, self.finished - len(takens) + 1):
            self._ended.append(Ended(number, False, (), taken))

    def _merging(self) -> dist.ProcessGroup | None:
        """The group to merge over, which may be there later than the Watch."""
        group = group_of(self._group)
        self._merged = self._merged or group is not None
        return group

    def _batch(self, steps: list[Ended]) -> Batch:
        """The values of steps on one device: of a table that is not on a CPU, where there is one."""
        takens = [step.taken for step in steps]
        devices = [rows.device for taken in takens for _, rows in taken.rows]
        device = next((own for own in devices if own.type != "cpu"), torch.device("cpu"))
        values = torch.stack([values_of(taken.rows, self.tables.num_rows).to(device) for taken in takens])
        scalars = torch.stack([_as_tensor(taken.scalars, device) for taken in takens])
        times = [[table.to(device) for table in tables] for tables in zip(*(taken.times for taken in takens), strict=True)]
        return Batch(values, scalars, times)

    def _settle(self) -> None:
        """Hands over what is logged; waits for its copies, which the next logging step finds there."""
        logged, self._logged = self._logged, []
        for steps, batch, copied in logged:
            if copied is not None:
                copied.synchronize()
            self._keep([self._snapshot(step, batch, index) for index, step in enumerate(steps)])

    def _snapshot(self, step: Ended, batch: Batch | None, index: int) -> Snapshot:
        taken = step.taken
        if batch is None:
            values, scalars, times = values_of(taken.rows, self.tables.num_rows), taken.scalars, taken.times
        else:
            values, scalars, times = batch.values[index], batch.scalars[index], [tables[index] for tables in batch.times]
        loss, scale, found_inf = _numbers(scalars)
        named = {name: rows.numpy() for name, rows in zip(self.tables.timed, times, strict=True)}
        loss, rates = None if math.isnan(loss) and not step.has_loss else loss, tuple(float(rate) for rate in step.rates)
        return Snapshot(step.step, loss, rates, values.numpy(), named, loss_scale=scale, skipped=found_inf > 0)


def _numbers(scalars: torch.Tensor | tuple[Scalar, ...]) -> list[float]:
    """The scalars of a step, which is waited for."""
    if isinstance(scalars, torch.Tensor):
        return scalars.tolist()
    return [absent if value is None else float(value) for value, absent in zip(scalars, ABSENT, strict=True)]


def _as_tensor(scalars: torch.Tensor | tuple[Scalar, ...], device: torch.device) -> torch.Tensor:
    """The scalars of a step on a device, which is not waited for where they lie in a ring."""
    given = scalars if isinstance(scalars, torch.Tensor) else _numbers(scalars)
    return torch.as_tensor(given, dtype=torch.float64, device=device)


def _to_host(batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
    """The batch in host memory, and what says when its copy has ended; of a batch on a CPU itself, and None."""
    if batch.values.is_cpu:
        return batch, None

    def copied(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)

    there = Batch(copied(batch.values), copied(batch.scalars), [[copied(table) for table in own] for own in batch.times])
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(batch.values.device))
    return there, event
