"""The kernels for GPUs, in Triton: one file an op, each of which registers what runs where Triton compiles for the device.

Imported by gradkernels where torch was built for CUDA or ROCm and triton is installed; nothing else needs it.
"""

from gradkernels.triton import add_layer_norm, gelu, layer_norm, probe, residual
from gradkernels.triton.launch_cache import KERNELS
from gradkernels.triton.lstm import cell, layer, stack

__all__ = ["KERNELS", "add_layer_norm", "cell", "gelu", "layer", "layer_norm", "probe", "residual", "stack"]
