"""What a call of an op allocates, launches and returns, written down for csrc/launch_cache.cpp to do again without Python.

Launches are captured from what one call did, and only where everything it did is understood: allocations, views, and
launches of compiled kernels whose parameters, by the kernel's own declaration, are those that are passed. Any other call
stays in Python.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradkernels.library import _C, implement

ATEN = torch.ops.aten
ALLOCATIONS = frozenset(
    (
        ATEN.empty.memory_format,
        ATEN.empty_like.default,
        ATEN.empty_strided.default,
        ATEN.new_empty.default,
        ATEN.new_empty_strided.default,
    )
)
INTEGER_BYTES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8}
POINTER_BYTES = 8
SCRATCH = 2  # pointers that Triton passes behind a kernel's own parameters: to global and to profiling memory, null if unused
LITERAL = -1
UNDERSTOOD = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
UNUSED = ("global_scratch_size", "profile_scratch_size", "tensordesc_meta", "instrumentation_mode")
LARGEST_SHARED = 228 * 1024  # bytes; above this Triton's launch carries an attribute more
Parameters = list[tuple[int, int]]


class Recording(TorchDispatchMode):
    """What is done while it is entered: allocations, launches, and whether there was anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[torch.Tensor] = []
        self.launches: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
        self.understood = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.allocations.append(result)
        elif func._schema.is_mutable or not is_view(result, args):
            self.understood = False
        return result

    def launched(self, compiled: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        """Called after each launch: the compiled kernel, if it was compiled, and its arguments by name."""
        self.launches.append((compiled, grid, given))

    def captured(self, inputs: tuple, outputs: tuple) -> tuple | None:
        """(allocations, launches, outputs, what keeps the kernels), as csrc/launch_cache.cpp reads it, or None."""
        results = [self._which(t) for t in outputs]
        device = next(t for t in inputs if isinstance(t, torch.Tensor)).device
        if not self.understood or None in results or any(t.device != device for t in self.allocations):
            return None
        starts = [t if isinstance(t, torch.Tensor) and t.numel() else None for t in inputs]
        launches = [self._launch(*launch, starts) for launch in self.launches]
        if None in launches or (launches and not can_launch(device)):
            return None
        return self._used(launches, results, len(inputs))

    def _which(self, output: torch.Tensor) -> int | None:
        """Which allocation the output is, all of it as it was made."""
        form = lambda t: (storage_of(t), t.shape, t.stride(), t.storage_offset(), t.dtype)  # noqa: E731
        return next((index for index, t in enumerate(self.allocations) if form(t) == form(output)), None)

    def _launch(self, compiled: Any, grid: tuple[int, ...], given: dict[str, Any], inputs: list) -> tuple | None:
        if compiled is None or min(grid) < 1 or not is_plain(compiled.metadata):
            return None
        parameters = self._parameters(compiled, given, inputs)
        if parameters is None:
            return None
        metadata = compiled.metadata
        threads = metadata.num_warps * metadata.target.warp_size
        whole_grid = (*grid, 1, 1)[:3]
        return (metadata.name, compiled.function, whole_grid, threads, metadata.shared, parameters)

    def _parameters(self, compiled: Any, given: dict[str, Any], inputs: list) -> Parameters | None:
        """(tensor, byte offset) or (LITERAL, bits) of each parameter, if that is what the kernel declares."""
        found, sizes = [], []
        for name, kind in compiled.src.signature.items():
            if kind == "constexpr":
                continue
            parameter = self._place(given[name], inputs) if kind.startswith("*") else literal(given[name], kind)
            if parameter is None:
                return None
            found.append(parameter)
            sizes.append(POINTER_BYTES if kind.startswith("*") else size_of(kind))
        found += [(LITERAL, 0)] * SCRATCH
        sizes += [POINTER_BYTES] * SCRATCH
        return found if declared_sizes(compiled) == tuple(sizes) else None

    def _place(self, t: torch.Tensor, inputs: list) -> tuple[int, int] | None:
        """Which input or allocation the tensor lies in, and how far in; None where that is not one alone."""
        if t.numel() == 0:
            return LITERAL, 0
        memory = list(enumerate([*inputs, *self.allocations]))
        owners = [(index, owner) for index, owner in memory if owner is not None and lies_in(t, owner)]
        return (owners[0][0], t.data_ptr() - owners[0][1].data_ptr()) if len(owners) == 1 else None

    def _used(self, launches: list, results: list[int], num_inputs: int) -> tuple:
        """The captured launches without allocations that nobody looks at."""
        seen = {tensor - num_inputs for launch in launches for tensor, _ in launch[-1] if tensor >= num_inputs}
        kept = sorted(seen | set(results))
        moved = {num_inputs + old: num_inputs + new for new, old in enumerate(kept)}
        launches = [(*launch[:-1], [(moved.get(tensor, tensor), value) for tensor, value in launch[-1]]) for launch in launches]
        return (
            [(list(t.shape), list(t.stride()), t.dtype) for t in (self.allocations[index] for index in kept)],
            launches,
            [kept.index(index) for index in results],
            [compiled for compiled, _, _ in self.launches],
        )


def is_view(result: Any, args: tuple) -> bool:
    """Whether the result is memory of an argument's."""
    return isinstance(result, torch.Tensor) and any(
        storage_of(t) == storage_of(result) for t in args if isinstance(t, torch.Tensor)
    )


def storage_of(t: torch.Tensor) -> int:
    """The identity of the tensor's storage, as long as that lives."""
    return t.untyped_storage()._cdata


def extent(t: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return t.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)))


def lies_in(t: torch.Tensor, owner: torch.Tensor) -> bool:
    """Whether t's first element is within the owner's memory; neither is empty."""
    return owner.numel() > 0 and 0 <= t.data_ptr() - owner.data_ptr() < extent(owner)


def size_of(kind: str) -> int:
    """Bytes of a scalar parameter of Triton's type `kind`, 0 for one that is not understood."""
    return INTEGER_BYTES.get(kind, {"fp32": 4, "fp64": 8}.get(kind, 0))


def literal(value: Any, kind: str) -> tuple[int, int] | None:
    """A scalar's bits, in the low bytes of an int."""
    if kind in INTEGER_BYTES:
        return LITERAL, int(value) & (2 ** (8 * INTEGER_BYTES[kind]) - 1)
    codes = {"fp32": "<f", "fp64": "<d"}
    return (LITERAL, int.from_bytes(struct.pack(codes[kind], value), "little")) if kind in codes else None


def is_plain(metadata: Any) -> bool:
    """Whether a launch of the kernel is grid, block, shared memory and parameters alone."""
    usual = all(getattr(metadata, name, value) == value for name, value in UNDERSTOOD.items())
    clusters = set(getattr(metadata, "cluster_dims", ())) <= {1}
    return usual and clusters and metadata.shared <= LARGEST_SHARED and not any(getattr(metadata, name, 0) for name in UNUSED)


def declared_sizes(compiled: Any) -> tuple[int, ...] | None:
    """Bytes of each parameter in their order, as the kernel's assembly declares them."""
    for language, sizes in (("ptx", ptx_sizes), ("amdgcn", amdgcn_sizes)):
        if language in compiled.asm:
            return sizes(compiled.asm[language], compiled.metadata.name)
    return None


@cache
def ptx_sizes(text: str, name: str) -> tuple[int, ...] | None:
    entry = re.search(rf"\.entry\s+{re.escape(name)}\((.*?)\)", text, re.DOTALL)
    return tuple(int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)\s", entry[1])) if entry else None


@cache
def amdgcn_sizes(text: str, name: str) -> tuple[int, ...]:
    kinds = re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", text)
    return tuple(int(size) for size, kind in kinds if not kind.startswith("hidden"))


@cache
def can_launch(device: torch.device) -> bool:
    """Whether C++ can launch on the device: it has the driver's function, and sees the stream that PyTorch's Python sees."""
    if _C.stream_of(device) != torch.cuda.current_stream(device).cuda_stream:
        return False
    _C.set_launch_function(launch_address())
    return True


def launch_address() -> int:
    """The address of the driver's launch function."""
    import ctypes

    if torch.version.hip:
        from triton.backends.amd.driver import _get_path_to_hip_runtime_dylib

        function = ctypes.CDLL(_get_path_to_hip_runtime_dylib()).hipModuleLaunchKernel
    else:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    return ctypes.cast(function, ctypes.c_void_p).value


def capture(kernel: Callable, *args: Any) -> tuple[Any, tuple | None]:
    """(what `kernel(*args)` returns, the captured launches of such a call or None)."""
    with Recording() as recording:
        result = kernel(*args)
    outputs = result if isinstance(result, tuple) else () if result is None else (result,)
    return result, recording.captured(args, outputs)


def register(op: str, kernel: Callable, opaque: bool = False) -> None:
    """Makes `kernel`, which launches Triton kernels, what runs for `op` on GPUs. opaque: torch.compile does not look in."""
    implement(op, kernel, capture, opaque=opaque)
