"""Every op has one file in each place, and no module grows beyond what can be read in one go."""

import ast
from pathlib import Path

import pytest
from places import place_of

from gradkernels.ops import OPS

ROOT = Path(__file__).parents[2]
PLACES = (
    "gradkernels/ops/<op>.py",
    "csrc/autograd/<op>.cpp",
    "csrc/cpu/<op>.cpp",
    "gradkernels/triton/<op>.py",
    "tests/ops/test_<op>.py",
    "benchmarks/bench_<op>.py",
)
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
    patterns = [place for place in PLACES if not any(part in place and op in ops for part, ops in missing.items())]
    places = [place_of(pattern, op) for pattern in patterns]
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


def unspecialized(tree, names):
    """(kernel, name) of each that a kernel is told not to be specialised on and that is none of its parameters."""
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", ()):
            for keyword in getattr(decorator, "keywords", ()):
                if keyword.arg == "do_not_specialize":
                    parameters = {argument.arg for argument in node.args.args}
                    found = eval(ast.unparse(keyword.value), dict(names))
                    yield from ((node.name, name) for name in found if name not in parameters)


def test_kernels_are_not_specialized_on_their_integers():
    """Triton passes over a name that is no parameter, and would build a kernel anew for other sizes."""
    for path in (ROOT / "gradkernels/triton").rglob("*.py"):
        tree = ast.parse(path.read_text())
        lists = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)]
        assert list(unspecialized(tree, {node.targets[0].id: ast.literal_eval(node.value) for node in lists})) == []
    wrong = ast.parse("@triton.jit(do_not_specialize=[*MORE, 'n'])\ndef kernel(n, m):\n    pass")
    assert list(unspecialized(wrong, {"MORE": ["k"]})) == [("kernel", "k")]
