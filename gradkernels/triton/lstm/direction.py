"""One LSTM layer in one direction on a GPU, alone (layer.py) or in a stack (stack.py).

The products that know no time are PyTorch's: x W_ih^T before the time loop, dx and the gradients of the weights after
it; the recurrences are in forward.py and backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradkernels.ops.layer_norm import upcast
from gradkernels.ops.lstm import Stack
from gradkernels.triton.lstm.backward import BackwardResult, recurrence_backward
from gradkernels.triton.lstm.forward import recurrence_forward
from gradkernels.triton.lstm.persistent import recurrence_backward_chunk
from gradkernels.triton.lstm.sequence import Steps, multiply_float32, preactivations, previous_rows
from gradkernels.triton.lstm.time_stats import record_steps
from gradkernels.triton.probe import probe_each


@dataclass
class LayerDirection:
    """One direction of one layer. Its tensors hold the rows of all steps."""

    steps: Steps
    weights: list[torch.Tensor | None]  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    y: torch.Tensor
    gates: torch.Tensor
    cells: torch.Tensor
    num_concurrent: int = 1  # persistent recurrences between which the device is divided
    # Of the backward recurrence: what arrives; dh and dc in float32 (float64), with the state between chunks; what is left.
    dy: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] = ()
    dx: torch.Tensor | None = None
    result: BackwardResult | None = None
    of_weights: tuple[torch.Tensor | None, ...] = (None,) * 4

    def forward(self, begin: int, end: int) -> None:
        """The forward pass through steps `begin` to `end`; it has gone through all before them."""
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = self.weights
        whole, rows, (h, c) = (begin, end) == (0, len(self.steps.sizes)), self.rows(begin, end), self.before(begin)
        steps = self.steps if whole else Steps.of(self.steps.sizes[begin:end], self.steps.B, reverse=False)
        bias = None if bias_ih is None else upcast(bias_ih) + upcast(bias_hh)
        gates = preactivations(self.x[rows], weight_ih, bias, out=self.gates[rows])
        recurrence_forward(steps, gates, weight_hh, weight_hr, h, c, self.y[rows], self.cells[rows], self.num_concurrent)

    def receive(self, dy: torch.Tensor | None, dh_n: torch.Tensor | None, dc_n: torch.Tensor | None, inputs: bool) -> None:
        """What the backward recurrence begins with: dy (rows, P), contiguous, dh_n and dc_n; room for dx where `inputs`."""
        dtype, form = self.cells.dtype, torch.contiguous_format
        self.dy, self.dx = dy, self.x.new_empty(self.x.shape) if inputs else None
        self.state = tuple(
            torch.zeros_like(s, dtype=dtype, memory_format=form) if d is None else d.to(dtype, memory_format=form, copy=True)
            for d, s in ((dh_n, self.h0), (dc_n, self.c0))
        )

    def backward(self, begin: int, end: int, telemetry: bool) -> None:
        """The backward pass through steps `end` to `begin`; it has gone through all after them."""
        weight_ih, weight_hh, _, _, weight_hr = self.weights
        T, rows, (_, c0) = len(self.steps.sizes), self.rows(begin, end), self.before(begin)
        gates, cells = self.gates[rows], self.cells[rows]
        if (begin, end) == (0, T):
            args = (self.dy, *self.state, weight_hh, weight_hr, c0, gates, cells, telemetry)
            self.result = recurrence_backward(self.steps, *args, self.num_concurrent)
        else:
            dy, left = None if self.dy is None else self.dy[rows], self.result
            sums = (left.partials[begin:end], left.exponents[begin:end]) if telemetry else (None, None)
            outputs = (left.dgates[rows], *sums)
            args = (dy, self.state, weight_hh, c0, gates, cells, outputs)
            recurrence_backward_chunk(*args, end < T, begin > 0, self.num_concurrent)
        if self.dx is not None:
            torch.mm(self.result.dgates[rows], weight_ih, out=self.dx[rows])

    def multiply(self, wanted: Sequence[bool | None]) -> None:
        """dweight_ih, dweight_hh, dbias, dweight_hr, after the backward recurrence: products over the rows of all steps.

        wanted: which of `weights` want a gradient; None or False where there is no such weight.
        """
        dg, dtype = self.result.dgates, self.x.dtype
        of_ih, of_hh, of_bias_ih, of_bias_hh, of_hr = wanted
        dweight_ih = multiply_float32(dg.t(), self.x).to(dtype) if of_ih else None
        previous = previous_rows(self.steps, self.y, self.h0) if of_hh else None
        dweight_hh = multiply_float32(dg.t(), previous).to(dtype) if of_hh else None
        dbias, dweight_hr = dg.sum(0) if of_bias_ih or of_bias_hh else None, None
        if of_hr:
            m = (self.gates[:, -self.cells.shape[1] :] * self.cells.tanh()).to(dtype)
            dweight_hr = multiply_float32(self.result.dh_total.t(), m).to(dtype)
        self.of_weights = (dweight_ih, dweight_hh, dbias, dweight_hr)

    def record(self, stats: torch.Tensor | None, time_stats: torch.Tensor | None) -> None:
        """What the recurrence has measured, and the statistics of all gradients that are there, in the order of PORTS."""
        if time_stats is not None:
            record_steps(self.steps, self.result, self.c0.shape[1], time_stats)
        probe_each(stats, self.dy, self.dx, *self.of_weights)

    def rows(self, begin: int, end: int) -> slice:
        """The rows of steps `begin` to `end`."""
        return slice(self.steps.first[begin], self.steps.first[end])

    def before(self, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """h, and c in float32 (float64), with which the forward pass comes to step `begin`."""
        if begin == 0:
            return self.h0, upcast(self.c0).contiguous()
        rows = self.rows(begin - 1, begin)
        return self.y[rows], self.cells[rows]


@dataclass
class Call:
    """A pass of a call. chunks: (begin, end) of each, of which there is one where layers do not run concurrently."""

    stack: Stack
    chunks: list[tuple[int, int]]
    layer_directions: list[LayerDirection]
    masks: list[torch.Tensor]  # what dropout keeps of the output of each layer but the last, (rows, directions P), bool

    def layer(self, index: int) -> list[LayerDirection]:
        """The directions of a layer."""
        return self.layer_directions[index * self.stack.directions : (index + 1) * self.stack.directions]

    def drop(self, layer: int, values: torch.Tensor, rows: slice, columns: slice = slice(None)) -> None:
        """Dropout of what `layer` gives to the next one, or of its gradient, in place."""
        if self.masks:
            values.mul_(self.masks[layer][rows, columns]).mul_(self.stack.scale)

    def join(self, layer: int, begin: int, end: int) -> None:
        """The input of `layer` from the outputs of the one below, where it is not y itself."""
        layer_direction, below = self.layer(layer)[0], self.layer(layer - 1)
        rows = layer_direction.rows(begin, end)
        torch.cat([other.y[rows] for other in below], -1, out=layer_direction.x[rows])
        self.drop(layer - 1, layer_direction.x[rows], rows)

    def backward(self, index: int, begin: int, end: int) -> None:
        """A layer direction's backward recurrence through a chunk, with dy from the layer above."""
        (layer, direction), layer_direction = divmod(index, self.stack.directions), self.layer_directions[index]
        above = self.layer(layer + 1)
        if above and layer_direction.dy is not above[0].dx:
            P, rows = layer_direction.y.shape[1], layer_direction.rows(begin, end)
            columns = slice(direction * P, (direction + 1) * P)
            torch.sum(torch.stack([other.dx[rows, columns] for other in above]), 0, out=layer_direction.dy[rows])
            self.drop(layer, layer_direction.dy[rows], rows, columns)
        layer_direction.backward(begin, end, self.stack.time_stats[index] is not None)
