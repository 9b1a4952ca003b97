"""The rules on histories of known content: grades, places, since when, what passed, sizes, skips, zeros, NaN."""

import math

import numpy as np
import pytest
from histories import decades, history_of

import gradkernels as gk
from gradkernels.diagnose import RULES, Severity, diagnose
from gradkernels.diagnose.nonfinite import INCOMING, origin
from gradkernels.ops import OPS
from gradkernels.telemetry import Record
from gradkernels.telemetry.records import norms_of, record_of


def only(history):
    findings = diagnose(history)
    assert len(findings) <= 1, findings
    return findings[0] if findings else None


@pytest.mark.parametrize(("sign", "code"), [(-1, "VANISHING"), (1, "EXPLODING")])
@pytest.mark.parametrize(
    ("size", "severity"),
    [
        (0.99, None),
        (1.01, Severity.NOTE),
        (1.49, Severity.NOTE),
        (1.51, Severity.WARNING),
        (2.99, Severity.WARNING),
        (3.01, Severity.ERROR),
        (12.0, Severity.ERROR),
    ],
)
def test_grades(sign, code, size, severity):
    finding = only(history_of([decades(sign * size, sign * size / 2, 0.0)] * 3))
    if severity is None:
        assert finding is None
    else:
        assert (finding.code, finding.severity, finding.site, finding.since_step) == (code, severity, "layers.0", 1)
        assert (finding.stack, finding.until_step) == ("layers", None)
        assert finding.advice


@pytest.mark.parametrize(
    "steps",
    [[], [-5.0], [-5.0, -5.0], [-5.0, 5.0, -5.0], [-5.0, 0.0, -5.0, 0.0, -5.0, -5.0], [None] * 9, [-0.9] * 9],
)
def test_nothing_is_said(steps):
    assert only(history_of([decades(value, 0.0) for value in steps])) is None


@pytest.mark.parametrize(
    ("steps", "since", "until", "severity"),
    [
        ([0.1, -0.2, -2.0, -2.0, -2.0, -2.0], 3, None, Severity.WARNING),
        ([-2.0, -0.1, -2.0, -2.0, -2.0], 3, None, Severity.WARNING),
        ([2.0, -2.0, -2.0, -2.0], 2, None, Severity.WARNING),
        ([-1.2, -2.0, -2.0, -2.0], 2, None, Severity.WARNING),
        ([-1.2, -2.0, -2.0], 1, None, Severity.NOTE),
        ([0.0, -4.0, -4.0, -4.0, -4.0, 0.0, 0.0], 2, 5, Severity.NOTE),
    ],
)
def test_since_when_and_what_passed(steps, since, until, severity):
    finding = only(history_of([decades(value, 0.0) for value in steps]))
    assert (finding.code, finding.since_step, finding.until_step) == ("VANISHING", since, until)
    assert finding.severity is severity
    assert ("passed" in finding.when) is (until is not None)


@pytest.mark.parametrize(
    ("values", "bypassed", "code", "site", "steepest"),
    [
        ((0.0, 0.0, -4.0, 0.0, 0.0), None, "VANISHING", "layers.2", "layers.2 and layers.3"),
        ((0.0, -1.0, -4.0, -1.0, 0.0), [True, True, False, False], "VANISHING", "layers.2", "layers.2 and layers.3"),
        ((-4.0, -4.0, -3.9, -0.1, 0.0), None, "VANISHING", "layers.0", "layers.2 and layers.3"),
        ((4.0, 3.9, 3.8, 0.1, 0.0), None, "EXPLODING", "layers.0", "layers.2 and layers.3"),
        ((-4.0, -3.9, 0.0, -4.0), [False, False, True], "VANISHING", "layers.0", "layers.1 and layers.2"),
        ((4.0, 3.0, 2.0, 1.0, 0.0), [True] * 4, None, None, None),
        ((2.0, 2.0, 2.0, 2.0, -2.0), [False, False, False, True], None, None, None),
    ],
)
def test_where_in_a_stack(values, bypassed, code, site, steepest):
    """A collapse between ends that agree; a gradient that came past a block is not one that exploded in it."""
    finding = only(history_of([decades(*values)] * 4, bypassed=bypassed))
    assert (finding and finding.code, finding and finding.site) == (code, site)
    if finding:
        assert f"steepest between {steepest}" in finding.evidence or "layers.2 is 4.0 decades below" in finding.evidence


@pytest.mark.parametrize(
    ("values", "sizes", "expected"),
    [
        ((-1.6, 0.0), (1600, 1), None),  # the norm is kept
        ((-1.6, 0.0), (1, 1600), "VANISHING"),  # no number of elements explains it
        ((1.6, 0.0), (1, 1600), None),
        ((-6.0, 0.0), (1600, 1), "VANISHING"),
    ],
)
def test_sites_of_different_size(values, sizes, expected):
    finding = only(history_of([decades(*values)] * 4, sizes=sizes))
    assert (finding and finding.code) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([decades(0.0, -math.inf, 0.0)] * 30, None),  # a branch that starts at zero
        ([decades(-math.inf, 0.0, 0.0)] * 5, None),  # so do layers in front of it, for a few steps
        ([decades(-math.inf, 0.0, 0.0)] * 10, "VANISHING"),
        ([decades(-math.inf, -math.inf)] * 30, None),
        ([decades(None, 0.0, 0.0)] * 30, None),  # frozen
        ([decades(None, None, -4.0, 0.0)] * 4, "VANISHING"),
    ],
)
def test_zero_and_absent(rows, expected):
    finding = only(history_of(rows))
    assert (finding and finding.code) == expected


@pytest.mark.parametrize(
    ("steps", "code", "since"),
    [
        ([0.1, 3.5, 3.5, 3.5, math.nan], "EXPLODING", 2),
        ([3.5, 3.5, 3.5, math.nan, math.nan, math.nan, math.nan], "EXPLODING", 1),
        ([-3.5, -3.5, -3.5, math.nan], "VANISHING", 1),
        ([math.nan] * 5, None, None),
        ([0.1, 0.1, 0.1, math.nan, math.nan], None, None),
    ],
)
def test_what_was_seen_before_it_was_not_finite(steps, code, since):
    rows = [decades(-9.0 if math.isnan(value) else value, 0.0) for value in steps]
    bad = {(step, 0) for step, value in enumerate(steps) if math.isnan(value)}
    codes = {finding.code: finding.since_step for finding in diagnose(history_of(rows, bad=bad))}
    assert codes.pop("NONFINITE") == next(step for step, value in enumerate(steps, 1) if math.isnan(value))
    assert codes == ({code: since} if code else {})


def test_incoming_ports_are_those_of_the_ops():
    """What an op lists before dx is what comes in."""
    ports = {port for op in OPS.values() for port in op.PORTS[: op.PORTS.index("dx") if "dx" in op.PORTS else None]}
    assert set(INCOMING) == ports


def test_nonfinite_that_passed():
    finding = only(history_of([decades(0.0, 0.0)] * 6, bad={(2, 0), (3, 0)}))
    assert (finding.code, finding.site, finding.severity) == ("NONFINITE", "layers.0", Severity.NOTE)
    assert finding.when == "from step 3 to 4, and passed"
    assert "made between layers.1 and layers.0" in finding.evidence


def port(site: str, name: str, bad: int = 0) -> Record:
    return Record(site, name, 64, 1, 1.0, 1.0, bad, 0, 1.0)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([port("a", "dy"), port("a", "dx", 1), port("b", "dy"), port("b", "dx")], "made in a"),
        ([port("a", "dy", 9), port("a", "dx", 9), port("b", "dy"), port("b", "dx")], "made between b and a"),
        ([port("a", "dy", 9), port("b", "dy", 1)], "the loss handed them to b"),
        ([port("a", "dy", 9), port("b", "dy", 9), port("b", "dx", 9), port("c", "dy")], "made between c and b"),
        ([port("a", "dx"), port("b", "dy"), port("b", "dx"), port("b", "dweight", 1)], "made in b"),
        ([port("a", "dskip"), port("a", "dbranch", 1), port("a", "dx", 1), port("b", "dskip")], "made between b and a"),
    ],
)
def test_origin(records, expected):
    assert origin(records)[0] == expected


def test_a_history_of_a_file_is_the_live_one(tmp_path):
    history = history_of(
        [decades(-2.0, None, 0.0)] * 5, bad={(4, 0)}, bypassed=[True, False], losses=[1.0, math.nan, math.inf, None, 0.25]
    )
    history.layers = ("Block", "Linear")
    history.write(tmp_path / "stats.jsonl")
    read = gk.History.load(tmp_path / "stats.jsonl")
    assert (read.sites, read.stacks, read.layers) == (history.sites, history.stacks, history.layers)
    for ours, theirs in zip(history.snapshots, read.snapshots, strict=True):
        assert repr(ours.loss) == repr(theirs.loss)
        np.testing.assert_array_equal(ours.values, theirs.values)
    assert diagnose(read) == diagnose(history)
    assert diagnose(read)


def test_a_history_is_bounded():
    history = history_of([decades(0.0, 0.0)])
    history.max_bytes = 10 * history.snapshots[0].nbytes
    for step in range(2, 100):
        history.append(history_of([decades(0.0, 0.0)] * step).snapshots[-1])
    assert (len(history), list(history.steps[[0, -1]])) == (10, [90, 99])
    assert history.column("rms", "layers.0").shape == (10,)


@pytest.mark.parametrize(
    "row", [(64, 1, 9.0, 0.0, 0.0, 1.0, 0, 0), (64, 1, 0.0, 5.0, 7.0, 1.0, 3, 0), (4, 2, 0, 0, 0, 0, 4, 0)]
)
def test_columns_are_those_of_records(row):
    record = record_of("site", "dy", row)
    assert norms_of(np.array([row]))[0] == pytest.approx(record.norm, rel=1e-15, abs=0)
    assert norms_of(np.array([row]), rms=True)[0] == pytest.approx(record.rms, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("layers", "has", "has_not"),
    [
        (("Linear", "Sigmoid"), ("replace Sigmoid", "put a norm before each block and a residual"), ("pre-LN", "Tanh")),
        (("Linear", "Tanh"), ("Xavier (gain 5/3) for Tanh", "residual"), ("ReLU",)),
        (("Linear", "ReLU", "LayerNorm"), ("He for ReLU", "pre-LN", "warm the learning rate up"), ("Sigmoid", "residual")),
        (("Conv2d", "BatchNorm2d"), ("norm before each block (pre-LN)",), ("Sigmoid",)),
        ((), ("He for ReLU and GELU, Xavier for tanh",), ("Sigmoid",)),
    ],
)
def test_advice_is_in_the_words_of_the_net(layers, has, has_not):
    history = history_of([decades(-4.0, 0.0)] * 3)
    history.layers = layers
    advice = only(history).advice
    assert all(words in advice for words in has)
    assert not any(words in advice for words in has_not)


def test_every_rule_is_in_the_list_once():
    assert len(set(RULES)) == len(RULES)
