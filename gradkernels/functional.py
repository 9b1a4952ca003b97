"""Every op as a function."""

from gradkernels.ops.add_layer_norm import add_layer_norm
from gradkernels.ops.gelu import gelu
from gradkernels.ops.layer_norm import layer_norm
from gradkernels.ops.lstm import lstm
from gradkernels.ops.lstm_cell import lstm_cell
from gradkernels.ops.lstm_layer import lstm_layer
from gradkernels.ops.probe import probe
from gradkernels.ops.residual import residual, residual_add, residual_fork

__all__ = [
    "add_layer_norm",
    "gelu",
    "layer_norm",
    "lstm",
    "lstm_cell",
    "lstm_layer",
    "probe",
    "residual",
    "residual_add",
    "residual_fork",
]
