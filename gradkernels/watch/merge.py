"""Finished steps of several processes as one: of the loss that they average, as if one process had computed it all."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gradkernels.telemetry import ABS_MAX, TIME_FIELDS
from gradkernels.telemetry.fields import LARGEST_SQUARED, NUM_NORMS, SCALE, SMALLEST_SQUARED, SQUARE_SUMS

Group = dist.ProcessGroup | None


@dataclass
class Batch:
    """Finished steps, in float64 on one device.

    values: (steps, rows, len(FIELDS)). scalars: (steps, SCALARS). times: for each LSTM direction, a table of time steps for
    each step, (1 + time steps, len(TIME_FIELDS)).
    """

    values: torch.Tensor
    scalars: torch.Tensor
    times: list[list[torch.Tensor]]

    def divide(self, divisor: torch.Tensor) -> None:
        """Makes them the steps of a loss that is smaller by `divisor`, (steps,): in place."""
        self.values[..., ABS_MAX] /= divisor[:, None]
        self.values[..., SQUARE_SUMS] /= (divisor * divisor)[:, None, None]
        for tables in self.times:
            for table, own in zip(tables, divisor, strict=True):
                table[1:, :NUM_NORMS] /= own


def group_of(process_group: Group) -> Group:
    """The group to merge over: the one given, else the default one; None where there is none, or this process is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def check_group(process_group: Group) -> None:
    """Raises ValueError unless this process is in the group."""
    if process_group == dist.GroupMember.NON_GROUP_MEMBER or (process_group and dist.get_rank(process_group) < 0):
        raise ValueError(f"watch: process_group must hold this process, rank {dist.get_rank()}, got a group without it")


def check_same_sites(names: Sequence[str], device: torch.device, group: dist.ProcessGroup) -> None:
    """Raises RuntimeError unless every process of the group watches the same sites. One all-reduce."""
    own = zlib.crc32("\n".join(names).encode())
    ends = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    largest, smallest = ends.tolist()
    if largest != -smallest:
        raise RuntimeError(
            f"watch: the processes of process_group must watch the same sites, got others than the {len(names)} of rank "
            f"{dist.get_rank()}: give the group of those that train the same modules"
        )


def merge(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """The same steps of all processes of `group` together. One all-reduce by MAX and one by SUM, the same in every process."""
    size = dist.get_world_size(group)
    batch.divide(torch.full_like(batch.scalars[:, 0], size))
    steps_seen = [table[0, 0] for tables in batch.times for table in tables]
    largest = _reduced([batch.values[..., ABS_MAX], batch.scalars[:, 1:], *steps_seen], dist.ReduceOp.MAX, group)
    tables = [table for tables in batch.times for table in tables]
    lengths = [int(steps) for steps in torch.stack(largest[2:]).tolist()] if tables else []  # waits for a device
    squares = [_squared(_of_length(table, steps)) for table, steps in zip(tables, lengths, strict=True)]
    losses = batch.scalars[:, 0] / size
    values, losses, *squares = _reduced([batch.values, losses, *squares], dist.ReduceOp.SUM, group)
    values[..., ABS_MAX] = largest[0]
    tables = [_rooted(table, steps) for table, steps in zip(squares, lengths, strict=True)]
    each = len(batch.values)
    times = [tables[first : first + each] for first in range(0, len(tables), each)]
    return Batch(values, torch.cat([losses[:, None], largest[1]], 1), times)


def _reduced(parts: list[torch.Tensor], op: dist.ReduceOp, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Tensors of any shape, each reduced over the group: one call."""
    packed = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(packed, op, group=group)
    pieces = packed.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _of_length(table: torch.Tensor, steps: int) -> torch.Tensor:
    """A table of `steps` time steps, as many as the longest of any process: tables have room for what their own has seen."""
    missing = 1 + steps - len(table)
    return torch.cat([table, table.new_zeros(missing, table.shape[1])]) if missing > 0 else table[: 1 + steps]


def _squared(table: torch.Tensor) -> torch.Tensor:
    """The first row, then norms squared in three parts, so that none leaves float64 (see FIELDS), and what adds up as it is."""
    norms, counts = table[1:, :NUM_NORMS], table[1:, NUM_NORMS:]
    tiny, huge = norms < SMALLEST_SQUARED, norms > LARGEST_SQUARED
    parts = norms.masked_fill(tiny | huge, 0.0), (norms * SCALE).where(tiny, 0.0), (norms / SCALE).where(huge, 0.0)
    return torch.cat([table[0], torch.cat([*(part.square() for part in parts), counts], 1).flatten()])


def _rooted(squared: torch.Tensor, steps: int) -> torch.Tensor:
    """The table that `_squared` has taken apart. steps: of the longest backward."""
    fields = len(TIME_FIELDS)
    widths = [NUM_NORMS] * 3 + [fields - NUM_NORMS]
    first, rest = squared[:fields].clone(), squared[fields:].view(-1, sum(widths))
    first[0] = steps
    middle, tiny, huge, counts = rest.split(widths, 1)
    norms = torch.hypot(torch.hypot(tiny.sqrt() / SCALE, middle.sqrt()), huge.sqrt() * SCALE)
    return torch.cat([first[None], torch.cat([norms, counts], 1)])
