"""python -m benchmarks.cuda_codegen: what the CUDA C++ kernels become, and how the LSTM's recurrence is laid over a GPU.

Every kernel of csrc/cuda is compiled by nvcc for sm_80, sm_90a and sm_100, no GPU needed, and ptxas's own report is read:
registers, stack, spills, shared memory. Writes benchmarks/results/cuda_codegen.jsonl, a line a kernel and target, and the
tables of docs/lstm_gpu.md: the kernels, and what csrc/cuda/lstm_tiling.h chooses and predicts. A prediction is marked as one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch.utils.cpp_extension

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cuda_codegen.jsonl"
PAGE = ROOT / "docs" / "lstm_gpu.md"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("sm_80", "sm_90a", "sm_100")
# As setup.py compiles them: the stable ABI of torch 2.11, with the declaration of the current stream.
FLAGS = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-Xptxas", "-v", "-cubin")
DEVICES = {"H100 SXM, H200": (132, 232448), "H100 PCIe": (114, 232448), "A100": (108, 166912), "B200": (148, 232448)}
SIZES = ((16, 1024, 768), (16, 1024, 256), (64, 512, 512), (16, 1024, 128), (16, 1024, 300), (32, 512, 1024), (16, 512, 2048))
GIGAHERTZ = 1.755  # an H100 SXM's clock under load, as published
CHOOSER = """
#include <cstdio>
#include "lstm_tiling.h"
int main() {
  int B, H, backward, sms, shared;
  while (std::scanf("%d %d %d %d %d", &B, &H, &backward, &sms, &shared) == 5) {
    const gk::Limits device{sms, shared};
    const gk::Tiling p = gk::choose_tiling(B, H, backward, device);
    const gk::Cost c = p.M ? gk::predicted_cost(p, device) : gk::Cost{};
    std::printf("%d %d %d %d %d ", p.M ? p.num_blocks() : 0, p.units, p.rows(), p.shared_bytes, p.buffer_vectors * 16);
    for (int64_t cycles : {c.barrier, c.exchange, c.products, c.weights, c.sums, c.cells}) std::printf("%d ", (int)cycles);
    std::printf("\\n");
  }
}
"""
COSTS = ("barrier", "exchange", "products", "weights", "sums", "cells")
TILING = ("programs", "units", "rows", "shared", "buffer_bytes", *COSTS)


def nvcc() -> str | None:
    """The compiler, or None where there is none."""
    return shutil.which("nvcc")


def compile_for(target: str, source: Path) -> list[dict[str, Any]]:
    """A line for every kernel of `source`."""
    includes = [f"-I{path}" for path in torch.utils.cpp_extension.include_paths()]
    architecture = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), *FLAGS, *includes, architecture, "-o", f"{folder}/kernels.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return [{**line, "source": source.name, "target": target} for line in read_report(done.stderr)]


def read_report(report: str) -> list[dict[str, Any]]:
    """The kernels of a report by ptxas -v, by name."""
    lines = []
    for block in report.split("Compiling entry function '")[1:]:
        pick = lambda pattern, block=block: int((re.search(pattern, block) or [0, 0])[1])  # noqa: E731
        lines.append(
            {
                **describe(block.split("'")[0]),
                "registers": pick(r"Used (\d+) registers"),
                "stack_bytes": pick(r"(\d+) bytes stack frame"),
                "spill_stores": pick(r"(\d+) bytes spill stores"),
                "spill_loads": pick(r"(\d+) bytes spill loads"),
                "static_shared_bytes": pick(r"(\d+) bytes smem"),
            }
        )
    return sorted(lines, key=lambda line: [str(value) for value in line.values()])


def describe(symbol: str) -> dict[str, Any]:
    """What a kernel's mangled name says: gk::lstm_recurrence_bwd_kernel<Bfloat16, 1, false, true> and the like."""
    name = re.search(r"\d+(lstm_\w+?_kernel)", symbol)[1]
    dtype = re.search(r"(Bfloat16|Half)E", symbol)
    flags = re.findall(r"Lb([01])E", symbol)
    tiles = re.search(r"Li(\d+)E", symbol)
    return {
        "kernel": name,
        "dtype": {"Bfloat16": "bfloat16", "Half": "float16"}[dtype[1]] if dtype else None,
        "tiles": int(tiles[1]) if tiles else None,
        "form": ("one block" if flags[0] == "1" else "grid") if flags else None,
        "telemetry": flags[1] == "1" if len(flags) > 1 else None,
    }


def tilings(questions: list[tuple[int, int, bool, tuple[int, int]]]) -> list[dict[str, int]]:
    """What the launcher would choose for each (B, H, backward, (multiprocessors, shared bytes)), and the predicted cycles."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/chooser"
        command = ["g++", "-std=c++20", "-x", "c++", f"-I{ROOT / 'csrc' / 'cuda'}", "-", "-o", program]
        subprocess.run(command, input=CHOOSER, text=True, check=True)
        asked = "".join(f"{B} {H} {int(backward)} {sms} {shared}\n" for B, H, backward, (sms, shared) in questions)
        answers = subprocess.run([program], input=asked, capture_output=True, text=True, check=True).stdout
    return [dict(zip(TILING, map(int, line.split()), strict=True)) for line in answers.splitlines()]


def kernel_table(lines: list[dict[str, Any]]) -> list[str]:
    """Registers of every kernel, a column a target."""
    rows, measured = {}, {None: "-", False: "off", True: "on"}
    for line in lines:
        if line["dtype"] != "float16":
            name = (line["kernel"], line["form"] or "-", str(line["tiles"] or "-"), measured[line["telemetry"]])
            rows.setdefault(name, {})[line["target"]] = line
    table = [f"| kernel | form | tiles | telemetry | {' | '.join(TARGETS)} |", "|" + "---|" * (4 + len(TARGETS))]
    for name, found in sorted(rows.items()):
        table.append(f"| {' | '.join(name)} | {' | '.join(str(found[target]['registers']) for target in TARGETS)} |")
    return table


def largest_table() -> list[str]:
    """The largest H that fits, forward and backward, for each device and batch."""
    batches, sizes = (1, 8, 16, 32, 64, 128), range(136, 2400, 8)
    recurrences = (False, True)
    questions = [
        (B, H, backward, size) for size in DEVICES.values() for B in batches for H in sizes for backward in recurrences
    ]
    fits = {question: tiling["programs"] > 0 for question, tiling in zip(questions, tilings(questions), strict=True)}
    table = [f"| device | {' | '.join(f'B = {B}' for B in batches)} |", "|" + "---|" * (1 + len(batches))]
    for name, device in DEVICES.items():
        largest = [[max((H for H in sizes if fits[B, H, way, device]), default=128) for way in recurrences] for B in batches]
        table.append(f"| {name} | {' | '.join(f'{forward} / {backward}' for forward, backward in largest)} |")
    return table


def time_table() -> list[str]:
    """Tiling and predicted time of each size in SIZES on an H100 SXM."""
    device = DEVICES["H100 SXM, H200"]
    questions = [(B, H, backward, device) for B, _, H in SIZES for backward in (False, True)]
    header = "| B, T, H | pass | blocks | tile | smem | L2 |"
    table = [f"{header} {' | '.join(COSTS)} | us | ms |", "|" + "---|" * (8 + len(COSTS))]
    for k, tiling in enumerate(tilings(questions)):
        (B, T, H), recurrence = SIZES[k // 2], ("forward", "backward")[k % 2]
        cycles = sum(tiling[part] for part in COSTS)
        l2_bytes = 0 if H <= 128 else tiling["buffer_bytes"]
        shape = f"| {(B, T, H)} | {recurrence} | {tiling['programs']} | {tiling['units']} x {tiling['rows']}"
        parts = " | ".join(str(tiling[part]) for part in COSTS)
        step = cycles / GIGAHERTZ / 1000
        table.append(f"{shape} | {tiling['shared']} | {l2_bytes} | {parts} | {step:.2f} | {T * step / 1000:.2f} |")
    return table


def at_once_table() -> list[str]:
    """What two recurrences take one after the other on an H100 SXM, and at the same time on half of it each."""
    (sms, shared), sizes = DEVICES["H100 SXM, H200"], [*SIZES[:-1], (64, 256, 200), (64, 256, 256)]
    cases = [(size, backward) for size in sizes for backward in (False, True)]
    parts = ((sms, shared), (sms // 2, shared))
    found = tilings([(B, H, backward, part) for (B, _, H), backward in cases for part in parts])
    table = ["| (B, H) | pass | alone, blocks | alone, us | half, blocks | half, us | two directions | two layers, 8 chunks |"]
    table.append("|" + "---|" * 8)
    for k, ((B, _, H), backward) in enumerate(cases):
        alone, half = found[2 * k : 2 * k + 2]
        us = [sum(tiling[part] for part in COSTS) / GIGAHERTZ / 1000 for tiling in (alone, half)]
        gain = f"{2 * us[0] / us[1]:.2f} | {2 * us[0] / us[1] * 8 / 9:.2f}" if half["programs"] else "- | -"
        blocks = f"{alone['programs']} | {us[0]:.2f} | {half['programs'] or '-'} | {us[1]:.2f}"
        table.append(f"| {(B, H)} | {('forward', 'backward')[backward]} | {blocks} | {gain} |")
    return table


def write_table(name: str, table: list[str]) -> None:
    """Puts `table` between its marks in docs/lstm_gpu.md."""
    start, end, text = f"<!-- {name} -->", f"<!-- end of {name} -->", PAGE.read_text()
    before, after = text.split(start)[0], text.split(end)[1]
    PAGE.write_text(f"{before}{start}\n" + "\n".join(table) + f"\n{end}{after}")


def main(arguments: list[str]) -> int:
    """Exit code 1 if a kernel spills or has a stack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON lines; write nothing")
    chosen = parser.parse_args(arguments)
    if nvcc() is None:
        print("nvcc is not there: nothing compiled, nothing written", file=sys.stderr)
        return 0
    lines = []
    for source in SOURCES:
        with ThreadPoolExecutor(2) as pool:
            for batch in pool.map(partial(compile_for, source=source), chosen.target or TARGETS):
                lines += batch
    for line in lines:
        print(json.dumps(line) if chosen.json else " ".join(map(str, line.values())))
    if not (chosen.json or chosen.target):
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tables = {"kernels": kernel_table(lines), "largest": largest_table(), "times": time_table(), "at once": at_once_table()}
        for name, table in tables.items():
            write_table(name, table)
    return int(any(line["stack_bytes"] + line["spill_stores"] + line["spill_loads"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
