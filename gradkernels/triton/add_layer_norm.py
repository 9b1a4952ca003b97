"""Residual add and LayerNorm on a GPU: the launches of layer_norm, with the residual stream in and out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkernels.library import or_empty
from gradkernels.ops.add_layer_norm import how_dh_is_returned
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
    output_mask: Sequence[bool],
    stats: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous dx, dresidual, dweight, dbias; the statistics of dy, dnew_residual, dx, dweight, dbias."""
    separate, shared = how_dh_is_returned(output_mask, x_dtype, new_residual.dtype)
    last = (weight, bias, num_dims, x_dtype, separate, output_mask[2:], stats)
    dh, dx, *of_columns = norm_bwd(dy, dnew_residual, new_residual, mean, rstd, *last, dx_port=2)
    return or_empty(new_residual, *((dh, None) if shared else (dx, dh)), *of_columns)


register("add_layer_norm_fwd", add_layer_norm_fwd)
register("add_layer_norm_bwd", add_layer_norm_bwd)
