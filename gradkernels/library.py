"""The one place where ops are defined with PyTorch's dispatcher, the extension is loaded, and errors get their type."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

try:
    import gradkernels._C as _C
except ModuleNotFoundError:  # installed without a C++ compiler; a build that does not load raises its own ImportError
    _C = None

NAMESPACE = "gradkernels"
STATS = "Tensor(a!)? stats"  # in a schema: where statistics are written, or None
VMAP_KEYS = ("FuncTorchBatched", "Batched")  # torch.func.vmap, and autograd.grad(is_grads_batched=True)
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
ON_CUDA: dict[str, Callable] = {}  # ops that gradkernels.triton has registered kernels for
FAKES: dict[torch._ops.OpOverload, Callable | None] = {}  # every op, and the fake of those that have kernels
SPREAD: dict[type, Callable] = {}  # classes of tensors that consist of others, and what runs an op on those: sharding.py
TRACED: dict[torch._ops.OpOverload, Callable] = {}  # those of them that torch.compile looks into: see implement
FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class ArgumentError(ValueError, RuntimeError):
    """A bad argument: its message names op, argument, what was expected and what came.

    A ValueError, as Python has it, and a RuntimeError, as torch.nn.functional raises for the same mistakes, so that
    code written around either keeps working.
    """


def define(schema: str) -> torch._ops.OpOverload:
    """The op of a schema without any implementation yet."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(getattr(torch.ops, NAMESPACE), schema.split("(")[0]).default


def define_kernel(schema: str, reference: Callable, fake: Callable, differentiable: bool = True) -> torch._ops.OpOverload:
    """An op with kernels: `reference` runs wherever no device has one of its own, `fake` gives shapes and dtypes.

    differentiable: False where all that it does is reading and writing statistics.

    Under torch.func.vmap, and where this op itself is differentiated (an outer level of nested transforms; the node of
    the op that users call runs it below autograd), the reference runs: its operations have batching rules and derivatives.
    An op that returns one tensor and may write statistics has a twin without them, `<op>_unmeasured`, for the graphs of
    torch.compile: see _trace.
    """
    name, unmeasured = schema.split("(")[0], None
    if schema.endswith(f"{STATS}) -> Tensor"):
        plain = schema.replace(f", {STATS}", "").replace(name, f"{name}_unmeasured", 1)
        unmeasured = define_kernel(plain, lambda *args: reference(*args, None), lambda *args: fake(*args, None))
    op = define(schema)
    FAKES[op] = fake

    def differentiated(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
            return reference(*args)
        if any(_has_tangent(value) for value in args):
            return reference(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    for key in ("CompositeExplicitAutograd", *VMAP_KEYS):
        LIBRARY.impl(name, reference, key)
    if differentiable:
        LIBRARY.impl(name, differentiated, "Autograd", with_keyset=True)
    else:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op.py_impl(FunctionalTensorMode)(lambda mode, *args: _trace(op, unmeasured, mode, args))
    return op


def or_empty(like: torch.Tensor, *gradients: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The gradients a backward op returns: one of no elements where None, for the outputs of an op are tensors."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def no_output(*args: Any) -> None:
    """The fake of an op that writes into its arguments and returns nothing."""


def _trace(op: torch._ops.OpOverload, unmeasured: torch._ops.OpOverload | None, mode: FunctionalTensorMode, args: tuple) -> Any:
    """What becomes of `op` in a graph of torch.compile: the launches of a Triton kernel, or the op.

    Where no statistics are written that is `unmeasured`: of an op that may write into an argument that is None, and returns
    one tensor, Inductor makes a tuple of one and then cannot take it apart (torch 2.13). Where they are, their table is
    marked as one that may change between a graph's forward and its backward: it does so in every backward, of any graph.
    """
    from torch.export._trace import custom_triton_ops_decomposition_disabled  # imports torch._dynamo: a second

    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        if type(tensor) in SPREAD:
            with mode:
                return SPREAD[type(tensor)](op, args)
    if op in TRACED and not custom_triton_ops_decomposition_disabled() and all(t.device.type == "cuda" for t in tensors):
        with mode:
            return TRACED[op](*args)
    if unmeasured is not None and args[-1] is None:
        return mode.__torch_dispatch__(unmeasured, (), args[:-1])
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if value is not None and argument.alias_info is not None and argument.alias_info.is_write:
            _may_change(value)
    return mode.__torch_dispatch__(op, (), args)


def _may_change(table: torch.Tensor) -> None:
    """Marks the node of a graph that is being traced for which `table` stands (a mark that torch 2.13 knows)."""
    tracing = get_proxy_mode()
    slot = tracing and get_proxy_slot(torch._from_functional_tensor(table.elem), tracing.tracer, None)
    if slot is not None:
        slot.proxy.node.meta["saved_tensor_with_no_vc_check"] = True


def _has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def implement(name: str, kernel: Callable, capture: Callable, opaque: bool = False) -> None:
    """Makes `kernel`, a function that launches Triton kernels, what runs for the op on CUDA devices (ROCm's too).

    Where the extension is built, it repeats calls that it has seen before without calling `kernel`: csrc/launch_cache.h.
    `capture(kernel, *args)` is called for the second call of a signature, and says what it did.

    torch.compile looks into it: in a graph the op is replaced by its allocations and launches, as torch.library.triton_op
    does it, so that Inductor plans memory and launches for them as for kernels of its own.
    """
    ON_CUDA[name] = kernel
    op = getattr(torch.ops.gradkernels, name).default
    if _C is not None and not opaque:
        _C.implement(f"{NAMESPACE}::{name}", "CUDA", kernel, capture)
    else:
        LIBRARY.impl(name, kernel, "CUDA")
    if not opaque:
        TRACED[op] = kernel


def define_composite(schema: str, python: Callable) -> torch._ops.OpOverload:
    """An op made of other ops, differentiable as they are, always in Python."""
    op = define(schema)
    FAKES[op] = None
    for key in ("CompositeImplicitAutograd", *VMAP_KEYS):
        LIBRARY.impl(schema.split("(")[0], python, key)
    return op


def define_autograd(schema: str, python: Callable, differentiable: Callable) -> Callable:
    """The op users call, with its autograd node: the extension's (csrc/autograd/), or `python` without extension.

    `differentiable` computes the same in plain PyTorch, without statistics; torch.func.vmap and forward mode run it.
    """
    op = define(schema)
    FAKES[op] = None
    for key in VMAP_KEYS:
        LIBRARY.impl(schema.split("(")[0], differentiable, key)
    if _C is not None:
        return op

    def call(*args: Any) -> Any:
        return (differentiable if forward_ad._current_level >= 0 else python)(*args)

    LIBRARY.impl(schema.split("(")[0], call, "CompositeImplicitAutograd")
    return call  # not through the dispatcher, under which torch.func could not see the Function


class _ImportAfter:
    """A finder that imports `module` once `trigger` has been: see import_after."""

    def __init__(self, trigger: str, module: str) -> None:
        self.trigger, self.module = trigger, module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's spec as it is found anyway, with a loader that goes on to import ours."""
        spec = PathFinder.find_spec(name, path, target) if name == self.trigger else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module(self.module)

        spec.loader.exec_module = exec_module
        return spec


def import_after(trigger: str, module: str) -> None:
    """Imports `module` if `trigger` is imported, else as soon as it will be: who does not use it does not pay for it."""
    if trigger in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _ImportAfter(trigger, module))
