"""How the kernels of norm.py are launched: rows of any layout, the shape of a program, and how many programs run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradkernels.ops.layer_norm import empty_gradient
from gradkernels.triton import launch as launching
from gradkernels.triton.launch import launch, num_slots, resident
from gradkernels.triton.norm import (
    norm_bwd_kernel,
    norm_bwd_looped_kernel,
    norm_finalize_kernel,
    norm_fwd_kernel,
    norm_fwd_looped_kernel,
)

REGISTER_BYTES = 64  # of one tensor that a thread holds: 16 elements in float32
LONGEST_FWD, LONGEST_BWD = 65536, 32768  # bytes in the accumulator's dtype of a row that stays in registers
LOOPED_WARPS = 4
PARTIAL_BLOCK, PARTIAL_ROWS = 32, 64  # columns of a program of the second launch, and partials it adds at a time
STAGES = 2  # blocks of rows in flight a program: one is computed while the next is loaded


@dataclass(frozen=True)
class Shape:
    """What one program holds: BLOCK_M rows of BLOCK_N columns, on num_warps warps; in turns along the row if `looped`.

    registers: what a thread may take. None spills, and 12 to 16 warps of a backward are resident an SM.
    """

    block_m: int
    block_n: int
    num_warps: int
    looped: bool
    registers: int

    @property
    def options(self) -> dict[str, int]:
        """The constants and options that every kernel of rows takes."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps, "maxnreg": self.registers}


def shape_of(N: int, dtype: torch.dtype, backward: bool, residual: bool = False) -> Shape:
    """The program for rows of N elements computed in `dtype`: 16 float32 elements a thread, and at least 4 warps.

    | N in float32      | rows | warps | form                                          |
    |-------------------|------|-------|-----------------------------------------------|
    | up to 1024        | 2048 / 2^ceil(log2 N) | 4 | registers                         |
    | up to 2048 ... 8192 | 1  | 4 to 16 | registers                                   |
    | forward to 16384  | 1    | 16    | registers, 32 elements a thread               |
    | above, forward    | 1    | 4     | blocks of 2048 columns                        |
    | above, backward   | 4    | 4     | blocks of 512 columns                         |
    """
    per_thread = REGISTER_BYTES // dtype.itemsize
    block_n = max(16, 1 << (N - 1).bit_length())
    if block_n * dtype.itemsize > (LONGEST_BWD if backward else LONGEST_FWD):
        block_m = 4 if backward else 1
        return Shape(block_m, LOOPED_WARPS * 32 * per_thread // block_m, LOOPED_WARPS, True, 160)
    num_warps = min(16, max(4, block_n // (32 * per_thread)))
    return Shape(
        max(1, num_warps * 32 * per_thread // block_n), block_n, num_warps, False, 160 if residual and num_warps == 4 else 128
    )


def num_programs(num_rows: int, shape: Shape, device: torch.device, stats: torch.Tensor | None) -> int:
    """Programs of a backward: as many as are resident, fewer where each would see fewer than four blocks of rows.

    Every program costs a row of partial sums, written and read again: below four blocks that is a quarter of the traffic.
    No more run than a row of `stats` has slots, or would have.
    """
    blocks, sms = -(-num_rows // shape.block_m), launching.num_sms(device)
    return max(1, min(blocks, sms * resident(shape.num_warps, shape.registers), max(sms, blocks // 4), num_slots(stats)))


def as_rows(t: torch.Tensor, num_dims: int) -> torch.Tensor:
    """`t` as (M, N), consecutive along N: a view where its strides allow one, else a copy."""
    N = math.prod(t.shape[t.dim() - num_dims :])
    rows = t.reshape(t.numel() // max(1, N), N)
    return rows if rows.stride(1) == 1 or N == 1 else rows.contiguous()


def norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, new_residual (x itself where there is no residual), mean, rstd. One launch."""
    h = x if residual is None else residual
    lengths = [*x.shape[: x.dim() - num_dims], *[1] * num_dims]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    y, new_residual = x.new_empty(x.shape), x if residual is None else residual.new_empty(x.shape)
    mean, rstd = h.new_empty(lengths, dtype=dtype), h.new_empty(lengths, dtype=dtype)
    if x.numel():
        x_rows, residual_rows = as_rows(x, num_dims), None if residual is None else as_rows(residual, num_dims)
        M, N = x_rows.shape
        shape = shape_of(N, dtype, backward=False)
        launch(
            norm_fwd_looped_kernel if shape.looped else norm_fwd_kernel,
            (-(-M // shape.block_m),),
            x_rows,
            residual_rows,
            columns_of(weight),
            columns_of(bias),
            y,
            None if residual is None else new_residual,
            mean,
            rstd,
            x_rows.stride(0),
            0 if residual is None else residual_rows.stride(0),
            M,
            N=N,
            EPS=eps,
            **shape.options,
        )
    return y, new_residual, mean, rstd


def columns_of(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias in consecutive memory."""
    return None if parameter is None else parameter.contiguous()


def norm_bwd(
    dy: torch.Tensor | None,
    dnew_residual: torch.Tensor | None,
    h: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    x_dtype: torch.dtype,
    separate_dx: bool,
    of_columns: Sequence[bool],
    stats: torch.Tensor | None,
    dx_port: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dh; dx (dh in x's dtype) if `separate_dx`; dweight and dbias where `of_columns` wants them; None for what is not there.

    Two launches; one without the last two.
    """
    dh, dx = h.new_empty(h.shape), h.new_empty(h.shape, dtype=x_dtype) if separate_dx else None
    dweight, dbias = map(empty_gradient, (weight, bias), of_columns)
    N = math.prod(h.shape[h.dim() - num_dims :])
    shape = shape_of(N, mean.dtype, backward=True, residual=dnew_residual is not None)
    programs, partials = num_programs(mean.numel(), shape, h.device, stats), None
    if dweight is not None or dbias is not None:
        partials = mean.new_empty(2, programs, max(1, N))
    gradients = [None if t is None else as_rows(t, num_dims) for t in (dy, dnew_residual, h)]
    flags = {"DX_PORT": dx_port, "DWEIGHT": dweight is not None, "DBIAS": dbias is not None}
    _launch_rows(programs, gradients, mean, rstd, weight, dh, dx, partials, stats, shape, **flags)
    if partials is not None:
        _launch_columns(partials, N, dweight, dbias, stats, dx_port + 1)
    return dh, dx, dweight, dbias


def _launch_rows(
    programs: int,
    rows: list[torch.Tensor | None],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    dh: torch.Tensor,
    dx: torch.Tensor | None,
    partials: torch.Tensor | None,
    stats: torch.Tensor | None,
    shape: Shape,
    **constants: int,
) -> None:
    M, N = rows[2].shape
    launch(
        norm_bwd_looped_kernel if shape.looped else norm_bwd_kernel,
        (programs,),
        *rows,
        mean,
        rstd,
        columns_of(weight),
        dh,
        dx,
        partials,
        stats,
        *(0 if t is None else t.stride(0) for t in rows),
        M,
        num_slots(stats),
        N=max(1, N),
        SLOTS=32 * shape.num_warps,
        STAGES=STAGES,
        **constants,
        **shape.options,
    )


def _launch_columns(
    partials: torch.Tensor,
    N: int,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    stats: torch.Tensor | None,
    first_port: int,
) -> None:
    block_n = max(PARTIAL_BLOCK, 1 << (-(-N // num_slots(stats)) - 1).bit_length())
    launch(
        norm_finalize_kernel,
        (max(1, -(-N // block_n)), 2),
        partials,
        dweight,
        dbias,
        stats,
        partials.shape[1],
        num_slots(stats),
        N=N,
        FIRST_PORT=first_port,
        BLOCK_P=PARTIAL_ROWS,
        BLOCK_N=block_n,
        num_warps=4,
    )
