"""The examples run as their first lines say, leave one file each, and see the same gradients of the same batches."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from processes import ROOT, environment_of

import gradkernels as gk

PATHS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "text.py")
STEPS = 12  # ten that are logged together, and a rest
IN_TWO_PROCESSES = {"ddp.py", "fsdp.py"}
OF_THE_WHOLE_BATCH = ("accumulation.py", "ddp.py", "fsdp.py")


def started(path, run_dir):
    """The process of an example: the command in its docstring, with this Python and, for torchrun, a port that is free."""
    words = shlex.split(path.read_text().split("\n")[2])
    assert words[0] == ("torchrun" if path.name in IN_TWO_PROCESSES else "python")
    assert words[-1] == f"examples/{path.name}"
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *(launcher if words[0] == "torchrun" else ()), *words[1:]]
    environment = environment_of(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    arguments = [f"--steps={STEPS}", f"--run-dir={run_dir}"]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check(name, output, run_dir):
    """What every example prints and writes; its History."""
    assert [path.name for path in run_dir.iterdir()] == ["stats.jsonl"]
    history = gk.History.load(run_dir)
    assert list(history.steps) == list(range(1, STEPS + 1))
    assert history.lines_left_out == 0
    assert history.run["world_size"] == (2 if name in IN_TWO_PROCESSES else 1)
    assert len(re.findall(r"^site +\|dL/dh\|", output, re.MULTILINE)) == 1, "one table, of one rank"
    assert len(re.findall(rf"^{STEPS} steps in .*, findings: \[\]$", output, re.MULTILINE)) == 1
    assert history.snapshots[-1].loss < 5
    return history


def test_examples(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    processes = {path.name: started(path, tmp_path / path.name) for path in PATHS}
    try:
        outputs = {name: process.communicate(timeout=500)[0] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
    assert {name: outputs[name] for name, process in processes.items() if process.returncode} == {}
    histories = {name: check(name, output, tmp_path / name) for name, output in outputs.items()}

    skipped = [snapshot.step for snapshot in histories["amp.py"].snapshots if snapshot.skipped]
    assert skipped
    assert f"steps skipped: {skipped}" in outputs["amp.py"]
    assert float(re.search(r"differ by (\S+) at most", outputs["accumulation.py"])[1]) < 1e-5
    # One model and one batch in the first step: by 4 micro-batches, by 2 ranks, and by 2 ranks that shard the weights.
    of_step_1 = [
        {(record.site, record.port): record.norm for record in histories[name].records(1) if record.port in ("dx", "dy")}
        for name in OF_THE_WHOLE_BATCH
    ]
    assert len(of_step_1[0]) > 20
    assert [norms == pytest.approx(of_step_1[0], rel=1e-5) for norms in of_step_1] == [True] * len(of_step_1)
