"""Cases that several processes run together. A module of them has `main(rank, size, folder)`, which calls `run_cases`."""

import datetime
import json
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import environment_of


def run_cases(cases, rank, size, folder, arguments=tuple):
    """Runs {name: case} as one of `size` processes that meet in `folder`, and writes there what failed, {name: traceback}.

    A case raises where something is wrong. arguments: what makes the arguments of every case, once the processes have met.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meeting, timeout = f"file://{folder}/meeting", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", meeting, timeout=timeout, rank=rank, world_size=size)
    given, failed = arguments(), {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case(*given)
        except Exception:
            failed[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"failed_{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


def failures(module, size, folder):
    """Starts `size` processes of a module; what failed in each of them, [{name: traceback}]."""
    plugin = "import without_extension; " if "without_extension" in sys.modules else ""
    start = f"{plugin}import sys; from {module} import main; main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    command = [sys.executable, "-c", start]
    ranks = [subprocess.Popen([*command, str(rank), str(size), str(folder)], env=environment_of()) for rank in range(size)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"failed_{rank}.json").read_text()) for rank in range(size)]


def check_case(failed, case):
    """Fails with the traceback of the first process in which `case` did. failed: of `failures`."""
    for rank, of_rank in enumerate(failed):
        if case in of_rank:
            pytest.fail(f"in process {rank}: {of_rank[case]}", pytrace=False)
