"""A pytest plugin (-p on_triton) that runs the ops' tests on the Triton kernels.

Where there is a GPU, tensors are made on it. Where there is none, the kernels are interpreted, and take the place of the
C++ ones on CPU tensors; rows then have several cells, as they do on a GPU, and so several programs run.
"""

import os

import numpy as np
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton.jit when the kernels are defined

import triton.language as tl  # noqa: E402

import gradkernels as gk  # noqa: E402
import gradkernels.triton  # noqa: E402


def round_to_bfloat16(values, source, target, rounding_mode):
    """The interpreter's conversion, but to the nearest even bfloat16, as a GPU converts; its own rounds ties away."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    return convert_float(values, source, target, rounding_mode)


def dot(builder, a, b, acc, input_precision, max_num_imprecise_acc):
    """The interpreter's product, but of bfloat16's values; its own multiplies their bits."""
    a, b = (
        interpreter.TensorHandle(convert_float(v.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
        if v.dtype == tl.bfloat16
        else v
        for v in (a, b)
    )
    return create_dot(builder, a, b, acc, input_precision, max_num_imprecise_acc)


new_stats, new_time_stats = gk.new_stats, gk.new_time_stats
if ON_GPU:
    torch.set_default_device("cuda")
    gk.new_stats = lambda ports, device="cuda": new_stats(ports, device)
    gk.new_time_stats = lambda steps, device="cuda": new_time_stats(steps, device)
else:
    from triton.runtime import interpreter

    convert_float, interpreter._convert_float = interpreter._convert_float, round_to_bfloat16
    create_dot, interpreter.InterpreterBuilder.create_dot = interpreter.InterpreterBuilder.create_dot, dot
    OVERRIDE = torch.library.Library("gradkernels", "IMPL")
    for op, kernel in gradkernels.triton.KERNELS.items():
        OVERRIDE.impl(op, kernel, "CPU", allow_override=True)
    gk.new_stats = lambda ports, device="cpu": new_stats(ports, device).expand(-1, 5, -1).contiguous()
