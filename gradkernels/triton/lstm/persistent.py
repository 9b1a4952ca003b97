"""Whether a time loop is taken by the persistent kernels of csrc/cuda, in one launch, and the call if so.

They are there where gradkernels._C_cuda was built, and take 16-bit dtypes without a projection, as long as all their programs
are resident on the device at once. Everything else goes step by step (forward.py, backward.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from gradkernels.triton.lstm.gates import NUM_SUMS
from gradkernels.triton.lstm.sequence import Steps

try:
    import gradkernels._C_cuda as _C_cuda
except ModuleNotFoundError:  # built without CUDA; an extension that does not load raises its own ImportError
    _C_cuda = None

OPS = torch.ops.gradkernels  # lstm_recurrence_fwd and lstm_recurrence_bwd are defined by _C_cuda


def tiling_of(
    y: torch.Tensor, weight_hr: torch.Tensor | None, H: int, backward: bool, B: int, num_concurrent: int = 1
) -> tuple[int, int]:
    """(programs, predicted cycles of a step) of the persistent recurrence over tensors like `y`, as one of `num_concurrent`
    such recurrences between which the device is divided. (0, 0) where there is no such kernel, or it does not fit.
    """
    taken = y.is_cuda and y.dtype in (torch.bfloat16, torch.float16) and weight_hr is None and B * H > 0
    if _C_cuda is None or not taken:
        return 0, 0
    return on_device(y.device.index, B, H, str(y.dtype).removeprefix("torch."), backward, num_concurrent)


@lru_cache(maxsize=1024)
def on_device(*case: Any) -> tuple[int, int]:
    """What the device answers, which is asked for at every recurrence and never changes."""
    return tuple(_C_cuda.recurrence_on_device(*case))


def takes(steps: Steps, y: torch.Tensor, weight_hr: torch.Tensor | None, H: int, backward: bool, num_concurrent: int) -> bool:
    """Whether a persistent kernel takes a recurrence: not into a CUDA graph, to which batch_sizes cannot be sent."""
    if steps.batch_sizes is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return tiling_of(y, weight_hr, H, backward, steps.B, num_concurrent)[0] > 0


def recurrence_forward(
    steps: Steps,
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    y: torch.Tensor,
    cells: torch.Tensor,
    num_concurrent: int,
) -> None:
    """Activates gates, fills y and cells."""
    OPS.lstm_recurrence_fwd(gates, weight_hh, h0, c0, y, cells, steps.batch_sizes, steps.reverse, num_concurrent)


def recurrence_backward(
    steps: Steps,
    dy: torch.Tensor | None,
    dh: torch.Tensor,
    dc: torch.Tensor,
    weight_hh: torch.Tensor,
    c0: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    dgates: torch.Tensor,
    telemetry: bool,
    num_concurrent: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(partials, exponents), None without telemetry: dgates filled, dh0 and dc0 in dh and dc."""
    (programs, _), T = tiling_of(dgates, None, c0.shape[1], True, steps.B, num_concurrent), len(steps.sizes)
    partials = dc.new_zeros(T, programs, NUM_SUMS.value, dtype=torch.float64) if telemetry else None
    exponents = torch.zeros(T, dtype=torch.int32, device=dc.device) if telemetry else None
    outputs, order = (dgates, partials, exponents), (steps.batch_sizes, steps.reverse)
    OPS.lstm_recurrence_bwd(
        dy, dh, dc, weight_hh.contiguous(), c0, gates, cells, *outputs, None, False, False, *order, num_concurrent
    )
    return partials, exponents


def recurrence_backward_chunk(
    dy: torch.Tensor | None,
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weight_hh: torch.Tensor,
    c0: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    continues_from: bool,
    continues_to: bool,
    num_concurrent: int,
) -> None:
    """recurrence_backward through some steps, with those after it run before: where persistent kernels take the case.

    state: dh, dc, and the carry (programs, 2) int32 with which they pass from chunk to chunk. outputs: dgates, partials,
    exponents. `continues_from`: not the last chunk of the sequence; `continues_to`: not the first. All but the state of these
    steps alone; bits are those of one recurrence.
    """
    dh, dc, carried_state = state
    OPS.lstm_recurrence_bwd(
        dy,
        dh,
        dc,
        weight_hh.contiguous(),
        c0,
        gates,
        cells,
        *outputs,
        carried_state,
        continues_from,
        continues_to,
        None,
        False,
        num_concurrent,
    )
