"""The tables of a Watch: one for each device, of which every site has its rows, and what becomes of them when a model moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gradkernels.nn import LSTM
from gradkernels.telemetry import ABS_MAX, FIELDS, merge_slots, new_stats, new_time_stats, take_rows, take_steps
from gradkernels.watch.ring import Ring, Scalar
from gradkernels.watch.sites import Site, device_of

TIME_STEPS = 256  # for which an LSTM has room before its first call
BLOCK_BYTES, BLOCK_STEPS = 4 * 2**20, 128  # of the memory that steps are cut from, which numpy asks for in huge pages
Taken = list[tuple[list[int], torch.Tensor]]  # rows, and which of all rows they are


@dataclass
class TakenStep:
    """What one step measured. times: a table for each LSTM direction. scalars: see ABSENT; a tensor where they were in a ring.

    plain: all of it is on a CPU, and nothing is scaled.
    """

    rows: Taken
    times: list[torch.Tensor]
    scalars: torch.Tensor | tuple[Scalar, ...]
    plain: bool


def has_ring(table: torch.Tensor) -> bool:
    """Whether the steps of a table wait on its device."""
    return not table.is_cpu and not table.is_meta


class Tables:
    """Where sites write. `first[site]` is the row of its first port among those of all sites."""

    def __init__(self, sites: Sequence[Site], num_steps: int) -> None:
        self.sites, self.num_steps = list(sites), num_steps
        self.first: dict[Site, int] = {}
        self.num_rows = 0
        for site in self.sites:
            self.first[site] = self.num_rows
            self.num_rows += len(site.ports)
        self._timed = [site for site in self.sites if isinstance(site.module, LSTM)]
        self._left: Taken = []  # by tables that a model has moved away from, since the last take
        self._on_cpu: list[tuple[list[int], torch.Tensor]] = []
        self._timed_on_cpu: list[Site] = []
        self._rings: list[tuple[list[int], list[Site], Ring]] = []  # of tables that are not on a CPU, with their LSTMs
        self.measuring = True
        self.captured = False  # a graph in which steps end, so that there may be more of them than the host knows
        self._allocate()

    def _allocate(self) -> None:
        self._left += self._take_on_cpu()
        for of_rows, _, ring in self._rings:
            self._left.append((of_rows, merge_slots(ring.table).cpu()))
        self._on_cpu, self._timed_on_cpu, self._rings = [], [], []
        self._room: list[torch.Tensor] = []  # for the rows of coming steps, on a CPU
        for site in self._timed:
            if site.time_stats is None or site.time_stats.device != site.device:
                site.time_stats = new_time_stats(TIME_STEPS, site.device)
        for device in dict.fromkeys(site.device for site in self.sites):
            sites = [site for site in self.sites if site.device == device]
            rows = [self.first[site] + offset for site in sites for offset in range(len(site.ports))]
            table = new_stats(len(rows), device)
            lstms = [site for site in sites if site in self._timed]
            if has_ring(table):
                self._rings.append((rows, lstms, Ring(self.num_steps, table, [site.time_stats for site in lstms])))
            elif table.is_cpu:
                self._on_cpu.append((rows, table))
                self._timed_on_cpu += lstms
            begin = 0
            for site in sites:
                site.table = table[begin : begin + len(site.ports)]
                begin += len(site.ports)
        if self.measuring:
            self.resume()

    @property
    def timed(self) -> list[str]:
        """The sites that have time steps, in the order of TakenStep.times."""
        return [site.name for site in self._timed]

    def pause(self) -> None:
        """No site measures."""
        self.measuring = False
        for site in self.sites:
            site.set_stats(None, None)

    def resume(self) -> None:
        """Every site measures."""
        self.measuring = True
        for site in self.sites:
            site.set_stats(site.table, site.time_stats)

    def follow(self, module: nn.Module, device: torch.device) -> None:
        """A module that ran on `device` has moved there: so have the others, each to where its parameters are."""
        old = next(site.device for site in self.sites if site.module is module)
        for site in self.sites:
            own = device_of(site.module) if site.module is not module else None
            if own is not None:
                site.device = own
            elif site.device == old:
                site.device = device
        self._allocate()

    def take(self, scalars: Sequence[Scalar]) -> TakenStep | None:
        """Ends a step: what was measured since the last call, and from zero again; nothing waits for a device.

        scalars: see ABSENT; None where there is none. None while a CUDA graph is captured: nothing runs, replays end steps.
        """
        rows, self._left = self._left + self._take_on_cpu(), []
        times = {site: take_steps(site.time_stats) for site in self._timed_on_cpu}
        if not self._rings:
            plain = all(value is None for value in scalars[1:])
            return TakenStep(rows, self._in_order(times), tuple(_kept(value) for value in scalars), plain)
        if not all([ring.put(scalars) for _, _, ring in self._rings]):
            self.captured = True
            return None
        return self._in_rings(self._rings[0][2].ended - 1, rows, times)

    def replayed(self) -> tuple[int, list[TakenStep]]:
        """How many steps replays of a captured graph have ended since the last call, and those that are still there. Waits."""
        rings = [ring for _, _, ring in self._rings]
        if not rings:
            return 0, []
        before, count = rings[0].ended, min(int(ring.count) for ring in rings)
        for ring in rings:
            ring.ended = count
        return count - before, [self._in_rings(step, [], {}) for step in range(max(before, count - self.num_steps), count)]

    def _in_rings(self, step: int, rows: Taken, times: dict[Site, torch.Tensor]) -> TakenStep:
        """A step that lies in rings, with what lies on a CPU."""
        scalars = None
        for of_rows, sites, ring in self._rings:
            values, time_steps, scalars = ring.step(step)
            rows.append((of_rows, values))
            times.update(zip(sites, time_steps, strict=True))
        return TakenStep(rows, self._in_order(times), scalars, False)

    def _in_order(self, times: dict[Site, torch.Tensor]) -> list[torch.Tensor]:
        return [times[site] if site in times else new_time_stats(0) for site in self._timed]

    def _take_on_cpu(self) -> Taken:
        taken = []
        for rows, table in self._on_cpu:
            own = self._room.pop() if self._room else self._make_room(len(rows))
            take_rows(table, own)
            taken.append((rows, own))
        return taken

    def _make_room(self, num_rows: int) -> torch.Tensor:
        """Memory for the rows of one step: the first of a block. Fresh pages for each step would cost more than the copy."""
        steps = min(BLOCK_STEPS, 1 + BLOCK_BYTES // (8 * num_rows * len(FIELDS)))
        with torch.inference_mode(False):
            self._room = list(torch.from_numpy(np.empty((steps, num_rows, len(FIELDS)))).unbind())
        return self._room.pop()


def _kept(value: Scalar) -> Scalar:
    """A number that may be written over later, as it is now."""
    return value.detach().to("cpu", non_blocking=True, copy=True) if isinstance(value, torch.Tensor) else value


def values_of(taken: Taken, num_rows: int) -> torch.Tensor:
    """The rows of a step, as `Tables.take` took them, as one tensor (num_rows, len(FIELDS)): they merge by + and max."""
    if len(taken) == 1 and len(taken[0][0]) == num_rows:  # one table holds them all, in their order
        return taken[0][1]
    device = taken[0][1].device if taken else "cpu"
    values = torch.zeros(num_rows, len(FIELDS), dtype=torch.float64, device=device)
    for rows, table in taken:
        own = values[rows]
        largest = torch.maximum(own[:, ABS_MAX], table[:, ABS_MAX].to(values.device))
        own += table.to(values.device)
        own[:, ABS_MAX] = largest
        values[rows] = own
    return values
