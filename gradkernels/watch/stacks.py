"""Stacks: sites of one kind through which the same data flows in turn. Along these, and no further, gradients are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from gradkernels.telemetry.history import Stack
from gradkernels.telemetry.names import NUMBER, without_numbers
from gradkernels.watch.flow import Flow
from gradkernels.watch.sites import PROBE, RESIDUAL, Site

FEW = 3  # sites of one class, each with a name of its own: two of them (an encoder and a decoder) make a stack only alone


def stacks_of(sites: Sequence[Site], module_of: Sequence[int], flow: Flow) -> list[Stack]:
    """The stacks of sites, which are given by depth; module_of[k] is the number in `flow` of the module of sites[k].

    Sites are of one kind where their modules have the same class and the same path but for numbers in it; layers that differ
    in their own name alone stand in for one another where they are single so. Of the sites of a kind each stack takes those
    that feed one another; where the flow is not known, those whose names differ in one number.
    """
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        kinds[_kind(site, own_name=True)].append(index)
    single: dict[tuple, list[int]] = defaultdict(list)
    for members in kinds.values():
        if len(members) == 1:
            single[_kind(sites[members[0]], own_name=False)].append(members[0])
    reach, passes_by = flow.reach() if flow.known else None, flow.passes_by()
    order = {site.name: index for index, site in enumerate(sites)}
    outer = {site.name for site in sites if site.role in (PROBE, RESIDUAL)}
    stacks = []
    for members, least in [*((members, 2) for members in kinds.values()), *((members, FEW) for members in single.values())]:
        for chain in _chains(members, sites, module_of, reach):
            if len(chain) >= least or (not stacks and len(chain) > 1):
                bypassed = [bool(flow.known) and passes_by(module_of[a], module_of[b]) for a, b in pairwise(chain)]
                stacks.append(_stack([sites[index].name for index in chain], bypassed, outer))
    return sorted(stacks, key=lambda stack: (stack.inside, order[stack.sites[0]]))


def _kind(site: Site, own_name: bool) -> tuple:
    """What sites of one kind share."""
    path = site.name if own_name else site.name.rpartition(".")[0]
    return without_numbers(path), type(site.module), site.role


def _chains(members: list[int], sites: Sequence[Site], module_of: Sequence[int], reach: list[int] | None) -> list[list[int]]:
    """The members, by depth, in chains of which each feeds the next: each goes on the chain whose end is named most like it."""

    def distance(end: int, index: int) -> int:
        """In how many numbers their names differ."""
        names = (NUMBER.findall(sites[place].name) for place in (end, index))
        return sum(a != b for a, b in zip(*names, strict=False))

    def feeds(end: int, index: int) -> bool:
        if reach is None:
            return distance(end, index) == 1
        return bool(reach[module_of[end]] >> module_of[index] & 1) or _follows(sites[end], sites[index])

    chains: list[list[int]] = []
    for index in members:
        fitting = [chain for chain in chains if feeds(chain[-1], index)]
        if fitting:
            min(fitting, key=lambda chain: distance(chain[-1], index)).append(index)
        else:
            chains.append([index])
    return chains


def _follows(earlier: Site, later: Site) -> bool:
    """Whether two sites are layers of one LSTM, of the same direction, one above the other."""
    return (
        earlier.module is later.module
        and earlier.suffix.endswith("_reverse") == later.suffix.endswith("_reverse")
        and earlier != later
    )


def _stack(names: list[str], bypassed: list[bool], outer: set[str]) -> Stack:
    """A chain of sites as a stack. It is `inside` where its sites are layers within modules that are sites themselves."""
    inside = all(any(parent in outer for parent in _parents(name)) for name in names)
    return Stack(_name(names), tuple(names), tuple(bypassed), inside)


def _parents(name: str) -> list[str]:
    """The names of the modules around the one of a name."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _name(names: list[str]) -> str:
    """What the names share, with a range where a number differs, or the first and the last name."""
    pattern = NUMBER.sub("{}", names[0])
    numbers = [NUMBER.findall(name) for name in names]
    if any(NUMBER.sub("{}", name) != pattern for name in names):
        return f"{names[0]} … {names[-1]}"
    columns = list(zip(*numbers, strict=True))
    moving = [k for k, column in enumerate(columns) if len(set(column)) > 1]
    if len(moving) != 1:
        return f"{names[0]} … {names[-1]}"
    return pattern.format(*(f"{column[0]}…{column[-1]}" if k in moving else column[0] for k, column in enumerate(columns)))
