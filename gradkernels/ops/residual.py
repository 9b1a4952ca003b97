"""The residual connection y = x + branch(x), whose backward owns the sum at the fork: dx = dskip + dbranch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

from gradkernels.library import FLOATS, ArgumentError, define_autograd, define_composite, define_kernel
from gradkernels.telemetry import check_stats, with_stats

PORTS = ("dskip", "dbranch", "dx")
SCHEMA = "residual_fork(Tensor(a) x, Tensor? stats) -> (Tensor(a), Tensor(a))"
SCHEMA_BWD = "residual_bwd(Tensor? dskip, Tensor? dbranch, Tensor(a!)? stats) -> Tensor"


def residual_bwd_reference(dskip: torch.Tensor | None, dbranch: torch.Tensor | None) -> torch.Tensor:
    """dx = dskip + dbranch; where only one arrives, a copy of it."""
    if dskip is None or dbranch is None:
        return (dskip if dbranch is None else dbranch).clone()
    return dskip + dbranch


def residual_bwd_fake(dskip: torch.Tensor | None, dbranch: torch.Tensor | None, stats: torch.Tensor | None) -> torch.Tensor:
    """The shape, dtype and strides of dskip, or of dbranch where that is all there is."""
    return torch.empty_like(dbranch if dskip is None else dskip)


_bwd_default = with_stats(residual_bwd_reference, lambda args, dx: (*args, dx))
residual_bwd = define_kernel(SCHEMA_BWD, _bwd_default, residual_bwd_fake)
residual_bwd_differentiable = define_composite(
    "residual_bwd_differentiable(Tensor? dskip, Tensor? dbranch, Tensor(a!)? stats) -> Tensor", _bwd_default
)


class _ResidualFork(Function):
    """Saves nothing. Its C++ twin is ResidualBackward in csrc/autograd/residual.cpp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, stats: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.stats = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dskip: torch.Tensor | None, dbranch: torch.Tensor | None) -> tuple:
        if dskip is None and dbranch is None:
            return None, None
        op = residual_bwd_differentiable if torch.is_grad_enabled() else residual_bwd
        return op(dskip, dbranch, ctx.stats), None


_residual_fork_op = define_autograd(SCHEMA, _ResidualFork.apply, lambda x, stats: (x.view_as(x), x.view_as(x)))


def residual_fork(x: torch.Tensor, *, stats: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(skip, branch), both x itself; backward adds the two gradients and measures them and their sum.

    x: any shape; float32, float64, bfloat16 or float16. Both results share its memory, so writing into one in place raises.
    stats: statistics tensor (3, slots, 8) for the ports dskip, dbranch, dx, written in backward; None measures nothing.
    Raises TypeError for another dtype, ArgumentError for a `stats` of another shape or device.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"residual_fork: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if stats is not None:
        check_stats("residual_fork", stats, x, PORTS)
    return _residual_fork_op(x, stats)


def residual_add(skip: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """skip + branch, the other end of residual_fork; in backward both receive dy as it is, at no cost.

    skip, branch: the same shape, dtype and device; nothing is broadcast or cast. Raises ArgumentError otherwise, TypeError
    for two dtypes.
    """
    if branch.shape != skip.shape:
        raise ArgumentError(f"residual_add: branch must have skip's shape, {tuple(skip.shape)}, got {tuple(branch.shape)}")
    if branch.dtype is not skip.dtype:
        raise TypeError(f"residual_add: branch must be {skip.dtype} like skip, got {branch.dtype}")
    if branch.device != skip.device:
        raise ArgumentError(f"residual_add: branch must be on skip's device, {skip.device}, got {branch.device}")
    return skip + branch


def residual(
    x: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor], *, stats: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x + branch(x), with the norms of dskip, dbranch and dx out of the one kernel that adds them.

    x: any shape; float32, float64, bfloat16 or float16. branch: returns a tensor of x's shape and dtype, and must not
    write into its argument in place. stats and errors: as for residual_fork and residual_add.
    """
    skip, branch_input = residual_fork(x, stats=stats)
    return residual_add(skip, branch(branch_input))
