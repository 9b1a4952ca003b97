"""Sites: the places of a model at which the gradient is measured, and how they are chosen and named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import nn

from gradkernels.nn import AddLayerNorm, FusedModule, Residual
from gradkernels.ops.probe import PORTS as PROBE_PORTS
from gradkernels.ops.probe import GradientHook
from gradkernels.telemetry.names import NUMBER

PROBE, RESIDUAL, LAYER = "probe", "residual", "layer"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
MANY_LAYERS = 4  # of one class in a container: a chain worth looking into, also inside a block
HEAD = 4096  # outputs from which on a Linear that widens fourfold is taken for a vocabulary's: too large to read for nothing
WRAPPED = re.compile(r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module")
WRAPPER = re.compile(r"Parallel|AveragedModel|Engine")  # in the class names of those that call their model `module`


@dataclass(eq=False)
class Site:
    """One instrumented place. role: PROBE (the output of a module is read), RESIDUAL (a fused op on the residual stream) or
    LAYER (any other fused op).

    suffix: what follows "stats" in the name of the module's attribute; `time_stats` is there in an LSTM alone.
    last_run: the step, counted from 1, in which the module ran last; 0 where it has not.
    """

    name: str
    module: nn.Module
    role: str
    ports: tuple[str, ...]
    device: torch.device
    suffix: str = ""
    stats: torch.Tensor | None = None
    time_stats: torch.Tensor | None = None
    table: torch.Tensor | None = None  # its rows; `stats` is these while it measures
    last_run: int = 0
    hook: GradientHook = field(default_factory=GradientHook)
    kept: list[Any] = field(default_factory=list)  # handles of the hook on tensors that outlive a backward

    @property
    def port(self) -> str:
        """The port that holds dL/dh: what is compared over depth."""
        return "dx" if self.role == RESIDUAL else self.ports[0]

    def set_stats(self, stats: torch.Tensor | None, time_stats: torch.Tensor | None) -> None:
        """Where the site measures from here on; None: it does not."""
        self.stats = self.hook.stats = stats
        if self.role != PROBE:
            setattr(self.module, f"stats{self.suffix}", stats)
        if self.time_stats is not None:
            setattr(self.module, f"time_stats{self.suffix}", time_stats)

    def let_go(self) -> None:
        """Measures no more, and takes what is kept off."""
        self.set_stats(None, None)
        for handle in self.kept:
            handle.remove()
        self.kept.clear()
        self.module.__dict__.pop("on_forward", None)


def sites_of(model: nn.Module, patterns: Sequence[str] | None = None) -> list[Site]:
    """The sites of a model whose supported layers are fused, a module after what is inside it.

    patterns: where given, the modules whose names match one of them (`*` matches dots too), and no others. Raises ValueError
    for a pattern that matches nothing.
    """
    names = names_of(model)
    fused = {module for module in names if isinstance(module, FusedModule)}
    if patterns is None:
        chosen = fused | ({model} if _is_layer(model) and _has_parameters(model) else set(_probed(model, False)))
        if _has_parameters(model) and not any(_has_parameters(module) for module in chosen):
            chosen = chosen | {model}
    else:
        chosen = set()
        for pattern in patterns:
            found = {module for module, name in names.items() if fnmatchcase(name, pattern)}
            if not found:
                raise ValueError(f"watch: sites must match modules of the model, got {pattern!r}, which matches none")
            chosen |= found
    if not chosen:
        raise RuntimeError("watch: model has no parameters and no layer with a fused kernel: there is nothing to measure")
    result = []
    for module, name in names.items():
        if module not in chosen:
            continue
        device = device_of(module) or device_of(model) or torch.device("cpu")
        if module not in fused:
            result.append(Site(name, module, PROBE, PROBE_PORTS, device))
            continue
        role = RESIDUAL if isinstance(module, Residual | AddLayerNorm) else LAYER
        for suffix in module.suffixes:
            result.append(Site(name + suffix.replace("_l", ".l", 1), module, role, module.PORTS, device, suffix))
    return result


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's parameters, or else its buffers, are; None where it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), None)


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Every module's name, a module after what is inside it: its path without what wrappers put in."""
    found: dict[nn.Module, str] = {}
    taken: set[str] = set()

    def visit(module: nn.Module, name: str, path: str, seen: set[nn.Module]) -> None:
        seen.add(module)
        for key, child in module.named_children():
            if child in seen:
                continue
            wrapped = WRAPPED.fullmatch(key) or (key == "module" and WRAPPER.search(type(module).__name__))
            visit(child, name if wrapped else f"{name}.{key}".lstrip("."), f"{path}.{key}".lstrip("."), seen)
        own = name or "(model)"
        if own in taken and not WRAPPER.search(type(module).__name__):
            own = path or "(model)"
        taken.add(own)
        found[module] = own

    visit(model, "", "", set())
    return found


def _probed(module: nn.Module, in_block: bool) -> Iterator[nn.Module]:
    """The modules inside `module` whose outputs are read: blocks, and layers that are in no block.

    A block is one of several modules of a class side by side that have layers inside. Inside a block no layer is read, but the
    blocks of a container, and chains of MANY_LAYERS.
    """
    children = {name: child for name, child in module.named_children() if _has_parameters(child)}
    classes = Counter(type(child) for child in children.values())
    named_alike = Counter((NUMBER.sub("", name), type(child)) for name, child in children.items())
    listed = isinstance(module, CONTAINERS)
    for name, child in children.items():
        same = classes[type(child)]
        if same == 2 and not listed and named_alike[NUMBER.sub("", name), type(child)] == 1:
            same = 1  # an encoder and a decoder, two towers
        if type(child) in CONTAINERS:
            yield from _probed(child, in_block)
        elif isinstance(child, FusedModule):
            if isinstance(child, Residual):
                yield from _probed(child, True)
        elif _is_layer(child):
            if not _is_head(child) and (not in_block or (listed and same >= MANY_LAYERS)):
                yield child
        elif same >= 2 and (listed or not in_block):
            yield child
            yield from _probed(child, in_block or listed or same >= 3)
        else:
            yield from _probed(child, in_block)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one layer: nothing with parameters is inside, or torch knows it as one."""
    if isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations"):
        return True
    return not any(_has_parameters(child) for child in module.children())


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features >= max(HEAD, 4 * module.in_features)
