"""Ops on tables of statistics: adding to them, taking what is in them, making room. Threads that share a table take turns.

On a CPU the extension does all of it under one lock (csrc/threads.h), and the references here under another: no table is
written by both, for what one has registered the other does not run. On a GPU the order is that of the stream.
"""

from __future__ import annotations

import os
import threading

import torch

from gradkernels.library import define_kernel
from gradkernels.telemetry import ABS_MAX, NORMS, merge_cells

# Guards the tables that the references write, and a tensor's list of probes.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has a copy of the lock, and not the thread that may hold it
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def add_row_reference(row: torch.Tensor, stats: torch.Tensor, port: int) -> None:
    """Adds one backward call's fields, (len(FIELDS),), to cell 0 of row `port` of `stats`."""
    with LOCK:
        cell = stats[port, 0]
        largest = torch.maximum(cell[ABS_MAX], row[ABS_MAX])
        cell += row
        cell[ABS_MAX] = largest


def add_row_fake(row: torch.Tensor, stats: torch.Tensor, port: int) -> None:
    """Nothing comes out."""


def fold_reference(stats: torch.Tensor) -> torch.Tensor:
    """The rows of a table, (..., cells, fields) -> (..., fields); its cells are zero afterwards."""
    with LOCK:
        rows = merge_cells(stats)
        stats.zero_()
    return rows


def fold_fake(stats: torch.Tensor) -> torch.Tensor:
    """Contiguous rows."""
    return stats.new_empty(*stats.shape[:-2], stats.shape[-1])


def add_steps_reference(rows: torch.Tensor, time_stats: torch.Tensor) -> None:
    """Adds one backward call, (steps, len(TIME_FIELDS)), to `time_stats`, as far as that has rows: row 0 shows it.

    A batch of calls, under vmap, is left out: see measure_steps_reference.
    """
    if torch._C._functorch.is_batchedtensor(rows):
        return
    with LOCK:
        recorded = min(len(rows), time_stats.shape[0] - 1)
        time_stats[0, 0].clamp_(min=len(rows))
        time_stats[0, 1] += 1
        table, rows = time_stats[1 : 1 + recorded], rows[:recorded]
        table[:, :NORMS] = torch.hypot(table[:, :NORMS], rows[:, :NORMS])
        table[:, NORMS:] += rows[:, NORMS:]


def add_steps_fake(rows: torch.Tensor, time_stats: torch.Tensor) -> None:
    """Nothing comes out."""


def make_room_reference(time_stats: torch.Tensor, num_steps: int) -> None:
    """Grows `time_stats` in place to `num_steps` steps at least; what is there stays."""
    with LOCK:
        rows, fields = time_stats.shape
        if rows <= num_steps:
            time_stats.resize_(1 + num_steps, fields)
            time_stats[rows:].zero_()


def make_room_fake(time_stats: torch.Tensor, num_steps: int) -> None:
    """A table without memory keeps its size."""


def take_steps_reference(time_stats: torch.Tensor) -> torch.Tensor:
    """A copy of `time_stats`, which is zero afterwards, on a CPU with room for as many steps as were seen."""
    with LOCK:
        rows = time_stats.clone()
        time_stats.zero_()
        if rows.device.type == "cpu":
            make_room_reference(time_stats, int(rows[0, 0]))
    return rows


def take_steps_fake(time_stats: torch.Tensor) -> torch.Tensor:
    """A table of the same size."""
    return time_stats.new_empty(time_stats.shape)


add_row = define_kernel("add_row(Tensor row, Tensor(a!) stats, int port) -> ()", add_row_reference, add_row_fake)
fold = define_kernel("fold(Tensor(a!) stats) -> Tensor", fold_reference, fold_fake)
add_steps = define_kernel("add_steps(Tensor rows, Tensor(a!) time_stats) -> ()", add_steps_reference, add_steps_fake)
make_room = define_kernel("make_room(Tensor(a!) time_stats, int num_steps) -> ()", make_room_reference, make_room_fake)
take_steps = define_kernel("take_steps(Tensor(a!) time_stats) -> Tensor", take_steps_reference, take_steps_fake)
