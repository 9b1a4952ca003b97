"""Every test: the same seed, one thread (tests of threads set more), and memory that is NaN until somebody writes it."""

import pytest
import torch


def pytest_configure(config):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    """torch.compile without earlier graphs and counters."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def body(tmp_path_factory):
    """The body of the CUDA kernels as a library of the host."""
    from recurrence_on_host import build

    return build(tmp_path_factory.mktemp("cuda"))
