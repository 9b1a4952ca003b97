"""Initialisers of recurrent layers, as functions on a module: nn.LSTM, nn.LSTMCell, gk.LSTM or gk.LSTMCell.

They write to every layer and direction, in place and without gradient, and give the module back. torch's LSTM has two bias
vectors, of which only the sum counts: what is set here is the sum, in bias_ih, and 0 in bias_hh.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from gradkernels.library import ArgumentError
from gradkernels.nn import LSTM, LSTMCell

INPUT, FORGET = 0, 1  # places of the gates in torch's order, i f g o
Module = TypeVar("Module", bound=nn.Module)


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Sets the forget gate's bias to `value`, so that the gate starts at sigmoid(value). Gers 2000; Jozefowicz 2015: 1.

    Raises TypeError for another module, ArgumentError for one without biases.
    """
    for bias_ih, bias_hh in _biases("forget_bias_", module):
        _gate(bias_ih, FORGET).fill_(value)
        _gate(bias_hh, FORGET).zero_()
    return module


def chrono_(module: Module, longest: float, generator: torch.Generator | None = None) -> Module:
    """Draws forget biases as log u, u uniform in [1, longest - 1], and sets the input gate's to their negatives.

    Units then remember for about u steps. longest: the longest lag that matters, at least 3. arXiv:1804.11188, equation 16.
    Raises TypeError for another module, ArgumentError for one without biases or for a shorter lag.
    """
    if not longest >= 3:
        raise ArgumentError(f"chrono_: longest must be at least 3, got {longest}")
    for bias_ih, bias_hh in _biases("chrono_", module):
        forget = _gate(bias_ih, FORGET)
        forget.copy_(torch.empty_like(forget).uniform_(1.0, longest - 1.0, generator=generator).log_())
        _gate(bias_ih, INPUT).copy_(-forget)
        for gate in (INPUT, FORGET):
            _gate(bias_hh, gate).zero_()
    return module


def orthogonal_recurrent_(module: Module, gain: float = 1.0, generator: torch.Generator | None = None) -> Module:
    """Makes each gate's block of weight_hh `gain` times a random orthogonal matrix. Saxe 2014, arXiv:1312.6120.

    Each of the four (H, H) blocks by itself: orthogonal columns of all (4H, H) together would make them smaller by half.
    With a projection the (H, P) blocks have orthonormal columns. Raises TypeError for another module.
    """
    with torch.no_grad():
        for weight in _weights("orthogonal_recurrent_", module, "weight_hh"):
            for block in weight.chunk(4):
                nn.init.orthogonal_(block, gain, generator=generator)
    return module


def _gate(bias: torch.Tensor, gate: int) -> torch.Tensor:
    return bias.detach().chunk(4)[gate]


def _weights(name: str, module: nn.Module, kind: str) -> Iterator[torch.Tensor]:
    if not isinstance(module, nn.LSTM | nn.LSTMCell | LSTM | LSTMCell):
        raise TypeError(f"{name}: module must be an LSTM or an LSTMCell, got {type(module).__name__}")
    return (value for key, value in module.named_parameters() if key == kind or key.startswith(f"{kind}_l"))


def _biases(name: str, module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = [tuple(_weights(name, module, kind)) for kind in ("bias_ih", "bias_hh")]
    if not pairs[0]:
        raise ArgumentError(f"{name}: module must have biases, got bias=False")
    return list(zip(*pairs, strict=True))
