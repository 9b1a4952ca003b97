"""Whether processes that should hold the same parameters do: sums of their bits, exact, in one all-reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from gradkernels.watch.merge import group_of
from gradkernels.watch.sites import names_of

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def desynced(model: nn.Module, process_group: dist.ProcessGroup | None) -> list[str]:
    """The names of the parameters that are not bit for bit equal in the processes of the group, in the model's order."""
    group = group_of(process_group)
    if group is None:
        return []
    paths, replicated = names_of(model), {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            local = _whole(parameter)
            if local is not None:
                replicated[f"{paths[module]}.{name}".removeprefix("(model).")] = _bits(local)
    if not replicated:
        return []
    sums = torch.stack(list(replicated.values()))
    ends = torch.cat([sums, -sums])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    largest, smallest = ends.chunk(2)
    return [name for name, differs in zip(replicated, (largest != -smallest).tolist(), strict=True) if differs]


def _whole(parameter: torch.Tensor) -> torch.Tensor | None:
    """The values of a parameter that each process has all of; None of one that is sharded."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return parameter.detach()
    return parameter.to_local().detach() if all(placement.is_replicate() for placement in placements) else None


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The sum of the bits, which no order of adding changes, each element weighted by its place."""
    integers = values.contiguous().view(INTEGERS[values.element_size()]).flatten().to(torch.int64)
    return (integers * torch.arange(1, 1 + len(integers), device=integers.device)).sum()
