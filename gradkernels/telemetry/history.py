"""The steps of a run: what rules and renderers read, live or from a file."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradkernels.telemetry.fields import FIELDS, OBSERVATIONS
from gradkernels.telemetry.records import Record, norms_of, record_of
from gradkernels.telemetry.snapshot import UNREADABLE, Snapshot
from gradkernels.telemetry.time_profile import TimeProfile, profile_of

MAX_BYTES = 64 * 2**20  # of snapshots that are kept; the oldest go first
FORMAT = 2
VERSION = [FORMAT, [*FIELDS]]  # of a file
FILE = re.compile(r"stats(?:-([2-9]|[1-9][0-9]+))?\.jsonl")


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

    max_bytes, max_steps: how much of a run is kept. sites: by depth. stacks: along which gradients are compared. Both may
    become known, and better known, as a run goes on.
    layers: the classes of the model's modules, for advice in the words of the net at hand. run: versions, start, world size and
    settings of a run, {} where nobody said. lines_left_out: of the file it was loaded from, those that could not be read.
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
        self.run: dict[str, Any] = {}
        self.lines_left_out = 0
        self._nbytes = 0
        self._num_rows = 0  # of a snapshot in the file that is loaded

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
        known = {"run": self.run, "layers": self.layers, "sites": sites, "stacks": stacks}
        return to_line({"format": FORMAT, "fields": FIELDS, **known})

    def lines(self) -> Iterator[str]:
        """The lines of stats.jsonl."""
        yield self.header()
        for snapshot in self.snapshots:
            yield to_line(snapshot.to_json())

    def write(self, path: str | Path) -> None:
        """A file that `History.load` gives this history back from, measured numbers to six digits: JSON, a line a step."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self.lines())

    @classmethod
    def load(cls, path: str | Path, max_bytes: int = MAX_BYTES) -> History:
        """The history in a file of `write` or of `gk.watch(run_dir=...)`, or in the newest one of a directory.

        max_bytes: of snapshots that are kept, the newest. A line that cannot be read (after a crash the last one), or whose
        step is not above that before it, is left out and counted in `lines_left_out`. Raises FileNotFoundError where there is
        no such file, or none in the directory, and ValueError where another version of the format wrote it.
        """
        history = cls(max_bytes=max_bytes)
        file_path = _file_at(Path(path))
        with open(file_path, encoding="utf-8", errors="replace", newline="\n") as file:
            for text in file:
                if text.isspace():
                    continue
                line = _object_in(text)
                version = [line.get("format", FORMAT), line.get("fields", [*FIELDS])]
                if version != VERSION:
                    raise ValueError(f"load: {file_path} must be of format and fields {VERSION}, got {version}")
                try:
                    history._take(line)
                except UNREADABLE:
                    history.lines_left_out += 1
        return history

    def _take(self, line: dict) -> None:
        """What a line of the file says. Raises one of UNREADABLE, and is then what it was."""
        if "format" not in line:
            snapshot = Snapshot.from_json(line, self._num_rows)
            if self.snapshots and snapshot.step <= self.snapshots[-1].step:
                raise ValueError("steps go up")
            self.append(snapshot)
            return
        sites = [SiteRows(**{**site, "ports": tuple(site["ports"])}) for site in line["sites"]]
        tuples = ("sites", "bypassed")
        stacks = [Stack(**{**stack, **{name: tuple(stack[name]) for name in tuples}}) for stack in line["stacks"]]
        self.sites, self.stacks, self.layers, self.run = sites, stacks, tuple(line["layers"]), dict(line["run"])
        self._num_rows = max((site.first + len(site.ports) for site in sites), default=0)


def to_line(content: dict) -> str:
    """A line of stats.jsonl, without its end."""
    return json.dumps(content, separators=(",", ":"))


def _object_in(text: str) -> dict:
    """The JSON object that a line is, {} where it is none."""
    try:
        line = json.loads(text)
    except UNREADABLE:
        return {}
    return line if isinstance(line, dict) else {}


def numbered_files(folder: Path) -> dict[int, Path]:
    """The stats.jsonl (1), stats-2.jsonl (2), ... of a directory, the oldest first. Raises OSError where it cannot be read."""
    found = {}
    for path in folder.iterdir():
        match = FILE.fullmatch(path.name)
        if match is not None:
            found[int(match[1] or 1)] = path
    return dict(sorted(found.items()))


def _file_at(path: Path) -> Path:
    """The path itself, or the newest file in the directory that it is."""
    if not path.is_dir():
        return path
    files = numbered_files(path)
    if not files:
        raise FileNotFoundError(f"load: path must be a file, or a directory with a stats.jsonl in it, got {str(path)!r}")
    return files[max(files)]
