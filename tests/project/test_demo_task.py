"""Tasks of long time lags: the data, the prediction of step 1, and whether training bears it out."""

import contextlib
import io
import statistics

import pytest
import torch
from test_demo import error_line

import gradkernels as gk
from gradkernels.cli import main
from gradkernels.demo import task as demo_task
from gradkernels.report.labels import COLUMNS

ADDING, ORDER = demo_task.TASKS["adding"], demo_task.TASKS["temporal_order"]


def test_adding_batch():
    x, target = ADDING.batch(40, torch.Generator().manual_seed(0))
    values, marks = x.unbind(-1)
    assert x.shape == (40, demo_task.BATCH, 2)
    assert (marks[:20].sum(0) == 1).all()
    assert (marks[20:].sum(0) == 1).all()
    torch.testing.assert_close(target.squeeze(1), (values * marks).sum(0))
    losses = [ADDING.loss(torch.ones(50, 1), ADDING.batch(10, torch.Generator().manual_seed(k))[1]) for k in range(50)]
    assert float(torch.stack(losses).mean()) == pytest.approx(ADDING.baseline, rel=0.1)


def test_temporal_order_batch():
    x, classes = ORDER.batch(50, torch.Generator().manual_seed(0))
    symbols = x.argmax(-1)
    special = [[int(s) for s in column if s in (4, 5)] for column in symbols.T]
    assert all(len(found) == 2 for found in special)
    assert classes.tolist() == [2 * (first - 4) + second - 4 for first, second in special]
    assert set(classes.tolist()) == {0, 1, 2, 3}
    assert (symbols[0] == 6).all()
    assert (symbols[-1] == 7).all()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The lines that a short run printed, and its output folder."""
    out = tmp_path_factory.mktemp("task")
    torch.set_num_threads(1)
    printed = io.StringIO()
    arguments = ["--task", "adding", "--length", "60", "--init", "default", "--steps", "25", "--out", str(out)]
    with contextlib.redirect_stdout(printed):
        assert main(["demo", *arguments]) == 0
    return printed.getvalue().splitlines(), out


def test_task_prints(finished):
    lines, out = finished
    text = "\n".join(lines)
    assert max(len(line) for line in lines if str(out) not in line) <= COLUMNS
    assert "Prediction: it should not learn" in text
    assert "Not solved within 1,250 sequences" in text
    assert "The prediction of step 1 was right." in text
    assert sum(line.startswith("step ") for line in lines) >= 10


def test_task_files(finished):
    _, out = finished
    for name in demo_task.PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    history = gk.History.load(out / "stats.jsonl")
    assert [snapshot.step for snapshot in history.snapshots if snapshot.loss > 0] == list(range(1, 26))
    assert all(0 < history.time_profiles(step=step)[0].reach() <= 60 for step in range(1, 26))


def test_lstm_learns_the_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("gradients flow back through every step of time\n" * 80, encoding="utf-8")
    arguments = ["--model", "lstm", "--text", str(tmp_path / "text.txt"), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["demo", *arguments]) == 0
    printed = capsys.readouterr().out
    for words in ("Model: character LSTM", "lstm.l0", "lstm.l1", "Gradient over time at lstm.l1: reach"):
        assert words in printed
    for name in ("flow.png", "profile.png", "time.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("initialisation", ["default", "chrono"])
def test_first_step_separates_the_initialisations(initialisation):
    """Over five seeds, before anything was learned."""
    for seed in range(5):
        (profile,) = demo_task.train(ORDER, 100, initialisation, 1, seed).history
        assert demo_task.learnable(profile) == (initialisation == "chrono")
        assert (profile.floor_ratio() > 1e-2) == (initialisation == "chrono")


@pytest.mark.parametrize("value", ["9", "x", "1000001"])
def test_bad_length(capsys, value):
    line = error_line(capsys, "--task", "adding", "--length", value)
    assert f"argument --length: expected an integer from 10 to 1000000, got {value!r}" in line


@pytest.mark.parametrize("option", ["--task", "--model", "--init"])
def test_bad_choice(capsys, option):
    assert f"argument {option}: invalid choice: 'nonsense'" in error_line(capsys, option, "nonsense")


@pytest.mark.slow
def test_temporal_order_is_solved():
    """With chrono initialisation, well within a minute; with the default one the same number of steps teaches nothing."""
    outcome = demo_task.train(ORDER, 100, "chrono", 2000, seed=0)
    assert outcome.sequences is not None
    failed = demo_task.train(ORDER, 100, "default", len(outcome.losses), seed=0)
    assert statistics.fmean(failed.losses[-demo_task.RECENT :]) > 0.95 * ORDER.baseline
