"""A probe: the identity, whose backward reads the gradient once and writes nothing but its statistics."""

from __future__ import annotations

from typing import Any

import torch

from gradkernels.library import _C, FLOATS, define_composite, define_kernel, no_output
from gradkernels.nested import numbers_of
from gradkernels.telemetry import LOCK, check_stats, measure_reference, without_graph

PORTS = ("dy",)
SCHEMA = "probe(Tensor(a) x, Tensor? stats) -> Tensor(a)"
SCHEMA_BWD = "probe_bwd(Tensor dy, Tensor(a!) stats, int port) -> ()"


def _probe_bwd_default(dy: torch.Tensor, stats: torch.Tensor, port: int) -> None:
    """The reference; under vmap, and with is_grads_batched, a batch of gradients is one larger gradient."""
    if torch._C._functorch.is_batchedtensor(dy):
        probe_bwd(torch._C._functorch.get_unwrapped(dy), stats, port)
    elif torch._C._functorch.is_legacy_batchedtensor(dy):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        probe_bwd(torch._remove_batch_dim(dy, level, 1, 0), stats, port)
    else:
        measure_reference(dy, stats, port)


probe_bwd = define_kernel(SCHEMA_BWD, _probe_bwd_default, no_output, differentiable=False)


class GradientHook:
    """A hook that measures the gradient of a tensor in row 0 of `stats`, as that is by then; None measures nothing.

    Hooks are equal where they write to the same table. Where the extension is built, its own hook (csrc/autograd/probe.cpp)
    serves the tensors that it can.
    """

    def __init__(self, stats: torch.Tensor | None = None) -> None:
        self._native = _C.ProbeHook() if _C is not None else None
        self.stats = stats

    @property
    def stats(self) -> torch.Tensor | None:
        """Where it measures."""
        return self._stats

    @stats.setter
    def stats(self, stats: torch.Tensor | None) -> None:
        self._stats = stats
        if self._native is not None:
            self._native.stats = stats

    def __call__(self, dy: torch.Tensor | None) -> None:
        if dy is None or self.stats is None:
            return
        dy = without_graph(numbers_of(dy))
        probe_bwd(torch.view_as_real(dy) if dy.is_complex() else dy, self.stats, 0)

    def attach(self, x: torch.Tensor) -> Any:
        """Has the gradient of `x` measured, summed over all its uses: a leaf's hook's handle, else None.

        No node and no view, so writing into x in place stays what it was. A tensor that meets the same hook again (a leaf
        every step, a block's input when checkpointing runs the block again) keeps its one hook, whichever thread is first.
        """
        if self._native is not None and self._native.attach(x):
            return None
        with LOCK:
            for hook in (x._backward_hooks or {}).values():
                if hook is self or (isinstance(hook, GradientHook) and hook.stats is self.stats is not None):
                    return None
            handle = x.register_hook(self)
        return handle if x.is_leaf else None


def _probe(x: torch.Tensor, stats: torch.Tensor | None) -> torch.Tensor:
    """x itself, with a hook on its gradient."""
    if stats is not None and x.requires_grad and torch.is_grad_enabled():
        GradientHook(stats).attach(x)
    return x


_probe_op = define_composite(SCHEMA, _probe)


def probe(x: torch.Tensor, *, stats: torch.Tensor | None = None) -> torch.Tensor:
    """x itself; in backward the gradient that reaches it, summed over all its uses, is measured.

    x: any shape, nested tensors too; float32, float64, bfloat16 or float16. Returned as it is.
    stats: statistics tensor (1, slots, 8) for the port dy, written in backward; None measures nothing.
    Raises TypeError for another dtype, ArgumentError for a `stats` of another shape or device.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"probe: x must be a floating-point tensor, got {x.dtype}")
    if stats is not None:
        check_stats("probe", stats, x, PORTS)
    return _probe_op(x, stats)
