"""The tables that rows live in: new ones, checks, and the ops that write and take them. Threads that share one take turns.

On a CPU the extension does all of it under one lock (csrc/threads.h), and the references here under another: no table is
written by both, for what one has registered the other does not run. On a GPU the order is that of the stream.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from gradkernels.library import _C, ArgumentError, define_kernel, no_output
from gradkernels.telemetry import fields
from gradkernels.telemetry.fields import ABS_MAX, FIELDS, NUM_NORMS, NUM_SLOTS, TIME_FIELDS

if _C is not None and {name: getattr(fields, name) for name in _C.fields()} != _C.fields():
    raise ImportError("gradkernels' extension was built from other sources than its Python code: install the package again")

# Guards the tables that the references write, and a tensor's list of probes.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has a copy of the lock, and not the thread that may hold it
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def new_stats(num_ports: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """An empty statistics tensor: zeros, float64, (num_ports, slots, len(FIELDS)); 1 slot on a CPU, NUM_SLOTS elsewhere."""
    slots = 1 if torch.device(device).type == "cpu" else NUM_SLOTS
    with torch.inference_mode(False):  # what it makes can be written there alone
        return torch.zeros(num_ports, slots, len(FIELDS), dtype=torch.float64, device=device)


def new_time_stats(num_steps: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Empty statistics of `num_steps` time steps: zeros, float64, (1 + num_steps, len(TIME_FIELDS)).

    Row 1 + t is step t. Row 0 holds the largest number of steps of a backward call, and the number of such calls. Steps
    beyond num_steps are not recorded, which row 0 shows.
    """
    with torch.inference_mode(False):
        return torch.zeros(1 + num_steps, len(TIME_FIELDS), dtype=torch.float64, device=device)


def check_time_stats(op: str, time_stats: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ArgumentError or TypeError unless `time_stats` is one of `new_time_stats` on x's device."""
    if time_stats.dtype is not torch.float64:
        raise TypeError(f"{op}: time_stats must be float64, got {time_stats.dtype}")
    if time_stats.dim() != 2 or time_stats.shape[0] < 1 or time_stats.shape[1] != len(TIME_FIELDS):
        expected = f"(1 + steps, fields) = (1 + steps, {len(TIME_FIELDS)})"
        raise ArgumentError(f"{op}: time_stats must have shape {expected}, got {tuple(time_stats.shape)}")
    if not time_stats.is_contiguous():
        raise ArgumentError(f"{op}: time_stats must be contiguous, got strides {time_stats.stride()}")
    if time_stats.device != x.device and torch.is_grad_enabled():
        raise ArgumentError(f"{op}: time_stats must be on x's device, {x.device}, got {time_stats.device}")


def check_stats(op: str, stats: torch.Tensor, x: torch.Tensor, ports: tuple[str, ...]) -> None:
    """Raises ArgumentError or TypeError unless `stats` is a statistics tensor for `ports` on x's device."""
    if stats.dtype is not torch.float64:
        raise TypeError(f"{op}: stats must be float64, got {stats.dtype}")
    if stats.dim() != 3 or stats.shape[0] != len(ports) or stats.shape[2] != len(FIELDS):
        expected = f"(ports, slots, fields) = ({len(ports)}, slots, {len(FIELDS)})"
        raise ArgumentError(f"{op}: stats must have shape {expected}, got {tuple(stats.shape)}")
    if stats.shape[1] < 1:
        raise ArgumentError(f"{op}: stats must have a slot or more, got shape {tuple(stats.shape)}")
    if not stats.is_contiguous():
        raise ArgumentError(f"{op}: stats must be contiguous, got strides {stats.stride()}")
    if stats.device != x.device and torch.is_grad_enabled():
        raise ArgumentError(f"{op}: stats must be on x's device, {x.device}, got {stats.device}")


def merge_slots(stats: torch.Tensor) -> torch.Tensor:
    """The rows of a table: (..., slots, fields) -> (..., fields), always a copy."""
    if stats.shape[-2] == 1:
        return stats.squeeze(-2).clone()
    rows = stats.sum(-2)
    rows[..., ABS_MAX] = stats[..., ABS_MAX].amax(-1)
    return rows


def add_row_reference(row: torch.Tensor, stats: torch.Tensor, port: int) -> None:
    """Adds one backward call's fields, (len(FIELDS),), to slot 0 of row `port` of `stats`."""
    with LOCK:
        slot = stats[port, 0]
        largest = torch.maximum(slot[ABS_MAX], row[ABS_MAX])
        slot += row
        slot[ABS_MAX] = largest


def take_rows_reference(stats: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes the rows of a table, (ports, slots, fields), into `rows`, (ports, fields); the slots are zero afterwards."""
    with LOCK:
        rows.copy_(merge_slots(stats))
        stats.zero_()


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
        table[:, :NUM_NORMS] = torch.hypot(table[:, :NUM_NORMS], rows[:, :NUM_NORMS])
        table[:, NUM_NORMS:] += rows[:, NUM_NORMS:]


def make_room_reference(time_stats: torch.Tensor, num_steps: int) -> None:
    """Grows `time_stats` in place to `num_steps` steps at least; what is there stays."""
    with LOCK:
        rows, fields = time_stats.shape
        if rows <= num_steps:
            time_stats.resize_(1 + num_steps, fields)
            time_stats[rows:].zero_()


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


def _define(schema: str, reference: Callable, fake: Callable) -> torch._ops.OpOverload:
    return define_kernel(schema, reference, fake, differentiable=False)


add_row = _define("add_row(Tensor row, Tensor(a!) stats, int port) -> ()", add_row_reference, no_output)
take_rows = _define("take_rows(Tensor(a!) stats, Tensor(b!) rows) -> ()", take_rows_reference, no_output)
add_steps = _define("add_steps(Tensor rows, Tensor(a!) time_stats) -> ()", add_steps_reference, no_output)
make_room = _define("make_room(Tensor(a!) time_stats, int num_steps) -> ()", make_room_reference, no_output)
take_steps = _define("take_steps(Tensor(a!) time_stats) -> Tensor", take_steps_reference, take_steps_fake)
