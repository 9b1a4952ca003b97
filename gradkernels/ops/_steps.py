"""The time steps of a sequence, padded or packed, and the rows that each of them owns."""

from __future__ import annotations

import math

import torch

from gradkernels.library import ArgumentError


def check_steps(x: torch.Tensor, batch_sizes: torch.Tensor | None) -> None:
    """Raises ArgumentError unless there is a step, and batch_sizes are of a kind that can be read."""
    sizes = batch_sizes
    if sizes is not None and (sizes.dim() != 1 or sizes.dtype is not torch.int64 or sizes.device.type != "cpu"):
        got = f"{sizes.dtype} of shape {tuple(sizes.shape)} on {sizes.device}"
        raise ArgumentError(f"lstm_layer: batch_sizes must be int64 of shape (T,) on the CPU, got {got}")
    if (x if sizes is None else sizes).shape[0] == 0:
        raise ArgumentError("lstm_layer: Expected sequence length to be larger than 0 in RNN")


def rows_per_step(x: torch.Tensor, h0: torch.Tensor, batch_sizes: torch.Tensor | None) -> list[int]:
    """The number of rows of each time step, or an error where batch_sizes are not those of x and h0."""
    check_steps(x, batch_sizes)
    if batch_sizes is None:
        return [x.shape[1]] * x.shape[0]
    sizes, B, rows = batch_sizes.tolist(), h0.shape[0], x.shape[0]
    if sizes[0] != B or sizes != sorted(sizes, reverse=True) or sizes[-1] < 0 or sum(sizes) != rows:
        raise ArgumentError(f"lstm_layer: batch_sizes must start with {B}, not increase and add up to {rows}, got {sizes}")
    return sizes


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """The rows of a padded or packed tensor: (rows, columns), also where there are no columns."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
