"""Every op has one file in each place, and no module grows beyond what can be read in one go."""

import ast
from pathlib import Path

import pytest

from gradkernels.ops import OPS

ROOT = Path(__file__).parent.parent
PLACES = (
    "gradkernels/ops/{}.py",
    "csrc/autograd/{}.cpp",
    "csrc/cpu/{}.cpp",
    "gradkernels/triton/{}.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
)
HOMES = {"csrc/cpu/lstm_": "csrc/cpu/lstm/", "gradkernels/triton/lstm_": "gradkernels/triton/lstm/"}  # many files: a folder
NO_BENCHMARK = {"probe"}
COMPOSED = {"lstm"}  # of other ops: no kernels
MAX_LINES, MAX_FUNCTION, MAX_KERNEL = 400, 60, 80
SOURCES = sorted(
    path
    for folder in ("gradkernels", "csrc", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_files(op):
    missing = {"bench": NO_BENCHMARK}
    places = [place.format(op) for place in PLACES if not any(part in place and op in ops for part, ops in missing.items())]
    for start, home in HOMES.items():
        places = [place.replace(start, home) for place in places]
    assert [place for place in places if not (ROOT / place).is_file()] == []


def test_ops_are_the_files_in_ops():
    assert {path.stem for path in (ROOT / "gradkernels/ops").glob("[!_]*.py")} == {*OPS, *COMPOSED}


def test_modules_are_short():
    """Generated tables are data, not modules: their file says so in its name."""
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES if "table" not in path.stem}
    assert {name: lines for name, lines in long.items() if lines > MAX_LINES} == {}


def lengths_of(source):
    """{name: lines} of functions that are too long."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = {}
    for node in functions:
        kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        lines = node.end_lineno - node.lineno + 1
        if lines > (MAX_KERNEL if kernel else MAX_FUNCTION):
            found[node.name] = lines
    return found


def test_functions_are_short():
    assert {str(path): found for path in SOURCES if path.suffix == ".py" and (found := lengths_of(path.read_text()))} == {}
    assert lengths_of("def f():\n" + "    x = 1\n" * MAX_FUNCTION) == {"f": MAX_FUNCTION + 1}
