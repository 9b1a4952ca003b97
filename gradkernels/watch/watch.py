"""Watching a model: what runs in its forwards and once a step, and what was seen."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from gradkernels.convert import check_module, convert
from gradkernels.diagnose import Finding, diagnose
from gradkernels.nn import FusedModule
from gradkernels.nn.fused_module import Hook, hooks_of
from gradkernels.ops.probe import probe
from gradkernels.telemetry import History, Record, RunFile, SiteRows, Snapshot, TimeProfile, describe_run
from gradkernels.watch.coverage import Coverage, coverage
from gradkernels.watch.desync import desynced
from gradkernels.watch.flow import Flow, hidden_state
from gradkernels.watch.merge import check_group
from gradkernels.watch.optimizer import LossScale, Rates, check_scaler
from gradkernels.watch.recorder import Recorder
from gradkernels.watch.sites import LAYER, PROBE, RESIDUAL, Site, sites_of
from gradkernels.watch.stacks import stacks_of
from gradkernels.watch.tables import Tables


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    *,
    sites: Sequence[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    history: int = 1024,
    log_every: int = 10,
    process_group: dist.ProcessGroup | None = None,
    desync_every: int = 0,
) -> Watch:
    """A Watch on `model`, whose supported layers are fused ones from here on. See Watch."""
    options = {"history": history, "log_every": log_every, "process_group": process_group, "desync_every": desync_every}
    return Watch(model, optimizer, scaler, sites=sites, run_dir=run_dir, **options)


class Watch:
    """Measures, every step, the gradient that flows through each site of a model, inside its backward kernels.

    model: its supported layers are swapped in place (`convert`). Where no fused op is, a probe reads the gradient of the output
    of each block, and of each layer that is in no block, once. What torch.compile has made of the process's models before is
    compiled anew when it runs next.
    optimizer: where given, the learning rates of each step are recorded; its parameters must be the model's.
    scaler: the GradScaler that steps the optimizer: what is read is divided by its scale, and steps it skips are marked.
    sites: patterns of module names (`*` matches dots too): these modules are measured and no others.
    run_dir: a directory, made where there is none, to whose new stats.jsonl the steps are appended as they are logged, at the
    latest when this Watch closes or the interpreter exits; `gk.History.load(run_dir)` reads it. Rank 0 alone writes. Where it
    cannot be written there is one warning. See RunFile.
    history: how many steps are kept. log_every: every so many steps those that have ended go to the host, and are merged over
    the processes of `process_group` (None: the default group of torch.distributed, where there is one), each of which trains
    the same modules and calls `step` as often; what is read is then of the loss averaged over them.
    desync_every: every so many times that steps are logged, `desync` is called, and warns; 0: never.
    Raises TypeError where the model is no module, the scaler no GradScaler, `sites` a string or `run_dir` no path, ValueError
    where the optimizer holds none of the model's parameters, a pattern matches nothing, `run_dir` is a file, a number is out of
    range or this process is not in the group, RuntimeError where a part of the model is watched already or there is nothing to
    measure in it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        sites: Sequence[str] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        history: int = 1024,
        log_every: int = 10,
        process_group: dist.ProcessGroup | None = None,
        desync_every: int = 0,
    ) -> None:
        _check(model, optimizer, sites)
        _check_numbers(history, log_every, desync_every)
        check_group(process_group)
        check_scaler(scaler)
        run_file = None if run_dir is None else RunFile(run_dir)
        self.model = convert(model)
        found = sites_of(model, sites)
        self._run = _Run(found, history)
        self.sites = found
        self._rates, self._scaling = Rates(optimizer), LossScale(scaler, optimizer)
        layers = tuple(sorted({type(module).__name__ for module in model.modules()}))
        self._history = History(layers=layers, max_steps=history)
        settings = {"sites": None if sites is None else list(sites), "history": history, "log_every": log_every}
        settings |= {"optimizer": None if optimizer is None else type(optimizer).__name__}
        self._history.run = describe_run({**settings, "scaler": None if scaler is None else type(scaler).__name__})
        self._recorder = Recorder(self._run.tables, partial(_keep, self._history, run_file), log_every, process_group)
        self._desync_every, self._group = desync_every, process_group
        self._describe()
        if run_file is not None:  # what is unread when the Watch or the process ends is written
            weakref.finalize(self, self._recorder.read)
        _compile_anew()
        # A Watch that nobody holds any more can tell nobody anything: it ends. Nothing that the model holds refers to it.
        handles = (self._run.hooks, self._run.learning, self._rates.hooks, self._scaling.hooks)
        self._end = weakref.finalize(self, _let_go, found, *handles)
        self._end.atexit = False

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Ends a step: what was measured since the last call becomes history, and counting starts again from zero.

        Call it once per optimizer step; micro-batches before it merge. Nothing waits for the device. Raises ValueError where
        `loss` has several elements, or the scaler is another optimizer's.
        """
        if isinstance(loss, torch.Tensor) and loss.numel() != 1:
            raise ValueError(f"step: loss must be one number, got a tensor of shape {tuple(loss.shape)}")
        logged = self._recorder.end_step(self._rates.take(), (loss, *self._scaling.take()))
        self._run.step += 1
        if self._run.end_pass():
            self.sites = [site for index in self._run.flow.order for site in self._run.of_module[index]]
            self._describe()
        if logged and self._desync_every and self._recorder.num_logs % self._desync_every == 0:
            self._warn_of_desync()

    @property
    def step_count(self) -> int:
        """How many steps are finished."""
        return self._recorder.finished

    @property
    def history(self) -> History:
        """The finished steps, as many as `history` and its memory allow; of several processes, those that are logged.

        Waits for the device where the model is on one.
        """
        self._recorder.read()
        return self._history

    def records(self) -> list[Record]:
        """The rows of the last finished step, by depth and port; rows that nothing flowed through are left out.

        Empty before the first step. Waits for the device where the model is on one.
        """
        return self.history.records()

    def stream(self) -> list[Record]:
        """dL/dh of the last finished step, one record a site, by depth: of the fused ops on the residual stream where there
        are two or more, else of all fused layers, else of the probes. Branches lie side by side in it: `depth_profile` has
        them apart.
        """
        found = {(record.site, record.port): record for record in self.records()}
        for role in (RESIDUAL, LAYER, PROBE):
            own = [found[site.name, site.port] for site in self.sites if site.role == role and (site.name, site.port) in found]
            if len(own) > 1:
                return own
        return own

    def depth_profile(self) -> dict[str, list[Record]]:
        """dL/dh of the last finished step along each stack: from its first site, at the input's end, to its last.

        A stack is a run of modules of one kind through which the same data flows in turn; what is in different stacks is not
        compared. Sites without a gradient are left out.
        """
        found = {(record.site, record.port): record for record in self.records()}
        ports = {site.name: site.port for site in self._history.sites}
        profile = {}
        for stack in self._history.stacks:
            records = [found.get((name, ports[name])) for name in stack.sites]
            profile[stack.name] = [record for record in records if record is not None]
        return profile

    def time_profile(self, site: str | None = None) -> list[TimeProfile]:
        """The gradient over the time steps of the last finished step: one TimeProfile for each layer and direction of each
        LSTM, of those of the site or module `site` alone where it is given; by depth. Empty before the first step.

        Raises ValueError where no LSTM has that name.
        """
        lstms = [own for own in self.sites if own.time_stats is not None]
        modules = {own.name: own.name.rpartition(".")[0] for own in lstms}
        if site is not None and site not in {*modules, *modules.values()}:
            raise ValueError(f"time_profile: site must be one of {sorted({*modules, *modules.values()})}, got {site!r}")
        profiles = self.history.time_profiles()
        return [profile for profile in profiles if site in (None, profile.site, modules[profile.site])]

    def diagnose(self) -> list[Finding]:
        """What the rules conclude from the history, the worst first."""
        return diagnose(self.history)

    def desync(self) -> list[str]:
        """The parameters that should be equal in all processes of the group and are not, in the model's order; bit by bit.

        Those that are sharded are left out. Every process of the group must call it at the same time: one all-reduce.
        """
        return desynced(self.model, self._group)

    def coverage(self) -> Coverage:
        """What is watched and what is not, as it is now."""
        return coverage(self.model, self._run.tables.sites, self.history, self.step_count, self._run.flow)

    def pause(self) -> None:
        """Stops measuring until `resume()`: the kernels run as if telemetry had never been written."""
        if self._end.alive:
            self._run.tables.pause()

    def resume(self) -> None:
        """Measures again after `pause()`. Raises RuntimeError after `close()`."""
        if not self._end.alive:
            raise RuntimeError("resume: this Watch was closed: gk.watch(model) begins anew")
        self._run.tables.resume()

    def close(self) -> None:
        """Ends the watching: no probes, no statistics. Fused layers stay; `gk.revert(model)` takes them back.

        What has ended and is not logged yet is logged first; of several processes each must therefore call it. A Watch that is
        no longer referred to closes itself, without that.
        """
        if self._end.alive:
            self._recorder.log()
            self._recorder.read()
        self._end()

    def table(self, all: bool = False) -> str:
        """The last finished step as text: a summary, then the sites; with `all` every one of them in a line of its own."""
        from gradkernels.report.terminal import table

        history = self.history
        if not history.snapshots and self.step_count:
            return (
                f"gradkernels: {self.step_count} steps have ended, and none is logged yet: in several processes that is done\n"
                "every log_every steps, and by watch.close() in each of them"
            )
        return table(history, diagnose(history), all=all)

    def __str__(self) -> str:
        return self.table()

    def __deepcopy__(self, memo: dict) -> Watch:
        """Itself: a copy of what holds a Watch refers to the one there is, and the copy of a watched model is not watched."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Watch cannot be pickled, for it belongs to a model in this process: save watch.history.write(path)")

    def _describe(self) -> None:
        """Tells the history what is known by now of the order of sites and of their stacks."""
        first = self._run.tables.first
        self._history.sites = [
            SiteRows(site.name, type(site.module).__name__, site.role, site.ports, site.port, first[site])
            for site in self.sites
        ]
        self._history.stacks = stacks_of(self.sites, [self._run.number[site.module] for site in self.sites], self._run.flow)

    def _warn_of_desync(self) -> None:
        names = self.desync()
        if names:
            warnings.warn(
                f"gradkernels: step {self.step_count}: {len(names)} parameters differ between processes, {names[0]} the first: "
                "a gradient that is not reduced, or random numbers that should be equal and are not",
                RuntimeWarning,
                stacklevel=3,
            )


class _Run:
    """What the hooks on a model refer to: its sites, where they write, and what is learned of the flow between them."""

    def __init__(self, sites: list[Site], num_steps: int) -> None:
        self.tables = Tables(sites, num_steps)
        modules = list(dict.fromkeys(site.module for site in sites))
        self.number = {module: index for index, module in enumerate(modules)}
        self.of_module = [[site for site in sites if site.module is module] for module in modules]
        self.flow = Flow(len(modules))
        self.step = 1  # the one that is measured now
        self.hooks: list[Any] = []
        self.unseen: set[int] = set()  # modules that have not run when the learning ended
        self.learning: list[Any] = []  # handles of the hooks that are there to learn the flow
        for index, module in enumerate(modules):
            if isinstance(module, FusedModule):
                module.__dict__["on_forward"] = self._on_forward(index)
            else:
                self.hooks.append(module.register_forward_hook(self._probe_hook(index)))
        self._learn()

    def _learn(self) -> None:
        for index, (site, *_) in enumerate(self.of_module):
            note = lambda module, args, output, index=index: self.flow.note(index, output)  # noqa: E731
            self.learning.append(site.module.register_forward_hook(Hook(note)))

    def end_pass(self) -> bool:
        """Learns from the step that ended; whether the order or the stacks may have changed."""
        if not self.learning:
            if not self.unseen or not any(self.of_module[index][0].last_run for index in self.unseen):
                return False
            self.flow.passes_left = 1
            self._learn()
            return False
        changed = self.flow.end_pass()
        if changed and (self.flow.complete or self.flow.passes_left <= 0):
            for handle in self.learning:
                handle.remove()
            self.learning.clear()
            self.unseen = set(range(len(self.of_module))) - self.flow.known
        return changed

    def _on_forward(self, index: int) -> Callable[[torch.Tensor], None]:
        sites = self.of_module[index]

        def ran(x: torch.Tensor) -> None:
            for site in sites:
                site.last_run = self.step
            if sites[0].device != x.device and self.tables.measuring:
                self.tables.follow(sites[0].module, x.device)

        return ran

    def _probe_hook(self, index: int) -> Hook:
        site = self.of_module[index][0]

        def measure(module: nn.Module, args: Any, output: Any) -> None:
            site.last_run = self.step
            h = hidden_state(output)
            if h is None or site.stats is None or not torch.is_grad_enabled():
                return
            if site.device != h.device:
                self.tables.follow(module, h.device)
            handle = site.hook.attach(h)
            if handle is not None:
                site.kept.append(handle)

        def trace(module: nn.Module, args: Any, output: Any) -> None:
            h = hidden_state(output)
            if h is not None and site.stats is not None and h.is_floating_point():
                probe(h, stats=site.stats)

        return Hook(measure, trace)


def _check(model: nn.Module, optimizer: torch.optim.Optimizer | None, sites: Sequence[str] | None) -> None:
    check_module("watch", model)
    if isinstance(sites, str):
        raise TypeError(f"watch: sites must be a list of patterns, got the string {sites!r}")
    for name, module in model.named_modules():
        if _is_watched(module):
            raise RuntimeError(
                f"watch: {name or 'model'} is watched already: close() that Watch first, or gk.revert(model) where it is out "
                "of reach; for models that share a part, watch one module that holds them both"
            )
    own = {id(parameter) for parameter in model.parameters()}
    if optimizer is not None and not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("watch: optimizer must hold parameters of model, got one that holds none of them")


def _check_numbers(history: int, log_every: int, desync_every: int) -> None:
    if history < 1:
        raise ValueError(f"watch: history must be 1 step or more, got {history}")
    if not 1 <= log_every <= history:
        raise ValueError(f"watch: log_every must be 1 to history, {history}, got {log_every}")
    if desync_every < 0:
        raise ValueError(f"watch: desync_every must be 0 or more, got {desync_every}")


def _compile_anew() -> None:
    """Drops the graphs that torch.compile has made so far: they do not look whether a module has got hooks since."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset_code_caches()


def _is_watched(module: nn.Module) -> bool:
    names = module.stats_names() if isinstance(module, FusedModule) else ()
    return bool(hooks_of(module)) or any(module.__dict__.get(name) is not None for name in ("on_forward", *names))


def _keep(history: History, run_file: RunFile | None, snapshots: list[Snapshot]) -> None:
    """Finished steps become history, and lines of the run's file, with what could not be written there before."""
    for snapshot in snapshots:
        history.append(snapshot)
        if run_file is not None:
            run_file.append(history)
    if run_file is not None:
        run_file.append(history)


def _let_go(sites: list[Site], *handles: list[Any]) -> None:
    """Ends the measuring of sites, and takes hooks off."""
    for site in sites:
        site.let_go()
    for handle in chain(*handles):
        handle.remove()
