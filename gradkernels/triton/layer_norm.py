"""LayerNorm on a GPU: one launch forward; two backward, dx with partial sums over rows, and the sum of those."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkernels.library import or_empty
from gradkernels.triton.launch_cache import register
from gradkernels.triton.norm_launch import norm_bwd, norm_fwd


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, num_dims: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous y, mean, rstd."""
    y, _, mean, rstd = norm_fwd(x, None, weight, bias, num_dims, eps)
    return y, mean, rstd


def layer_norm_bwd(
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
    """Contiguous dx, dweight, dbias; the statistics of dy, dx, dweight, dbias."""
    last = (weight, bias, num_dims, x.dtype, False, output_mask[1:], stats)
    dx, _, dweight, dbias = norm_bwd(dy, None, x, mean, rstd, *last, dx_port=1)
    return or_empty(x, dx, dweight, dbias)


register("layer_norm_fwd", layer_norm_fwd)
register("layer_norm_bwd", layer_norm_bwd)
