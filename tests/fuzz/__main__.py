"""Fuzzes the CPU kernels on every instruction set this CPU has, in a process each, all at the same time."""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from fuzz.process import STRATEGIES, fuzz, how_to_repeat, repeat

CAPABILITIES = ("default", "avx2", "avx512")  # ATEN_CPU_CAPABILITY, each including those before it
PROCESS = ["-m", "fuzz"]
TESTS = Path(__file__).parents[1]


def capabilities() -> list[str]:
    """Those of CAPABILITIES that this process may choose."""
    has = torch.backends.cpu.get_cpu_capability().lower()
    return list(CAPABILITIES[: 1 + max(k for k, name in enumerate(CAPABILITIES) if k == 0 or has.startswith(name))])


def run_process(capability: str, arguments: list[str]) -> bool:
    """One process on one instruction set; prints its lines with the instruction set's name. Whether it found nothing."""
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder) / "last"
        command = [sys.executable, *PROCESS, "--in-process", "--last-example", str(last), *arguments]
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
        process = subprocess.Popen(
            command, cwd=TESTS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            print(f"[{capability}] {line}", end="", flush=True)
        if process.wait() not in (0, 1):
            ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
            example = last.read_text() if last.exists() else "none yet"
            print(f"[{capability}] FAILED: the process ended with {ended}. Its last example, in tests/:")
            print(f"[{capability}] {how_to_repeat(example, capability)}", flush=True)
        return process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=60, help="random examples for so long (default: %(default)s)")
    length.add_argument("--examples", type=int, help="so many examples of each op, always the same ones")
    length.add_argument("--repeat", metavar="EXAMPLE", help="one example as a failure printed it")
    parser.add_argument("--ops", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--capability", nargs="+", choices=CAPABILITIES, help="instruction sets (default: all of this CPU)")
    parser.add_argument("--in-process", action="store_true", help="in this process, on the instruction set that torch chose")
    parser.add_argument("--last-example", type=Path, help="file to write each example to before it runs, in this process")
    given = parser.parse_args()
    if given.repeat:
        repeat(given.repeat)
        return 0
    if given.in_process:
        return 0 if fuzz(given.ops, given.examples, given.seconds, given.last_example) else 1
    arguments = ["--seconds", str(given.seconds)] if given.examples is None else ["--examples", str(given.examples)]
    arguments += ["--ops", *given.ops]
    found = {}

    def watch(capability: str) -> None:
        found[capability] = run_process(capability, arguments)

    threads = [threading.Thread(target=watch, args=(name,)) for name in given.capability or capabilities()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
