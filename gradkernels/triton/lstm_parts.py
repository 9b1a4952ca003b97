"""The parts of a stack of LSTM layers, each a layer in one direction, and what each does of a pass: lstm_stack.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkernels.functional import Stack
from gradkernels.ops.layer_norm import widen
from gradkernels.triton.lstm_backward import WalkedBack, walk_backward
from gradkernels.triton.lstm_forward import walk_forward
from gradkernels.triton.lstm_layer import weight_gradients
from gradkernels.triton.lstm_persistent import walk_span_back
from gradkernels.triton.lstm_steps import Steps, preactivations


@dataclass
class Part:
    """One direction of one layer. Its tensors hold the rows of all steps."""

    steps: Steps
    weights: list[torch.Tensor | None]  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    y: torch.Tensor
    gates: torch.Tensor
    cells: torch.Tensor
    at_once: int  # persistent walks between which the device is divided
    # Of the walk back: what arrives; dh and dc in float32 (float64), with spans the carry between them; what is left.
    dy: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] = ()
    dx: torch.Tensor | None = None
    walked: WalkedBack | None = None
    of_weights: tuple[torch.Tensor | None, ...] = (None,) * 4

    def walk(self, begin: int, end: int) -> None:
        """The forward pass through steps `begin` to `end`; it has gone through all before them."""
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = self.weights
        whole, rows, (h, c) = (begin, end) == (0, len(self.steps.sizes)), self.rows(begin, end), self.before(begin)
        steps = self.steps if whole else Steps.of(self.steps.sizes[begin:end], self.steps.B, reverse=False)
        bias = None if bias_ih is None else widen(bias_ih) + widen(bias_hh)
        gates = preactivations(self.x[rows], weight_ih, bias, out=self.gates[rows])
        projection = None if weight_hr is None else weight_hr.contiguous()
        outputs = (self.y[rows], self.cells[rows])
        walk_forward(steps, gates, weight_hh.contiguous(), projection, h.contiguous(), c, *outputs, self.at_once)

    def walk_back(self, begin: int, end: int, telemetry: bool) -> None:
        """The backward pass through steps `end` to `begin`; it has gone through all after them."""
        weight_ih, weight_hh, _, _, weight_hr = self.weights
        T, rows, (_, c0) = len(self.steps.sizes), self.rows(begin, end), self.before(begin)
        gates, cells = self.gates[rows], self.cells[rows]
        if (begin, end) == (0, T):
            args = (self.dy, *self.state, weight_hh, weight_hr, c0, gates, cells, telemetry)
            self.walked = walk_backward(self.steps, *args, self.at_once)
        else:
            dy, left = None if self.dy is None else self.dy[rows], self.walked
            sums = (left.partials[begin:end], left.exponents[begin:end]) if telemetry else (None, None)
            outputs = (left.dgates[rows], *sums)
            args = (dy, self.state, weight_hh, c0, gates, cells, outputs)
            walk_span_back(*args, end < T, begin > 0, self.at_once)
        if self.dx is not None:
            torch.mm(self.walked.dgates[rows], weight_ih, out=self.dx[rows])

    def multiply(self) -> None:
        """The gradients of the weights, after the walk back."""
        bias = self.weights[2] is not None
        self.of_weights = weight_gradients(self.steps, self.walked, self.x, self.y, self.h0, self.gates, self.cells, bias)

    def rows(self, begin: int, end: int) -> slice:
        """The rows of steps `begin` to `end`."""
        return slice(self.steps.first[begin], self.steps.first[end])

    def before(self, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """h, and c in float32 (float64), with which the forward pass comes to step `begin`; to a walk of all steps with 0."""
        if begin == 0:
            return self.h0, widen(self.c0).contiguous()
        rows = self.rows(begin - 1, begin)
        return self.y[rows], self.cells[rows]


@dataclass
class Call:
    """A pass of a call. spans: (begin, end) of each, of which there is one where layers do not walk at once."""

    stack: Stack
    spans: list[tuple[int, int]]
    parts: list[Part]
    masks: list[torch.Tensor]  # what dropout keeps of the output of each layer but the last, (rows, directions P), bool

    def layer(self, index: int) -> list[Part]:
        """The parts of a layer."""
        return self.parts[index * self.stack.directions : (index + 1) * self.stack.directions]

    def drop(self, layer: int, values: torch.Tensor, rows: slice, columns: slice = slice(None)) -> None:
        """Dropout of what `layer` gives to the next one, or of its gradient, in place."""
        if self.masks:
            values.mul_(self.masks[layer][rows, columns]).mul_(self.stack.scale)

    def join(self, layer: int, begin: int, end: int) -> None:
        """The input of `layer` from the outputs of the one below, where it is not y itself."""
        part, below = self.layer(layer)[0], self.layer(layer - 1)
        rows = part.rows(begin, end)
        torch.cat([other.y[rows] for other in below], -1, out=part.x[rows])
        self.drop(layer - 1, part.x[rows], rows)

    def walk_back(self, index: int, begin: int, end: int) -> None:
        """A part's walk back through a span, with dy from the layer above."""
        (layer, direction), part = divmod(index, self.stack.directions), self.parts[index]
        above = self.layer(layer + 1)
        if above and part.dy is not above[0].dx:
            P, rows = part.y.shape[1], part.rows(begin, end)
            columns = slice(direction * P, (direction + 1) * P)
            torch.sum(torch.stack([other.dx[rows, columns] for other in above]), 0, out=part.dy[rows])
            self.drop(layer, part.dy[rows], rows, columns)
        part.walk_back(begin, end, self.stack.time_stats[index] is not None)
