"""python -m benchmarks.launch_cost: host time a call of the Triton ops, measured where there is no GPU.

On CPU tensors, the device's part replaced by nothing: Triton's driver by one that says it is an sm_90 and launches nothing, the
driver's launch function by one that returns. So what is timed is everything before that, for
  python   the op's Python function and Triton's `kernel[grid](...)`, up to its launcher, which is not in the figure: it
           reads the arguments again and calls the driver
  captured launches     the same call repeated by csrc/launch_cache.cpp, up to the driver's function
  PyTorch  the same op of PyTorch's on the CPU, which computes; and, at no rows, which only dispatches and allocates
All three are called through torch.ops. What is missing everywhere: the driver's own time, and what allocation costs on a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import harness, raw_calls
from gradkernels.library import _C
from gradkernels.triton import KERNELS
from gradkernels.triton import launch_cache as cache

SHAPE = (8, 64)
DTYPE = torch.bfloat16
NAMESPACE = "launch_cost"
ATEN = torch.ops.aten
Calls = dict[str, Callable[[int], object]]


class NoDriver:
    """Triton's driver of an sm_90 that is not there: kernels are compiled for it, loading and launching do nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": cache.LARGEST_SHARED},
            load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None


def launch_nothing(folder: Path) -> int:
    """The address of a C function that does nothing and returns 0."""
    source, library = folder / "nothing.c", folder / "nothing.so"
    source.write_text("int nothing(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
    return ctypes.cast(ctypes.CDLL(str(library)).nothing, ctypes.c_void_p).value


def define_ops() -> tuple[dict[str, Callable], dict[str, Callable]]:
    """({op: by its Python function}, {op: by captured launches}) at the CPU's key, in namespaces of their own."""
    both = []
    for namespace, use_launch_cache in ((f"{NAMESPACE}_python", False), (f"{NAMESPACE}_plan", True)):
        library, ops = torch.library.Library(namespace, "DEF"), {}
        KEPT.append(library)
        for op, kernel in KERNELS.items():
            library.define(str(getattr(torch.ops.gradkernels, op).default._schema).removeprefix("gradkernels::"))
            if use_launch_cache:
                _C.implement(f"{namespace}::{op}", "CPU", kernel, cache.capture)
            else:
                library.impl(op, kernel, "CPU")
            ops[op] = getattr(getattr(torch.ops, namespace), op).default
        both.append(ops)
    return both[0], both[1]


KEPT: list[torch.library.Library] = []


def calls_of(python: dict[str, Callable], captured: dict[str, Callable]) -> Iterator[tuple[str, str, Calls]]:
    """(op, direction, {implementation: call}); ours with telemetry in the backward, which eager has not."""
    x, weight = torch.randn(SHAPE, dtype=DTYPE), torch.randn(SHAPE[1:], dtype=DTYPE)
    ours = {**raw_calls.layer_norm(x), **raw_calls.gelu(x)}

    def layer_norm(x: torch.Tensor) -> tuple[Callable, tuple]:
        return ATEN.native_layer_norm.default, (x, SHAPE[1:], weight, weight, 1e-5)

    def layer_norm_backward(x: torch.Tensor) -> tuple[Callable, tuple]:
        forward, args = layer_norm(x)
        return ATEN.native_layer_norm_backward.default, (x, x, SHAPE[1:], *forward(*args)[1:], weight, weight, [True] * 3)

    eager = {
        ("layer_norm", "forward"): layer_norm,
        ("layer_norm", "backward"): layer_norm_backward,
        ("gelu", "forward"): lambda x: (ATEN.gelu.default, (x,)),
        ("gelu", "backward"): lambda x: (ATEN.gelu_backward.default, (x, x)),
    }
    for (op, direction), call_of in eager.items():
        name = f"{op}_{'fwd' if direction == 'forward' else 'bwd'}"
        calls = {
            "PyTorch": call_of(x),
            "PyTorch, no rows": call_of(x[:0]),
            "python": (python[name], ours[name]),
            "captured launches": (captured[name], ours[name]),
        }
        yield op, direction, {key: lambda index, op=op, args=args: op(*args) for key, (op, args) in calls.items()}


def lines() -> Iterator[dict]:
    """A line for every op, direction and implementation."""
    for op, direction, calls in calls_of(*define_ops()):
        for implementation, seconds in harness.time_rounds(calls).items():
            yield {
                "op": f"{op} host time",
                "implementation": implementation,
                "direction": direction,
                "dtype": str(DTYPE).removeprefix("torch."),
                "shape": list(SHAPE),
                "microseconds": harness.quantiles([1e6 * value for value in seconds]),
                "triton": triton.__version__,
            }
        replays = _C.caches_of(f"{NAMESPACE}_plan::{op}_{'fwd' if direction == 'forward' else 'bwd'}")["replays"]
        if replays == 0:
            raise RuntimeError(f"launch_cost: no captured launches of {op}, {direction}: its figure is the Python function's")


def main() -> None:
    """Prints a line a figure and writes benchmarks/results/<device>.jsonl."""
    triton.runtime.driver.set_active(NoDriver())
    found = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(cache, "can_launch", return_value=True):
        _C.set_launch_function(launch_nothing(Path(folder)))
        for line in lines():
            figures = line["microseconds"]
            print(f"{line['op']:<22}{line['direction']:<10}{line['implementation']:<18}{figures['median']:8.2f} us", flush=True)
            found.append(line)
    print(f"written to {harness.write(found, {line['op'] for line in found}).name}")


if __name__ == "__main__":
    main()
