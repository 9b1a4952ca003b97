"""The same few hundred examples of each op on each instruction set, and that what is wrong is found."""

import pytest

from fuzz.__main__ import CAPABILITIES, capabilities, run_process
from fuzz.check import check
from fuzz.norms import AddLayerNorm, LayerNorm
from fuzz.pointwise import Gelu, Probe, Residual
from fuzz.recurrent import LSTMCell, LSTMLayer
from fuzz.tensors import Drawn, Values
from gradkernels.library import _C
from gradkernels.ops import OPS
from gradkernels.telemetry import FIELDS, new_stats

EXAMPLES = 150  # of each op: a minute on two cores for all instruction sets
A, B, WEIGHT = Drawn(seed=1), Drawn(seed=2), Drawn(Values(exponent=-1), seed=3)
COLUMNS = {"weight": A, "bias": B}
LSTM = {"dtype": "float32", "D": 5, "H": 7, "x": A, "state": B, "weights": WEIGHT, "bias": True}
ORDINARY = {
    "gelu": Gelu("float32", (3, 37), False, A, B),
    "layer_norm": LayerNorm("bfloat16", (3, 37), 1, "float32", A, B, **COLUMNS),
    "add_layer_norm": AddLayerNorm("float16", "float32", (3, 37), 1, "float32", A, B, B, A, **COLUMNS),
    "residual": Residual("float64", (3, 37), A, B),
    "lstm_layer": LSTMLayer(**LSTM, T=3, B=2, P=4, lengths=None, dy=A, dh_n=B, dc_n=A),
    "lstm_cell": LSTMCell(**LSTM, B=3, dh_next=A, dc_next=B),
    "probe": Probe("float32", (3, 37), A),
}
pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fuzz(capability, capfd):
    if capability not in capabilities():
        pytest.skip("this CPU does not have it")
    nothing_wrong = run_process(capability, ["--examples", str(EXAMPLES)])
    if not nothing_wrong:
        pytest.fail(capfd.readouterr().out, pytrace=False)


def test_a_crash_names_its_example(monkeypatch, capfd):
    """A process that a signal ends leaves the example it was at."""
    crash = "from fuzz import process; from fuzz.pointwise import OPS; import os; OPS.probe_bwd = lambda *_: os.abort()"
    monkeypatch.setattr("fuzz.__main__.PROCESS", ["-c", f"{crash}; from fuzz.__main__ import main; main()"])
    assert not run_process("default", ["--examples", "1", "--ops", "probe"])
    said = capfd.readouterr().out
    assert "the process ended with signal 6" in said
    assert '--repeat "Probe(' in said


class Changed:
    """An example whose op does something else besides: change(tensors, results, stats)."""

    def __init__(self, example, change):
        self.example, self.change = example, change

    def __getattr__(self, name):
        return getattr(self.example, name)

    def run(self, tensors, stats):
        results = self.example.run(tensors, stats)
        self.change(tensors, results, stats)
        return results


def write_input(tensors, results, stats):
    tensor = next(t for t in tensors.values() if t is not None)
    tensor.select(-1, 0).fill_(7.5)


def add_to(field):
    def change(tensors, results, stats):
        if stats is not None:
            stats[-1, 0, FIELDS.index(field)] += 1

    return change


def scale_when(name, measured):
    def change(tensors, results, stats):
        if measured or stats is None:
            results[name].view(-1)[-1] *= 1.25

    return change


@pytest.mark.parametrize("op", OPS)
def test_an_ordinary_example_is_right(op):
    check(ORDINARY[op])


@pytest.mark.parametrize("op", OPS)
def test_wrong_statistics_are_found(op):
    for field in FIELDS:
        if field in ("square_sum_tiny", "square_sum_huge"):
            continue  # zero, or too large to notice a change by 1, for ordinary gradients
        with pytest.raises(AssertionError):
            check(Changed(ORDINARY[op], add_to(field)))


@pytest.mark.parametrize("op", OPS)
def test_a_written_input_is_found(op):
    with pytest.raises(AssertionError, match="wrote into its input"):
        check(Changed(ORDINARY[op], write_input))


@pytest.mark.parametrize("op", [op for op in OPS if op != "probe"])
def test_wrong_results_are_found(op):
    """Each result of its own; mean and rstd of the norms are compared through what is computed from them alone."""
    example = ORDINARY[op]
    names = [name for name, t in example.run(example.tensors(), None).items() if t.numel() and name not in ("mean", "rstd")]
    for name in names:
        tensors = example.tensors()
        results = changed_results(example, tensors, name)
        with pytest.raises(AssertionError, match=name):
            example.compare(tensors, results)
        with pytest.raises(AssertionError, match="without statistics gives other bits"):
            check(Changed(example, scale_when(name, measured=False)))


def changed_results(example, tensors, name):
    """Results with one element of one of them changed."""
    results = example.run(tensors, new_stats(len(OPS[example.op].PORTS)))
    scale_when(name, measured=True)(tensors, results, None)
    return results
