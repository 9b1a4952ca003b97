"""An LSTM with zoneout or resets: one `lstm_cell` a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from gradkernels.autocast import autocast_region
from gradkernels.library import ArgumentError
from gradkernels.ops.lstm import Stack
from gradkernels.ops.lstm_cell import lstm_cell


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
    stack = Stack(num_layers, False, bias, None, dropout, (), ())
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
