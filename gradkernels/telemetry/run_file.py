"""The file of a run that is going on: stats.jsonl, to which each step is appended when the host has its numbers."""

from __future__ import annotations

import os
import platform
import warnings
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from gradkernels.library import ArgumentError
from gradkernels.telemetry.history import History, numbered_files, to_line
from gradkernels.version import __version__


class RunFile:
    """Appends a history to a new file in the directory `run_dir`: stats.jsonl, or stats-2.jsonl and so on where others are.

    A line is written whole and synced to the disk before the next one, so that a crash loses at most the line that is being
    written; what `append` returned from is there. The file appears with the first step. Where a disk is full, or nothing may be
    written, one warning says so, and what the file lacks is written later, as far as the history still has it. Of several ranks
    of torch.distributed rank 0 alone makes anything, and a fork of the process writes nothing to its parent's file.
    Raises TypeError where run_dir is no path, ArgumentError where there cannot be such a directory.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._folder = _folder_of(run_dir)
        self._path: Path | None = None  # once there is a file
        self._process = 0  # which made it
        self._header: tuple | None = None  # what the last one that was written says
        self._last_step = 0  # that was written
        self._torn = False  # the file ends within a line
        self._warned = False
        self._silent = False
        if self._has_rank_0():
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._warn(error)

    def append(self, history: History) -> None:
        """Writes the steps of `history` that are not in the file yet, behind a header where the last one no longer holds."""
        new = list(takewhile(lambda snapshot: snapshot.step > self._last_step, reversed(history.snapshots)))
        if not new or not self._has_rank_0() or self._process not in (0, os.getpid()):
            return
        try:
            if self._path is None:
                self._create()
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                header = (list(history.sites), list(history.stacks), history.layers, dict(history.run))
                if header != self._header:
                    self._write(file, history.header())
                    self._header = header
                for snapshot in reversed(new):
                    self._write(file, to_line(snapshot.to_json()))
                    self._last_step = snapshot.step
            finally:
                os.close(file)
        except OSError as error:
            self._warn(error)

    def _has_rank_0(self) -> bool:
        """Remembered where it is not so: at exit there may be no process group left to ask."""
        self._silent = self._silent or (_is_distributed() and distributed.get_rank() != 0)
        return not self._silent

    def _create(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = max(numbered_files(self._folder), default=0)
        while self._path is None:
            number += 1
            path = self._folder / ("stats.jsonl" if number == 1 else f"stats-{number}.jsonl")
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # made by another run just now
                continue
            os.close(file)
            self._path, self._process = path, os.getpid()
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a crash of the machine could lose the name of a file whose lines are on the disk
        finally:
            os.close(folder)

    def _write(self, file: int, line: str) -> None:
        """Writes one line whole, or, where that fails, takes back what was written of it."""
        end = os.fstat(file).st_size
        left = line.encode() + b"\n"
        if self._torn:
            left = b"\n" + left
        torn, self._torn = self._torn, True
        try:
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
            self._torn = False
        except BaseException:
            os.ftruncate(file, end)
            self._torn = torn
            raise

    def _warn(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        what = f"watch: run_dir must be writable, got {str(self._path or self._folder)!r}: {error.strerror}"
        warnings.warn(f"{what}; training goes on, and steps that memory still holds are written when it is", stacklevel=3)


def describe_run(settings: dict[str, Any]) -> dict[str, Any]:
    """`History.run` of a run that starts now. settings: what JSON can hold. started: in UTC, ISO 8601."""
    return {
        "versions": {"gradkernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": distributed.get_world_size() if _is_distributed() else 1,
        "settings": settings,
    }


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _folder_of(run_dir: str | os.PathLike[str]) -> Path:
    """As an absolute path: the process may go elsewhere. Raises as RunFile does."""
    try:
        folder = Path(os.path.abspath(os.fsdecode(run_dir)))
    except TypeError:
        raise TypeError(f"watch: run_dir must be the path of a directory, got {type(run_dir).__name__}") from None
    for path in (folder, *folder.parents):
        if "\0" in str(path) or (os.path.exists(path) and not path.is_dir()):
            got = "a path with a null character" if "\0" in str(path) else f"the file {str(path)!r}"
            raise ArgumentError(f"watch: run_dir must be a directory, or one that can be made, got {got}")
    return folder
