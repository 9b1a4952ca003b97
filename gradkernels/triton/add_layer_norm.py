"""Residual add and LayerNorm on a GPU: the launches of layer_norm, with the residual stream in and out."""

from __future__ import annotations

import torch

from gradkernels.triton.launch_cache import register
from gradkernels.triton.norm_launch import norm_bwd, norm_fwd


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous y, new_residual, mean, rstd."""
    return norm_fwd(x, residual, weight, bias, num_dims, eps)


def add_layer_norm_bwd(
    dy: torch.Tensor | None,
    dnew_residual: torch.Tensor | None,
    new_residual: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    x_dtype: torch.dtype,
    separate_dx: bool,
    columns: bool,
    stats: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous dresidual, dx, dweight, dbias; the statistics of dy, dnew_residual, dx, dweight, dbias."""
    last = (weight, bias, num_dims, x_dtype, separate_dx, columns, stats)
    return norm_bwd(dy, dnew_residual, new_residual, mean, rstd, *last, dx_port=2)


register("add_layer_norm_fwd", add_layer_norm_fwd)
register("add_layer_norm_bwd", add_layer_norm_bwd)
