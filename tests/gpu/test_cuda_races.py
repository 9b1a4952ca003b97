"""The body of the CUDA recurrences under sanitizers, on the host (tests/cuda_emulator/device_on_host.h).

ThreadSanitizer takes every thread of every block for a thread of its own, and knows nothing but the barriers and flags that
order them on a device: whatever is written and read without one between is found, whoever happened to come first.
AddressSanitizer and UBSan find access outside of shared memory and tensors, and 16-byte accesses that are not aligned.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "cuda_emulator" / "cuda_sanitized.cpp"
COMPILER = shutil.which("g++")
TILED = (0,) * 8

# B, H, half, reverse, packed, misaligned, tilings by hand, rows of each step.
CASES = {
    "one block": (9, 33, 0, 0, 1, 0, TILED, (9, 5, 1)),
    "one block, all registers": (2, 128, 1, 0, 0, 1, TILED, (2, 2)),
    "grid": (10, 26, 1, 1, 1, 0, (2, 1, 1, 1, 1, 1, 1, 1), (10, 9, 1)),
    "beyond the registers": (16, 200, 0, 0, 0, 0, (4, 2, 2, 2, 1, 2, 2, 2), (16, 16)),
}
NOTHING, SYNC, PUBLISH, ACQUIRE = range(4)  # host::Order: what orders nothing
OPTIONS = {
    "thread": ["-O1", "-g", "-fsanitize=thread", "-Wno-tsan"],
    "address": ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
# Of ThreadSanitizer's own: little history of each thread, since there are thousands.
SETTINGS = {"TSAN_OPTIONS": "history_size=0 halt_on_error=1 exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}


def build(folder, source, sanitizer):
    """The program, or None where the sanitizer is missing or does not run here."""
    program = folder / f"{source.stem}_{sanitizer}"
    options = ["-std=c++20", "-pthread", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *OPTIONS[sanitizer]]
    subprocess.run([COMPILER, *options, "-o", program, source], check=True)
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """{sanitizer: program}, of the sanitizers that are there: each builds and runs an empty program first."""
    folder = tmp_path_factory.mktemp("sanitized")
    empty = folder / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    found = {}
    for sanitizer, options in OPTIONS.items():
        linked = (
            COMPILER
            and subprocess.run([COMPILER, *options, "-o", folder / "empty", empty], capture_output=True).returncode == 0
        )
        if linked and subprocess.run([folder / "empty"], capture_output=True).returncode == 0:
            found[sanitizer] = build(folder, SOURCE, sanitizer)
    return found


def run(programs, sanitizer, case, forgotten=NOTHING):
    """(exit code, what the sanitizer says) of one case of both recurrences."""
    if sanitizer not in programs:
        pytest.skip(f"g++ is not there, or -fsanitize={sanitizer} does not run")
    *numbers, by_hand, sizes = case
    vectors = [str(number) for number in (*numbers, forgotten, *by_hand, *sizes)]
    done = subprocess.run([programs[sanitizer], *vectors], capture_output=True, text=True, env=SETTINGS, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize("sanitizer", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_found(programs, case, sanitizer):
    code, said = run(programs, sanitizer, CASES[case])
    assert code == 0, said[:4000]


@pytest.mark.parametrize("forgotten", [SYNC, PUBLISH, ACQUIRE], ids=["sync", "publish", "acquire"])
def test_a_missing_order_is_found(programs, forgotten):
    """Without what a barrier, a flag's release or its acquire orders there is a race, on a host whose stores are never late."""
    code, said = run(programs, "thread", CASES["grid"], forgotten)
    assert code == 66
    assert "data race" in said
