"""When steps reach the history: every `log_every` steps, out of tables on a CPU or rings on a device."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from watched import Blocks, X, total

import gradkernels as gk
from gradkernels.telemetry import FIELDS, new_stats, new_time_stats, take_rows
from gradkernels.watch import tables
from gradkernels.watch.ring import ABSENT, Ring

SQUARE_SUM = FIELDS.index("square_sum")


class WithTime(nn.Module):
    """An LSTM and what follows it."""

    def __init__(self):
        super().__init__()
        self.lstm, self.norm, self.head = nn.LSTM(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.norm(self.lstm(x[:, None])[0]))


def run(steps, *, model=WithTime, accumulate=1, scale=None, loss=True, **options):
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    watch = gk.watch(net, optimizer, scaler if scaler.is_enabled() else None, **options)
    for _ in range(steps):
        for _ in range(accumulate):
            value = total(net(X)) / accumulate
            scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        watch.step(value if loss else None)
    return watch


@pytest.fixture
def in_rings(monkeypatch):
    """Every table waits in a ring, as one on a GPU does."""
    monkeypatch.setattr(tables, "has_ring", lambda table: not table.is_meta)


def same(history, expected):
    assert [snapshot.step for snapshot in history.snapshots] == [snapshot.step for snapshot in expected.snapshots]
    for ours, theirs in zip(history.snapshots, expected.snapshots, strict=True):
        np.testing.assert_array_equal(ours.values, theirs.values)
        assert (ours.loss, ours.learning_rates, ours.skipped) == (theirs.loss, theirs.learning_rates, theirs.skipped)
        assert ours.loss_scale == theirs.loss_scale
        assert ours.time_values.keys() == theirs.time_values.keys()
        for name, rows in theirs.time_values.items():
            np.testing.assert_array_equal(ours.time_values[name], rows)


@pytest.mark.parametrize(
    "options",
    [dict(zip(("accumulate", "scale", "loss"), each, strict=True)) for each in product((1, 3), (None, 64.0), (True, False))],
    ids=str,
)
@pytest.mark.parametrize("log_every", [1, 4, 7])
def test_rings_and_tables_say_the_same(log_every, options, monkeypatch):
    expected = run(9, log_every=log_every, **options).history
    monkeypatch.setattr(tables, "has_ring", lambda table: not table.is_meta)
    same(run(9, log_every=log_every, history=7 if log_every < 7 else 1024, **options).history, _last(expected, log_every))


def _last(history, log_every):
    """What a history of 7 steps would have kept."""
    while log_every < 7 and len(history.snapshots) > 7:
        history.snapshots.popleft()
    return history


@pytest.mark.parametrize("log_every", [1, 3, 10])
def test_steps_reach_the_host_every_so_often(tmp_path, log_every):
    watch = run(0, model=Blocks, log_every=log_every, run_dir=tmp_path)
    for step in range(1, 12):
        total(watch.model(X)).backward()
        watch.step()
        written = len(gk.History.load(tmp_path)) if list(tmp_path.iterdir()) else 0
        assert written == step // log_every * log_every
    assert len(watch.history) == 11


def test_the_history_is_bounded():
    watch = run(9, model=Blocks, history=4, log_every=3)
    assert list(watch.history.steps) == [6, 7, 8, 9]
    assert watch.step_count == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": 0}, "history must be 1 step or more, got 0"),
        ({"history": -3}, "history must be 1 step or more, got -3"),
        ({"log_every": 0}, "log_every must be 1 to history, 1024, got 0"),
        ({"history": 5, "log_every": 6}, "log_every must be 1 to history, 5, got 6"),
        ({"desync_every": -1}, "desync_every must be 0 or more, got -1"),
    ],
)
def test_numbers_out_of_range(options, message):
    net = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=f"^watch: {message}$"):
        gk.watch(net, **options)
    gk.watch(net).close()  # which the error has left as it was


@pytest.mark.parametrize("ring", [False, True])
def test_a_loss_that_is_written_over(ring, monkeypatch):
    """The loss of a step is what it was at its end."""
    if ring:
        monkeypatch.setattr(tables, "has_ring", lambda table: not table.is_meta)
    watch, loss = run(0, model=Blocks), torch.zeros(())
    for step in range(3):
        watch.step(loss.fill_(step))
    assert [snapshot.loss for snapshot in watch.history.snapshots] == [0.0, 1.0, 2.0]


def test_a_loss_that_is_not_a_number(in_rings):
    watch = run(0, model=Blocks)
    for loss in (torch.tensor(math.nan), None, math.inf):
        watch.step(loss)
    found = [snapshot.loss for snapshot in watch.history.snapshots]
    assert math.isnan(found[0])
    assert found[1:] == [None, math.inf]


class Recorded(TorchDispatchMode):
    """Keeps the operations that run, to run them again on the same memory: what a captured CUDA graph does with launches."""

    def __init__(self):
        super().__init__()
        self.calls, self.results = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        """Each operation once more, its result where it was."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(
                *(value if isinstance(value, tuple | list) else (value,) for value in (result, again)), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def test_replays_of_a_recorded_step_write_the_next_slots():
    """The place in the ring depends on nothing but what is on the device."""
    table, time_table, loss = new_stats(3), new_time_stats(2), torch.zeros(())
    ring = Ring(4, table, [time_table])
    with Recorded() as recorded:
        ring.put((loss, None, None))
    for step in range(1, 7):
        table[:, 0, SQUARE_SUM] = torch.tensor([1.0, 2.0, 3.0]) * step
        time_table[1, 0], time_table[0, :2] = step, torch.tensor([2.0, 1.0])
        loss.fill_(10 * step)
        recorded.replay()
        assert not table.any()
        assert int(ring.count) == step + 1
        rows, times, scalars = ring.step(step)
        assert rows[:, SQUARE_SUM].tolist() == [step, 2 * step, 3 * step]
        assert times[0][1, 0] == step
        assert scalars.tolist() == [10 * step, *ABSENT[1:]]


def test_a_watch_reads_the_steps_of_replays(in_rings):
    """More of them than the ring holds: the last ones are there, with the numbers of the steps that they were."""
    watch = run(2, history=5, log_every=2)
    assert len(watch.history) == 2
    ((*_, ring),) = watch._run.tables._rings
    for step in range(7):
        table = watch._run.tables.sites[0].table
        table[0, 0, SQUARE_SUM] = step + 1
        table[0, 0, :2] = 1
        ring.put((torch.tensor(float(step)), None, None))
        ring.ended -= 1  # as in a replay, in which no Python runs
        watch._run.tables.captured = True
    history = watch.history
    assert watch.step_count == 9
    assert list(history.steps) == [5, 6, 7, 8, 9]
    assert [snapshot.loss for snapshot in history.snapshots] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert history.column("square_sum", watch._run.tables.sites[0].name, watch.sites[0].ports[0]).shape == (5,)
    total(watch.model(X)).backward()
    watch.step()
    assert list(watch.history.steps) == [6, 7, 8, 9, 10]


def test_steps_between_replays(in_rings):
    """Steps of Python and of replays, in the order in which they ended; those that wait to be logged are not mixed up."""
    watch = run(1, history=6, log_every=6)
    ((*_, ring),) = watch._run.tables._rings
    watch._run.tables.captured = True
    for step in range(2, 12):
        if step % 3:
            ring.put((torch.tensor(float(step)), None, None))
            ring.ended -= 1
        else:
            watch.step(torch.tensor(float(step)))
    found = {snapshot.step: snapshot.loss for snapshot in watch.history.snapshots}
    assert found == {step: float(step) for step in range(6, 12)}


@pytest.mark.parametrize("log_every", [1, 3, 8])
def test_sequences_that_are_longer_than_before(log_every, monkeypatch):
    """The table of an LSTM's time steps grows beyond its first room while steps wait in the ring."""

    def trained():
        torch.manual_seed(0)
        watch = gk.watch(net := nn.LSTM(4, 4, batch_first=True), log_every=log_every)
        for length in (6, 300, 6, 300, 700):
            total(net(torch.randn(2, length, 4))[0]).backward()
            watch.step()
        return watch

    expected = trained()
    monkeypatch.setattr(tables, "has_ring", lambda table: not table.is_meta)
    found = trained()
    profiles = [profile for step in range(1, 6) for profile in found.history.time_profiles(step=step)]
    assert [profile.steps for profile in profiles] == [6, 300, 6, 300, 700]
    for ours, theirs in zip(found.history.snapshots, expected.history.snapshots, strict=True):
        np.testing.assert_array_equal(ours.values, theirs.values)
        for name, rows in theirs.time_values.items():
            length = 1 + int(rows[0, 0])
            np.testing.assert_array_equal(ours.time_values[name][:length], rows[:length])
            assert rows[1:length].any(1).all()


def test_memory_stays_where_it_is(in_rings):
    """A ring is one block of memory: steps write where others were."""
    watch = run(3, history=4, log_every=2)
    ((*_, ring),) = watch._run.tables._rings
    places = [ring.step(step)[0].data_ptr() for step in range(8)]
    assert places[:4] == places[4:]
    assert ring.values.numel() == 4 * sum(ring.widths)


def test_a_model_that_moves_between_dtypes_in_a_step(in_rings):
    """What a table held when the tables were made anew is not lost."""
    watch = run(1, model=Blocks)
    total(watch.model(X)).backward()
    watch._run.tables._allocate()
    total(watch.model(X)).backward()
    watch.step()
    history = watch.history
    assert history.column("observation_count", watch.sites[0].name).tolist() == [1.0, 2.0]


def test_rows_are_taken_as_they_are():
    table = new_stats(2)
    table[1, 0] = torch.arange(1.0, 1 + len(FIELDS))
    rows = torch.empty(2, len(FIELDS), dtype=torch.float64)
    take_rows(table, rows)
    assert rows[1].tolist() == list(range(1, 1 + len(FIELDS)))


def test_what_replays_have_written_over_is_no_step(tmp_path, in_rings):
    """Neither a step that waited in the ring to be logged, nor, without a reading between, one that took its slot."""
    watch = run(1, history=4, log_every=4, run_dir=tmp_path)
    ((*_, ring),) = watch._run.tables._rings
    watch._run.tables.captured = True
    for step in range(2, 8):
        ring.put((torch.tensor(float(step)), None, None))
        ring.ended -= 1
    for step in (8, 9):
        watch.step(torch.tensor(float(step)))
    watch.close()
    loaded = gk.History.load(tmp_path)
    assert {snapshot.step: snapshot.loss for snapshot in loaded.snapshots} == {step: float(step) for step in range(4, 10)}
