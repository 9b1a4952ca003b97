"""The kernels for GPUs, in Triton: one file an op, registered where the device is one that Triton compiles for.

Imported by gradkernels where torch was built for CUDA or ROCm and triton is installed; nothing else needs it.
"""

from gradkernels.library import implement
from gradkernels.triton import (
    add_layer_norm,
    gelu,
    layer_norm,
    lstm_backward,
    lstm_cell,
    lstm_forward,
    lstm_layer,
    probe,
    residual,
)
from gradkernels.triton.plans import watch

KERNELS = {
    "gelu_fwd": gelu.gelu_fwd,
    "gelu_bwd": gelu.gelu_bwd,
    "layer_norm_fwd": layer_norm.layer_norm_fwd,
    "layer_norm_bwd": layer_norm.layer_norm_bwd,
    "add_layer_norm_fwd": add_layer_norm.add_layer_norm_fwd,
    "add_layer_norm_bwd": add_layer_norm.add_layer_norm_bwd,
    "residual_bwd": residual.residual_bwd,
    "probe_bwd": probe.probe_bwd,
    "take_rows": probe.take_rows,
    "lstm_cell_fwd": lstm_cell.lstm_cell_fwd,
    "lstm_cell_bwd": lstm_cell.lstm_cell_bwd,
    "lstm_layer_fwd": lstm_layer.lstm_layer_fwd,
    "lstm_layer_bwd": lstm_layer.lstm_layer_bwd,
    "lstm_steps_fwd": lstm_forward.lstm_steps_fwd,
    "lstm_steps_bwd": lstm_backward.lstm_steps_bwd,
}
# torch.compile does not look into these: it would lay out one launch a step, and build another graph for every length.
OPAQUE = ("lstm_layer_fwd", "lstm_layer_bwd")

for op, kernel in KERNELS.items():
    implement(op, kernel, watch, opaque=op in OPAQUE)
