"""Nested tensors: what an op of rows does to one, and the numbers that one holds."""

from __future__ import annotations

from collections.abc import Callable

import torch


def on_components(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function`, which treats every row alike and keeps its shape, on a nested tensor of either layout; differentiable.

    One call where the components lie one behind the other, as those of a jagged tensor do; else one for each.
    """
    if x.layout is torch.jagged and x.lengths() is None and x._ragged_idx == 1:
        return torch.nested.nested_tensor_from_jagged(function(x.values()), x.offsets())
    components = [function(component) for component in x.unbind()]
    return torch.nested.as_nested_tensor(components, layout=x.layout) if components else x


def numbers_of(x: torch.Tensor) -> torch.Tensor:
    """The elements of any tensor, nested ones as one plain tensor."""
    return x.contiguous().values() if x.is_nested else x
