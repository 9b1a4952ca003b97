"""The benchmarks' descriptions on meta and CPU tensors; the harness with settings so small that figures mean nothing."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from benchmarks import (
    bench_gelu,
    bench_layer_norm,
    bench_lstm_cell,
    bench_lstm_layer,
    bench_residual,
    gpu,
    gpu_summary,
    harness,
)
from benchmarks.bench_add_layer_norm import case as add_layer_norm
from benchmarks.case import META, SHAPES, bytes_moved
from benchmarks.run import MODULES, show

M, N = 6, 32
SMALL = [
    *(bench_gelu.case(op, dtype, (M, N)) for op in bench_gelu.OPS for dtype in (torch.bfloat16, torch.float32)),
    bench_layer_norm.case(torch.bfloat16, (M, N)),
    add_layer_norm(torch.float32, (M, N)),
    bench_residual.case(torch.float32, (M, N)),
    bench_lstm_cell.case(torch.float32, (3, 8)),
    bench_lstm_layer.case("lstm_layer projected", torch.float64, (3, 5, 8)),
    *bench_lstm_layer.cases("dry run"),
]
each = pytest.mark.parametrize("case", SMALL, ids=[f"{case.op}-{case.dtype}" for case in SMALL])
HARDLY = {name: replace(own, rounds=2, round_seconds=0.0, rotated_bytes=1) for name, own in harness.PROTOCOLS.items()}
OPTIONAL = {"share_of_product", "ratio_to_telemetry_off", "host_microseconds"}


@each
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_bytes_are_those_of_the_tensors(case, direction):
    """What is counted where nothing is computed is what the ops on a CPU take and return."""
    assert bytes_moved(case, direction) == bytes_moved(case, direction, torch.device("cpu")) > 0


def test_bytes_of_known_ops():
    """A norm's mean and rstd are float32; its backward takes x, dy, both of these, weight and bias."""
    x, row, column = 2 * M * N, 2 * N, 4 * M
    gelu, norm = bench_gelu.case("gelu", torch.bfloat16, (M, N)), bench_layer_norm.case(torch.bfloat16, (M, N))
    assert [bytes_moved(gelu, direction) for direction in ("forward", "forward+backward")] == [2 * x, 5 * x]
    forward = 2 * x + 2 * row + 2 * column
    assert bytes_moved(norm, "forward") == forward
    assert bytes_moved(norm, "forward+backward") == forward + 3 * x + 4 * row + 2 * column
    assert bytes_moved(bench_residual.case(torch.float32, (M, N)), "forward+backward") == 10 * 4 * M * N


@each
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_lines(case, kind, capsys):
    """Every variant is right and has a line a direction, with all that readers look for."""
    protocol = HARDLY[kind]
    lines = list(harness.measure(case, protocol=protocol))
    names = {*case.variants(META), "copy", "eager again", *(("product",) if case.flops and kind == "cpu" else ())}
    for direction in protocol.directions:
        found = {line["implementation"]: line for line in lines if line["direction"] == direction}
        assert set(found) == names
        assert "ratio_to_telemetry_off" in found["telemetry on"]
    keys = {"op", "implementation", "direction", "dtype", "shape", "bytes_moved", "buffers", "ratio_to_eager", "share_of_copy"}
    keys |= {"launched", "microseconds"} if kind == "cuda" else set()
    assert all(keys <= set(line) <= keys | OPTIONAL for line in lines)
    for line in lines:
        show(line)
    assert len(capsys.readouterr().out.splitlines()) == len(lines)
    text = gpu_summary.summary([{**line, **harness.environment()} for line in lines])
    assert ("GPU tests not run" in text) == (kind == "cuda")


@each
def test_a_wrong_variant_is_not_timed(case):
    wrong = replace(case, fused=lambda *inputs, **tables: tuple(1.1 * y for y in outputs(case.fused(*inputs, **tables))))
    lines = list(harness.measure(wrong, protocol=HARDLY["cpu"]))
    assert {line["implementation"] for line in lines if "failed" in line} == {"telemetry off", "telemetry on"}
    assert {"copy", "eager", "eager again"} <= {line["implementation"] for line in lines if "failed" not in line}


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def test_ratios_are_to_what_is_launched_in_the_same_way():
    """PyTorch's LSTM is in no graph: ours is compared with its calls, but with our own graph."""
    times = {
        ("copy", "call"): [1.0],
        ("eager", "call"): [8.0],
        ("telemetry off", "call"): [5.0],
        ("telemetry on", "call"): [6.0],
    }
    times |= {("telemetry off", "graph"): [2.0], ("telemetry on", "graph"): [4.0]}
    found = harness.ratios(SMALL[0], "telemetry on", "graph", times)
    assert [found[name]["median"] for name in ("ratio_to_eager", "ratio_to_telemetry_off")] == [0.5, 2.0]
    assert found["share_of_copy"] == 0.25
    assert harness.ratios(SMALL[0], "telemetry on", "call", times)["ratio_to_telemetry_off"]["median"] == 1.2
    times |= {("eager", "graph"): [16.0]}
    assert harness.ratios(SMALL[0], "telemetry on", "graph", times)["ratio_to_eager"]["median"] == 0.25


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("name", MODULES)
def test_every_case_is_described_everywhere(name, where):
    """Inputs and outputs on the meta device, at full size, on a CPU, a GPU and in a dry run; each case once."""
    module = import_module(f"benchmarks.bench_{name}")
    cases = list(module.cases(where)) if hasattr(module, "cases") else []
    assert hasattr(module, "cases") or hasattr(module, "lines")
    assert len({(case.op, case.dtype, case.shape) for case in cases}) == len(cases)
    for case in cases:
        assert bytes_moved(case, "forward") > 0
        assert case.check is None or (where == "cuda" and case.check.op == case.op)


def test_order_on_a_gpu():
    """The most important shapes first, in both dtypes, then the LSTM."""
    cases = gpu.cases("cuda")
    assert [case.op for case in cases[:6]] == 2 * ["layer_norm", "gelu", "add_layer_norm"]
    assert {case.shape for case in cases[:6]} == {SHAPES["cuda"][0]}
    assert [case.dtype for case in cases[:6]] == 3 * [torch.bfloat16] + 3 * [torch.float32]
    assert all(case.op.startswith("lstm") for case in cases[6 * len(SHAPES["cuda"]) :])
