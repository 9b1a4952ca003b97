"""The file of a run: what is in it after a crash, on a full disk, beside other runs and on several ranks."""

import errno
import gc
import os
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import decades, history_of
from processes import TESTS, run
from torch import distributed, nn
from watched import Blocks, X, total

import gradkernels as gk
from gradkernels.telemetry import RunFile, run_file


def steps_of(path):
    return list(gk.History.load(path).steps)


def trained(run_dir, steps=3, read=True, model=None):
    """The Watch of a run whose host reads each step, or none."""
    model = model or nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    watch = gk.watch(model, run_dir=run_dir)
    more(watch, steps, read)
    return watch


def more(watch, steps=1, read=True):
    for _ in range(steps):
        loss = total(watch.model(X))
        loss.backward()
        watch.step(loss)
        if read:
            assert len(watch.history)


def test_a_file_is_the_live_history(tmp_path):
    watch = trained(tmp_path / "new" / "run")
    more(watch, 2)
    read, live = gk.History.load(tmp_path / "new" / "run"), watch.history
    assert (read.sites, read.stacks, read.layers, read.run) == (live.sites, live.stacks, live.layers, live.run)
    for ours, theirs in zip(live.snapshots, read.snapshots, strict=True):
        assert (ours.step, ours.loss, ours.learning_rates) == (theirs.step, theirs.loss, theirs.learning_rates)
        np.testing.assert_allclose(theirs.values, ours.values, rtol=5e-6, atol=0)
    assert read.lines_left_out == 0
    live.write(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    appended = (tmp_path / "new" / "run" / "stats.jsonl").read_text().splitlines()
    assert [line for line in appended if line.startswith('{"step"')] == whole[1:]
    assert [line for line in appended if not line.startswith('{"step"')][-1] == whole[0]


def test_the_header_says_of_what(tmp_path):
    model = nn.Linear(8, 8)
    watch = gk.watch(model, torch.optim.SGD(model.parameters(), 0.1), sites=["*"], run_dir=tmp_path)
    more(watch)
    about = gk.History.load(tmp_path).run
    assert about["versions"]["gradkernels"] == gk.__version__
    assert about["versions"]["torch"] == torch.__version__
    assert set(about["versions"]) == {"gradkernels", "torch", "python"}
    expected = {"sites": ["*"], "history": 1024, "log_every": 10, "optimizer": "SGD", "scaler": None}
    assert about["settings"] == expected
    assert about["world_size"] == 1
    assert about["started"].endswith("+00:00")


def test_a_header_follows_where_more_is_known(tmp_path):
    """The order of the sites is learned in the first steps; a block that runs later gets its place later."""
    model = Blocks()
    model.skipped = (1, 2)
    watch = trained(tmp_path, model=model)
    model.skipped = ()
    more(watch, 3)
    lines = (tmp_path / "stats.jsonl").read_text().splitlines()
    headers = [index for index, line in enumerate(lines) if line.startswith('{"format"')]
    assert headers[0] == 0
    assert 2 <= len(headers) <= 3
    assert gk.History.load(tmp_path).stacks == watch.history.stacks
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ends", ["close", "no reference", "steps after close"])
def test_what_is_unread_at_the_end_is_written(tmp_path, ends):
    watch = trained(tmp_path, read=False)
    assert not list(tmp_path.iterdir())
    if ends != "no reference":
        watch.close()
        assert steps_of(tmp_path) == [1, 2, 3]
    if ends == "steps after close":
        more(watch, 2, read=False)
    del watch
    gc.collect()
    assert steps_of(tmp_path) == ([1, 2, 3, 4, 5] if ends == "steps after close" else [1, 2, 3])


def test_what_is_unread_at_exit_is_written(tmp_path):
    code = f"""
import torch, gradkernels as gk
watch = gk.watch(model := torch.nn.Linear(4, 4), run_dir={str(tmp_path)!r})
for _ in range(5):
    model(torch.ones(2, 4)).sum().backward()
    watch.step()
raise SystemExit(0)
"""
    run("-c", code)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_killed_at_random_moments(tmp_path):
    """Every file can be read, no step that was reported is missing, and a line at most is torn."""
    reported = list(map(int, run(str(TESTS / "support" / "killed_runs.py"), str(tmp_path), "50").split()))
    assert len(reported) == 50
    torn = 0
    for index, step in enumerate(reported):
        folder = tmp_path / str(index)
        if step == 0 and not list(folder.glob("*")):
            continue  # killed before there was anything
        history = gk.History.load(folder)
        assert list(history.steps) == list(range(1, len(history) + 1))
        assert step <= len(history) <= step + 1
        assert history.lines_left_out <= 1
        torn += history.lines_left_out
    assert sum(step > 0 for step in reported) > 10
    assert torn > 0


def test_each_line_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def note(file):
        sync(file)
        synced.append("folder" if os.path.samestat(os.fstat(file), tmp_path.stat()) else os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", note)
    trained(tmp_path)
    lines = (tmp_path / "stats.jsonl").read_bytes().splitlines(keepends=True)
    assert synced == ["folder", *np.cumsum([len(line) for line in lines])]


def test_a_write_in_pieces(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    trained(tmp_path)
    monkeypatch.undo()
    assert steps_of(tmp_path) == [1, 2, 3]


def full(file, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(tmp_path, monkeypatch):
    """One warning; the history in memory goes on; when there is room again, the file has what it has."""
    watch = trained(tmp_path, 2)
    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match=r"run_dir must be writable, got '.*stats\.jsonl': No space left on device") as caught:
        more(watch, 3)
    assert len(caught) == 1
    assert "training goes on" in str(caught[0].message)
    assert list(watch.history.steps) == [1, 2, 3, 4, 5]
    assert steps_of(tmp_path) == [1, 2]
    monkeypatch.undo()
    more(watch, 2)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert "\n\n" not in (tmp_path / "stats.jsonl").read_text()


def test_what_memory_lost_while_the_disk_was_full_is_lost(tmp_path, monkeypatch):
    watch = trained(tmp_path, 2)
    watch.history.max_bytes = 3 * watch.history.snapshots[0].nbytes
    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="run_dir must be writable"):
        more(watch, 4)
    monkeypatch.undo()
    more(watch)
    assert steps_of(tmp_path) == [1, 2, 5, 6, 7]


@pytest.mark.parametrize("truncates", [True, False])
def test_a_limit_in_the_middle_of_a_line(tmp_path, monkeypatch, truncates):
    """The kernel takes a part of the line: what is torn is taken back, or the next line begins behind it."""
    watch = trained(tmp_path, 2)
    size = (tmp_path / "stats.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not truncates:
        monkeypatch.setattr(os, "ftruncate", full)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
    try:
        with pytest.warns(UserWarning, match="run_dir must be writable") as caught:
            more(watch, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(caught) == 1
    history = gk.History.load(tmp_path)
    assert (list(history.steps), history.lines_left_out) == ([1, 2], int(not truncates))
    assert (tmp_path / "stats.jsonl").stat().st_size == size + (0 if truncates else 50)
    more(watch)
    history = gk.History.load(tmp_path)
    assert (list(history.steps), history.lines_left_out) == ([1, 2, 3, 4, 5], int(not truncates))


def test_an_interrupt_while_a_line_is_written(tmp_path, monkeypatch):
    """The step is there once, in memory and in the file."""
    watch, write = trained(tmp_path, 2), os.write

    def interrupted(file, data):
        write(file, data[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        more(watch, 1)
    monkeypatch.undo()
    more(watch, 1)
    history = gk.History.load(tmp_path)
    assert list(watch.history.steps) == list(history.steps) == [1, 2, 3, 4]
    assert history.lines_left_out == 0


def test_a_directory_that_cannot_be_made():
    """/proc takes no directories, not from root either."""
    with pytest.warns(UserWarning, match="run_dir must be writable, got '/proc/gradkernels/run'") as caught:
        watch = trained("/proc/gradkernels/run")
    assert len(caught) == 1
    assert len(watch.history) == 3


def test_a_directory_in_which_no_file_can_be_made(tmp_path, monkeypatch):
    def refuse(path, flags, *mode):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    watch = trained(tmp_path, 0)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="Read-only file system") as caught:
        more(watch, 3)
    assert len(caught) == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    watch.close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_file_that_was_deleted_meanwhile(tmp_path):
    watch = trained(tmp_path)
    (tmp_path / "stats.jsonl").unlink()
    with pytest.warns(UserWarning, match="No such file"):
        more(watch, 2)
    assert not list(tmp_path.iterdir())


def test_bad_run_directories(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    for run_dir in (file, file / "run", str(file / "a" / "b")):
        with pytest.raises(gk.ArgumentError, match=r"watch: run_dir must be a directory, or one that can be made, got .*file'"):
            gk.watch(model, run_dir=run_dir)
    with pytest.raises(gk.ArgumentError, match="got a path with a null character"):
        gk.watch(model, run_dir="a\0b")
    with pytest.raises(TypeError, match="watch: run_dir must be the path of a directory, got int"):
        gk.watch(model, run_dir=3)
    assert type(model[0]) is nn.LayerNorm
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_second_run_writes_a_second_file(tmp_path):
    for steps, name in ((2, "stats.jsonl"), (3, "stats-2.jsonl"), (1, "stats-3.jsonl")):
        trained(tmp_path, steps)
        assert steps_of(tmp_path / name) == list(range(1, steps + 1))
        assert steps_of(tmp_path) == list(range(1, steps + 1))
    assert len(list(tmp_path.iterdir())) == 3
    assert len(steps_of(tmp_path / "stats.jsonl")) == 2
    for name in ("stats.jsonl", "stats-2.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "stats-x.jsonl").write_text("another's")
    trained(tmp_path, 2)
    assert (tmp_path / "stats-4.jsonl").exists()


def test_two_runs_that_begin_at_the_same_time(tmp_path, monkeypatch):
    """Both saw an empty directory: the file of the first is not touched by the second."""
    monkeypatch.setattr(run_file, "numbered_files", lambda folder: {})
    trained(tmp_path, 2)
    first = (tmp_path / "stats.jsonl").read_bytes()
    trained(tmp_path, 3)
    assert (tmp_path / "stats.jsonl").read_bytes() == first
    assert steps_of(tmp_path / "stats-2.jsonl") == [1, 2, 3]


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch = trained("run", 0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    more(watch)
    assert steps_of(tmp_path / "run") == [1]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_writes(tmp_path, rank):
    """Also once there is no process group any more, as at exit."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        watch = gk.watch(Blocks(), run_dir=tmp_path / "run", log_every=1)
        more(watch, 2)
    finally:
        distributed.destroy_process_group()
    more(watch)
    watch.close()
    assert len(watch.history) == 2  # what nobody can be asked to merge any more is left out
    assert (tmp_path / "run").exists() == (rank == 0)
    if rank == 0:
        history = gk.History.load(tmp_path / "run")
        assert (list(history.steps), history.run["world_size"]) == ([1, 2], 4)


def test_a_fork_does_not_write_to_its_parents_file(tmp_path):
    file, history = RunFile(tmp_path), history_of([decades(0.0, -1.0)] * 2)
    last = history.snapshots.pop()
    file.append(history)
    history.append(last)
    child = os.fork()
    if child == 0:
        file.append(history)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert steps_of(tmp_path) == [1]
    file.append(history)
    assert steps_of(tmp_path) == [1, 2]


def test_nothing_is_warned_of_where_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = trained(tmp_path)
        watch.close()
        more(watch)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["stats.jsonl"]
