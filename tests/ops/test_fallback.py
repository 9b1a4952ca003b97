"""The op tests again, in processes of their own: without the extension, on each instruction set, and on Triton kernels."""

import pytest
import torch
from processes import SHARED, run, run_tests, selection_of

import gradkernels
from gradkernels.ops import OPS

CAPABILITIES = ("default", "avx2", "avx512")  # ATEN_CPU_CAPABILITY, each including those before it
SHOWN = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
IMPLEMENTATIONS = "import gradkernels; print(gradkernels.implementations())"
NUMBERS = "(implementation or tails or layouts or stats or threads or special or accuracy or one_output) and not vmap"


def test_import_without_extension():
    shown = run("-c", f"import without_extension; {IMPLEMENTATIONS}")
    for op in OPS:
        assert f"'{op} on cpu': 'reference (PyTorch): the extension is not built'" in shown
    assert "'autograd': 'Python: the extension is not built'" in shown


@pytest.mark.parametrize("op", OPS)
def test_ops_without_extension(op):
    """Forward, gradients, statistics, double backward, vmap and torch.compile of the reference implementation."""
    files, names = selection_of(op, OPS)
    run_tests("-p", "without_extension", *files, "-k", f"{names} and not inductor and not tails and not threads")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_shared_tests_on_triton(op):
    """The tests that every op shares, on the Triton kernels; test_triton.py runs those that are an op's own."""
    pytest.importorskip("triton")
    names = "not inductor and not threads and not gradcheck" + " and not transforms" * (op == "lstm_layer")
    run_tests("-p", "on_triton", *SHARED, "-W", "ignore", "-k", f"{selection_of(op, OPS)[1]} and {names}")


def test_shared_memory_without_extension():
    run_tests("-p", "without_extension", "test_shared_memory.py")


def test_dtensors_without_extension():
    run_tests("-p", "without_extension", "test_dtensor.py", "-k", "test_case")


def test_edges_and_threads_without_extension():
    """Sizes of zero, batch_sizes of any kind, and tables that several threads share."""
    run_tests("-p", "without_extension", "test_lstm_edges.py", "test_tables.py", "-k", "not float16 and not float64")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_sets(capability):
    """Every kernel, dtype and field on an instruction set this CPU has, other than the one all other tests run on."""
    has = torch.backends.cpu.get_cpu_capability().lower()
    if CAPABILITIES.index(capability) > max(k for k, name in enumerate(CAPABILITIES) if k == 0 or has.startswith(name)):
        pytest.skip(f"this CPU has {has} at most")
    shown = run("-c", IMPLEMENTATIONS, ATEN_CPU_CAPABILITY=capability)
    assert shown.count(f"C++ ({SHOWN[capability]}") == len(OPS)
    if shown.strip() == str(gradkernels.implementations()):
        pytest.skip("the tests of the ops in this process run on it")
    run_tests(*(f"test_{op}.py" for op in OPS), *SHARED, "-k", NUMBERS, ATEN_CPU_CAPABILITY=capability)
