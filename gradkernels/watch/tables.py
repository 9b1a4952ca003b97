"""The tables of a Watch: one for each device, of which every site has its rows, and what becomes of them when a model moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradkernels.nn import LSTM
from gradkernels.telemetry import ABS_MAX, FIELDS, new_stats, new_time_stats, take_rows, take_steps
from gradkernels.watch.sites import Site, device_of

TIME_STEPS = 256  # for which an LSTM has room before its first call
BLOCK_BYTES, BLOCK_STEPS = 4 * 2**20, 128  # of the memory that steps are cut from, which numpy asks for in huge pages
Taken = list[tuple[list[int], torch.Tensor]]  # rows, and which of all rows they are


class Tables:
    """Where sites write. `first[site]` is the row of its first port among those of all sites."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.first: dict[Site, int] = {}
        self.num_rows = 0
        for site in self.sites:
            self.first[site] = self.num_rows
            self.num_rows += len(site.ports)
        self._timed = [site for site in self.sites if isinstance(site.module, LSTM)]
        self._left: Taken = []  # by tables that a model has moved away from, since the last take
        self._tables: list[tuple[list[int], torch.Tensor]] = []
        self.measuring = True
        self._allocate()

    def _allocate(self) -> None:
        self._left += self._take()
        self._tables = []
        self._room: list[torch.Tensor] = []  # for the rows of coming steps, on a CPU
        for device in dict.fromkeys(site.device for site in self.sites):
            sites = [site for site in self.sites if site.device == device]
            rows = [self.first[site] + offset for site in sites for offset in range(len(site.ports))]
            table = new_stats(len(rows), device)
            self._tables.append((rows, table))
            begin = 0
            for site in sites:
                site.table = table[begin : begin + len(site.ports)]
                begin += len(site.ports)
        for site in self._timed:
            if site.time_stats is None or site.time_stats.device != site.device:
                site.time_stats = new_time_stats(TIME_STEPS, site.device)
        if self.measuring:
            self.resume()

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

    def take(self) -> tuple[Taken, list[tuple[str, torch.Tensor]]]:
        """What was measured since the last call, and from zero again; nothing waits for a device."""
        taken, self._left = self._left + self._take(), []
        return taken, [(site.name, take_steps(site.time_stats)) for site in self._timed if not site.time_stats.is_meta]

    def _take(self) -> Taken:
        taken = []
        for rows, table in self._tables:
            if table.is_cpu:
                own = self._room.pop() if self._room else self._make_room(len(rows))
                take_rows(table, own)
                taken.append((rows, own))
            elif not table.is_meta:
                own = table.new_empty(len(rows), len(FIELDS))
                take_rows(table, own)
                taken.append((rows, own.to("cpu", non_blocking=True)))
        return taken

    def _make_room(self, num_rows: int) -> torch.Tensor:
        """Memory for the rows of one step: the first of a block. Fresh pages for each step would cost more than the copy."""
        steps = min(BLOCK_STEPS, 1 + BLOCK_BYTES // (8 * num_rows * len(FIELDS)))
        with torch.inference_mode(False):
            self._room = list(torch.from_numpy(np.empty((steps, num_rows, len(FIELDS)))).unbind())
        return self._room.pop()

    def synchronize(self) -> None:
        """Waits until the copies that `take` has begun are there."""
        for _, table in self._tables:
            if table.is_cuda:
                torch.cuda.synchronize(table.device)


def values_of(taken: Taken, num_rows: int) -> np.ndarray:
    """What `Tables.take` took as one array (num_rows, len(FIELDS)): rows merge by + and max."""
    if len(taken) == 1 and len(taken[0][0]) == num_rows:  # one table holds them all, in their order
        return taken[0][1].numpy()
    values = np.zeros((num_rows, len(FIELDS)))
    for rows, table in taken:
        array: Any = table.numpy()
        largest = np.maximum(values[rows, ABS_MAX], array[:, ABS_MAX])
        values[rows] += array
        values[rows, ABS_MAX] = largest
    return values
