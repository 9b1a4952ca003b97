"""python -m benchmarks.table [--write FILE]: the README's tables, made from the committed result lines and nothing else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import RESULTS

BEGIN, END = "<!-- benchmarks: begin (written by benchmarks/table.py) -->", "<!-- benchmarks: end -->"


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean log."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def op_rows(lines: list[dict]) -> list[str]:
    """One row an op and dtype: ours with telemetry against eager and torch.compile without, and telemetry on against off."""
    rows = []
    ours = [line for line in lines if line["implementation"] == "telemetry on" and "ratio_to_eager" in line]
    compiled = {key(line): line for line in lines if line["implementation"] == "torch.compile"}
    noise = {key(line): line for line in lines if line["implementation"] == "eager again"}
    for op, dtype in dict.fromkeys((line["op"], line["dtype"]) for line in ours if line["op"] != "training step"):
        group = [line for line in ours if (line["op"], line["dtype"]) == (op, dtype)]
        ratios = [line["ratio_to_eager"]["median"] for line in group]
        tax = [line["ratio_to_telemetry_off"]["median"] for line in group]
        pairs = [
            line["ratio_to_eager"]["median"] / compiled[key(line)]["ratio_to_eager"]["median"]
            for line in group
            if key(line) in compiled
        ]
        against_compiled = f"{geometric_mean(pairs):.2f}" if pairs else "-"
        spread = max(abs(math.log(noise[key(line)]["ratio_to_eager"]["median"])) for line in group)
        rows.append(
            f"| {op} | {dtype} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {against_compiled} | {geometric_mean(tax):.3f} | {max(tax):.3f} | {100 * spread:.1f} % |"
        )
    return rows


def key(line: dict) -> tuple:
    """What makes two lines comparable."""
    return line["op"], line["dtype"], tuple(line["shape"])


def step_rows(lines: list[dict]) -> list[str]:
    """One row a variant of the training step."""
    steps = [line for line in lines if line["op"] == "training step"]
    return [
        f"| {line['implementation']} | {line['ratio_to_eager']['median']:.3f} "
        f"| {line['ratio_to_eager']['p20']:.3f} to {line['ratio_to_eager']['p80']:.3f} |"
        for line in steps
    ]


def comparisons(path: Path) -> list[dict]:
    """The lines that compare with eager round by round; other files and lines (machine code, host time, a GPU's) have none."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if isinstance(line.get("ratio_to_eager"), dict) or "failed" in line]


def tables(path: Path) -> str:
    """Markdown of one results file."""
    lines = comparisons(path)
    first = lines[0]
    text = [
        f"{first['device']}, {first['kernels']}, torch {first['torch']}. Forward and backward with all gradients, allocation "
        "included, over all shapes of the op's benchmark; geometric means of ratios of times in the same run. "
        "Below 1 is faster.",
        "",
        "| op | dtype | ours with telemetry / eager | smallest to largest | / torch.compile | telemetry on / off | largest "
        "| noise |",
        "|---|---|---|---|---|---|---|---|",
        *op_rows(lines),
    ]
    if step_rows(lines):
        text += ["", "| training step of a small transformer | time / eager PyTorch | p20 to p80 |", "|---|---|---|"]
        text += step_rows(lines)
    return "\n".join(text)


def main(arguments: list[str]) -> None:
    """Prints the tables, or writes them between the markers of a file."""
    text = "\n\n".join(tables(path) for path in sorted(RESULTS.glob("*.jsonl")) if comparisons(path))
    if arguments[:1] == ["--write"]:
        path = Path(arguments[1])
        head, rest = path.read_text().split(BEGIN)
        path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
