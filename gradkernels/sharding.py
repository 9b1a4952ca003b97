"""DTensors: every op on tensors that are spread over a mesh of processes, as tensor and sequence parallelism have them.

An op treats its rows alone, so each process runs it on the rows that it has: tensors stay sharded along the dimensions of
RULES, and a weight is whole in every process, its gradient the sum of what the processes found (`Partial`, as torch.nn's is).
Whatever else comes, a sharded normalized dimension or a `Partial` sum, is redistributed first, as PyTorch does for its own ops.
Statistics are plain tensors, one table a process, and measure what that process computes: docs/telemetry.md.

Imported when torch.distributed.tensor is, which takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from gradkernels.library import FAKES, LIBRARY, SPREAD

Arguments = dict[str, Any]
Rule = Callable[[torch.Tensor, Arguments], Collection[int]]
PLAIN = ("stats", "time_stats", "batch_sizes")  # arguments that each process has its own of
LEADERS = ("x", "new_residual", "dskip", "dbranch", "dy")  # the first of these that is there says how the rows are sharded


def every_dimension(x: torch.Tensor, given: Arguments) -> Collection[int]:
    """All of x's, of an op that treats each element alone."""
    return range(x.dim())


def dimensions_of_rows(x: torch.Tensor, given: Arguments) -> Collection[int]:
    """All but the normalized ones, the last num_dims."""
    return range(x.dim() - given["num_dims"])


def batch_dimension(x: torch.Tensor, given: Arguments) -> Collection[int]:
    """The last but one of (T, B, D) and (B, D); none of a packed sequence, whose steps are of several sequences each."""
    return () if given.get("batch_sizes") is not None else (x.dim() - 2,)


# The dimensions along which the first of LEADERS may be sharded; the other tensors are along the same, counted from the last.
RULES: dict[str, Rule] = {
    "gelu": every_dimension,
    "layer_norm": dimensions_of_rows,
    "add_layer_norm": dimensions_of_rows,
    "residual": every_dimension,
    "lstm_layer": batch_dimension,
    "lstm_cell": batch_dimension,
    "probe": every_dimension,
}


def rule_of(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of a kernel, `<op>_fwd` or `<op>_bwd`; the ops of tables have none."""
    return RULES.get(op._schema.name.split("::")[1].removesuffix("_unmeasured")[: -len("_fwd")])


def sharded_rows(op: torch._ops.OpOverload, given: Arguments, mesh: DeviceMesh) -> list[int | None]:
    """For each dimension of the mesh the tensors' dimension that it shards, counted from the last, or None."""
    leader = next(given[name] for name in LEADERS if given.get(name) is not None)
    if not isinstance(leader, DTensor):
        return [None] * mesh.ndim
    allowed = rule_of(op)(leader, given)
    return [p.dim - leader.dim() if type(p) is Shard and p.dim in allowed else None for p in leader.placements]


def placements_of(name: str, dim: int, rows: Sequence[int | None]) -> list[Placement]:
    """How a tensor of `dim` dimensions is placed, by its name: that of a weight, of a weight's gradient, or of rows."""
    if name.startswith(("weight", "bias")):
        return [Replicate() for _ in rows]
    if name.startswith(("dweight", "dbias")):
        return [Replicate() if row is None else Partial() for row in rows]
    return [Replicate() if row is None or dim + row < 0 else Shard(dim + row) for row in rows]


def local_argument(op: torch._ops.OpOverload, name: str, value: Any, rows: Sequence[int | None]) -> Any:
    """What this process computes with in the place of an argument."""
    if isinstance(value, DTensor):
        placements = placements_of(name, value.dim(), rows)
        # A probe measures the gradient as it is: it must not communicate, for another process may not watch.
        if list(value.placements) != placements and not op._schema.name.endswith("probe_bwd"):
            value = value.detach().redistribute(placements=placements)
        return value.to_local()
    if isinstance(value, torch.Tensor) and name not in PLAIN and not DTensor._op_dispatcher._allow_implicit_replication:
        raise RuntimeError(
            f"{op}: got mixed torch.Tensor and DTensor: {name} must be a DTensor like others, got a torch.Tensor"
        )
    return value


def whole(value: Any) -> Any:
    """A tensor without memory of the size of all shards together; other values as they are."""
    if not isinstance(value, DTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def assembled(name: str, local: torch.Tensor, shape: torch.Tensor, mesh: DeviceMesh, rows: Sequence[int | None]) -> DTensor:
    """The DTensor of which `local` is this process's part; `shape` has its size and strides, and is `local` out of the mesh."""
    placements = placements_of(name, shape.dim(), rows)
    if local is shape:
        local = shape.new_empty(0, device=mesh.device_type)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape.shape, stride=shape.stride())


def run(op: torch._ops.OpOverload, args: Sequence[Any]) -> Any:
    """An op on DTensors: a kernel on this process's part of each, the results put together."""
    fake = FAKES[op]
    if fake is None:  # made of other ops
        return op.decompose(*args)
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=True))
    mesh, *others = (value.device_mesh for value in args if isinstance(value, DTensor))
    if any(other != mesh for other in others):
        raise RuntimeError(f"{op}: all DTensors must be on one mesh, got {mesh} and {next(o for o in others if o != mesh)}")
    with torch.no_grad():
        rows = sharded_rows(op, given, mesh)
        shapes = fake(*(whole(value) for value in args))
        parts = [local_argument(op, name, value, rows) for name, value in given.items()]
        results = shapes if mesh.get_coordinate() is None else op(*parts)
        if not isinstance(shapes, tuple):
            return results if shapes is None else assembled("", results, shapes, mesh, rows)
        names = (result.name for result in op._schema.returns)
        return tuple(assembled(*each, mesh, rows) for each in zip(names, results, shapes, strict=True))


def register() -> None:
    """Makes `run` what every op does with DTensors."""
    SPREAD[DTensor] = run
    for op, fake in FAKES.items():
        if fake is None or rule_of(op) is not None:
            torch.library.register_torch_dispatch(op, DTensor, lambda cls, op, types, args, kwargs: run(op, args), lib=LIBRARY)


register()
