"""python -m benchmarks.codegen: what the Triton kernels become, for GPUs that need not be there.

Every kernel is compiled ahead of time for NVIDIA sm_80, sm_90 and sm_100 and for AMD gfx942, with the very arguments that
the ops launch it with, and the machine code is read: registers, shared memory, spills, the width of global accesses, and
the instructions of the main loop per element and thread. Writes benchmarks/results/codegen.jsonl, a line a kernel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import raw_calls
from gradkernels.triton import KERNELS, launch

RESULTS = Path(__file__).parent / "results" / "codegen.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "tables_triton.md"
START, END = "<!-- codegen -->", "<!-- end of codegen -->"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTWISE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NORM_DTYPES = (torch.bfloat16, torch.float32)
NORM_COLUMNS = (768, 1024, 4096, 8192, 16384)
LSTM_SIZES = ((1024, 0), (200, 72), (65, 0))  # H, P
LSTM_OPS = (  # name, telemetry
    ("lstm_layer_bwd", False),
    ("lstm_layer_bwd", True),
    ("lstm_layer_fwd", False),
    ("lstm_cell_fwd", False),
    ("lstm_cell_bwd", False),
)
M = 8192
TRITON_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
}

# Cases are tensors without memory: what lstm_layer calls for a recurrence in steps launches on those as well.
META = torch.library.Library("gradkernels", "IMPL")
for _op in ("lstm_stepwise_fwd", "lstm_stepwise_bwd"):
    META.impl(_op, KERNELS[_op], "Meta")


@dataclass(frozen=True)
class Launch:
    """One launch as the op makes it, with meta tensors for arguments."""

    kernel: Any
    args: tuple
    constants: dict[str, Any]
    options: dict[str, Any]


def launches_of(op: Any, *args: Any) -> list[Launch]:
    """What `op(*args)` launches; nothing runs."""
    found = []

    def record(kernel: Any, grid: tuple, args: tuple, constants: dict, options: dict) -> None:
        found.append(Launch(kernel, args, constants, options))

    with mock.patch.object(launch, "num_sms", return_value=132), mock.patch.object(launch, "run", record):
        op(*args)
    return found


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[tuple, Any], dict[tuple, list]]:
    """(types, constants, attributes) of the arguments, specialised as Triton does when it launches."""
    given = dict(zip((p.name for p in launch.kernel.params), launch.args, strict=False)) | launch.constants
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value, plain = given[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (not plain and isinstance(value, int) and value == 1):
            types[parameter.name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[parameter.name], aligned = f"*{TRITON_TYPES[value.dtype]}", True
        else:
            types[parameter.name], aligned = "i32" if abs(value) < 2**31 else "i64", not plain and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """The compiled kernel."""
    types, constants, attributes = signature_of(launch)
    options = dict(launch.options)
    if target.backend == "hip":
        options.pop("maxnreg", None)
    source = ASTSource(launch.kernel, types, constants, attributes)
    return triton.compile(source, target=target, options=options)


def tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that come with Triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([folder / name, *arguments], capture_output=True, text=True, check=True).stdout


def loops(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(instructions, [(first, last) of each loop, by where it ends]) of a disassembly by nvdisasm."""
    labels, instructions, found = {}, [], []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    for index, text in enumerate(instructions):
        if (target := re.search(r"\bBRA.*?(\.L_x_\d+)", text)) and labels.get(target[1], index) < index:
            found.append((labels[target[1]], index))
    return instructions, found


def read_nvidia(compiled: Any, elements: int) -> dict[str, Any]:
    """Figures from a cubin; `elements` are a thread's in one turn of the main loop, which is the first with a store.

    Where no loop stores anything, it is the one with most of a product's instructions, or the first.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        instructions, found = loops(tool("nvdisasm", "-c", file.name))
    bodies = [instructions[first : last + 1] for first, last in found]
    storing = [body for body in bodies if any("STG" in text for text in body)]
    products = lambda body: sum(bool(re.search(r"\b(HMMA|DMMA|FFMA)\b", text)) for text in body)  # noqa: E731
    main = storing[0] if storing else max(bodies, key=products) if bodies else instructions
    accesses = [text for text in main if re.search(r"\b(LDG|STG|LDGSTS)\b", text)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local_accesses": sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in instructions),
        "shared_bytes": compiled.metadata.shared,
        "loop_instructions": len(main),
        "loop_instructions_per_element": round(len(main) / elements, 1),
        "accesses_128_bit": sum(".128" in text for text in accesses),
        "accesses_narrower": sum(".128" not in text for text in accesses),
    }


def read_amd(compiled: Any) -> dict[str, Any]:
    """Figures from the assembly's own summary."""
    text = compiled.asm["amdgcn"]
    pick = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
    return {
        "registers": pick("vgpr_count"),
        "stack_bytes": pick("private_segment_fixed_size"),
        "local_accesses": pick("vgpr_spill_count"),
        "shared_bytes": compiled.metadata.shared,
        "accesses_128_bit": len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", text)),
    }


def elements_a_thread(launch: Launch) -> int:
    """Elements of one tensor that a thread handles in one turn."""
    tile = launch.constants.get("BLOCK") or launch.constants.get("BLOCK_M", 1) * launch.constants["BLOCK_N"]
    return max(1, tile // (32 * launch.options["num_warps"]))


def cases() -> Iterator[tuple[dict[str, Any], Any, tuple]]:
    """(what it is, op, arguments) of every op, dtype and width; forward once, backward with telemetry off and on."""
    for on in (False, True):
        for dtype in POINTWISE_DTYPES:
            x = torch.empty(M, 4096, dtype=dtype, device="meta")
            pointwise = [("gelu", raw_calls.gelu(x, False, on)), ("gelu tanh", raw_calls.gelu(x, True, on))]
            pointwise += [("residual", raw_calls.residual(x, on)), *([("probe", raw_calls.probe(x))] if on else [])]
            yield from named(pointwise, x, on)
        for dtype in NORM_DTYPES:
            for columns in NORM_COLUMNS:
                x = torch.empty(M, columns, dtype=dtype, device="meta")
                norms = [("layer_norm", raw_calls.layer_norm(x, on)), ("add_layer_norm", raw_calls.add_layer_norm(x, on))]
                yield from named(norms, x, on)


def named(calls: list[tuple[str, raw_calls.Calls]], x: torch.Tensor, on: bool) -> Iterator[tuple[dict[str, Any], Any, tuple]]:
    """The same of calls; a forward has no telemetry."""
    for op, arguments in calls:
        what = {"op": op, "dtype": str(x.dtype).removeprefix("torch."), "columns": x.shape[1], "telemetry": on}
        for name in sorted(arguments):
            if name.endswith("_bwd") or not on:
                yield what, KERNELS[name], arguments[name]


def lstm_cases() -> Iterator[tuple[dict[str, Any], Any, tuple]]:
    """The same of the LSTM, two steps of it: the tall sizes in every dtype, odd ones and a projection in two."""
    for H, P in LSTM_SIZES:
        for dtype in POINTWISE_DTYPES if P == 0 and H > 1000 else NORM_DTYPES:
            for name, on in LSTM_OPS:
                if arguments := raw_calls.lstm(H, P, dtype, on).get(name):
                    what = {"op": name[:-4], "dtype": str(dtype).removeprefix("torch."), "columns": H, "telemetry": on}
                    yield what, KERNELS[name], arguments


def lines_of(case: tuple, targets: tuple[str, ...] = tuple(TARGETS)) -> list[dict[str, Any]]:
    """A line for every kernel that the case launches and every target."""
    what, op, args = case
    result = []
    for found in {one.kernel: one for one in launches_of(op, *args)}.values():
        for name in targets:
            target = TARGETS[name]
            compiled = compile_for(found, target)
            figures = read_amd(compiled) if target.backend == "hip" else read_nvidia(compiled, elements_a_thread(found))
            result.append({"kernel": found.kernel.fn.__name__, **what, "target": name, **figures})
    return result


def write_table() -> None:
    """The Hopper lines of the main loops, telemetry off and on, as tables in docs/tables_triton.md."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    wanted = {}
    for line in lines:
        shown = line["target"] == "sm_90" and line["dtype"] in ("bfloat16", "float32") and "lstm" not in line["op"]
        if shown and "bwd" in line["kernel"]:
            wanted.setdefault((line["op"], line["dtype"], line["columns"]), {})[line["telemetry"]] = line
    rows = [
        "| backward | dtype | columns | instructions, off / on | registers, off / on | shared bytes |",
        "|" + "---|" * 6,
    ]
    for (op, dtype, columns), pair in sorted(wanted.items()):
        off, on = pair.get(False), pair[True]
        both = lambda name, off=off, on=on: f"{off[name] if off else '-'} / {on[name]}"  # noqa: E731
        length = columns if "norm" in op else "any"
        figures = f"{both('loop_instructions_per_element')} | {both('registers')} | {on['shared_bytes']}"
        rows.append(f"| {op} | {dtype} | {length} | {figures} |")
    rows += ["", *lstm_rows(lines)]
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{START}\n" + "\n".join(rows) + f"\n{END}{after}")


def lstm_rows(lines: list[dict[str, Any]]) -> list[str]:
    """A table of the LSTM's kernels on Hopper, those of one step."""
    rows = ["| LSTM kernel | dtype | H | telemetry | loop instructions | registers | shared bytes |", "|" + "---|" * 7]
    for line in lines:
        if line["target"] == "sm_90" and ("step_" in line["kernel"] or "project" in line["kernel"]):
            figures = (line["loop_instructions"], line["registers"], line["shared_bytes"])
            what = (line["kernel"], line["dtype"], line["columns"], "on" if line["telemetry"] else "off")
            rows.append("| " + " | ".join(map(str, (*what, *figures))) + " |")
    return rows


def main(arguments: list[str]) -> int:
    """Exit code 1 if a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; may be repeated")
    parser.add_argument("--columns", action="append", type=int, help="only rows of this length; may be repeated")
    parser.add_argument("--telemetry", choices=("off", "on"), help="only without or with statistics")
    parser.add_argument("--json", action="store_true", help="print JSON lines; write nothing")
    chosen = parser.parse_args(arguments)
    wanted = [
        case
        for case in (*cases(), *lstm_cases())
        if (not chosen.columns or case[0]["columns"] in chosen.columns)
        and (not chosen.telemetry or case[0]["telemetry"] == (chosen.telemetry == "on"))
    ]
    spilled, lines = 0, []
    with ProcessPoolExecutor() as pool:
        for batch in pool.map(partial(lines_of, targets=tuple(chosen.target or TARGETS)), wanted):
            for line in batch:
                lines.append({**line, "triton": triton.__version__})
                spilled += line["stack_bytes"] + line["local_accesses"] > 0
                print(json.dumps(lines[-1]) if chosen.json else " ".join(map(str, line.values())), flush=True)
    if not (chosen.json or chosen.target or chosen.columns or chosen.telemetry):
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_table()
        print(f"{len(lines)} kernels in {RESULTS.name}, {spilled} of them spill; tables in docs/{PAGE.name}")
    return int(spilled > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
