"""Arrows point down: a module imports from its own layer and those below it, and no imports form a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = (  # the lowest first; a folder stands for all modules in it
    ("autocast", "library", "nested", "version"),
    ("telemetry",),
    ("ops",),
    ("functional", "implementations", "sharding", "testing", "triton"),
    ("init", "nn"),
    ("integrations", "convert"),
    ("diagnose",),
    ("report",),
    ("watch",),
    ("demo",),
    ("__init__",),
    ("cli", "__main__"),
)
COMPILED = {"gradkernels._C", "gradkernels._C_cuda"}


def module_of(path, root):
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports_of(path, modules):
    """The modules of the package that a file imports, wherever in it: a name that is a module of a package is that module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules or f"{whole}.__init__" in modules else node.module)
    own = {name for name in found if name.partition(".")[0] == "gradkernels"} - COMPILED
    return {f"{name}.__init__" if f"{name}.__init__" in modules else name for name in own}


def graph_of(root):
    """{module: those it imports} of the package `gradkernels` in `root`."""
    paths = {module_of(path, root): path for path in (root / "gradkernels").rglob("*.py")}
    return {name: imports_of(path, paths) for name, path in paths.items()}


def layer_of(module):
    """The number of a module's layer."""
    first = module.split(".")[1]
    return next(number for number, layer in enumerate(LAYERS) if first in layer)


def upward(graph):
    """The imports that lead upwards."""
    every = {(name, other) for name, others in graph.items() for other in others}
    return sorted(f"{a} -> {b}" for a, b in every if layer_of(a) < layer_of(b))


def test_every_import_is_of_a_module():
    graph = graph_of(ROOT)
    assert {name for others in graph.values() for name in others} <= set(graph)


def test_arrows_point_down():
    assert upward(graph_of(ROOT)) == []


def test_no_circle():
    """Neither at the top of modules nor within functions."""
    graph = graph_of(ROOT)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_ops_know_no_kernels():
    """triton/ and the extension register themselves with PyTorch's dispatcher: nothing calls them."""
    above = {
        name
        for name, others in graph_of(ROOT).items()
        if not name.startswith("gradkernels.triton") and any(other.startswith("gradkernels.triton") for other in others)
    }
    assert above == {"gradkernels.__init__"}


def test_a_wrong_arrow_is_seen(tmp_path):
    """Of a copy in which an op imports the watch, and the watch the op."""
    package = tmp_path / "gradkernels"
    lazy = "def f():\n    import gradkernels.ops.x"
    for name, text in (("ops/x.py", "from gradkernels.watch import y"), ("watch/y.py", lazy)):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text(text)
    graph = graph_of(tmp_path)
    assert upward(graph) == ["gradkernels.ops.x -> gradkernels.watch.y"]
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
