"""What is measured: the fields of a row, the table rows live in, and the records read from it.

A statistics tensor, called `stats` everywhere, is float64 of shape (ports, cells, len(FIELDS)). A port is one gradient at
a site: `dy` comes in, `dx` goes out, and so on in the order of the op's PORTS. Each program of a kernel adds to a cell of
its own; a row is the merge of its cells. Rows merge by + and max, so micro-batches, a module used twice and several
ranks combine exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradkernels.library import ArgumentError

FIELDS = (
    "numel",  # elements seen
    "observation_count",  # backward calls that added to the row
    "square_sum",  # sum of squares of the finite elements, less what the next two hold
    "square_sum_tiny",  # float64 tensors: sum of (2^537 v)^2 over elements below 2^-480 whose squares would underflow
    "square_sum_huge",  # float64 tensors: sum of (2^-537 v)^2 over blocks with elements above 2^480
    "abs_max",  # largest magnitude among the finite elements; merges by max, every other field by +
    "nonfinite_count",  # elements that are NaN or infinite
    "zero_count",  # elements that are exactly zero
)
ABS_MAX = FIELDS.index("abs_max")
SCALE = 2.0**537
NUM_CELLS = 1024  # of a row on a GPU, one for each program that may run: four an SM and more
TIME_FIELDS = (  # of one time step of one direction of an LSTM layer; norms merge by hypot, the rest by +
    "dh",  # norm of dL/dh_t: dy_t, what comes through W_hh from the step after, and dL/dh_n where t is a sequence's last step
    "dc",  # norm of dL/dc_t: through c_{t+1}, through h_t, and dL/dc_n
    "dh_recurrent",  # norm of dG_{t+1} W_hh, the part of dh that comes from the step after
    "gate_count",  # live rows times H: what the counts and the sum below are out of
    "input_low",  # elements of i below 0.1
    "input_high",  # elements of i above 0.9
    "forget_low",
    "forget_high",
    "candidate_high",  # elements of |g| above 0.9
    "output_low",
    "output_high",
    "forget_sum",  # sum of f
)
NORMS = TIME_FIELDS.index("dh_recurrent") + 1  # how many of them are norms


@dataclass(frozen=True)
class Record:
    """One row: what flowed through one port of one site in one step.

    `square_sum` is over the finite elements; for float64 gradients beyond 1e-154 or 1e+154 it leaves float64's range,
    `norm` does not. `dweight` and `dbias` are the gradients of single backward calls: over gradient accumulation their
    rows hold the sum of the squared norms, not the squared norm of the sum.
    """

    site: str
    port: str
    numel: int
    observation_count: int
    square_sum: float
    abs_max: float
    nonfinite_count: int
    zero_count: int
    norm: float

    @property
    def rms(self) -> float:
        """Root mean square of the finite elements; 0 where there are none."""
        finite = self.numel - self.nonfinite_count
        return self.norm / math.sqrt(finite) if finite else 0.0


def record_of(site: str, port: str, row: Sequence[float]) -> Record:
    """The record of one row (len(FIELDS) numbers)."""
    numel, observations, middle, tiny, huge, abs_max, nonfinite, zeros = row
    norm = math.hypot(math.sqrt(tiny) / SCALE, math.sqrt(middle), math.sqrt(huge) * SCALE)
    square_sum = middle + tiny / SCALE / SCALE + huge * SCALE * SCALE
    return Record(site, port, int(numel), int(observations), square_sum, abs_max, int(nonfinite), int(zeros), norm)


def new_stats(num_ports: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """An empty statistics tensor: zeros, float64, (num_ports, cells, len(FIELDS)); 1 cell on a CPU, NUM_CELLS elsewhere."""
    cells = 1 if torch.device(device).type == "cpu" else NUM_CELLS
    return torch.zeros(num_ports, cells, len(FIELDS), dtype=torch.float64, device=device)


def new_time_stats(num_steps: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Empty statistics of `num_steps` time steps: zeros, float64, (1 + num_steps, len(TIME_FIELDS)).

    Row 1 + t is step t. Row 0 holds the largest number of steps of a backward call, and the number of such calls. Steps
    beyond num_steps are not recorded, which row 0 shows.
    """
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
    if time_stats.device != x.device:
        raise ArgumentError(f"{op}: time_stats must be on x's device, {x.device}, got {time_stats.device}")


def check_stats(op: str, stats: torch.Tensor, x: torch.Tensor, ports: tuple[str, ...]) -> None:
    """Raises ArgumentError or TypeError unless `stats` is a statistics tensor for `ports` on x's device."""
    if stats.dtype is not torch.float64:
        raise TypeError(f"{op}: stats must be float64, got {stats.dtype}")
    if stats.dim() != 3 or stats.shape[0] != len(ports) or stats.shape[2] != len(FIELDS):
        expected = f"(ports, cells, fields) = ({len(ports)}, cells, {len(FIELDS)})"
        raise ArgumentError(f"{op}: stats must have shape {expected}, got {tuple(stats.shape)}")
    if stats.shape[1] < 1:
        raise ArgumentError(f"{op}: stats must have a cell or more, got shape {tuple(stats.shape)}")
    if not stats.is_contiguous():
        raise ArgumentError(f"{op}: stats must be contiguous, got strides {stats.stride()}")
    if stats.device != x.device:
        raise ArgumentError(f"{op}: stats must be on x's device, {x.device}, got {stats.device}")


def merge_cells(stats: torch.Tensor) -> torch.Tensor:
    """The rows of a table: (..., cells, fields) -> (..., fields), always a copy."""
    if stats.shape[-2] == 1:
        return stats.squeeze(-2).clone()
    rows = stats.sum(-2)
    rows[..., ABS_MAX] = stats[..., ABS_MAX].amax(-1)
    return rows


def measure_reference(gradient: torch.Tensor, stats: torch.Tensor, port: int) -> None:
    """Adds every field of `gradient` (any shape and floating dtype) to cell 0 of row `port` of `stats`, which is written."""
    magnitude = gradient.detach().double().abs().flatten()
    finite = magnitude.isfinite()
    zeros = (magnitude == 0).sum()
    magnitude = torch.where(finite, magnitude, 0.0)
    tiny, huge = magnitude < 2.0**-480, magnitude > 2.0**480
    if gradient.dtype is not torch.float64:
        tiny, huge = torch.zeros_like(tiny), torch.zeros_like(huge)
    sums = (
        torch.tensor(gradient.numel(), device=stats.device),
        torch.tensor(1, device=stats.device),
        torch.where(tiny | huge, 0.0, magnitude).square().sum(),
        torch.where(tiny, magnitude * SCALE, 0.0).square().sum(),
        torch.where(huge, magnitude / SCALE, 0.0).square().sum(),
        torch.cat([magnitude, magnitude.new_zeros(1)]).amax(),
        (~finite).sum(),
        zeros,
    )
    row = torch.stack([value.double() for value in sums])
    torch.ops.gradkernels.add_row.default(row, stats, port)


def measure_steps_reference(
    dh: Sequence[torch.Tensor],
    dc: Sequence[torch.Tensor],
    dh_recurrent: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    time_stats: torch.Tensor,
) -> None:
    """Adds every field of TIME_FIELDS, one tensor a step of each (gates: activated i f g o), to `time_stats`, which is written.

    Of a batch of calls, of vmap or is_grads_batched, nothing is measured: there is no one row that a step of many calls
    belongs to.
    """
    if any(torch._C._functorch.is_legacy_batchedtensor(t) for t in (*dh, *dc, *dh_recurrent, *gates)):
        return
    rows = []
    for t in range(len(dh)):
        norms = [_norm(v[t].detach().double()) for v in (dh, dc, dh_recurrent)]
        i, f, g, o = gates[t].detach().double().chunk(4, -1)
        counts = (i < 0.1, i > 0.9, f < 0.1, f > 0.9, g.abs() > 0.9, o < 0.1, o > 0.9, f)
        count = torch.tensor(f.numel(), dtype=torch.float64, device=f.device)
        rows.append(torch.stack([*norms, count, *(v.double().sum() for v in counts)]))
    torch.ops.gradkernels.add_steps.default(torch.stack(rows), time_stats)


def _norm(v: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm, right also where the squares leave float64."""
    largest = torch.cat([v.abs().flatten(), v.new_zeros(1)]).amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return (v / scale).square().sum().sqrt() * scale


def without_graph(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient as a number. In most backwards it is one, and is_grads_batched has no rule for detach."""
    return gradient.detach() if gradient.requires_grad else gradient


def measured(reference: Callable, ports: Callable) -> Callable:
    """The plain implementation of a backward op `f(*args, stats)` made of `reference(*args)`, which has no telemetry.

    `ports(args, gradients)` lists the gradients in the order of the op's PORTS, None where there is none.
    """

    def backward(*args: Any) -> Any:
        *inputs, stats = args
        gradients = reference(*inputs)
        for port, gradient in enumerate(ports(inputs, gradients) if stats is not None else ()):
            if gradient is not None:
                torch.ops.gradkernels.probe_bwd.default(without_graph(gradient), stats, port)
        return gradients

    return backward
