"""Ops and layers on DTensors, in two processes that run every case of dtensor_cases.py."""

import subprocess
import sys

import pytest
import torch

from gradkernels.library import FAKES
from gradkernels.ops import OPS

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from dtensor_cases import CASES
from processes import environment_of
from ranks import check_case, failures
from torch.distributed.tensor import DTensor

from gradkernels.sharding import RULES

OF_TABLES = {"add_row", "add_steps", "make_room", "take_rows", "take_steps"}
ORDERS = {
    "": False,
    "import torch.distributed.tensor; ": True,
    "import gradkernels, torch.distributed.tensor.parallel; ": True,
}
LOADED = "import sys, torch, gradkernels; print('{}' in sys.modules, 'gradkernels.sharding' in sys.modules)"


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """{case: traceback} of each process."""
    return failures("dtensor_cases", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_case(failed, case):
    check_case(failed, case)


def test_every_op_has_a_rule():
    assert set(RULES) == set(OPS)


@pytest.mark.parametrize("op", FAKES, ids=str)
def test_every_kernel_is_registered(op):
    """All but those of tables.py, which are plain tensors."""
    entry = torch._library.simple_registry.singleton.find(f"{op.namespace}::{op._opname}")
    registered = entry.torch_dispatch_rules.find(DTensor) is not None
    assert registered == (op._opname not in OF_TABLES)


@pytest.mark.parametrize(("first", "loaded"), ORDERS.items())
def test_loaded_when_needed(first, loaded):
    """Importing gradkernels imports nothing of DTensor's; whichever of the two comes first, the rules are there."""
    program = first + LOADED.format("torch.distributed.tensor")
    done = subprocess.run([sys.executable, "-c", program], env=environment_of(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(loaded)] * 2
