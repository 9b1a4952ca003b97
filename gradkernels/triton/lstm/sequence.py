"""What is known of a recurrence on the host: the rows of each step, the shape of a program, the products around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROWS = 32  # of a program of a step: fixed, so that no kernel is rebuilt for another batch
COLUMNS = 16  # units or outputs of a program, which for one step of H 768 makes 48 programs
DEPTH = {2: 64, 4: 32, 8: 16}  # of a turn of a product's loop, by bytes of an element


@dataclass(frozen=True)
class Steps:
    """The rows of each time step. A tuple of runs describes all of them: consecutive steps of one size."""

    sizes: list[int]
    first: list[int]  # row of each step
    order: range  # the steps as the forward pass takes them
    B: int
    batch_sizes: torch.Tensor | None = None  # `sizes` on the CPU, contiguous, where they were given

    @classmethod
    def of(cls, sizes: list[int], B: int, reverse: bool, batch_sizes: torch.Tensor | None = None) -> Steps:
        """The steps of `sizes` rows each, of sequences that start together."""
        first, T = [0], len(sizes)
        for size in sizes:
            first.append(first[-1] + size)
        order = range(T - 1, -1, -1) if reverse else range(T)
        return cls(sizes, first, order, B, None if batch_sizes is None else batch_sizes.contiguous())

    @classmethod
    def padded(cls, rows: int, B: int, reverse: bool) -> Steps:
        """The steps of B rows each, of which there is at least one."""
        return cls.of([B] * (rows // B), B, reverse)

    @property
    def reverse(self) -> bool:
        """Whether the last step is taken first."""
        return self.order.step < 0

    def previous(self, t: int) -> int:
        """The step that the forward pass takes before t; -1 or T where there is none."""
        return t - self.order.step

    def rows_with_predecessor(self, t: int) -> int:
        """How many rows of step t have a row in the step before; the others start from the initial state."""
        before = self.previous(t)
        return min(self.sizes[t], self.sizes[before]) if 0 <= before < len(self.sizes) else 0

    def active_rows(self, t: int) -> int:
        """How many rows of step t have a row in the step after; the other sequences end at t."""
        after = t + self.order.step
        return min(self.sizes[t], self.sizes[after]) if 0 <= after < len(self.sizes) else 0

    def runs(self) -> list[tuple[int, int]]:
        """(first, last) of each run of steps of one size; few, whatever T is: no more than there are sequences."""
        found = []
        for t, size in enumerate(self.sizes):
            if t and size == self.sizes[t - 1]:
                found[-1] = (found[-1][0], t)
            else:
                found.append((t, t))
        return found


def previous_rows(steps: Steps, rows: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """For every row (t, b) row (previous t, b) of `rows`, and row b of `initial` where there is none: a run at a time."""
    pieces = []
    for begin, end in steps.runs():
        size, starts = steps.sizes[begin], end if steps.reverse else begin
        source, rows_with_predecessor = (
            steps.first[steps.previous(starts)] if steps.rows_with_predecessor(starts) else 0,
            steps.rows_with_predecessor(starts),
        )
        outside = [rows[source : source + rows_with_predecessor], initial[rows_with_predecessor:size]]
        if steps.reverse:
            pieces += [rows[steps.first[begin + 1] : steps.first[end + 1]] if end > begin else rows[:0], *outside]
        else:
            pieces += [*outside, rows[steps.first[begin] : steps.first[end]]]
    return torch.cat(pieces)


def last_rows(steps: Steps, rows: torch.Tensor) -> torch.Tensor:
    """Row b of each sequence's last step: the rows that no later step continues."""
    if steps.reverse:
        return rows[: steps.B]
    ends = reversed([end for _, end in steps.runs()])
    return torch.cat([rows[steps.first[t] + steps.active_rows(t) : steps.first[t] + steps.sizes[t]] for t in ends])


def tile_of(dtype: torch.dtype, H: int, P: int) -> dict[str, int]:
    """The constants and options of a program for operands of `dtype`; neither T nor B is among what they depend on.

    Rows that do not start at whole accesses are loaded element by element, through registers: fewer at a time, or they spill.
    """
    whole = (H * dtype.itemsize) % 16 == 0 and (P * dtype.itemsize) % 16 == 0
    depth = DEPTH[dtype.itemsize] if whole else max(16, DEPTH[dtype.itemsize] // 2)
    return {"BLOCK_M": ROWS, "BLOCK_N": COLUMNS, "BLOCK_K": depth, "num_warps": 4}


def uses_tf32(dtype: torch.dtype, exact: bool = False) -> bool:
    """Whether products of float32 operands may be rounded to TF32: as PyTorch's switch for matmul says.

    exact: the operands are float32 that hold float16, or are meant to be rounded to as many bits; TF32 has as many.
    """
    if dtype is not torch.float32 or torch.version.hip:
        return False
    return exact or torch.backends.cuda.matmul.fp32_precision == "tf32"


def aligned(t: torch.Tensor) -> torch.Tensor:
    """`t` without gaps and from an address that any tensor of its own has, so that kernels see no other alignment."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def multiply_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a b, added up and given back in float32 (float64). PyTorch has that for 16-bit dtypes on GPUs alone."""
    if a.dtype.itemsize > 2:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def of_both_biases(
    dbias: torch.Tensor | None, of_bias_ih: bool, of_bias_hh: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of bias_ih and bias_hh where they are wanted: equal numbers, a tensor each."""
    both = dbias is not None and of_bias_ih and of_bias_hh
    return dbias if of_bias_ih else None, dbias.clone() if both else dbias if of_bias_hh else None


def preactivations(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x weight^T + bias in float32 (float64); bias is in that already."""
    if bias is not None and x.dtype is bias.dtype:
        return torch.addmm(bias, x, weight.t(), out=out)
    product = multiply_float32(x, weight.t(), out)
    return product if bias is None else product.add_(bias)
