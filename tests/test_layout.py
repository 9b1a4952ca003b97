"""Every op has one file in each place, and no module grows beyond what can be read in one go."""

from pathlib import Path

import pytest

from gradkernels.ops import OPS

ROOT = Path(__file__).parent.parent
PLACES = ("gradkernels/ops/{}.py", "csrc/cpu/{}.cpp", "gradkernels/triton/{}.py", "tests/test_{}.py", "benchmarks/bench_{}.py")
NO_BENCHMARK = {"probe"}
MAX_LINES = 400
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
    assert [place for place in places if not (ROOT / place).is_file()] == []


def test_ops_are_the_files_in_ops():
    assert {path.stem for path in (ROOT / "gradkernels/ops").glob("[!_]*.py")} == set(OPS)


def test_modules_are_short():
    """Generated tables are data, not modules: their file says so in its name."""
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES if "table" not in path.stem}
    assert {name: lines for name, lines in long.items() if lines > MAX_LINES} == {}
