"""LayerNorm: x_hat = (x - mean) rstd over the last dimensions, y = x_hat weight + bias. arXiv:1607.06450, equation 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from gradkernels.autocast import autocast_norm
from gradkernels.library import FLOATS, ArgumentError, define_autograd, define_composite, define_kernel, or_empty
from gradkernels.nested import on_components
from gradkernels.telemetry import check_stats, with_stats

PORTS = ("dy", "dx", "dweight", "dbias")
SCHEMA = "layer_norm(Tensor x, int num_dims, Tensor? weight, Tensor? bias, float eps, Tensor? stats) -> Tensor"
SCHEMA_FWD = (
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int num_dims, float eps) -> (Tensor y, Tensor mean, Tensor rstd)"
)
SCHEMA_BWD = (
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int num_dims, "
    "bool[3] output_mask, Tensor(a!)? stats) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that is computed in: float32, and float64 for float64."""
    return x if x.dtype is torch.float64 else x.float()


def normalized_dims(num_dims: int) -> tuple[int, ...]:
    """The last num_dims dimensions."""
    return tuple(range(-num_dims, 0))


def layer_norm_fwd_reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, num_dims: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y in x's dtype; mean and rstd in float32 (float64 for float64), x's shape with ones in the last num_dims places."""
    v, dims = upcast(x), normalized_dims(num_dims)
    mean = v.mean(dims, keepdim=True)
    rstd = ((v - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    y = (v - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def layer_norm_bwd_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx = rstd (g - mean(g) - x_hat mean(g x_hat)), g = dy weight; dweight = sum(dy x_hat), dbias = sum(dy) over the rows.

    output_mask: whether dx, dweight, dbias are wanted; dx, which is measured, comes in any case. The others have no elements
    where they are not wanted or there is no such parameter.
    """
    dims, rows = normalized_dims(num_dims), tuple(range(x.dim() - num_dims))
    dy_upcast, x_hat = upcast(dy), (upcast(x) - mean) * rstd
    g = dy_upcast if weight is None else dy_upcast * weight
    dx = rstd * (g - g.mean(dims, keepdim=True) - x_hat * (g * x_hat).mean(dims, keepdim=True))
    dweight = dbias = None
    if output_mask[1] and weight is not None:
        dweight = ((dy_upcast * x_hat).sum(rows) if rows else dy_upcast * x_hat).to(weight.dtype).contiguous()
    if output_mask[2] and bias is not None:
        dbias = (dy_upcast.sum(rows).to(bias.dtype) if rows else dy_upcast.to(bias.dtype, copy=True)).contiguous()
    return or_empty(x, dx.to(x.dtype).contiguous(), dweight, dbias)


def layer_norm_fwd_fake(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, num_dims: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous y, mean, rstd."""
    shape = [*x.shape[: x.dim() - num_dims], *[1] * num_dims]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def layer_norm_bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    output_mask: Sequence[bool],
    stats: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous dx, dweight, dbias."""
    return or_empty(x, x.new_empty(x.shape), *map(empty_gradient, (weight, bias), output_mask[1:]))


def empty_gradient(of: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    """Room for the contiguous gradient of an argument that is there and wants one."""
    return of.new_empty(of.shape) if wanted and of is not None else None


def _differentiable(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, num_dims: int, eps: float
) -> torch.Tensor:
    return layer_norm_fwd_reference(x, weight, bias, num_dims, eps)[0]


def _bwd_differentiable(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
    output_mask: Sequence[bool],
    stats: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward as a function of x alone: mean and rstd are computed again, so that they are differentiated too."""
    _, mean, rstd = layer_norm_fwd_reference(x, weight, bias, num_dims, eps)
    return _bwd_default(dy, x, mean, rstd, weight, bias, num_dims, output_mask, stats)


def _ports(args: tuple, gradients: tuple) -> tuple:
    dx, dweight, dbias = gradients
    return args[0], dx, *of_parameters((dweight, dbias), args[4:6], args[7][1:])


def of_parameters(gradients: Sequence[Any], parameters: Sequence[Any], wanted: Sequence[bool]) -> list[torch.Tensor | None]:
    """Those gradients that are of a parameter which is there and wants one, None for the others."""
    triples = zip(gradients, parameters, wanted, strict=True)
    return [d if want and parameter is not None else None for d, parameter, want in triples]


_bwd_default = with_stats(layer_norm_bwd_reference, _ports)
layer_norm_fwd = define_kernel(SCHEMA_FWD, layer_norm_fwd_reference, layer_norm_fwd_fake)
layer_norm_bwd = define_kernel(SCHEMA_BWD, _bwd_default, layer_norm_bwd_fake)
layer_norm_differentiable = define_composite(
    "layer_norm_differentiable(Tensor x, Tensor? weight, Tensor? bias, int num_dims, float eps) -> Tensor",
    _differentiable,
)
layer_norm_bwd_differentiable = define_composite(
    "layer_norm_bwd_differentiable(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, int num_dims, float eps, "
    "bool[3] output_mask, Tensor(a!)? stats) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _bwd_differentiable,
)


class _LayerNorm(Function):
    """Saves x, weight, and mean and rstd in float32. Its C++ twin is LayerNormBackward in csrc/autograd/layer_norm.cpp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, num_dims: int, weight: Any, bias: Any, eps: float, stats: Any) -> tuple:
        return layer_norm_fwd(x, weight, bias, num_dims, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, ctx.num_dims, weight, bias, ctx.eps, ctx.stats = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, mean, rstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dmean: Any, drstd: Any) -> tuple:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        mask = [ctx.needs_input_grad[k] for k in (0, 2, 3)]
        if torch.is_grad_enabled():
            gradients = layer_norm_bwd_differentiable(dy, x, weight, bias, ctx.num_dims, ctx.eps, mask, ctx.stats)
        else:
            gradients = layer_norm_bwd(dy, x, mean, rstd, weight, bias, ctx.num_dims, mask, ctx.stats)
        dx, dweight, dbias = (d if want else None for d, want in zip(gradients, mask, strict=True))
        return dx, None, dweight, dbias, None, None


_layer_norm_op = define_autograd(
    SCHEMA,
    lambda *args: _LayerNorm.apply(*args)[0],
    lambda x, num_dims, weight, bias, eps, stats: _differentiable(x, weight, bias, num_dims, eps),
)


def check_norm_arguments(
    op: str,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> int:
    """The number of normalized dimensions, or an error that names what does not fit."""
    num_dims = len(normalized_shape)
    if num_dims == 0:
        raise ArgumentError(f"{op}: Expected normalized_shape to be at least 1-dimensional, got ()")
    shape = torch.Size(normalized_shape)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.shape[-num_dims:] != shape:
        raise ArgumentError(
            f"{op}: x must end in the normalized shape. Given normalized_shape={list(shape)}, expected x with shape "
            f"[*, {', '.join(map(str, shape))}], got {list(x.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_parameter(op, name, parameter, x, shape)
    return num_dims


def _check_parameter(op: str, name: str, parameter: torch.Tensor, x: torch.Tensor, shape: torch.Size) -> None:
    if parameter.shape != shape:
        raise ArgumentError(
            f"{op}: Expected {name} to be of same shape as normalized_shape: {name} must have shape {tuple(shape)}, "
            f"got {tuple(parameter.shape)}"
        )
    if parameter.dtype is not x.dtype and not (parameter.dtype is torch.float32 and x.dtype.itemsize == 2):
        raise TypeError(f"{op}: {name} must be {x.dtype} like x, or float32 beside a 16-bit x, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ArgumentError(f"{op}: {name} must be on x's device, {x.device}, got {parameter.device}")


def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    stats: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(variance + eps) weight + bias over the last dimensions; drop-in for F.layer_norm.

    mean and (biased) variance are taken over the last len(normalized_shape) dimensions, in float32 (float64 for float64).
    x: (..., *normalized_shape), any strides, nested tensors too; float32, float64, bfloat16 or float16.
    weight, bias: normalized_shape; x's dtype, or float32 beside a bfloat16 or float16 x.
    stats: statistics tensor (4, slots, 8) for the ports dy, dx, dweight, dbias, written in backward; None measures nothing.
    Returns y: x's shape and dtype, contiguous. Under torch.autocast("cuda") all is float32, y too, as PyTorch has it.
    Raises TypeError for another dtype, ArgumentError for a shape or device that does not fit. Differentiable twice.
    Source: arXiv:1607.06450, equation 4.
    """
    if x.is_nested:
        return on_components(lambda component: layer_norm(component, normalized_shape, weight, bias, eps, stats=stats), x)
    x, weight, bias = autocast_norm(x, weight, bias)
    num_dims = check_norm_arguments("layer_norm", x, normalized_shape, weight, bias)
    if stats is not None:
        check_stats("layer_norm", stats, x, PORTS)
    return _layer_norm_op(x, num_dims, weight, bias, eps, stats)
