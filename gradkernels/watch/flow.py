"""How data flows from site to site: learned from the autograd graph of a few training forwards.

When a site has run, its output's nodes of the autograd graph carry its number (Node.metadata, which lives and dies with the
node), and a walk from them towards the inputs ends at the numbers of the sites before it. Nothing is kept of the graph.
Where there is none to walk (reentrant checkpointing runs blocks without one), the order of the runs stands in for it; where no
site ever ran outside of a compiled graph, that in which the model lists its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

MAX_NODES = 10_000  # of one walk: beyond it the order of runs has to do
PASSES = 10  # training steps that are learned from, at most: layers that are skipped at random show up in some of them


class Flow:
    """What feeds what among modules 0, 1, ... `count - 1`, which are given as their models list them.

    before[k]: the modules whose outputs reach module k with no other module between them.
    """

    def __init__(self, count: int) -> None:
        self.before: list[set[int]] = [set() for _ in range(count)]
        self.order = list(range(count))  # by depth
        self.known: set[int] = set()  # modules that have run with gradients
        self._mark = object()  # in a node's metadata: the modules whose output it made, inner ones first
        self.complete = False  # whether all modules were in the last pass
        self.passes_left = PASSES
        self._start_pass()

    def _start_pass(self) -> None:
        self._runs: list[int] = []
        self._without_graph: set[int] = set()
        self._run_again: set[int] = set()  # in a backward: what a reentrant checkpoint has run without a graph before
        self._found: dict[int, set[int]] = {}

    def note(self, index: int, output: Any) -> None:
        """Module `index` has returned `output`."""
        if index not in self._found and index not in self._without_graph:
            self._runs.append(index)
        nodes = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
        if not nodes:
            self._without_graph.add(index)
            return
        if index in self._without_graph and torch._C._current_graph_task_id() != -1:
            self._run_again.add(index)
        found = self._found.setdefault(index, set())
        for node in nodes:
            own = node.metadata.setdefault(self._mark, [])
            found.update(own[-1:] or self._before(node))
            if index not in own:
                own.append(index)
        found.discard(index)

    def _before(self, node: Any) -> set[int]:
        """The modules at the first marked nodes on each way from `node` to the inputs."""
        found: set[int] = set()
        seen = {node}
        waiting = [node]
        while waiting and len(seen) < MAX_NODES:
            for following, _ in waiting.pop().next_functions:
                if following is None or following in seen:
                    continue
                seen.add(following)
                mark = following.metadata.get(self._mark)
                if mark:
                    found.add(mark[-1])
                else:
                    waiting.append(following)
        return found

    def end_pass(self) -> bool:
        """Learns from what has run since the last call: whether anything has, with gradients."""
        if not self._found:
            self._start_pass()
            return False
        again = [index for index in self._runs if index in self._run_again]
        for previous, index in pairwise(again):
            self._found[index] = self._found[index] or {previous}
        superset = self.known <= set(self._found)
        for index, before in self._found.items():
            self.before[index] = before if superset else self.before[index] | before
        self.known |= set(self._found)
        self.complete = len(self._found) == len(self.before)
        self.order = self._by_depth()
        self.passes_left -= 1
        self._start_pass()
        return True

    def _by_depth(self) -> list[int]:
        """All modules so that what feeds comes before what is fed; else as they ran.

        One that has not run stands before the next one in the model's list that has.
        """
        place = {index: rank for rank, index in enumerate(self._runs)}
        waiting = sorted(self.known, key=lambda index: (place.get(index, len(place)), index))
        done: list[int] = []
        placed: set[int] = set()
        while waiting:
            ready = next((k for k in waiting if self.before[k] <= placed), waiting[0])  # a circle starts where it first ran
            waiting.remove(ready)
            done.append(ready)
            placed.add(ready)
        behind = len(done)
        for index in range(len(self.before) - 1, -1, -1):
            if index in self.known:
                behind = done.index(index)
            else:
                done.insert(behind, index)
        return done

    def _after(self) -> list[list[int]]:
        """The modules that each module's output reaches with no other module between them."""
        after: list[list[int]] = [[] for _ in self.before]
        for index, before in enumerate(self.before):
            for feeder in before:
                after[feeder].append(index)
        return after

    def reach(self) -> list[int]:
        """For each module those that its output gets to, as the bits of a number."""
        after, found = self._after(), [0] * len(self.before)
        changed = True
        while changed:  # once for each circle that a path may go through, and once more
            changed = False
            for index in reversed(self.order):
                reached = found[index]
                for following in after[index]:
                    reached |= found[following] | 1 << following
                changed |= reached != found[index]
                found[index] = reached
        return found

    def passes_by(self) -> Callable[[int, int], bool]:
        """A function of two modules: whether the output of the first gets to an end without going through the second."""
        after = self._after()

        def passes(source: int, avoiding: int) -> bool:
            seen, waiting = {source, avoiding}, [source]
            while waiting:
                following = after[waiting.pop()]
                if not following:
                    return True
                new = [index for index in following if index not in seen]
                seen.update(new)
                waiting += new
            return False

        return passes


def tensors_of(value: Any) -> Iterable[torch.Tensor]:
    """The tensors in what a module returned, first ones first: in tuples, lists, dicts, dataclasses, packed sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_of(getattr(value, name, None))


def hidden_state(value: Any) -> torch.Tensor | None:
    """The tensor that a module hands on: the first in its output that a gradient can come back to."""
    for tensor in (value,) if isinstance(value, torch.Tensor) else tensors_of(value):
        if tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
    return None
