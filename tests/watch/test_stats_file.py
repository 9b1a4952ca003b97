"""The format of stats.jsonl: what a line holds, and what is made of one that is none."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import decades, history_of
from torch import nn

import gradkernels as gk
from gradkernels.report.flow import flow_picture
from gradkernels.report.terminal import table
from gradkernels.telemetry import FIELDS, Snapshot
from gradkernels.telemetry.fields import COUNTS

PAGE = Path(__file__).parents[2] / "docs" / "files.md"
LARGEST = 2**53


def written(tmp_path, history, name="stats.jsonl"):
    history.write(tmp_path / name)
    return tmp_path / name


@pytest.fixture
def small(tmp_path):
    """A file of three steps, and where each of its lines ends."""
    path = written(tmp_path, history_of([decades(0.0, -2.0), decades(-1.0, 0.0), decades(-3.0, None)], losses=[3.5, 2.0, None]))
    content = path.read_bytes()
    return path, content, [match.start() for match in re.finditer(b"\n", content)]


def test_a_file_cut_at_every_byte(small):
    path, content, ends = small
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        history = gk.History.load(path)
        whole = sum(end <= cut for end in ends)
        torn = cut not in (0, *ends, *(end + 1 for end in ends))
        assert (list(history.steps), history.lines_left_out) == ([1, 2, 3][: max(0, whole - 1)], int(torn)), cut
        assert bool(history.sites) == (whole > 0)


def test_a_torn_line_with_whole_ones_behind_it(small):
    path, content, ends = small
    for cut in range(ends[0] + 2, ends[1]):
        path.write_bytes(content[:cut] + content[ends[1] :])
        history = gk.History.load(path)
        assert (list(history.steps), history.lines_left_out) == ([2, 3], 1)


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "5", "null", '"format"', "{}", '{"step":4}', '{"format":2}', "[" * 100_000, "\udcff\udcfe", "9" * 5000),
        '{"step":4,"loss":1,"lr":[],"rows":{}}',
        '{"step":4,"loss":1,"lr":[],"rows":{"numel":[1]}}',
        '{"step":3,"loss":1,"lr":[],"rows":ROWS}',
        '{"step":4,"loss":[],"lr":[],"rows":ROWS}',
        '{"step":4,"loss":1,"lr":[],"rows":MORE}',
        '{"step":4,"loss":1,"lr":[],"rows":ONE}',
        '{"step":4,"loss":1,"lr":[],"rows":BEYOND}',
        '{"step":4,"loss":1,"lr":[],"rows":HUGE}',
        '{"step":4,"loss":1,"lr":[],"rows":ROWS,"time":{"lstm.l0":{}}}',
    ],
)
def test_a_line_that_is_none_is_left_out(small, line):
    path, content, _ = small
    rows = json.loads(content.splitlines()[2])["rows"]
    kinds = {
        "ROWS": rows,
        "MORE": {**rows, "abs_max": [1, 2, 3]},
        "ONE": {**rows, "numel": [1]},
        "BEYOND": {**rows, "zero_count": {"2": 1}},
    }
    for name, made in {**kinds, "HUGE": {**rows, "numel": [10**400, 1]}}.items():
        line = line.replace(name, json.dumps(made))
    path.write_bytes(
        content + line.encode(errors="surrogateescape") + b"\n" + content.splitlines()[2].replace(b":2,", b":7,", 1)
    )
    history = gk.History.load(path)
    assert (list(history.steps), history.lines_left_out) == ([1, 2, 3, 7], 1)


def test_empty_lines_hold_nothing(small):
    path, content, _ = small
    path.write_bytes(b"\n" + content.replace(b"\n", b"\n\n \n"))
    history = gk.History.load(path)
    assert (list(history.steps), history.lines_left_out) == ([1, 2, 3], 0)


@pytest.mark.parametrize("change", [{"format": 3}, {"fields": ["numel"]}, {"fields": 1}])
def test_a_file_of_another_format(small, change):
    path, content, _ = small
    head, *lines = content.splitlines()
    path.write_bytes(b"\n".join([json.dumps({**json.loads(head), **change}).encode(), *lines]))
    with pytest.raises(ValueError, match=r"load: .*stats\.jsonl must be of format and fields \[2, \['numel', .*\]\], got \["):
        gk.History.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        gk.History.load(tmp_path / "none.jsonl")
    (tmp_path / "stats-1.jsonl").write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"load: path must be a file, or a directory with a stats\.jsonl in it, got '.*'"
    ):
        gk.History.load(tmp_path)


def test_the_newest_file_of_a_directory(tmp_path):
    for number, name in enumerate(("stats.jsonl", "stats-2.jsonl", "stats-9.jsonl", "stats-10.jsonl"), 1):
        written(tmp_path, history_of([decades(0.0)] * number), name)
        assert len(gk.History.load(tmp_path)) == number
    assert len(gk.History.load(str(tmp_path / "stats-2.jsonl"))) == 2


def test_a_load_keeps_the_newest_that_fit(small):
    nbytes = gk.History.load(small[0]).snapshots[0].nbytes
    assert list(gk.History.load(small[0], max_bytes=2 * nbytes).steps) == [2, 3]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((math.pi, 3.14159), (1e-300, 1e-300), (5e-324, 5e-324), (-0.0, 0.0), (1.23456789e300, 1.23457e300), (0.1, 0.1)),
        *((1.7976931348623157e308, 1.79769e308), (123456789.0, 123457000.0), (999999.0, 999999.0), (999999.5, 1e6)),
        *((math.inf, math.inf), (math.nan, math.nan)),
    ],
)
def test_numbers(tmp_path, value, expected):
    """Six digits of what is measured, at any size of a float64; whole numbers exact; the second writing changes nothing."""
    history = history_of([decades(0.0, 0.0)], losses=[value])
    table = history.snapshots[0].values
    for name in FIELDS:
        table[1, FIELDS.index(name)] = LARGEST - 1 if name in COUNTS else value
    path = written(tmp_path, history)
    read = gk.History.load(path)
    row = read.snapshots[0].values[1]
    for name, number in zip(FIELDS, row, strict=True):
        np.testing.assert_equal(number, LARGEST - 1 if name in COUNTS else expected)
    np.testing.assert_array_equal(read.snapshots[0].values[0], table[0])
    np.testing.assert_equal(read.snapshots[0].loss, value)
    assert written(tmp_path, read, "again.jsonl").read_bytes() == path.read_bytes()
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_fields_that_are_mostly_zero_take_no_room(tmp_path):
    history = history_of([decades(0.0, -np.inf, 0.0)], bad={(0, 2)})
    line = json.loads(written(tmp_path, history).read_text().splitlines()[1])
    assert line["rows"].pop("numel") == [64, 64, 64]
    assert line["rows"].pop("square_sum") == [64, 0, 64]
    assert line["rows"] == {
        "observation_count": [1, 1, 1],
        "abs_max": [1, 0, 1],
        "nonfinite_count": {"2": 1},
        "zero_count": {"1": 64},
    }
    assert "time" not in line


def test_time_profiles(tmp_path):
    """Of the steps that were there: not of all that the table has room for, nor of an LSTM that did not run."""
    net = nn.ModuleList([nn.LSTM(4, 3, num_layers=2), nn.LSTM(4, 3)])
    watch = gk.watch(net)
    for _ in range(2):
        net[0](torch.randn(7, 2, 4))[0].square().sum().backward()
        watch.step()
    path = written(tmp_path, watch.history)
    read = gk.History.load(path)
    assert {len(snapshot.time_values["0.l1"]) for snapshot in read.snapshots} == {1 + 7}
    live = watch.history.time_profiles()
    assert [(profile.site, profile.steps) for profile in read.time_profiles()] == [("0.l0", 7), ("0.l1", 7)]
    for ours, theirs in zip(live, read.time_profiles(), strict=True):
        for name in ("dh", "dc", "dh_recurrent", "forget_mean"):
            np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=5e-6, atol=0)
        for name in ("gate_count", "input_low", "forget_high", "output_low"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
    assert written(tmp_path, read, "again.jsonl").read_bytes() == path.read_bytes()


def test_time_steps_that_were_not_recorded():
    """More steps than the table had rows for: NaN in the profile, from a file too."""
    rows = np.ones((3, 12))
    rows[0, :2] = 5, 1
    live = Snapshot(1, None, (), np.zeros((0, len(FIELDS))), {"lstm.l0": rows})
    read = Snapshot.from_json(json.loads(json.dumps(live.to_json())), 0)
    np.testing.assert_array_equal(read.time_values["lstm.l0"][1:], rows[1:])
    np.testing.assert_array_equal(read.time_values["lstm.l0"][0, :2], rows[0, :2])


def test_reports_say_what_was_left_out(small):
    path, content, _ = small
    assert "left out" not in table(gk.History.load(path), [])
    path.write_bytes(content + b"{\n")
    assert "1 line of the file could not be read and was left out." in table(gk.History.load(path), [])
    path.write_bytes(content + b"{\n{\n")
    history = gk.History.load(path)
    assert "2 lines of the file could not be read and were left out." in table(history, [])
    flow_picture(history, [], path.with_suffix(".png"))
    path.write_bytes(b"{\n")
    assert "no finished step" in table(gk.History.load(path), [])
    assert "1 line of the file" in table(gk.History.load(path), [])


def test_the_example_of_the_page(tmp_path):
    """It is a file that is read whole, and is what is written of it."""
    (example,) = re.findall(r"^```text\n(\{.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "stats.jsonl"
    path.write_text(re.sub(r"\n +", "", example))
    history = gk.History.load(path)
    assert history.lines_left_out == 0
    assert len(history) == 2
    assert history.column("nonfinite_count", "1")[1] > 0
    assert written(tmp_path, history, "again.jsonl").read_text() == path.read_text()
