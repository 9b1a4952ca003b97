"""LSTM and LSTMCell.

LSTM derives from torch's RNNBase and not from torch.nn.LSTM, at whose subclasses torch.compile breaks the graph.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from gradkernels.autocast import in_autocast
from gradkernels.library import ArgumentError
from gradkernels.nn.fused_module import FusedModule
from gradkernels.nn.zoneout import lstm_steps
from gradkernels.ops import lstm_cell as lstm_cell_op
from gradkernels.ops import lstm_layer as lstm_layer_op
from gradkernels.ops.lstm import lstm
from gradkernels.telemetry import make_room

State = tuple[torch.Tensor, torch.Tensor]


class _Quantizable(nn.Module):
    """Says so where torch.ao.quantization passes a layer by, which it looks up by its exact class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            layer = type(self).__name__
            warnings.warn(
                f"quantization looks layers up by class and leaves gradkernels' {layer} as it is: call gk.revert(model) first, "
                f"which gives torch.nn.{layer} back",
                stacklevel=2,
            )
        super().__setattr__(name, value)


class LSTM(_Quantizable, FusedModule, RNNBase):
    """torch.nn.LSTM whose backward measures, for each layer and direction, its gradients and those of every time step.

    Arguments, parameters, state_dict, inputs (padded, packed, unbatched), outputs, errors and random numbers are
    torch.nn.LSTM's. Beyond it:
    zoneout_h, zoneout_c: probability with which an element of h or c keeps its value of the step before (Krueger 2016), drawn
    in training; in eval mode the expectation is taken.
    forward(..., reset_mask=): (T, B), (B, T) with batch_first; where it is true, the states of that sequence are set to zero
    before that step. Not with packed input or two directions.
    Both run one `gk.lstm_cell` a step: slower, and without statistics of time steps.
    """

    PORTS, TWIN = lstm_layer_op.PORTS, nn.LSTM
    zoneout_h = zoneout_c = 0.0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
    ) -> None:
        args = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        super().__init__("LSTM", *args)
        for name, value in (("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c)):
            if not 0 <= value <= 1:
                raise ArgumentError(f"LSTM: {name} must be in [0, 1], got {value}")
            if value:
                setattr(self, name, float(value))

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of parameters and statistics, one for each layer and direction."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return tuple(f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions)

    def flatten_parameters(self) -> None:
        """Nothing: the weights are used where they are."""

    def __prepare_scriptable__(self) -> nn.Module:
        if self.zoneout_h or self.zoneout_c:
            raise NotImplementedError("torch.jit.script: LSTM with zoneout has no twin in torch.nn to be scripted in its place")
        return super().__prepare_scriptable__()

    def extra_repr(self) -> str:
        zoneout = "".join(f", {name}={getattr(self, name)}" for name in ("zoneout_h", "zoneout_c") if getattr(self, name))
        return super().extra_repr() + zoneout

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def forward(
        self, input: torch.Tensor | PackedSequence, hx: State | None = None, *, reset_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | PackedSequence, State]:
        if not isinstance(self, FusedModule):  # kept by somebody from before `revert`
            return type(self).forward(self, input, hx)
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, reset_mask)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        is_batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not is_batched:
            input = input.unsqueeze(batch_dim)
            reset_mask = None if reset_mask is None else reset_mask.unsqueeze(batch_dim)
        hx = self._zeros(input, input.size(batch_dim)) if hx is None else self._batched(hx, is_batched)
        self.check_forward_args(input, hx, None)
        output, *hidden = self._run(input, hx, None, reset_mask)
        if not is_batched:
            output, hidden = output.squeeze(batch_dim), [state.squeeze(1) for state in hidden]
        return output, tuple(hidden)

    def _forward_packed(self, packed: PackedSequence, hx: State | None, reset_mask: Any) -> tuple[PackedSequence, State]:
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        if reset_mask is not None:
            raise ArgumentError("LSTM: reset_mask must be None for packed input, got one")
        if batch_sizes.numel() == 0:
            raise ArgumentError("LSTM: Expected sequence length to be larger than 0 in RNN")
        if hx is None:
            self.check_input(input, batch_sizes)
            hx = self._zeros(input, int(batch_sizes[0]))
        else:
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_forward_args(input, hx, batch_sizes)
        output, *hidden = self._run(input, hx, batch_sizes, None)
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, self.permute_hidden(tuple(hidden), unsorted_indices)

    def _zeros(self, input: torch.Tensor, batch: int) -> State:
        count = self.num_layers * (2 if self.bidirectional else 1)
        return input.new_zeros(count, batch, self.proj_size or self.hidden_size), input.new_zeros(
            count, batch, self.hidden_size
        )

    def _batched(self, hx: State, is_batched: bool) -> State:
        """hx with a batch dimension, or torch.nn.LSTM's error."""
        dims, words = (3, "batched 3-D") if is_batched else (2, "unbatched 2-D")
        if hx[0].dim() != dims or hx[1].dim() != dims:
            raise RuntimeError(
                f"For {words} input, hx and cx should also be {dims}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        return hx if is_batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))

    def _run(self, input: torch.Tensor, hx: State, batch_sizes: Any, reset_mask: Any) -> tuple[torch.Tensor, ...]:
        self.enter(input)
        weights = [getattr(self, name) for names in self._all_weights for name in names]
        args = (input, hx, weights, self.num_layers)
        kwargs = {"bias": self.bias, "dropout": self.dropout, "training": self.training, "batch_first": self.batch_first}
        if reset_mask is not None or self.zoneout_h or self.zoneout_c:
            if batch_sizes is not None or self.bidirectional or self.proj_size:
                raise ArgumentError(
                    "LSTM: zoneout and reset_mask must be used with padded input, one direction and no projection, got "
                    f"packed={batch_sizes is not None}, bidirectional={self.bidirectional}, proj_size={self.proj_size}"
                )
            return lstm_steps(*args, **kwargs, zoneout=(self.zoneout_h, self.zoneout_c), reset_mask=reset_mask)
        steps = input.shape[1 if self.batch_first else 0] if batch_sizes is None else batch_sizes.shape[0]
        stats = [self.table(f"stats{suffix}") for suffix in self.suffixes]
        time_stats = [self._time_stats(suffix, steps) for suffix in self.suffixes]
        return lstm(
            *args, **kwargs, bidirectional=self.bidirectional, batch_sizes=batch_sizes, stats=stats, time_stats=time_stats
        )

    def _time_stats(self, suffix: str, steps: int) -> torch.Tensor | None:
        """The statistics of a layer and direction's time steps, with room for `steps` of them.

        They grow in place, so that a backward still to come writes where it should; and outside of torch.compile's graphs,
        in which a call of more steps records the first ones alone, says so in row 0, and `watch.step()` makes room.
        """
        time_stats = self.table(f"time_stats{suffix}")
        if time_stats is not None and time_stats.shape[0] <= steps and not torch.compiler.is_compiling():
            make_room(time_stats, steps)
        return time_stats


class LSTMCell(_Quantizable, FusedModule, nn.LSTMCell):
    """torch.nn.LSTMCell whose backward measures the gradients of h and c on both sides, of x and of the weights.

    Arguments, parameters, state_dict, inputs, outputs and errors are torch.nn.LSTMCell's; a mistake in shapes or dtypes is an
    `gk.ArgumentError` or a TypeError, with torch's words where torch.nn.LSTMCell has some.
    """

    PORTS, TWIN = lstm_cell_op.PORTS, nn.LSTMCell

    def forward(self, input: torch.Tensor, hx: State | None = None) -> State:
        if not isinstance(self, FusedModule):
            return type(self).forward(self, input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, value in enumerate(hx or ()):
            if value.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {value.dim()}D instead")
        is_batched = input.dim() == 2
        if not is_batched:
            input = input.unsqueeze(0)
        if hx is None:
            h = c = input.new_zeros(input.size(0), self.hidden_size)
        else:
            h, c = hx if is_batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        self._check_shapes(input, h, c)
        tensors = (input, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if in_autocast(input.device.type):
            tensors = _widest(tensors)
        self.enter(input)
        h, c = lstm_cell_op.lstm_cell(*tensors, stats=self.table())
        return (h, c) if is_batched else (h.squeeze(0), c.squeeze(0))

    def _check_shapes(self, input: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> None:
        if input.size(1) != self.input_size:
            raise ArgumentError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for index, state in enumerate((h, c)):
            if state.dim() != 2 or state.size(0) != input.size(0):
                raise ArgumentError(f"Input batch size {input.size(0)} doesn't match hidden{index} batch size {state.size(0)}")
            if state.size(1) != self.hidden_size:
                raise ArgumentError(
                    f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"
                )


def _widest(tensors: tuple) -> tuple:
    """All tensors in the widest dtype among them: an autocast region mixes them, and torch.nn.LSTMCell upcasts there too."""
    dtype = torch.float32
    for t in tensors:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return tuple(t if t is None else t.to(dtype) for t in tensors)
