"""Fused kernels whose backward passes measure the gradients flowing through them. See README.md."""

from gradkernels.library import ArgumentError, implementations
from gradkernels.ops.add_layer_norm import add_layer_norm
from gradkernels.ops.gelu import gelu
from gradkernels.ops.layer_norm import layer_norm
from gradkernels.ops.probe import probe
from gradkernels.ops.residual import residual, residual_add, residual_fork
from gradkernels.telemetry import FIELDS, Record, new_stats

__version__ = "0.1.0"
__all__ = [
    "FIELDS",
    "ArgumentError",
    "Record",
    "add_layer_norm",
    "gelu",
    "implementations",
    "layer_norm",
    "new_stats",
    "probe",
    "residual",
    "residual_add",
    "residual_fork",
]
