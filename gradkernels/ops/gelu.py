"""GELU: y = x P(X <= x) for a standard normal X, or its tanh form. Hendrycks and Gimpel, arXiv:1606.08415."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd import Function

from gradkernels.library import FLOATS, ArgumentError, define_autograd, define_composite, define_kernel
from gradkernels.nested import on_components
from gradkernels.telemetry import check_stats, with_stats

PORTS = ("dy", "dx")
SCHEMA = "gelu(Tensor x, bool tanh, Tensor? stats) -> Tensor"
SCHEMA_FWD = "gelu_fwd(Tensor x, bool tanh) -> Tensor"
SCHEMA_BWD = "gelu_bwd(Tensor dy, Tensor x, bool tanh, Tensor(a!)? stats) -> Tensor"

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu_fwd_reference(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """y in x's dtype, computed in float32 (float64 for float64)."""
    v = x if x.dtype is torch.float64 else x.float()
    if tanh:
        y = 0.5 * v * (1 + torch.tanh(SQRT_2_OVER_PI * (v + 0.044715 * v**3)))
    else:
        y = v * 0.5 * torch.special.erfc(-v * math.sqrt(0.5))
    return y.to(x.dtype)


def gelu_bwd_reference(dy: torch.Tensor, x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """dx in x's dtype: dy times the derivative at x, computed in float32 (float64 for float64)."""
    v = x if x.dtype is torch.float64 else x.float()
    if tanh:
        t = torch.tanh(SQRT_2_OVER_PI * (v + 0.044715 * v**3))
        slope = 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * 0.044715 * v * v)
    else:
        density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
        slope = 0.5 * torch.special.erfc(-v * math.sqrt(0.5)) + v * density
    return (slope * dy.to(v.dtype)).to(x.dtype)


def gelu_fwd_fake(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """x's shape, dtype and strides."""
    return torch.empty_like(x)


def gelu_bwd_fake(dy: torch.Tensor, x: torch.Tensor, tanh: bool, stats: torch.Tensor | None) -> torch.Tensor:
    """x's shape, dtype and strides."""
    return torch.empty_like(x)


_bwd_default = with_stats(gelu_bwd_reference, lambda args, dx: (args[0], dx))
gelu_fwd = define_kernel(SCHEMA_FWD, gelu_fwd_reference, gelu_fwd_fake)
gelu_bwd = define_kernel(SCHEMA_BWD, _bwd_default, gelu_bwd_fake)
gelu_differentiable = define_composite(SCHEMA_FWD.replace("_fwd", "_differentiable"), gelu_fwd_reference)
gelu_bwd_differentiable = define_composite(
    "gelu_bwd_differentiable(Tensor dy, Tensor x, bool tanh, Tensor(a!)? stats) -> Tensor", _bwd_default
)


class _Gelu(Function):
    """Saves x. The C++ twin that runs where the extension is built is GeluBackward in csrc/autograd/gelu.cpp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, tanh: bool, stats: torch.Tensor | None) -> torch.Tensor:
        return gelu_fwd(x, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, ctx.tanh, ctx.stats = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        op = gelu_bwd_differentiable if torch.is_grad_enabled() else gelu_bwd
        return op(dy, x, ctx.tanh, ctx.stats), None, None


_gelu_op = define_autograd(SCHEMA, _Gelu.apply, lambda x, tanh, stats: gelu_fwd_reference(x, tanh))


def gelu(x: torch.Tensor, approximate: str = "none", *, stats: torch.Tensor | None = None) -> torch.Tensor:
    """y = x P(X <= x), elementwise, X standard normal; the drop-in for torch.nn.functional.gelu.

    approximate "none": P = (1 + erf(x / sqrt 2)) / 2. "tanh": y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
    x: any shape and strides, nested tensors too; float32, float64, bfloat16 or float16. Computed in float32 (float64 for
    float64).
    stats: statistics tensor (2, slots, 8) for the ports dy, dx, written in backward; None measures nothing.
    Returns y: x's shape and dtype. Raises TypeError for another dtype, ArgumentError for another `approximate` or a
    `stats` of another shape or device. Source: arXiv:1606.08415, section 2.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"gelu: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if approximate != "none" and approximate != "tanh":
        raise ArgumentError(f"gelu: approximate argument must be either none or tanh, got {approximate!r}")
    if stats is not None:
        check_stats("gelu", stats, x, PORTS)
    if x.is_nested:
        return on_components(lambda component: gelu(component, approximate, stats=stats), x)
    return _gelu_op(x, approximate == "tanh", stats)
