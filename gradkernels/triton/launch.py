"""How kernels are launched: layouts, numbers of programs, and the way into torch.compile's graph."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gradkernels.telemetry import NUM_SLOTS
from gradkernels.triton.launch_cache import Recording

THREADS = 256  # a program of a pointwise kernel
VECTOR_BYTES = 16  # one access
REGISTERS = 64  # with statistics, a thread, so that four programs are resident an SM


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, maxnreg: int | None = None, **constants: Any
) -> None:
    """Runs the kernel on the current stream of its tensors' device, or puts the launch into the graph that is being traced.

    maxnreg: the registers a thread may take. It is NVIDIA's, and Inductor does not pass it on: a compiled graph launches the
    same kernel without it.
    """
    mode = _get_current_dispatch_mode()
    if mode is not None and not isinstance(mode, Recording):
        torch.library.wrap_triton(kernel)[grid](*args, **constants, num_warps=num_warps)
        return
    # A multiplication and an addition become one instruction, as in all of CUDA; Triton 3.10 no longer does so unasked.
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if maxnreg is not None and not torch.version.hip:
        options["maxnreg"] = maxnreg
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
        note(mode, kernel, run(kernel, grid, args, constants, options), grid, args, constants)


def note(mode: Any, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple, constants: dict[str, Any]) -> None:
    """Tells a recording what has been launched."""
    if isinstance(mode, Recording):
        given = dict(zip((parameter.name for parameter in kernel.params), args, strict=False))
        mode.launched(compiled, grid, given | constants)


def launch_each(launches: list[tuple[Any, tuple[int, ...], tuple]], *, num_warps: int, **constants: Any) -> None:
    """Runs each (kernel, grid, arguments) in turn, all with the same constants, as `launch` does; never in a traced graph.

    What is the same for all is done once: on the host a step of a recurrent layer is little more than its launch. A launch of
    no programs, for a step without rows or a layer without outputs, is left out.
    """
    launches = [launch for launch in launches if all(launch[1])]
    if not launches:
        return
    mode = _get_current_dispatch_mode()
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    with torch.cuda.device_of(next(arg for arg in launches[0][2] if isinstance(arg, torch.Tensor))):
        for kernel, grid, args in launches:
            note(mode, kernel, run(kernel, grid, args, constants, options), grid, args, constants)


def run(kernel: Any, grid: tuple[int, ...], args: tuple, constants: dict[str, Any], options: dict[str, Any]) -> Any:
    """The launch itself; the compiled kernel, or None where it is interpreted."""
    return kernel[grid](*args, **constants, **options)


def with_strides_of(model: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`t` with the strides of the dense tensor `model`, so that both can be read as flat arrays: itself, or a copy."""
    return t if t.stride() == model.stride() else torch.empty_like(model).copy_(t)


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; 2 for the CPU, where kernels are only ever interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def resident(num_warps: int, registers: int) -> int:
    """Programs of `num_warps` warps that an SM's 65,536 registers hold."""
    return max(1, 65536 // (32 * num_warps * registers))


def num_slots(stats: torch.Tensor | None) -> int:
    """The slots of a row: no more programs than that may run with statistics."""
    return NUM_SLOTS if stats is None else stats.shape[1]


def pointwise(kernel: Any, t: torch.Tensor, stats: torch.Tensor | None, *args: Any, **constants: Any) -> None:
    """Launches a pointwise kernel(*args, num_vectors, [stats, num_slots], ...) over the elements of the dense tensor `t`.

    Two accesses of 16 bytes a thread and tensor; one element at a time where their number is not a multiple of eight.
    Without statistics a program owns one block; with them every resident program goes through blocks in turns.
    """
    block = THREADS * 2 * VECTOR_BYTES // t.element_size()
    vector = 8 if t.numel() % 8 == 0 else 1
    num_programs = -(-t.numel() // block)
    cap = None
    if stats is not None:
        count = REGISTERS if t.element_size() < 8 else 2 * REGISTERS
        num_programs = min(num_programs, resident(THREADS // 32, count) * num_sms(t.device), num_slots(stats))
        cap = count
    launch(
        kernel,
        (max(1, num_programs),),
        *args,
        t.numel() // vector,
        stats,
        num_slots(stats),
        **constants,
        TELEMETRY=stats is not None,
        VECTOR=vector,
        BLOCK=block,
        SLOTS=THREADS,
        num_warps=THREADS // 32,
        maxnreg=cap,
    )
