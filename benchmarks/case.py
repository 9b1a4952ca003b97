"""What a benchmark is: one op at one shape and dtype, described once for every device.

A description holds no tensors: inputs and statistics are made on the device that is asked for. On the meta device, where
nothing is computed, its bytes are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradkernels as gk
from gradkernels.ops import OPS

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = {  # the most important first on a GPU
    "cpu": ((8, 64), (64, 256), (512, 768), (2048, 768), (2048, 3072), (8192, 1024)),
    "cuda": ((8192, 4096), (16384, 1024), (4096, 4096), (2048, 8192), (8192, 8192), (512, 768), (64, 256), (8, 64)),
    "dry run": ((16, 64),),
}
COMPILED_SHAPES = ((512, 768), (8192, 1024))  # on a CPU; on a GPU all are
BASE = "eager"
ALLOWED_ERROR = 2.0  # a variant whose error against float64 exceeds this multiple of eager's is not timed
ORDER_OF_SUMS = 64  # roundings
META = torch.device("meta")

Tensors = Sequence[torch.Tensor]
Variant = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype. A variant maps the inputs to one output or several.

    fused: ours; with `tables`, statistics on a device, as keyword arguments it measures.
    flops: of an op made of products, twice its multiply-adds; its share of the rate of one large product, measured in the same
    rounds, then says how far it is from what the arithmetic allows.
    replayed: the variants that are also replayed from a CUDA graph. None: all of them, and of a call, which is few launches,
    the host's time is taken.
    check: a smaller case of the op whose correctness stands for this one's.
    """

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make_inputs: Callable[[torch.device], list[torch.Tensor]]
    eager: Variant
    fused: Variant
    tables: Callable[[torch.device], dict[str, Any]]
    compiled: bool = True
    others: dict[str, Variant] = field(default_factory=dict)
    flops: int = 0
    replayed: tuple[str, ...] | None = None
    check: Case | None = None
    tf32: bool = False

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        """New ones, that require gradients."""
        return [tensor.requires_grad_() for tensor in self.make_inputs(device)]

    def variants(self, device: torch.device) -> dict[str, Variant]:
        """{name: variant} of all that is timed."""
        measured = partial(self.fused, **self.tables(device))
        found = {BASE: self.eager, "telemetry off": self.fused, "telemetry on": measured}
        if self.compiled and (device.type == "cuda" or self.shape in COMPILED_SHAPES):
            found["torch.compile"] = torch.compile(self.eager, dynamic=False)
        return {**found, **self.others}

    def buffers(self, device: torch.device, size: int = 0, count: int = 1) -> list[tuple[list, list]]:
        """(inputs, random dy of every output), until they hold `size` bytes, but no more than `count`."""
        torch.manual_seed(0)
        found, held = [], 0
        while not found or (held < size and len(found) < count):
            inputs = self.inputs(device)
            dys = [torch.randn_like(output) for output in outputs_of(self.eager, inputs)]
            found.append((inputs, dys))
            held += sum(tensor.nbytes for tensor in (*inputs, *dys))
        return found


def grid(where: str) -> Iterator[tuple[torch.dtype, tuple[int, int]]]:
    """Every dtype and shape of a pointwise op or a norm."""
    return ((dtype, shape) for dtype in DTYPES for shape in SHAPES[where])


def normal(dtype: torch.dtype, *shapes: tuple[int, ...]) -> Callable[[torch.device], list[torch.Tensor]]:
    """What makes an input of each shape, of normal random numbers."""
    return lambda device: [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def stats(op: str) -> Callable[[torch.device], dict[str, torch.Tensor]]:
    """What makes the statistics of an op."""
    return lambda device: {"stats": gk.new_stats(len(OPS[op].PORTS), device)}


def flops_of(rows: int, make_inputs: Callable[[torch.device], list[torch.Tensor]]) -> int:
    """Of the products of every row with every weight matrix forward, and of the two for each backward."""
    return 3 * 2 * rows * sum(weight.numel() for weight in make_inputs(META)[1:] if weight.dim() == 2)


def outputs_of(variant: Variant, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The variant's outputs, always as a tuple."""
    result = variant(*inputs)
    return result if isinstance(result, tuple) else (result,)


def forward(variant: Variant, inputs: Tensors, dys: Tensors) -> tuple[torch.Tensor, ...]:
    """Outputs alone, without a graph for autograd."""
    with torch.no_grad():
        return outputs_of(variant, inputs)


def forward_backward(variant: Variant, inputs: Tensors, dys: Tensors) -> tuple[torch.Tensor, ...]:
    """Outputs and the gradients of all inputs."""
    outputs = outputs_of(variant, inputs)
    return (*outputs, *torch.autograd.grad(outputs, inputs, dys))


DIRECTIONS = {"forward": forward, "forward+backward": forward_backward}


class _Bytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that every op takes and returns. A view moves nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, results))
            self.total += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return results


def bytes_moved(case: Case, direction: str, device: torch.device = META) -> int:
    """What the fused ops read and write without statistics: inputs, outputs, saved tensors and gradients, each once an op."""
    inputs = case.inputs(device)
    dys = [torch.empty_like(output) for output in outputs_of(case.fused, inputs)]
    with _Bytes() as moved:
        DIRECTIONS[direction](case.fused, inputs, dys)
    return moved.total


def gate(case: Case, variants: dict[str, Variant], inputs: Tensors, dys: Tensors) -> list[str]:
    """The variants that are wrong: an error beyond ALLOWED_ERROR times eager's against float64, plus rounding."""
    wide_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = forward_backward(case.eager, wide_inputs, [dy.double() for dy in dys])
    base = forward_backward(case.eager, inputs, dys)
    # In float64 eager is its own truth, and its error 0: ours may differ by what sums in another order do.
    rounding = torch.finfo(case.dtype).eps * (ORDER_OF_SUMS if case.dtype is torch.float64 else 1)
    wrong = []
    for name, variant in variants.items():
        for got, eager, truth in zip(forward_backward(variant, inputs, dys), base, exact, strict=True):
            allowed = ALLOWED_ERROR * (eager.double() - truth).abs().max() + rounding * truth.abs().max()
            if not (got.double() - truth).abs().max() <= allowed:
                wrong.append(name)
                break
    return wrong
