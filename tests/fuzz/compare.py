"""Comparison of results with the truth, element by element, each with the error that it may have."""

import torch

from gradkernels.testing import accumulator


def describe(name: str, wrong: torch.Tensor, **columns: torch.Tensor) -> str:
    """How many elements are wrong, and what the first of them is."""
    index = tuple(wrong.nonzero()[0].tolist())
    shown = ", ".join(f"{column} {values.broadcast_to(wrong.shape)[index].item()!r}" for column, values in columns.items())
    return f"{name}{list(index)}: {shown} ({int(wrong.sum())} of {wrong.numel()} elements are wrong)"


def check_like(name: str, ours: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Asserts dtype and shape."""
    assert ours.dtype is dtype, f"{name}: {ours.dtype}, expected {dtype}"
    assert tuple(ours.shape) == tuple(shape), f"{name}: {tuple(ours.shape)}, expected {tuple(shape)}"


def check_equal(name: str, ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equal numbers; NaN equals NaN."""
    check_like(name, ours, expected.dtype, expected.shape)
    wrong = ~((ours == expected) | (ours.isnan() & expected.isnan()))
    assert not wrong.any(), describe(name, wrong, ours=ours, expected=expected)


def check_within(
    name: str, ours: torch.Tensor, exact: torch.Tensor, error: torch.Tensor, where: torch.Tensor | bool = True
) -> None:
    """Asserts |ours - exact| <= error and one rounding to ours' dtype, where `where`, all in float64.

    Where the truth is NaN or infinite ours must be either. Where one of them is infinite because it rounded beyond the largest
    number the other may be that number.
    """
    if ours.numel() == 0:
        return
    info = torch.finfo(ours.dtype)
    stored = ours.double()
    where = torch.as_tensor(where).broadcast_to(ours.shape)
    allowed = error + info.eps * exact.abs() + info.smallest_normal * info.eps
    right = (stored - exact).abs() <= allowed
    right |= stored.isinf() & (exact * stored.sign() + allowed >= info.max)
    at_the_end = exact.isinf() & (stored * exact.sign() >= info.max * (1 - 64 * info.eps))
    right = torch.where(exact.isfinite(), right, at_the_end | ~stored.isfinite())
    wrong = ~right & where
    assert not wrong.any(), describe(name, wrong, ours=stored, exact=exact, allowed=allowed)


def rounding(dtype: str | torch.dtype) -> float:
    """eps of what a tensor of `dtype` is computed in."""
    return torch.finfo(accumulator(dtype)).eps


def floor(dtype: torch.dtype) -> float:
    """The smallest number of what a tensor of `dtype` is computed in: products below it are lost."""
    info = torch.finfo(accumulator(dtype))
    return info.smallest_normal * info.eps


def sum_error(dtype: torch.dtype, count: int, lanes: int = 1) -> float:
    """How far off a sum of `count` numbers, added one after the other in `lanes`, may be in terms of their magnitudes' sum.

    Half a rounding for each addition, as where all numbers are equal, and a few for what the numbers are products of.
    """
    return rounding(dtype) * (8 + count / lanes / 2)
