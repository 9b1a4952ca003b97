"""A stack of LSTM layers in one or two directions, with dropout between them: what torch.nn.LSTM computes.

It is made of `lstm_layer`, one layer and direction after the other. On a GPU several of them run at the same time where that
pays: triton/lstm/stack.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from gradkernels.autocast import autocast_region
from gradkernels.library import ArgumentError, define_composite
from gradkernels.ops.lstm_layer import lstm_layer

SCHEMA = (
    "lstm(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, int num_layers, bool bidirectional, bool bias, "
    "Tensor? batch_sizes, float dropout, Tensor?[] stats, Tensor?[] time_stats) -> (Tensor y, Tensor h_n, Tensor c_n)"
)

IMPLEMENTED: set[str] = set()  # kinds of device for which the op has an implementation of its own, beside the reference


@dataclass(frozen=True)
class Stack:
    """What a call of `lstm` is beside its tensors: the op's arguments from num_layers on.

    What there is of each layer and direction stands in a flat list, the reverse direction of a layer after its forward one.
    """

    num_layers: int
    bidirectional: bool
    bias: bool
    batch_sizes: torch.Tensor | None
    dropout: float  # between layers
    stats: Sequence[torch.Tensor | None]
    time_stats: Sequence[torch.Tensor | None]

    @property
    def directions(self) -> int:
        """One or two."""
        return 2 if self.bidirectional else 1

    @property
    def layer_directions(self) -> int:
        """Layers times directions."""
        return self.num_layers * self.directions

    @property
    def scale(self) -> float:
        """What dropout multiplies the elements by that it keeps."""
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0

    def weights_of(self, weights: Sequence[Any], index: int) -> list[Any]:
        """What belongs to weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of a layer and direction; None where missing."""
        each = len(weights) // self.layer_directions
        own = list(weights[index * each : (index + 1) * each])
        projection = own.pop() if each in (3, 5) else None
        return [*own, *(() if self.bias else (None, None)), projection]


def sequential(
    stack: Stack,
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    drop: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h_n, c_n) of the stack, one `lstm_layer` after the other; x time-major or packed. drop(y, layer): dropout."""
    h_n, c_n = [], []
    for layer in range(stack.num_layers):
        outputs = []
        for direction in range(stack.directions):
            index = layer * stack.directions + direction
            result = lstm_layer(
                x,
                h0[index],
                c0[index],
                *stack.weights_of(weights, index),
                batch_sizes=stack.batch_sizes,
                reverse=direction == 1,
                stats=stack.stats[index],
                time_stats=stack.time_stats[index],
            )
            for values, value in zip((outputs, h_n, c_n), result, strict=True):
                values.append(value)
        x = torch.cat(outputs, -1) if stack.bidirectional else outputs[0]
        if stack.dropout and layer < stack.num_layers - 1:
            x = F.dropout(x, stack.dropout) if drop is None else drop(x, layer)
    return x, torch.stack(h_n), torch.stack(c_n)


def lstm_reference(
    x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, weights: Sequence[torch.Tensor], *stack: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sequential` of the op's arguments."""
    return sequential(Stack(*stack), x, h0, c0, weights)


_lstm_op = define_composite(SCHEMA, lstm_reference)


def lstm(
    x: torch.Tensor,
    hx: tuple[torch.Tensor, torch.Tensor],
    weights: Sequence[torch.Tensor],
    num_layers: int = 1,
    *,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: torch.Tensor | None = None,
    stats: Sequence[torch.Tensor | None] | None = None,
    time_stats: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h_n, c_n) of a stack of LSTM layers; what torch.nn.LSTM computes. See `gk.ops.lstm_layer` for one layer.

    x: (T, B, D), (B, T, D) with batch_first, or (sum of batch_sizes, D) packed. hx: h_0 and c_0, each (layers * directions,
    B, .), the reverse direction of a layer after its forward one. weights: flat, for each of these in order weight_ih,
    weight_hh, then bias_ih, bias_hh where `bias`, then weight_hr where there is a projection.
    dropout: probability, applied to the output of every layer but the last where `training`.
    stats, time_stats: for each layer and direction, in that order, a tensor or None, written in backward.
    Returns y with the directions side by side: x's shape but for the last dimension; h_n and c_n: hx's shapes. In a CPU
    autocast region everything but float64 is cast to its dtype, as torch.nn.LSTM does. Raises ArgumentError where the
    number of weights or statistics does not fit, and what `lstm_layer` raises.
    """
    count = num_layers * (2 if bidirectional else 1)
    if num_layers < 1:
        raise ArgumentError(f"lstm: num_layers must be at least 1, got {num_layers}")
    for name, state in zip(("h_0", "c_0"), hx, strict=True):
        if state.dim() != 3 or state.shape[0] != count:
            raise ArgumentError(f"lstm: {name} must have shape ({count}, B, .), got {tuple(state.shape)}")
    if len(weights) == 0 or len(weights) % count or len(weights) // count not in ((4, 5) if bias else (2, 3)):
        each = "4 or 5" if bias else "2 or 3"
        raise ArgumentError(
            f"lstm: weights must hold {each} tensors for each of {count} layers and directions, got {len(weights)}"
        )
    for name, given in (("stats", stats), ("time_stats", time_stats)):
        if given is not None and len(given) != count:
            raise ArgumentError(
                f"lstm: {name} must hold a tensor or None for each of {count} layers and directions, got {len(given)}"
            )
    x, h0, c0, *weights = autocast_region(x, *hx, *weights)
    transposed = batch_first and batch_sizes is None and x.dim() == 3
    x = x.transpose(0, 1) if transposed else x
    measured = ([None] * count if given is None else given for given in (stats, time_stats))
    stack = (num_layers, bidirectional, bias, batch_sizes, dropout if training else 0.0, *measured)
    # Where only the reference can run, the way to it through the dispatcher costs 20 us. A trace cannot hold lists with None.
    run = _lstm_op if x.device.type in IMPLEMENTED and not torch.jit.is_tracing() else lstm_reference
    y, h_n, c_n = run(x, h0, c0, weights, *stack)
    return y.transpose(0, 1) if transposed else y, h_n, c_n
