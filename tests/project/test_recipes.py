"""The recipes of CONTRIBUTING.md: they are followed in a copy of the project, and name every file that there is to touch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import place_of

from gradkernels.ops import OPS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = ("An op", "A row field", "A time field", "A rule", "A report format")


def files_of(recipe):
    """The paths in a recipe's numbered list."""
    text = PAGE.partition(f"### {recipe}\n")[2].partition("\n#")[0]
    return [path for path in re.findall(r"`([^`\s]+)`", text) if "/" in path]


def naming(word, *folders):
    """The files, but for tests and tables of figures, that have a word in them."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu")]
    return {str(path.relative_to(ROOT)) for path in paths if re.search(rf"\b{word}\b", path.read_text())}


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_are_there(recipe):
    named = files_of(recipe)
    assert len(named) > 2
    assert [path for path in named if "<" not in path and not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_files(op):
    for path in files_of("An op"):
        own = place_of(path, op)
        assert (ROOT / own).is_file() or (op, path) == ("probe", "benchmarks/bench_<op>.py"), own


def test_a_row_field_is_named_in_no_other_files():
    assert naming("zero_count", "gradkernels", "csrc") <= set(files_of("A row field"))


def test_a_time_field_is_named_in_no_other_files():
    named = naming("forget_sum", "gradkernels", "csrc") | naming("FORGET_SUM", "csrc") | naming("sums_of_gates", "gradkernels")
    assert named - {"gradkernels/triton/lstm/backward.py"} <= set(files_of("A time field"))  # which calls it, whatever it sums


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what the recipes speak of, without the extension."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("gradkernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results", ".hypothesis")
        )
    shutil.copy(ROOT / "CONTRIBUTING.md", root)
    return root


def edit(path, **words):
    """Replaces words in a file, each of which is there."""
    text = path.read_text()
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def run(root, code):
    """What Python prints in the copy, without the extension, which is built of the original."""
    code = f"import sys; sys.path.insert(0, 'tests/support'); import without_extension\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_op(copy):
    """`toy`, which is gelu by another name: made of the files of the list alone, it runs, measures and is said to run."""
    own = [path for path in files_of("An op") if "<op>" in path]
    shared = [path for path in files_of("An op") if "<op>" not in path]
    for path in own:
        made = copy / path.replace("<op>", "toy")
        made.write_text((copy / path.replace("<op>", "gelu")).read_text().replace("gelu", "toy").replace("Gelu", "Toy"))
    lines = {
        "gradkernels/ops/__init__.py": ('"gelu", ', '"gelu", "toy", '),
        "gradkernels/functional.py": ("import gelu\n", "import gelu\nfrom gradkernels.ops.toy import toy\n"),
        "gradkernels/__init__.py": ("    gelu,\n", "    gelu,\n    toy,\n"),
        "gradkernels/sharding.py": (
            '    "gelu": every_dimension,\n',
            '    "gelu": every_dimension,\n    "toy": every_dimension,\n',
        ),
    }
    assert set(lines) <= set(shared)
    for path, (old, new) in lines.items():
        edit(copy / path, **{old: new})
    code = """
import torch, torch.nn.functional as F, gradkernels as gk
x, stats = torch.randn(5, 7, requires_grad=True), gk.new_stats(2)
y = gk.toy(x, stats=stats)
dx, = torch.autograd.grad(y, x, torch.ones_like(y))
torch.testing.assert_close(y, F.gelu(x))
torch.testing.assert_close(stats[1, 0, 2], dx.double().square().sum())
print(gk.implementations()["toy on cpu"])
"""
    assert "reference" in run(copy, code)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "without_extension",
        "project/test_layout.py",
    ]
    done = subprocess.run(
        [*command, "project/test_layout.py", "project/test_imports.py"],
        cwd=copy / "tests",
        env={**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests/support'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_row_field(copy):
    """A ninth field in Python: tables, the reference and records take it without another file to touch."""
    edit(copy / "gradkernels/telemetry/fields.py", **{'    "zero_count",': '    "toy_count",\n    "zero_count",'})
    edit(copy / "gradkernels/telemetry/measure.py", **{"        zeros,\n": "        2 * zeros,\n        zeros,\n"})
    edit(
        copy / "gradkernels/telemetry/records.py",
        **{
            "abs_max, nonfinite, zeros = row": "abs_max, nonfinite, _, zeros = row",
            "nonfinite, _ = np.moveaxis": "nonfinite, *_ = np.moveaxis",
        },
    )
    code = """
import torch, gradkernels as gk
stats = gk.new_stats(1)
x = torch.randn(3, 4, requires_grad=True)
gk.probe(x, stats=stats).backward(torch.tensor([0.0, 1, 2, 0]).expand(3, 4))
print(stats.shape[-1], stats[0, 0, gk.FIELDS.index("toy_count")].item(), stats[0, 0, -1].item())
"""
    assert run(copy, code).split() == ["9", "12.0", "6.0"]


def test_a_rule(copy):
    """A rule in a file of its own, and in the list: it is asked, and what it finds is told."""
    (copy / "gradkernels/diagnose/toy.py").write_text(
        "from gradkernels.diagnose.finding import Finding, Severity\n\n\n"
        "def toy(history):\n"
        "    return [Finding('TOY', Severity.NOTE, 'x', 1, 'seen', 'nothing')] if len(history) else []\n"
    )
    edit(
        copy / "gradkernels/diagnose/__init__.py",
        **{
            "(nonfinite, ": "(toy, nonfinite, ",
            "from gradkernels.telemetry": "from gradkernels.diagnose.toy import toy\nfrom gradkernels.telemetry",
        },
    )
    code = """
import torch, gradkernels as gk
net = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
watch = gk.watch(net)
net(torch.randn(3, 4)).sum().backward()
watch.step()
print([finding.code for finding in watch.diagnose()], watch)
"""
    assert "['TOY']" in run(copy, code)


def test_a_report_format(copy):
    """A function of a history and its findings, which needs no Watch."""
    (copy / "gradkernels/report/toy.py").write_text(
        "def render(history, findings):\n    return f'{len(history)} {len(findings)}'\n"
    )
    code = "from gradkernels.report.toy import render\nfrom gradkernels import History\nprint(render(History(), []))"
    assert run(copy, code).split() == ["0", "0"]
