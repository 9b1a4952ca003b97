"""Fused kernels whose backward passes measure the gradients flowing through them. See README.md."""

import importlib.util

import torch

from gradkernels import init
from gradkernels.convert import convert, revert, uncovered
from gradkernels.diagnose import Finding, Severity, diagnose
from gradkernels.functional import (
    add_layer_norm,
    gelu,
    layer_norm,
    lstm,
    lstm_cell,
    lstm_layer,
    probe,
    residual,
    residual_add,
    residual_fork,
)
from gradkernels.implementations import implementations
from gradkernels.library import ArgumentError, import_after
from gradkernels.nn import GELU, LSTM, AddLayerNorm, LayerNorm, LSTMCell, Residual
from gradkernels.telemetry import FIELDS, TIME_FIELDS, History, Record, TimeProfile, new_stats, new_time_stats
from gradkernels.version import __version__
from gradkernels.watch import Coverage, Watch, watch

if (torch.version.cuda or torch.version.hip) and importlib.util.find_spec("triton"):
    import gradkernels.triton  # noqa: F401  registers its kernels

import_after("torch.distributed.tensor", "gradkernels.sharding")

__all__ = [
    "FIELDS",
    "GELU",
    "LSTM",
    "TIME_FIELDS",
    "AddLayerNorm",
    "ArgumentError",
    "Coverage",
    "Finding",
    "History",
    "LSTMCell",
    "LayerNorm",
    "Record",
    "Residual",
    "Severity",
    "TimeProfile",
    "Watch",
    "__version__",
    "add_layer_norm",
    "convert",
    "diagnose",
    "gelu",
    "implementations",
    "init",
    "layer_norm",
    "lstm",
    "lstm_cell",
    "lstm_layer",
    "new_stats",
    "new_time_stats",
    "probe",
    "residual",
    "residual_add",
    "residual_fork",
    "revert",
    "uncovered",
    "watch",
]
