"""A Watch in 2 and 4 processes, which run every case of merging_cases.py."""

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from merging_cases import CASES
from ranks import check_case, failures


@pytest.fixture(scope="module", params=[2, 4])
def failed(request, tmp_path_factory):
    """{case: traceback} of each process."""
    return failures("merging_cases", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_case(failed, case):
    check_case(failed, case)
