"""Watching a model: which site writes which rows, and what happens once a step."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from gradkernels.convert import Uncovered, convert, uncovered
from gradkernels.diagnose import slope
from gradkernels.nn import LSTM, AddLayerNorm, Residual, _Measuring
from gradkernels.nn.measuring import Hook, hooks_of
from gradkernels.ops.probe import PORTS as PROBE_PORTS
from gradkernels.ops.probe import measure_gradient, probe
from gradkernels.telemetry import LOCK, Record, TimeProfile, fold, new_stats, new_time_stats, profile_of, record_of, take_steps

WRAPPERS = re.compile(r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
PROBE, STREAM = "probe", "stream"
TIME_STEPS = 256  # for which an LSTM has room before its first call
MAX_UNREAD = 256  # finished steps kept before their slopes are read; by then the device is long done with them


@dataclass
class Site:
    """One instrumented place. `kind`: "probe" (a block's output), "stream" (a fused op on the residual stream), "op".

    `part` is what follows "stats" in the name of the module's attribute; `time_stats` is there in a part of an LSTM alone.
    """

    name: str
    module: nn.Module
    kind: str
    ports: tuple[str, ...]
    device: torch.device
    part: str = ""
    stats: torch.Tensor | None = None
    time_stats: torch.Tensor | None = None
    probed: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # tensors with a hook, and its handle


@dataclass(frozen=True)
class Coverage:
    """What is watched and what is not: names of fused sites, of probes, and the layers left as they are with the reason."""

    fused: tuple[str, ...]
    probes: tuple[str, ...]
    uncovered: tuple[Uncovered, ...]
    order: str

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused sites, {len(self.probes)} probes; order of sites: {self.order}"]
        lines += [f"  not covered: {site or '(the model)'} ({layer}): {reason}" for site, layer, reason in self.uncovered]
        return "\n".join(lines)


def site_name(path: str) -> str:
    """A module path without the prefixes that torch.compile, DDP, FSDP and checkpointing put in."""
    return WRAPPERS.sub("", path).lstrip(".") or "(model)"


def watch(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Watch:
    """A Watch on `model`, whose supported layers are fused ones from here on. See Watch."""
    return Watch(model, optimizer)


class Watch:
    """Measures, every step, the gradient that flows through each site of a model, inside its backward kernels.

    model: its supported layers are swapped in place (`convert`); where no fused op covers the boundary of a block (a child
    of a ModuleList or Sequential that has parameters), a probe reads the gradient of the block's output once. Call it after
    the model is on its device and before torch.compile traces it.
    optimizer: where given, the learning rate is recorded with each step; its parameters must be the model's.
    Raises ValueError where the optimizer holds none of the model's parameters, RuntimeError where the model is watched
    already or has nothing to watch.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        if any(_is_watched(module) for module in model.modules()):
            raise RuntimeError(
                "watch: model is watched already: close() that Watch first, or gk.revert(model) where it is out of reach"
            )
        if optimizer is not None:
            _check_optimizer(model, optimizer)
        self.model, self.optimizer = convert(model), optimizer
        self.step_count, self.loss, self.learning_rate = 0, None, None
        self._hooks: list[Any] = []
        self._ordering: list[Any] = []
        self._first_run: list[int] = []
        self._rows: list[torch.Tensor] | None = None
        self._time_rows: list[tuple[Site, torch.Tensor]] = []
        self._unread: list[list[torch.Tensor]] = []
        self._slopes: list[float | None] = []
        self.sites = _in_registration_order(model, [*_fused_sites(model), *_probe_sites(model)])
        if not self.sites:
            raise RuntimeError("watch: model has no layer with a fused kernel and no block boundary to probe")
        for index, site in enumerate(self.sites):
            self._ordering.append(_on_run(site, self._note_run(index)))
            if site.kind == PROBE:
                self._hooks.append(site.module.register_forward_hook(_probe_hook(site)))
        self._allocate()
        # A Watch that nobody holds any more can tell nobody anything: it ends. Nothing that the model holds refers to it.
        self._end = weakref.finalize(self, _let_go, self.sites, self._hooks, self._ordering)
        self._end.atexit = False

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Ends a step: what was measured since the last call becomes `records()`, and counting starts again from zero.

        Call it once per optimizer step; micro-batches before it merge. `loss` is kept as it is given, detached. Nothing
        waits for the device.
        """
        self._rows = []
        for table in self._tables:
            self._rows.append(fold(table).to("cpu", non_blocking=True))
        self._time_rows = [(site, take_steps(site.time_stats)) for site in self.sites if site.time_stats is not None]
        self.step_count += 1
        self.loss = loss.detach() if isinstance(loss, torch.Tensor) else loss
        if self.optimizer is not None:
            self.learning_rate = self.optimizer.param_groups[0]["lr"]
        self._settle_order()
        self._unread.append(self._rows)
        if len(self._unread) > MAX_UNREAD:
            self._read_slopes()

    def records(self) -> list[Record]:
        """The rows of the last finished step, by depth and port; rows that nothing flowed through are left out.

        Empty before the first step. Waits for the device where the model is on one.
        """
        return [record for _, record in self.site_records()]

    def site_records(self) -> list[tuple[Site, Record]]:
        """As `records`, each with its site."""
        return self._site_records(self._rows) if self._rows is not None else []

    def stream(self) -> list[Record]:
        """dL/dh of the last finished step from the first site to the last, one record a site: what is compared over depth.

        Block boundaries (probes) and the residual stream (Residual, AddLayerNorm) where there are at least two of them;
        the incoming gradient dy of every fused op where not.
        """
        return _stream(self.site_records())

    def time_profile(self, site: str | None = None) -> list[TimeProfile]:
        """The gradient over the time steps of the last finished step: one TimeProfile for each layer and direction of each
        LSTM, of those of the site or module `site` alone where it is given; by depth. Empty before the first step.

        Raises ValueError where no LSTM has that name.
        """
        names = {name for own in self.sites if own.time_stats is not None for name in (own.name, _module_name(own))}
        if site is not None and site not in names:
            raise ValueError(f"time_profile: site must be one of {sorted(names)}, got {site!r}")
        found = ((own, rows) for own, rows in self._time_rows if site is None or site in (own.name, _module_name(own)))
        profiles = (profile_of(own.name, own.part, rows) for own, rows in found)
        return [profile for profile in profiles if profile is not None]

    def slopes(self) -> list[float | None]:
        """The dL/dh slope of each finished step, in decades; see `gradkernels.diagnose.slope`."""
        self._read_slopes()
        return list(self._slopes)

    def coverage(self) -> Coverage:
        """Which layers are fused, where probes are, and which norms and activations could not be fused, with the reason."""
        ran = "the forward pass" if self._first_run else "registration (no forward pass was seen outside torch.compile)"
        fused = tuple(site.name for site in self.sites if site.kind != PROBE)
        probes = tuple(site.name for site in self.sites if site.kind == PROBE)
        layers = tuple(Uncovered(site_name(name), layer, reason) for name, layer, reason in uncovered(self.model))
        return Coverage(fused, probes, layers, ran)

    def pause(self) -> None:
        """Stops measuring until `resume()`: the kernels run as if telemetry had never been written."""
        for site in self.sites:
            _set_stats(site, None, None)

    def resume(self) -> None:
        """Measures again after `pause()`."""
        for site, table, first in self._placed:
            _set_stats(site, table[first : first + len(site.ports)], site.time_stats)

    def close(self) -> None:
        """Ends the watching: no probes, no statistics. Fused layers stay; `gk.revert(model)` takes them back.

        A Watch that is no longer referred to closes itself.
        """
        self._end()

    def __str__(self) -> str:
        from gradkernels.report.terminal import table

        return table(self)

    def _allocate(self) -> None:
        """One table per device; each site owns a block of its rows."""
        self._tables, self._placed = [], []
        for device in dict.fromkeys(site.device for site in self.sites):
            sites = [site for site in self.sites if site.device == device]
            table = new_stats(sum(len(site.ports) for site in sites), device)
            self._tables.append(table)
            first = 0
            for site in sites:
                self._placed.append((site, table, first))
                first += len(site.ports)
                if isinstance(site.module, LSTM):
                    site.time_stats = new_time_stats(TIME_STEPS, device)
        self.resume()

    def _site_records(self, rows: list[torch.Tensor]) -> list[tuple[Site, Record]]:
        for table in self._tables:
            if table.is_cuda:
                torch.cuda.synchronize(table.device)
        values = {id(table): host.tolist() for table, host in zip(self._tables, rows, strict=True)}
        result = []
        for site, table, first in self._placed:
            for offset, port in enumerate(site.ports):
                record = record_of(site.name, port, values[id(table)][first + offset])
                if record.observation_count:
                    result.append((site, record))
        return result

    def _read_slopes(self) -> None:
        for rows in self._unread:
            self._slopes.append(slope(_stream(self._site_records(rows))))
        self._unread = []

    def _note_run(self, index: int) -> Callable[[torch.Tensor], None]:
        """What runs when a site first does: notes its place in the forward pass, and moves the tables to its device."""

        own = weakref.ref(self)

        def note(x: torch.Tensor) -> None:
            if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor):
                return
            watch = own()
            if watch is None:
                return
            if index not in watch._first_run:
                watch._first_run.append(index)
            if x.device != watch.sites[index].device:
                watch.sites[index].device = x.device
                watch._allocate()

        return note

    def _settle_order(self) -> None:
        """After the first step with a forward pass: sites in the order in which they ran, and no more hooks to learn it."""
        if not self._ordering or not self._first_run:
            return
        for hook in self._ordering:
            hook.remove()
        self._ordering.clear()
        seen = set(self._first_run)
        order = [*self._first_run, *(index for index in range(len(self.sites)) if index not in seen)]
        self.sites[:] = [self.sites[index] for index in order]
        place = {id(site): (site, table, first) for site, table, first in self._placed}
        self._placed = [place[id(site)] for site in self.sites]


def _stream(rows: list[tuple[Site, Record]]) -> list[Record]:
    boundaries = [record for site, record in rows if (site.kind, record.port) in ((PROBE, "dy"), (STREAM, "dx"))]
    return boundaries if len(boundaries) >= 2 else [record for _, record in rows if record.port == "dy"]


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("watch: optimizer must hold parameters of model, got one that holds none of them")


def _device_of(model: nn.Module, module: nn.Module) -> torch.device:
    for owner in (module, model):
        for tensor in (*owner.parameters(), *owner.buffers()):
            return tensor.device
    return torch.device("cpu")


def _fused_sites(model: nn.Module) -> Iterator[Site]:
    for path, module in model.named_modules():
        if isinstance(module, _Measuring):
            kind = STREAM if isinstance(module, Residual | AddLayerNorm) else "op"
            for part in module.parts:
                name = site_name(path) + part.replace("_l", ".l", 1)
                yield Site(name, module, kind, module.PORTS, _device_of(model, module), part)


def _is_watched(module: nn.Module) -> bool:
    names = module.stats_names() if isinstance(module, _Measuring) else ()
    return bool(hooks_of(module)) or any(module.__dict__.get(name) is not None for name in names)


def _module_name(site: Site) -> str:
    """The name of the site's module: the site's own, unless that names a part."""
    return site.name.removesuffix(site.part.replace("_l", ".l", 1))


def _probe_sites(model: nn.Module) -> Iterator[Site]:
    """The blocks of the outermost ModuleLists and Sequentials: their children with parameters that are not fused sites.

    A child that is itself such a container is looked into instead; a block is not.
    """
    seen: set[int] = set()

    def blocks(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            for name, child in module.named_children():
                yield from blocks(f"{path}.{name}", child)
            return
        children = [(f"{path}.{name}", child) for name, child in module.named_children()]
        nested = [item for item in children if isinstance(item[1], nn.ModuleList | nn.Sequential)]
        plain = [item for item in children if item not in nested and any(True for _ in item[1].parameters())]
        if len(plain) + len(nested) >= 2:
            yield from plain
        for name, child in nested:
            yield from blocks(name, child)

    for path, module in blocks("", model):
        if not isinstance(module, _Measuring) and id(module) not in seen:
            seen.add(id(module))
            yield Site(site_name(path), module, PROBE, PROBE_PORTS, _device_of(model, module))


def _in_registration_order(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Sites as the model lists its modules, a block after what is inside it: the order until a forward pass is seen."""

    def finished(module: nn.Module, seen: set[int]) -> Iterator[int]:
        if id(module) not in seen:
            seen.add(id(module))
            for child in module.children():
                yield from finished(child, seen)
            yield id(module)

    place = {identity: index for index, identity in enumerate(finished(model, set()))}
    return sorted(sites, key=lambda site: place[id(site.module)])


def _first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor of a block's output that its successor reads: the output, or the first of a tuple."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _probe_hook(site: Site) -> Hook:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        h = _first_tensor(output)
        if h is None or site.stats is None:
            return
        if torch.compiler.is_compiling():
            probe(h, stats=site.stats)
        elif h.requires_grad and torch.is_grad_enabled():
            _attach(site, h)

    return Hook(hook)


def _attach(site: Site, h: torch.Tensor) -> None:
    """Has the gradient of `h` measured where the site measures by then; once, however often the site meets this tensor."""

    def measure(dy: torch.Tensor | None) -> None:
        if dy is not None and site.stats is not None:
            measure_gradient(dy, site.stats)

    with LOCK:
        if h not in site.probed:
            site.probed[h] = h.register_hook(measure)


def _on_run(site: Site, note: Callable[[torch.Tensor], None]) -> Any:
    """A hook that calls note(x) when the site runs: with an op's input before it, with a block's output after it."""
    if site.kind == PROBE:
        return site.module.register_forward_hook(Hook(lambda module, args, output: note(_first_tensor(output))))
    return site.module.register_forward_pre_hook(Hook(lambda module, args: note(_first_tensor(args[0]) if args else None)))


def _let_go(sites: list[Site], *handles: list[Any]) -> None:
    """Ends the measuring of sites, and takes hooks off."""
    for site in sites:
        _set_stats(site, None, None)
        for handle in [*site.probed.values()]:
            handle.remove()
        site.probed.clear()
    for handle in chain(*handles):
        handle.remove()


def _set_stats(site: Site, stats: torch.Tensor | None, time_stats: torch.Tensor | None) -> None:
    site.stats = stats
    if site.kind != PROBE:
        setattr(site.module, f"stats{site.part}", stats)
    if site.time_stats is not None:
        setattr(site.module, f"time_stats{site.part}", time_stats)
