"""What PyTorch's own ops do in a torch.autocast region, for ours to do the same."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}
NORMS_IN_FLOAT32, CELLS_IN_REGION = (  # devices on which PyTorch's own op has a rule under torch.autocast
    frozenset(device for device, key in AUTOCAST_KEYS.items() if torch._C._dispatch_has_kernel_for_dispatch_key(op, key))
    for op in ("aten::layer_norm", "aten::lstm_cell")
)


def in_autocast(device: str) -> bool:
    """Whether an autocast region of this kind of device is around; meta has none (Dynamo of torch 2.11 cannot ask that)."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_off(x: torch.Tensor) -> AbstractContextManager:
    """A context in which products on x's device are computed in the dtype of their arguments, as our ops mean them."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if in_autocast(device) else nullcontext()


def autocast_norm(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as PyTorch's layer_norm computes them: in float32 in an autocast region of a GPU, float64 ones as they are.

    On the CPU autocast leaves layer_norm alone, as it leaves gelu alone everywhere.
    """
    device = x.device.type
    if device not in NORMS_IN_FLOAT32 or not in_autocast(device):
        return (x, *others)
    return _cast(torch.float32, x, *others)


def autocast_region(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in the dtype of the autocast region around, if there is one; float64 and integer ones as they are."""
    device = tensors[0].device.type
    if not in_autocast(device):
        return tensors
    return _cast(torch.get_autocast_dtype(device), *tensors)


def _cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    keep = lambda t: t is None or t.dtype is torch.float64 or not t.is_floating_point()  # noqa: E731
    return tuple(t if keep(t) else t.to(dtype) for t in tensors)
