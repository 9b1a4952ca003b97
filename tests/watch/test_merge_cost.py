"""What a logging step sends: the calls and elements of docs/distributed.md, counted where torch.distributed takes them."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not dist.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from torch.testing._internal.distributed.fake_pg import FakeStore

import gradkernels as gk
from gradkernels.telemetry.fields import FIELDS, NUM_NORMS, TIME_FIELDS
from gradkernels.watch import tables

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
MAX, SUM = dist.ReduceOp.MAX, dist.ReduceOp.SUM
STEPS, T = 9, 6


@pytest.fixture
def formula():
    """The block of the page that defines `elements`."""
    (text,) = [text for text in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S) if "def elements" in text]
    scope = {}
    exec(text, scope)
    assert (scope["FIELDS"], scope["TIME_FIELDS"], scope["NORMS"]) == (len(FIELDS), len(TIME_FIELDS), NUM_NORMS)
    return scope["elements"]


@pytest.fixture
def calls(monkeypatch):
    """What all_reduce is called with, as one of 8 processes of which the others are not there."""
    made, all_reduce = [], dist.all_reduce

    def counted(tensor, op, group):
        made.append((op, tensor.dtype, tensor.numel()))
        return all_reduce(tensor, op, group=group)

    monkeypatch.setattr(dist, "all_reduce", counted)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield made
    dist.destroy_process_group()


class Norms(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize(("build", "directions"), [(Norms, 0), (Recurrent, 4)])
def test_elements(formula, calls, build, directions, log_every):
    watch = gk.watch(model := build(), log_every=log_every)
    for _ in range(STEPS):
        loss = model(torch.randn(2, T, 8)).square().mean()
        loss.backward()
        watch.step(loss)
    watch.close()
    rows = sum(len(site.ports) for site in watch.sites)
    expected = [(MAX, torch.int64, 2)]  # the sites, once
    for steps in [log_every] * (STEPS // log_every) + [STEPS % log_every] * (STEPS % log_every > 0):
        largest, sums = formula(rows, steps, (T,) * directions)
        expected += [(MAX, torch.float64, largest), (SUM, torch.float64, sums)]
    assert calls == expected


def test_reading_sends_nothing(calls):
    watch = gk.watch(model := Norms(), log_every=4)
    model(torch.randn(2, 8)).square().mean().backward()
    watch.step()
    print(watch, watch.diagnose(), watch.coverage(), watch.records(), watch.history)
    assert calls == []


@pytest.mark.parametrize("reads", [False, True])
def test_closing_logs_the_steps_of_replays(calls, monkeypatch, reads):
    """Whether this process has read before or not: another one may have, and all must send the same."""
    monkeypatch.setattr(tables, "has_ring", lambda table: not table.is_meta)
    watch = gk.watch(Norms(), log_every=4)
    ((*_, ring),) = watch._run.tables._rings
    watch._run.tables.captured = True
    for _ in range(3):
        ring.put((None, None, None))
        ring.ended -= 1  # as in a replay, in which no Python runs
    if reads:
        assert not watch.history.snapshots
    watch.close()
    assert [op for op, *_ in calls] == [MAX, MAX, SUM]
    assert list(watch.history.steps) == [1, 2, 3]


def test_desync_sends_two_integers_a_parameter(calls):
    watch = gk.watch(model := Norms(), log_every=2, desync_every=2)
    for _ in range(7):
        model(torch.randn(2, 8)).square().mean().backward()
        watch.step()
    assert [call for call in calls if call[1] is torch.int64] == [(MAX, torch.int64, 2), (MAX, torch.int64, 2 * 4)]
