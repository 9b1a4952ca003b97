"""The Triton kernels on a machine without a GPU: interpreted, compiled for GPUs that are not there, and traced."""

import importlib.util
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from processes import ROOT, run, run_tests
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from gradkernels.telemetry import NUM_SLOTS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
OP = torch.ops.gradkernels
RECURRENT = ("lstm_fwd_step_kernel", "lstm_bwd_step_kernel")
OPS = ("gelu", "residual", "probe", "layer_norm", "add_layer_norm", "lstm_cell", "lstm_layer")
VERSION = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "0.0"
since_3_9 = pytest.mark.skipif(
    tuple(map(int, VERSION.split(".")[:2])) < (3, 9),
    reason="the machine code is that of Triton 3.9 and later: 3.6 spills 64 bytes in two kernels (docs/kernels.md)",
)


def test_kernels():
    """tests/gpu/test_triton_kernels.py: every kernel, interpreted."""
    run_tests("-p", "on_triton", "test_triton_kernels.py", "-W", "ignore")


def test_shared_memory():
    """tests/ops/test_shared_memory.py on the kernels, but for all choices, which take thousands of interpreted calls."""
    run_tests("-p", "on_triton", "test_shared_memory.py", "-W", "ignore", "-k", "halving or zeroes")


@pytest.mark.parametrize("part", ["lstm", "stack"])
def test_lstm(part):
    """tests/gpu/test_triton_lstm.py: the LSTM's kernels, interpreted; tests/gpu/test_lstm_stack.py: several parts at once."""
    run_tests("-p", "on_triton", {"lstm": "test_triton_lstm.py", "stack": "test_lstm_stack.py"}[part], "-W", "ignore")


def test_lstm_edges():
    """tests/lstm/test_lstm_edges.py: sizes of zero, and batch_sizes of any layout, changed or wrong."""
    run_tests("-p", "on_triton", "test_lstm_edges.py", "-W", "ignore", "-k", "not float64 and not float16")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_ops(op):
    """All of an op's tests, on the kernels; but for what takes thousands of interpreted calls, and compares references."""
    names = "not inductor and not threads and not better" + " and not reference and not transforms" * (op == "lstm_layer")
    run_tests("-p", "on_triton", f"test_{op}.py", "-W", "ignore", "-k", names)


def test_import_needs_no_triton():
    run("-c", "import sys; sys.modules['triton'] = None; import gradkernels; print(gradkernels.implementations())")


def codegen(*arguments):
    """The lines of benchmarks.codegen, which fails where a kernel spills."""
    command = [sys.executable, "-m", "benchmarks.codegen", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_lines(lines, targets):
    """No spills, no stack, 16-byte accesses; more than a few registers or instructions for telemetry are seen in review."""
    assert {line["target"] for line in lines} == set(targets)
    for line in lines:
        assert (line["stack_bytes"], line["local_accesses"]) == (0, 0), line
        if line["op"].startswith("lstm"):  # whose tensors are small, but for the operands of its products
            whole = line["target"].startswith("sm") and line["columns"] == 1024 and line["kernel"] in RECURRENT
            assert not whole or (line["accesses_128_bit"] > 0 and line["accesses_narrower"] == 0), line
            continue
        assert line["accesses_128_bit"] > 0, line
        assert line.get("accesses_narrower", 0) <= 2, line  # mean and rstd of a row
        if line["target"].startswith("sm") and "looped" not in line["kernel"] and line["dtype"] != "float64":
            assert line["loop_instructions_per_element"] < 60, line


@since_3_9
def test_codegen():
    """Every kernel and dtype for Hopper; with statistics for the other targets."""
    check_lines(codegen("--target", "sm_90", "--columns", "1024", "--columns", "4096", "--columns", "16384"), ["sm_90"])
    others = ["sm_80", "sm_100", "gfx942"]
    arguments = [argument for target in others for argument in ("--target", target)]
    check_lines(codegen(*arguments, "--columns", "4096", "--telemetry", "on"), others)


@since_3_9
@pytest.mark.slow
def test_codegen_of_everything():
    lines = codegen()
    check_lines(lines, ["sm_80", "sm_90", "sm_100", "gfx942"])
    committed = [json.loads(line) for line in (ROOT / "benchmarks/results/codegen.jsonl").read_text().splitlines()]
    key = lambda line: [line[name] for name in ("kernel", "op", "dtype", "columns", "telemetry", "target")]  # noqa: E731
    assert [key(line) for line in committed] == [key(line) for line in lines]


def traced(function, *shapes):
    """The graph of `function` on CUDA tensors that are not there; each shape is (sizes, dtype)."""

    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        raise NotImplementedError("captured")

    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch("gradkernels.triton.launch.num_sms", return_value=132):
        tensors = [torch.empty(sizes, dtype=dtype, device="cuda") for sizes, dtype in shapes]
        compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=capture))
        with pytest.raises(Exception, match="captured"):
            compiled(*tensors)
    return [node for node in graphs[0].graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)]


def test_compiled_graphs_hold_the_kernels(fresh_compiler):
    """Two backwards in one graph are three launches and allocations, and no call of an op that nobody can look into."""

    def backwards(x, mean, weight, gelu_stats, norm_stats):
        dx = OP.gelu_bwd(x, x, False, gelu_stats)
        return OP.layer_norm_bwd(dx, x, mean, mean, weight, weight, 1, [True] * 3, norm_stats)

    table = lambda ports: ((ports, NUM_SLOTS, 8), torch.float64)  # noqa: E731
    shapes = [((64, 256), torch.bfloat16), ((64, 1), torch.float32), ((256,), torch.bfloat16), table(2), table(4)]
    names = [str(node.target) for node in traced(backwards, *shapes)]
    assert not fresh_compiler["graph_break"]
    assert sum("triton_kernel_wrapper" in name for name in names) == 3
    assert not [name for name in names if "gradkernels" in name or "copy" in name or "clone" in name]


def test_compiled_graphs_hold_one_call_of_a_recurrent_layer(fresh_compiler):
    """A time loop is no loop in a graph, whatever T is; a cell's launch is seen, as that of other ops."""

    def both_ways(x, state, weight):
        y, _, _, gates, cells = OP.lstm_layer_fwd(x, state, state, weight, weight, None, None, None, None, False)
        saved = (y, gates, cells, False, [True] * 8, None, None)
        dx = OP.lstm_layer_bwd(y, None, None, x, state, state, weight, weight, None, None, None, None, *saved)[0]
        return dx, OP.lstm_cell_fwd(state, state, state, weight, weight, None, None)

    T, B, H = 300, 4, 32
    shapes = [((T, B, H), torch.bfloat16), ((B, H), torch.bfloat16), ((4 * H, H), torch.bfloat16)]
    nodes = traced(both_ways, *shapes)
    names = [str(node.args[0] if "auto_functionalized" in str(node.target) else node.target) for node in nodes]
    assert not fresh_compiler["graph_break"]
    assert [name for name in names if "gradkernels" in name] == [
        f"gradkernels.lstm_layer_{way}.default" for way in ("fwd", "bwd")
    ]
    assert sum("triton_kernel_wrapper" in name for name in names) == 1
    assert len(names) < 20
