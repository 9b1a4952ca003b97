"""Functions made of several ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from gradkernels.library import ON_CUDA, SPREAD, ArgumentError, autocast_region
from gradkernels.ops.lstm_cell import lstm_cell
from gradkernels.ops.lstm_layer import lstm_layer


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
    directions = 2 if bidirectional else 1
    parts = num_layers * directions
    if num_layers < 1:
        raise ArgumentError(f"lstm: num_layers must be at least 1, got {num_layers}")
    for name, state in zip(("h_0", "c_0"), hx, strict=True):
        if state.dim() != 3 or state.shape[0] != parts:
            raise ArgumentError(f"lstm: {name} must have shape ({parts}, B, .), got {tuple(state.shape)}")
    if len(weights) == 0 or len(weights) % parts or len(weights) // parts not in ((4, 5) if bias else (2, 3)):
        each = "4 or 5" if bias else "2 or 3"
        raise ArgumentError(f"lstm: weights must hold {each} tensors for each of {parts} parts, got {len(weights)}")
    for name, given in (("stats", stats), ("time_stats", time_stats)):
        if given is not None and len(given) != parts:
            raise ArgumentError(f"lstm: {name} must hold a tensor or None for each of {parts} parts, got {len(given)}")
    x, h0, c0, *weights = autocast_region(x, *hx, *weights)
    transposed = batch_first and batch_sizes is None and x.dim() == 3
    x = x.transpose(0, 1) if transposed else x
    measured = (tuple((None,) * parts if given is None else given) for given in (stats, time_stats))
    stack = Stack(num_layers, directions, bias, batch_sizes, dropout if training else 0.0, *measured)
    y, h_n, c_n = _at_once(stack, x, h0, c0, weights) or in_turn(stack, x, h0, c0, weights)
    return y.transpose(0, 1) if transposed else y, h_n, c_n


@dataclass(frozen=True)
class Stack:
    """What a call of `lstm` is beside its tensors. A part is a layer in one direction: `directions` of them a layer."""

    num_layers: int
    directions: int
    bias: bool
    batch_sizes: torch.Tensor | None
    dropout: float  # between layers
    stats: tuple[torch.Tensor | None, ...]
    time_stats: tuple[torch.Tensor | None, ...]

    @property
    def parts(self) -> int:
        """Layers times directions."""
        return self.num_layers * self.directions

    @property
    def scale(self) -> float:
        """What dropout multiplies the elements by that it keeps."""
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0

    def weights_of(self, weights: Sequence[Any], part: int) -> list[Any]:
        """What belongs to weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of a part; None where there is none."""
        each = len(weights) // self.parts
        own = list(weights[part * each : (part + 1) * each])
        projection = own.pop() if each in (3, 5) else None
        return [*own, *(() if self.bias else (None, None)), projection]


def in_turn(
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
            part = layer * stack.directions + direction
            result = lstm_layer(
                x,
                h0[part],
                c0[part],
                *stack.weights_of(weights, part),
                batch_sizes=stack.batch_sizes,
                reverse=direction == 1,
                stats=stack.stats[part],
                time_stats=stack.time_stats[part],
            )
            for values, value in zip((outputs, h_n, c_n), result, strict=True):
                values.append(value)
        x = torch.cat(outputs, -1) if stack.directions == 2 else outputs[0]
        if stack.dropout and layer < stack.num_layers - 1:
            x = F.dropout(x, stack.dropout) if drop is None else drop(x, layer)
    return x, torch.stack(h_n), torch.stack(c_n)


def _at_once(
    stack: Stack, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """What in_turn gives, of a GPU that walks through several parts at once; None where it does not."""
    if stack.parts == 1 or not x.is_cuda or not ON_CUDA or torch.compiler.is_compiling():
        return None
    if any(type(tensor) in SPREAD for tensor in (x, h0, c0, *weights)):
        return None
    from gradkernels.triton.lstm_stack import side_by_side

    return side_by_side(stack, x, h0, c0, weights)


def lstm_steps(
    x: torch.Tensor,
    hx: tuple[torch.Tensor, torch.Tensor],
    weights: Sequence[torch.Tensor],
    num_layers: int = 1,
    *,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    zoneout: tuple[float, float] = (0.0, 0.0),
    reset_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`lstm` in one direction, one `lstm_cell` a step, with zoneout and resets.

    zoneout: (of h, of c), the probability z with which an element keeps its value of the step before, arXiv:1606.01305: in
    training by a random mask, else state = z state + (1 - z) new state. reset_mask: bool, (T, B), (B, T) with batch_first;
    where it is true both states of that sequence are zero before that step. The rest as for `lstm`, without statistics.
    Raises TypeError or ArgumentError for a reset_mask of another dtype or shape, and what `lstm_cell` raises.
    """
    x, h0, c0, *weights = autocast_region(x, *hx, *weights)
    if reset_mask is not None and reset_mask.dtype is not torch.bool:
        raise TypeError(f"lstm: reset_mask must be bool, got {reset_mask.dtype}")
    if reset_mask is not None and reset_mask.shape != x.shape[:2]:
        raise ArgumentError(f"lstm: reset_mask must have shape {tuple(x.shape[:2])}, got {tuple(reset_mask.shape)}")
    keep = None if reset_mask is None else (~reset_mask).to(x.dtype).unsqueeze(-1)
    if batch_first:
        x, keep = x.transpose(0, 1), None if keep is None else keep.transpose(0, 1)
    if x.shape[0] == 0:
        raise ArgumentError("lstm: Expected sequence length to be larger than 0 in RNN")
    stack = Stack(num_layers, 1, bias, None, dropout, (), ())
    h_n, c_n = [], []
    for layer in range(num_layers):
        own, outputs, state = stack.weights_of(weights, layer)[:4], [], (h0[layer], c0[layer])
        for t in range(x.shape[0]):
            if keep is not None:
                state = (state[0] * keep[t], state[1] * keep[t])
            new = lstm_cell(x[t], *state, *own)
            state = tuple(_zoned_out(old, now, z, training) for old, now, z in zip(state, new, zoneout, strict=True))
            outputs.append(state[0])
        h_n.append(state[0])
        c_n.append(state[1])
        x = torch.stack(outputs)
        if dropout and training and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    return x.transpose(0, 1) if batch_first else x, torch.stack(h_n), torch.stack(c_n)


def _zoned_out(old: torch.Tensor, new: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """`new` where an element moves on, `old` where it stays."""
    if probability == 0:
        return new
    if not training:
        return probability * old + (1 - probability) * new
    return torch.where(torch.rand_like(new) < probability, old, new)
