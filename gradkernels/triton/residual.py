"""The residual connection on a GPU: the sum at the fork, dx = dskip + dbranch. A program goes through blocks of elements."""

import torch
import triton
import triton.language as tl

from gradkernels.triton.launch import pointwise, with_strides_of
from gradkernels.triton.launch_cache import register
from gradkernels.triton.reduce import accumulate, accumulator, elements_per_access, new_accumulator, write_stats_flat


@triton.jit(do_not_specialize=["num_vectors", "num_slots"])
def residual_bwd_kernel(
    dskip_ptr,
    dbranch_ptr,
    dx_ptr,
    num_vectors,
    stats_ptr,
    num_slots,
    TELEMETRY: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """dx = dskip + dbranch, either of which may be absent. Grid: as gelu_bwd_kernel's."""
    HAS_DSKIP: tl.constexpr = dskip_ptr is not None
    HAS_DBRANCH: tl.constexpr = dbranch_ptr is not None
    dtype: tl.constexpr = accumulator(dx_ptr.dtype.element_ty)
    ELEMENTS_PER_ACCESS: tl.constexpr = elements_per_access(dx_ptr.dtype.element_ty)
    numel = num_vectors.to(tl.int64) * VECTOR
    dskip_acc, dbranch_acc, dx_acc = new_accumulator(SLOTS, dtype), new_accumulator(SLOTS, dtype), new_accumulator(SLOTS, dtype)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < numel
        total = tl.zeros([BLOCK], dtype)
        if HAS_DSKIP:
            dskip = tl.load(dskip_ptr + offsets, mask, other=0.0).to(dtype)
            total = dskip
            if TELEMETRY:
                dskip_acc = accumulate(dskip_acc, dskip, ELEMENTS_PER_ACCESS)
        if HAS_DBRANCH:
            dbranch = tl.load(dbranch_ptr + offsets, mask, other=0.0).to(dtype)
            total = total + dbranch if HAS_DSKIP else dbranch
            if TELEMETRY:
                dbranch_acc = accumulate(dbranch_acc, dbranch, ELEMENTS_PER_ACCESS)
        dx = total.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offsets, dx, mask)
        if TELEMETRY:
            dx_acc = accumulate(dx_acc, dx.to(dtype), ELEMENTS_PER_ACCESS)
    if TELEMETRY:
        if HAS_DSKIP:
            write_stats_flat(dskip_acc, stats_ptr, 0, num_slots, dskip_ptr, numel, BLOCK)
        if HAS_DBRANCH:
            write_stats_flat(dbranch_acc, stats_ptr, 1, num_slots, dbranch_ptr, numel, BLOCK)
        write_stats_flat(dx_acc, stats_ptr, 2, num_slots, dx_ptr, numel, BLOCK)


def residual_bwd(dskip: torch.Tensor | None, dbranch: torch.Tensor | None, stats: torch.Tensor | None) -> torch.Tensor:
    """dx, with the shape, dtype and strides of dskip, or of dbranch where that is all there is. One launch."""
    dx = torch.empty_like(dbranch if dskip is None else dskip)
    inputs = [t if t is None else with_strides_of(dx, t) for t in (dskip, dbranch)]
    pointwise(residual_bwd_kernel, dx, stats, *inputs, dx)
    return dx


register("residual_bwd", residual_bwd)
