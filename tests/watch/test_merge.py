"""A Watch in 2 and 4 processes, which run every case of merging_cases.py."""

import json
import subprocess
import sys

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from merging_cases import CASES
from processes import environment_of


@pytest.fixture(scope="module", params=[2, 4])
def failed(request, tmp_path_factory):
    """{case: traceback} of each process."""
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    start = "import sys; from merging_cases import main; main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    command = [sys.executable, "-c", start]
    ranks = [subprocess.Popen([*command, str(rank), str(size), str(folder)], env=environment_of()) for rank in range(size)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"failed_{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("case", CASES)
def test_case(failed, case):
    for rank, of_rank in enumerate(failed):
        if case in of_rank:
            pytest.fail(f"in process {rank}: {of_rank[case]}", pytrace=False)
