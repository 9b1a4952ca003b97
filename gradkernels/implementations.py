"""Which implementation of each op runs on which device."""

import sys

from gradkernels.library import _C, ON_CUDA
from gradkernels.ops import OPS


def implementations() -> dict[str, str]:
    """What will run where: {"<op> on <device>": implementation}, so that no fallback is silent.

    The reference is plain PyTorch: right, differentiable, with the same statistics, and not fast.
    """
    native = f"C++ ({_C.cpu_capability()})" if _C is not None else "reference (PyTorch): the extension is not built"
    table = {f"{op} on cpu": native for op in OPS}
    table["autograd"] = "C++" if _C is not None else "Python: the extension is not built"
    if ON_CUDA:
        table.update({f"{op} on cuda": "Triton" for op in OPS if any(name.startswith(op) for name in ON_CUDA)})
    if "gradkernels._C_cuda" in sys.modules:
        table["lstm_layer on cuda"] = "CUDA C++ for 16-bit layers that fit the device, Triton for others"
    table["any op on any other device"] = "reference (PyTorch)"
    return table
