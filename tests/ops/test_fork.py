"""Our ops in a child of fork(), where the threads that PyTorch's ops have started in its parent are gone.

Each test is a process of its own, which has run none of our ops: `python test_fork.py OP`.
"""

import os
import signal
import sys
import tempfile

import pytest
import torch
from cases import make_case
from checks import same, tuple_of
from lstm_cases import case_of, cell_case
from processes import run

import gradkernels as gk
from gradkernels.library import _C

SECONDS = 20
CASES = {  # each large enough to be shared by two threads, in products too
    "gelu": lambda: make_case("gelu", 600, 600),
    "layer_norm": lambda: make_case("layer_norm", 600, 600),
    "add_layer_norm": lambda: make_case("add_layer_norm", 600, 600),
    "residual": lambda: make_case("residual", 600, 600),
    "lstm_layer": lambda: case_of(3, 60, 40, 160),
    "lstm_cell": lambda: cell_case(600, 40, 160),
}


@pytest.mark.skipif(_C is None, reason="without the extension our ops are PyTorch's, which wait for the parent's threads")
@pytest.mark.parametrize("generations", [1, 2])
@pytest.mark.parametrize("op", CASES)
def test_child(op, generations):
    run(__file__, op, str(generations))


def results(case, leaves, dys):
    """Outputs, gradients and statistics of a call; `leaves` are there already, for making them would wait for threads."""
    stats = gk.new_stats(len(case.ports))
    outputs = tuple_of(case.function(*leaves, stats=stats))
    wanted = [leaf for leaf in leaves if leaf is not None]
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, wanted, dys), stats


def descend(generations, work):
    """Runs work() in a child of `generations` forks, which has SECONDS for it, and raises unless it ends well."""
    if generations == 0:
        return work()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        descend(generations - 1, work)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(op, generations):
    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)  # by two threads, which are the parent's alone
    case = CASES[op]()
    leaves = [t if t is None else t.requires_grad_() for t in case.inputs]
    dys = [dy.mT.contiguous().mT if dy.dim() > 1 else dy for dy in case.dys]  # to be laid out anew
    with tempfile.NamedTemporaryFile() as file:
        descend(generations, lambda: torch.save(results(case, leaves, dys), file.name))
        found = torch.load(file.name)
    torch.set_num_threads(1)
    same(found, results(case, leaves, dys))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
