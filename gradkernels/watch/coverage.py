"""What is watched and what is not: the truth at any moment."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from gradkernels.convert import Uncovered, uncovered
from gradkernels.telemetry import History
from gradkernels.telemetry.names import without_numbers
from gradkernels.watch.flow import Flow
from gradkernels.watch.sites import PROBE, Site, names_of

CALL = re.compile(r"\b(?:F|functional)\.(gelu|layer_norm|lstm_cell|relu|silu|softmax|rms_norm|batch_norm|group_norm)\(")


@dataclass(frozen=True)
class Coverage:
    """fused, probes: the names of sites. silent: sites from which nothing came in the last step, with the reason.
    uncovered: norms, activations and recurrent layers that are as they were, with the reason. functional: calls of
    torch.nn.functional in a module's own code, which no Watch can see: (class, function, how many such modules).
    order: where the order of sites comes from.
    """

    fused: tuple[str, ...]
    probes: tuple[str, ...]
    silent: tuple[tuple[str, str], ...]
    uncovered: tuple[Uncovered, ...]
    functional: tuple[tuple[str, str, int], ...]
    order: str

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused sites, {len(self.probes)} probes; order of sites: {self.order}"]
        lines += [f"  fused: {text}" for text in _grouped((name, "") for name in self.fused)]
        lines += [f"  probe: {text}" for text in _grouped((name, "") for name in self.probes)]
        lines += [f"  silent: {text}" for text in _grouped(self.silent)]
        lines += [
            f"  not covered: {text}" for text in _grouped((site, f"{layer}: {why}") for site, layer, why in self.uncovered)
        ]
        for layer, function, count in self.functional:
            lines.append(f"  not seen: {function} called in the code of {layer} ({count} of them)")
        return "\n".join(lines)


def coverage(model: nn.Module, sites: Iterable[Site], history: History, step: int, flow: Flow) -> Coverage:
    """The coverage of a watched model after `step` finished steps."""
    sites = list(sites)
    seen = {record.site for record in history.records()}
    now = names_of(model)
    runs_known = bool(flow.known) or any(site.last_run for site in sites)
    silent = [(site.name, _why_silent(site, now, step, site.name in seen, runs_known)) for site in sites]
    return Coverage(
        tuple(site.name for site in sites if site.role != PROBE),
        tuple(site.name for site in sites if site.role == PROBE),
        tuple((name, why) for name, why in silent if why),
        tuple(Uncovered(now[model.get_submodule(path)], layer, why) for path, layer, why in uncovered(model)),
        tuple(_functional(model)),
        "the flow of data" if flow.known else "registration (no training forward was seen outside torch.compile)",
    )


def _why_silent(site: Site, now: dict, step: int, seen: bool, runs_known: bool) -> str:
    """Why a site shows nothing, empty where it does, or where no step is finished."""
    if site.module not in now:
        return "its module is no longer in the model"
    if seen or not step:
        return ""
    if not runs_known:
        return "no gradient came back to it; whether it ran cannot be seen inside a compiled graph"
    if site.last_run < step:
        return "did not run" if not site.last_run else f"did not run since step {site.last_run}"
    parameters = list(site.module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return "ran, no gradient came back: it is frozen, and so is what feeds it"
    return "ran, but no gradient came back to it: its output was detached, or nothing of it reached the loss"


def _functional(model: nn.Module) -> list[tuple[str, str, int]]:
    """Calls in the code of the model's own classes, as their source tells."""
    counts: dict[type, int] = defaultdict(int)
    for module in model.modules():
        counts[type(module)] += 1
    found = []
    for cls, count in counts.items():
        if cls.__module__.startswith(("torch.", "gradkernels.")):
            continue
        try:
            source = inspect.getsource(cls.forward)
        except (OSError, TypeError):
            continue
        found += [(cls.__name__, f"F.{name}", count) for name in dict.fromkeys(CALL.findall(source))]
    return found


def _grouped(items: Iterable[tuple[str, str]]) -> list[str]:
    """One line for names that differ in numbers alone, with the same remark."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, remark in items:
        groups[without_numbers(name), remark].append(name or "(the model)")
    lines = []
    for (pattern, remark), names in groups.items():
        text = names[0] if len(names) == 1 else f"{pattern} ({len(names)})"
        lines.append(f"{text}: {remark}" if remark else text)
    return lines
