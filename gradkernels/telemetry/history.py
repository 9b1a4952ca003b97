"""The steps of a run: what rules and renderers read, live or from a file."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from gradkernels.telemetry.fields import FIELDS, OBSERVATIONS
from gradkernels.telemetry.records import Record, norms_of, record_of
from gradkernels.telemetry.snapshot import Snapshot
from gradkernels.telemetry.time_profile import TimeProfile, profile_of

MAX_BYTES = 64 * 2**20  # of snapshots that are kept; the oldest go first
FORMAT = 1


@dataclass(frozen=True)
class SiteRows:
    """A site of a history. `first`: the row of its first port in every snapshot, the others follow.

    port: the one that holds dL/dh. layer: the class of its module. role: "probe", "residual" or "layer".
    """

    name: str
    layer: str
    role: str
    ports: tuple[str, ...]
    port: str
    first: int

    @property
    def suffix(self) -> str:
        """Of an LSTM's layer and direction: "_l<layer>", and "_reverse" behind it for that direction."""
        return "_" + self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Stack:
    """Sites of one kind through which the same data flows in turn, the input's end first.

    bypassed[k]: the output of sites[k] also goes somewhere without passing sites[k + 1] (a skip, a head of its own), so a
    gradient that is larger at k than at k + 1 need not have come through k + 1. inside: its sites are layers within blocks that
    are sites themselves.
    """

    name: str
    sites: tuple[str, ...]
    bypassed: tuple[bool, ...]
    inside: bool = False


class History:
    """A bounded run of snapshots, oldest first.

    max_bytes, max_steps: how much of a run is kept. sites: by depth. stacks: along which gradients are compared. Both may become
    known, and better known, as a run goes on.
    layers: the classes of the model's modules, for advice in the words of the net at hand.
    """

    def __init__(
        self,
        sites: Iterable[SiteRows] = (),
        stacks: Iterable[Stack] = (),
        max_bytes: int = MAX_BYTES,
        layers: tuple[str, ...] = (),
        max_steps: int | None = None,
    ) -> None:
        self.sites, self.stacks, self.max_bytes, self.layers = list(sites), list(stacks), max_bytes, layers
        self.max_steps = max_steps
        self.snapshots: deque[Snapshot] = deque()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self.snapshots)

    def append(self, snapshot: Snapshot) -> None:
        """Adds a step; the oldest ones make room, but for this one."""
        self.snapshots.append(snapshot)
        self._nbytes += snapshot.nbytes
        while len(self.snapshots) > 1 and (self._nbytes > self.max_bytes or len(self.snapshots) > (self.max_steps or math.inf)):
            self._nbytes -= self.snapshots.popleft().nbytes

    @property
    def steps(self) -> np.ndarray:
        """The number of each step, (steps,)."""
        return np.array([snapshot.step for snapshot in self.snapshots], dtype=np.int64)

    def column(self, field: str, site: str, port: str | None = None) -> np.ndarray:
        """A field of one row over the steps, (steps,) float64; NaN in steps in which nothing flowed through it.

        field: one of FIELDS, or "norm" or "rms" as Record has them. port: the one that holds dL/dh where None. Raises
        KeyError for a site or port that there is not.
        """
        rows = self.rows(self._site(site), port)
        column = rows[:, FIELDS.index(field)] if field in FIELDS else norms_of(rows, rms=field == "rms")
        return np.where(rows[:, OBSERVATIONS] > 0, column, np.nan)

    def rows(self, site: SiteRows, port: str | None = None) -> np.ndarray:
        """One row over the steps, (steps, len(FIELDS)); zeros in steps in which nothing flowed through it. As `column`."""
        port = port or site.port
        if port not in site.ports:
            raise KeyError(f"history: {site.name} has the ports {site.ports}, got {port!r}")
        row = site.first + site.ports.index(port)
        return np.array([snapshot.values[row] for snapshot in self.snapshots]).reshape(-1, len(FIELDS))

    def _site(self, name: str) -> SiteRows:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"history: no site is called {name!r}")

    def records(self, step: int | None = None) -> list[Record]:
        """The rows of a step, the last one where None, by depth and port; rows that nothing flowed through are left out."""
        snapshot = self._snapshot(step)
        result = []
        for site in self.sites if snapshot is not None else ():
            for offset, port in enumerate(site.ports):
                row = site.first + offset
                if snapshot.values[row, OBSERVATIONS]:
                    result.append(record_of(site.name, port, snapshot.values[row]))
        return result

    def time_profiles(self, site: str | None = None, step: int | None = None) -> list[TimeProfile]:
        """The gradient over time steps in a step, the last one where None, of each LSTM layer and direction, by depth."""
        snapshot = self._snapshot(step)
        result = []
        for own in self.sites if snapshot is not None else ():
            if own.name in snapshot.time_values and site in (None, own.name):
                profile = profile_of(own.name, own.suffix, snapshot.time_values[own.name])
                if profile is not None:
                    result.append(profile)
        return result

    def _snapshot(self, step: int | None) -> Snapshot | None:
        if step is None:
            return self.snapshots[-1] if self.snapshots else None
        return next((snapshot for snapshot in self.snapshots if snapshot.step == step), None)

    def header(self) -> str:
        """The first line of stats.jsonl: what the rows are. Another one may follow, where more became known."""
        sites, stacks = ([asdict(item) for item in items] for items in (self.sites, self.stacks))
        head = {"gradkernels": FORMAT, "fields": FIELDS, "layers": self.layers, "sites": sites, "stacks": stacks}
        return json.dumps(head)

    def lines(self) -> Iterator[str]:
        """The lines of stats.jsonl."""
        yield self.header()
        for snapshot in self.snapshots:
            yield line_of(snapshot)

    def write(self, path: str | Path) -> None:
        """A file that `History.read` gives this history back from: JSON, a line a step."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self.lines())

    @classmethod
    def read(cls, path: str | Path | TextIO, max_bytes: int = MAX_BYTES) -> History:
        """The history in a file of `write`. Raises ValueError with the number of the line that is not one of it."""
        if isinstance(path, str | Path):
            with open(path, encoding="utf-8") as file:
                return cls.read(file, max_bytes)
        history = cls(max_bytes=max_bytes)
        for number, text in enumerate(path, 1):
            try:
                line = json.loads(text)
                if "gradkernels" in line:
                    history._read_header(line)
                else:
                    rows = max((site.first + len(site.ports) for site in history.sites), default=0)
                    history.append(Snapshot.from_json(line, rows))
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise ValueError(f"stats.jsonl, line {number}: expected a line of History.write, got {text[:60]!r}") from error
        return history

    def _read_header(self, line: dict) -> None:
        if line["gradkernels"] != FORMAT or tuple(line["fields"]) != FIELDS:
            raise ValueError("another version of the format")
        self.sites = [SiteRows(**{**site, "ports": tuple(site["ports"])}) for site in line["sites"]]
        self.layers = tuple(line["layers"])
        tuples = ("sites", "bypassed")
        self.stacks = [Stack(**{**stack, **{name: tuple(stack[name]) for name in tuples}}) for stack in line["stacks"]]


def line_of(snapshot: Snapshot) -> str:
    """A line of stats.jsonl."""
    return json.dumps(snapshot.to_json())
