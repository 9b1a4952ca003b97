"""Residual add and LayerNorm in one pass: new_residual = residual + x, y = LayerNorm(new_residual)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from gradkernels.autocast import autocast_norm
from gradkernels.library import ArgumentError, define_autograd, define_composite, define_kernel, or_empty
from gradkernels.ops.layer_norm import (
    check_norm_arguments,
    empty_gradient,
    layer_norm_bwd_reference,
    layer_norm_fwd_fake,
    layer_norm_fwd_reference,
    of_parameters,
    upcast,
)
from gradkernels.telemetry import check_stats, with_stats

PORTS = ("dy", "dnew_residual", "dx", "dweight", "dbias")
SCHEMA = (
    "add_layer_norm(Tensor x, Tensor residual, int num_dims, Tensor? weight, Tensor? bias, float eps, Tensor? stats) "
    "-> (Tensor y, Tensor new_residual)"
)
SCHEMA_FWD = (
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, int num_dims, float eps) "
    "-> (Tensor y, Tensor new_residual, Tensor mean, Tensor rstd)"
)
SCHEMA_BWD = (
    "add_layer_norm_bwd(Tensor? dy, Tensor? dnew_residual, Tensor new_residual, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, int num_dims, ScalarType x_dtype, bool[4] output_mask, Tensor(a!)? stats) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


def add_layer_norm_fwd_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y in x's dtype, new_residual in residual's; the norm is of new_residual as stored."""
    new_residual = (residual + x).to(residual.dtype).contiguous()
    y, mean, rstd = layer_norm_fwd_reference(new_residual, weight, bias, num_dims, eps)
    return y.to(x.dtype), new_residual, mean, rstd


def add_layer_norm_bwd_reference(
    dy: torch.Tensor | None,
    dnew_residual: torch.Tensor | None,
    new_residual: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    x_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx and dresidual, LayerNorm's dx plus dnew_residual in the dtypes of x and residual; dweight and dbias.

    output_mask: which of them are wanted; see `how_dh_is_returned`. Those that are not there have no elements.
    """
    h = new_residual
    if dy is None:
        dy = torch.zeros_like(h, dtype=x_dtype)
    # h upcast, so that the sum is rounded once
    dh, dweight, dbias = layer_norm_bwd_reference(dy, upcast(h), mean, rstd, weight, bias, num_dims, output_mask[1:])
    dweight, dbias = of_parameters((dweight, dbias), (weight, bias), output_mask[2:])
    if dnew_residual is not None:
        dh = dh + dnew_residual
    separate, shared = how_dh_is_returned(output_mask, x_dtype, h.dtype)
    dx, dresidual = dh.to(x_dtype, copy=True) if separate else None, dh.to(h.dtype)
    return or_empty(h, *((dresidual, None) if shared else (dx, dresidual)), dweight, dbias)


def how_dh_is_returned(output_mask: Sequence[bool], x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[bool, bool]:
    """(separate, shared): dx and dresidual are two tensors; they are one, returned as dx. If neither, it is dresidual alone.

    They are equal but for their dtypes, `x_dtype` and `dtype`. One of `dtype` comes in any case, for it is measured.
    """
    of_x, of_residual = output_mask[:2]
    separate = of_x and (of_residual or x_dtype is not dtype)
    return separate, of_x and not separate


def add_layer_norm_fwd_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous y, new_residual, mean, rstd."""
    y, mean, rstd = layer_norm_fwd_fake(x, weight, bias, num_dims, eps)
    return y, residual.new_empty(residual.shape), mean, rstd


def add_layer_norm_bwd_fake(
    dy: torch.Tensor | None,
    dnew_residual: torch.Tensor | None,
    new_residual: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    x_dtype: torch.dtype,
    output_mask: Sequence[bool],
    stats: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous dx, dresidual, dweight, dbias."""
    h = new_residual
    separate, shared = how_dh_is_returned(output_mask, x_dtype, h.dtype)
    dx, dresidual = h.new_empty(h.shape, dtype=x_dtype) if separate else None, h.new_empty(h.shape)
    of_columns = map(empty_gradient, (weight, bias), output_mask[2:])
    return or_empty(h, *((dresidual, None) if shared else (dx, dresidual)), *of_columns)


def _differentiable(x: torch.Tensor, residual: torch.Tensor, weight: Any, bias: Any, num_dims: int, eps: float) -> tuple:
    return add_layer_norm_fwd_reference(x, residual, weight, bias, num_dims, eps)[:2]


def _bwd_differentiable(
    dy: torch.Tensor | None,
    dnew_residual: torch.Tensor | None,
    new_residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
    x_dtype: torch.dtype,
    output_mask: Sequence[bool],
    stats: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward as a function of new_residual alone: mean and rstd are computed again and differentiated too."""
    _, mean, rstd = layer_norm_fwd_reference(new_residual, weight, bias, num_dims, eps)
    last = (x_dtype, output_mask, stats)
    return _bwd_default(dy, dnew_residual, new_residual, mean, rstd, weight, bias, num_dims, *last)


def _ports(args: tuple, gradients: tuple) -> tuple:
    dx, dresidual, *of_columns = gradients
    h, (x_dtype, output_mask) = args[2], args[-2:]
    _, shared = how_dh_is_returned(output_mask, x_dtype, h.dtype)
    return args[0], args[1], dx if shared else dresidual, *of_parameters(of_columns, args[5:7], output_mask[2:])


_bwd_default = with_stats(add_layer_norm_bwd_reference, _ports)
add_layer_norm_fwd = define_kernel(SCHEMA_FWD, add_layer_norm_fwd_reference, add_layer_norm_fwd_fake)
add_layer_norm_bwd = define_kernel(SCHEMA_BWD, _bwd_default, add_layer_norm_bwd_fake)
add_layer_norm_differentiable = define_composite(
    "add_layer_norm_differentiable(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, int num_dims, float eps) "
    "-> (Tensor y, Tensor new_residual)",
    _differentiable,
)
add_layer_norm_bwd_differentiable = define_composite(
    "add_layer_norm_bwd_differentiable(Tensor? dy, Tensor? dnew_residual, Tensor new_residual, Tensor? weight, Tensor? bias, "
    "int num_dims, float eps, ScalarType x_dtype, bool[4] output_mask, Tensor(a!)? stats) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _bwd_differentiable,
)


class _AddLayerNorm(Function):
    """Saves new_residual, weight, and mean and rstd in float32. Its C++ twin is in csrc/autograd/add_layer_norm.cpp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, residual: torch.Tensor, num_dims: int, weight: Any, bias: Any, eps: float, stats: Any
    ) -> tuple:
        return add_layer_norm_fwd(x, residual, weight, bias, num_dims, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, _, ctx.num_dims, weight, bias, ctx.eps, ctx.stats = inputs
        _, new_residual, mean, rstd = output
        ctx.x_dtype = x.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(new_residual, mean, rstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Any, dnew_residual: Any, dmean: Any, drstd: Any) -> tuple:
        if dy is None and dnew_residual is None:
            return (None,) * 7
        h, mean, rstd, weight, bias = ctx.saved_tensors
        mask = [ctx.needs_input_grad[k] for k in (0, 1, 3, 4)]
        norm, last = (weight, bias, ctx.num_dims), (ctx.x_dtype, mask, ctx.stats)
        if torch.is_grad_enabled():
            gradients = add_layer_norm_bwd_differentiable(dy, dnew_residual, h, *norm, ctx.eps, *last)
        else:
            gradients = add_layer_norm_bwd(dy, dnew_residual, h, mean, rstd, *norm, *last)
        dx, dresidual, dweight, dbias = (d if want else None for d, want in zip(gradients, mask, strict=True))
        return dx, dresidual, None, dweight, dbias, None, None


_add_layer_norm_op = define_autograd(
    SCHEMA,
    lambda *args: _AddLayerNorm.apply(*args)[:2],
    lambda x, residual, num_dims, weight, bias, eps, stats: _differentiable(x, residual, weight, bias, num_dims, eps),
)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(LayerNorm(residual + x), residual + x): the step of a pre-norm residual stream, in one pass.

    x: (..., *normalized_shape), any strides; float32, float64, bfloat16 or float16.
    residual: x's shape; x's dtype, or float32 beside a bfloat16 or float16 x (a stream kept in full precision).
    weight, bias: normalized_shape; x's dtype, or float32 beside a bfloat16 or float16 x.
    stats: statistics tensor (5, slots, 8) for the ports dy, dnew_residual, dx, dweight, dbias, written in backward; dx is
    the gradient of the residual stream, dL/d(residual) = dL/dx, in residual's dtype. None measures nothing.
    Returns y (x's shape and dtype) and new_residual (residual's dtype), contiguous; y is the norm of new_residual as
    stored. Under torch.autocast("cuda") all is float32, y too, as PyTorch's layer_norm has it; new_residual is then rounded
    to the dtype of residual + x. Raises TypeError for another dtype, ArgumentError for a shape or device that does not fit.
    Differentiable twice.
    """
    given = x, residual
    x, residual, weight, bias = autocast_norm(x, residual, weight, bias)
    num_dims = check_norm_arguments("add_layer_norm", x, normalized_shape, weight, bias)
    if residual.shape != x.shape:
        expected = tuple(x.shape)
        raise ArgumentError(f"add_layer_norm: residual must have x's shape, {expected}, got {tuple(residual.shape)}")
    if residual.dtype is not x.dtype and not (residual.dtype is torch.float32 and x.dtype.itemsize == 2):
        raise TypeError(
            f"add_layer_norm: residual must be {x.dtype} like x, or float32 beside a 16-bit x, got {residual.dtype}"
        )
    if residual.device != x.device:
        raise ArgumentError(f"add_layer_norm: residual must be on x's device, {x.device}, got {residual.device}")
    if stats is not None:
        check_stats("add_layer_norm", stats, x, PORTS)
    y, new_residual = _add_layer_norm_op(x, residual, num_dims, weight, bias, eps, stats)
    if residual is not given[1]:
        new_residual = new_residual.to(torch.promote_types(given[0].dtype, given[1].dtype))
    return y, new_residual
