"""The kernels for GPUs, in Triton: one file an op, each of which registers what runs where Triton compiles for the device.

Imported by gradkernels where torch was built for CUDA or ROCm and triton is installed; nothing else needs it.
"""

from importlib import import_module

from gradkernels.library import ON_CUDA as KERNELS
from gradkernels.ops import OPS
from gradkernels.triton.lstm import stack

for op in OPS:
    import_module(f"gradkernels.triton.{op.replace('lstm_', 'lstm.')}")

__all__ = ["KERNELS", "stack"]
