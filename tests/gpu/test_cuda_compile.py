"""The CUDA C++ kernels as nvcc compiles them, for GPUs that need not be there, and when setup.py builds them."""

import json
import runpy
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import cuda_codegen

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(cuda_codegen.nvcc() is None, reason="nvcc is not there")
FIGURES = ("registers", "stack_bytes", "spill_stores", "spill_loads", "static_shared_bytes")


def of_target(lines, target):
    """{what the kernel is: line} of one target."""
    return {tuple(v for k, v in line.items() if k not in FIGURES): line for line in lines if line["target"] == target}


@needs_nvcc
@pytest.mark.parametrize("target", cuda_codegen.TARGETS)
@pytest.mark.parametrize("source", cuda_codegen.SOURCES, ids=lambda source: source.name)
def test_kernels_compile_without_spills(source, target):
    """No stack and no spills; every kernel has its line in the committed table."""
    found = of_target(cuda_codegen.compile_for(target, source), target)
    assert found
    for line in found.values():
        assert (line["stack_bytes"], line["spill_stores"], line["spill_loads"]) == (0, 0, 0), line
        assert line["static_shared_bytes"] == 0, line
    committed = map(json.loads, cuda_codegen.RESULTS.read_text().splitlines())
    assert set(found) == set(of_target([line for line in committed if line["source"] == source.name], target))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not there")
def test_documented_tilings_are_the_chosen_ones():
    """The tables of docs/lstm_gpu.md say what csrc/cuda/lstm_tiling.h tilings now."""
    page = (ROOT / "docs" / "lstm_gpu.md").read_text()
    for table in (cuda_codegen.largest_table(), cuda_codegen.time_table(), cuda_codegen.at_once_table()):
        assert "\n".join(table) in page


def extensions(cuda):
    """{name: extension} of what setup.py builds with a torch of this CUDA version."""
    with mock.patch.object(torch.version, "cuda", cuda), mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return {extension.name: extension for extension in setup.call_args.kwargs["ext_modules"]}


def test_setup_builds_cuda_where_torch_has_it(monkeypatch, tmp_path):
    """_C alone with a torch for CPUs and where its nvcc is not there; _C and _C_cuda, from nvcc's own libraries, otherwise."""
    from torch.utils import cpp_extension

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert list(extensions(None)) == ["gradkernels._C"]
    assert list(extensions("13.0")) == ["gradkernels._C"]
    nvcc = tmp_path / "bin" / "nvcc"
    version, libraries = "echo Cuda compilation tools, release 13.1, V13.1.1", """echo '#$ LIBRARIES=  "-L/toolkit/lib"' >&2"""
    nvcc.write_text(f"#!/bin/sh\n{version}\n{libraries}\n")
    nvcc.chmod(0o755)
    assert list(extensions(None)) == ["gradkernels._C"]
    assert list(extensions("12.9")) == ["gradkernels._C"]
    built = extensions("13.0")
    assert list(built) == ["gradkernels._C", "gradkernels._C_cuda"]
    assert "/toolkit/lib" in built["gradkernels._C_cuda"].library_dirs
