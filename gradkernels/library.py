"""The one place where ops are defined with PyTorch's dispatcher, the extension is loaded, and errors get their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    from gradkernels import _C
except ModuleNotFoundError:  # installed without a C++ compiler; a build that does not load raises its own ImportError
    _C = None

NAMESPACE = "gradkernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
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


def define_kernel(schema: str, reference: Callable, fake: Callable, vmap: Callable) -> torch._ops.OpOverload:
    """An op with kernels: `reference` runs wherever no device has one of its own, `fake` gives shapes and dtypes.

    `vmap(*args)` computes the same from batched arguments in differentiable PyTorch.
    """
    op = define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _vmap_rule(vmap), lib=LIBRARY)
    return op


def _vmap_rule(function: Callable) -> Callable:
    """PyTorch's batching rule made of a function of the batched arguments; outputs are batched in dimension 0."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        result = function(in_dims, *args)
        return result, 0 if isinstance(result, torch.Tensor) else (0,) * len(result)

    return rule


def define_composite(schema: str, python: Callable) -> torch._ops.OpOverload:
    """An op made of other ops, differentiable as they are, always in Python."""
    op = define(schema)
    LIBRARY.impl(schema.split("(")[0], python, "CompositeImplicitAutograd")
    return op


def define_autograd(schema: str, python: Callable) -> torch._ops.OpOverload:
    """The op users call, with its autograd node: the extension's (csrc/autograd.cpp), or `python` without extension."""
    return define(schema) if _C is not None else define_composite(schema, python)


def implementations() -> dict[str, str]:
    """What will run where: {"<op> on <device>": implementation}, so that no fallback is silent.

    The reference is plain PyTorch: right, differentiable, with the same statistics, and not fast.
    """
    native = f"C++ ({_C.cpu_capability()})" if _C is not None else "reference (PyTorch): the extension is not built"
    table = {f"{op} on cpu": native for op in ("gelu", "layer_norm", "add_layer_norm", "residual", "probe")}
    table["autograd"] = "C++" if _C is not None else "Python: the extension is not built"
    table["any op on any other device"] = "reference (PyTorch)"
    return table
