"""Comparison with eager PyTorch: gradients, tolerances taken from eager's own error, statistics computed independently.

Shared by tests and benchmarks. Nothing here calls an op of gradkernels; `check` and `check_stats` raise AssertionError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradkernels.telemetry import merge_slots, record_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EAGER_FACTOR = 1.5  # how much larger than eager's an error may be: both are maxima of a few hundred roundings

Tensors = Sequence[torch.Tensor | None]


def randn(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> torch.Tensor:
    """Normal values around `mean`, the same for every dtype but for rounding."""
    return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)


def lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """`t` in another layout: contiguous, transposed, sliced, channels_last, or expanded (stride 0, other values)."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "sliced":
        wider = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
        wider[..., 1::2] = t
        return wider[..., 1::2]
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return t[..., :1].contiguous().expand_as(t)
    if layout == "scalar":
        return t.flatten()[0].expand_as(t)
    return t.contiguous()


def differentiate(function: Callable, inputs: Sequence[Any], dys: Tensors, dtype: torch.dtype | None = None) -> tuple:
    """(outputs, gradients): function(*inputs) and what `dys` (None: output not used) give to each floating-point input.

    Everything is cast to `dtype` where there is one. The gradients of other inputs, and those autograd leaves out, are None.
    """
    cast = [t.detach().to(dtype or t.dtype) if is_floating(t) else t for t in inputs]
    leaves = [t.requires_grad_() for t in cast if is_floating(t)]
    outputs = function(*cast)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, dys, strict=True) if dy is not None]
    found = torch.autograd.grad([y for y, _ in used], leaves, [dy for _, dy in used], allow_unused=True)
    gradients = iter(found)
    return tuple(y.detach() for y in outputs), tuple(next(gradients) if is_floating(t) else None for t in cast)


def is_floating(t: Any) -> bool:
    """Whether `t` is a tensor that can have a gradient."""
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def largest(t: torch.Tensor | None) -> float:
    """The largest finite magnitude; 0 where there is none."""
    if t is None or t.numel() == 0:
        return 0.0
    return torch.where(t.isfinite(), t.double().abs(), 0.0).max().item()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor of `dtype` is computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def tolerance(eager_error: float, exact: torch.Tensor, dtype: torch.dtype, terms: float) -> float:
    """EAGER_FACTOR times eager's error, one rounding to `dtype`, and roundings of `terms` in the accumulator.

    terms: the largest sum of magnitudes that an element is made of, times the square root of how many were added up. Two
    roundings each for ours and for the truth, which in float64 is no better.
    """
    stored, summed = torch.finfo(dtype).eps, torch.finfo(accumulator(dtype)).eps
    return EAGER_FACTOR * eager_error + stored * largest(exact) + 4 * summed * max(terms, largest(exact))


def compare(name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, terms: float = 0.0) -> None:
    """Asserts eager's dtype and shape, finite numbers where it has them, and an error within `tolerance`."""
    assert ours.dtype is eager.dtype, f"{name}: {ours.dtype}, expected {eager.dtype}"
    assert ours.shape == eager.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(eager.shape)}"
    finite = eager.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: {(ours.isfinite() != finite).sum()} elements NaN or infinite"
    assert torch.equal(ours.isnan(), eager.isnan()), f"{name}: NaN in other places than eager's"
    zero = torch.zeros((), dtype=torch.float64)
    error, eager_error = (largest(torch.where(finite, t.double() - exact, zero)) for t in (ours, eager))
    bound = tolerance(eager_error, exact, ours.dtype, terms)
    assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e} (eager's {eager_error:.2e})"


def check_results(ours: tuple, eager: tuple, exact: tuple, terms: Mapping[str, float] | None = None) -> None:
    """Compares every output ("y0", ...) and every gradient ("d0", ...) of three results of `differentiate`."""
    for letter, part in zip("yd", zip(ours, eager, exact, strict=True), strict=True):
        for k, (value, eager_value, exact_value) in enumerate(zip(*part, strict=True)):
            name = f"{letter}{k}"
            assert (value is None) == (eager_value is None), f"{name}: there in one implementation alone"
            if value is not None:
                compare(name, value, eager_value, exact_value, (terms or {}).get(name, 0.0))


def check(
    function: Callable,
    eager: Callable,
    inputs: Sequence[Any],
    dys: Tensors,
    terms: Mapping[str, float] | None = None,
) -> tuple:
    """Compares function with eager, forward and every gradient; eager in float64 is the truth. Returns function's results."""
    ours = differentiate(function, inputs, dys)
    check_results(ours, differentiate(eager, inputs, dys), differentiate(eager, inputs, dys, torch.float64), terms)
    return ours


def norm_terms(h: torch.Tensor, weight: Any, dy: torch.Tensor | None, num_dims: int, eps: float) -> dict[str, float]:
    """`terms` of LayerNorm of `h`: "y", "dx", "dweight", "dbias"; "offset": 1 + the largest |h| in standard deviations."""
    if h.numel() == 0:
        return {"offset": 1.0, "y": 0.0, "dx": 0.0, "dweight": 0.0, "dbias": 0.0}
    dims, h = tuple(range(-num_dims, 0)), h.detach().double()
    dy = torch.zeros_like(h) if dy is None else dy.double()
    factor = torch.ones_like(h) if weight is None else weight.detach().double()
    rstd = (h.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
    x_hat, g = (h - h.mean(dims, keepdim=True)) * rstd, dy * factor
    offset = largest(h * rstd)  # x_hat is off by a rounding of this, all along a row
    size = largest(x_hat) + offset
    mean_g, mean_gx = g.mean(dims, keepdim=True).abs(), (g * x_hat).mean(dims, keepdim=True).abs()
    dx = rstd * (g.abs() + mean_g * (1 + offset * x_hat.abs()) + size * mean_gx)
    depth = math.sqrt(h.numel() / math.prod(h.shape[-num_dims:]))
    return {
        "offset": 1 + offset,
        "y": size * largest(factor),
        "dx": largest(dx),
        "dweight": depth * largest(dy) * size,
        "dbias": depth * largest(dy),
    }


def fields_of(gradients: Sequence[torch.Tensor]) -> dict[str, float]:
    """The fields of a row that saw `gradients`, in plain float64; squares are scaled by the largest magnitude."""
    parts = [t.detach().double().flatten().numpy() for t in gradients]
    values = np.concatenate([*parts, np.zeros(0)])
    finite = values[np.isfinite(values)]
    peak = float(np.abs(finite).max(initial=0.0))
    with np.errstate(under="ignore"):
        norm = peak * math.sqrt(math.fsum(np.square(finite / peak))) if peak else 0.0
    return {
        "numel": values.size,
        "observation_count": len(gradients),
        "square_sum": norm * norm,
        "norm": norm,
        "abs_max": peak,
        "nonfinite_count": values.size - finite.size,
        "zero_count": int((values == 0).sum()),
    }


def check_stats(stats: torch.Tensor, ports: Sequence[str], expected: Mapping[str, Any], relative: float = 1e-5) -> None:
    """Asserts that row by row `stats` holds the fields of `expected`: for each port a gradient or a list of them.

    Counts and abs_max must be equal, sums to `relative`. A port that is not in `expected` must be empty.
    """
    assert set(expected) <= set(ports)
    for port, row in zip(ports, merge_slots(stats).tolist(), strict=True):
        gradients = expected.get(port, [])
        record = record_of("site", port, row)
        for field, value in fields_of(gradients if isinstance(gradients, list) else [gradients]).items():
            found = getattr(record, field)
            sums = field in ("square_sum", "norm")
            same = math.isclose(found, value, rel_tol=relative) if sums else found == value
            assert same, f"{port}.{field}: {found!r}, expected {value!r}"
