"""python -m benchmarks.table [--write]: the tables of README.md and docs/benchmarks.md, made from the committed result lines.

The README has one row an op and dtype, with a column a machine; docs/benchmarks.md has all of each machine.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.harness import RESULTS

BEGIN, END = "<!-- benchmarks: begin (written by benchmarks/table.py) -->", "<!-- benchmarks: end -->"
ROOT = Path(__file__).parent.parent


def machines() -> dict[str, list[dict]]:
    """The lines of every machine that timed ops against eager PyTorch, by its name."""
    files = (path.read_text().splitlines() for path in sorted(RESULTS.glob("*-threads.jsonl")))
    found = [[json.loads(line) for line in lines] for lines in files]
    return {lines[0]["device"]: lines for lines in found}


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean log."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def key(line: dict) -> tuple:
    """What makes two lines comparable."""
    return line["op"], line["dtype"], tuple(line["shape"])


def ours(lines: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The lines of our ops with telemetry, by op and dtype."""
    groups = {}
    for line in lines:
        if line["implementation"] == "telemetry on" and "ratio_to_eager" in line and line["op"] != "training step":
            groups.setdefault((line["op"], line["dtype"]), []).append(line)
    return groups


def median(line: dict, ratio: str = "ratio_to_eager") -> float:
    """The median of one of a line's ratios."""
    return line[ratio]["median"]


def op_rows(lines: list[dict]) -> list[str]:
    """One row an op and dtype: ours with telemetry against eager and torch.compile without, and telemetry on against off."""
    rows = []
    compiled = {key(line): line for line in lines if line["implementation"] == "torch.compile"}
    noise = {key(line): line for line in lines if line["implementation"] == "eager again"}
    for (op, dtype), group in ours(lines).items():
        ratios = [median(line) for line in group]
        tax = [median(line, "ratio_to_telemetry_off") for line in group]
        pairs = [median(line) / median(compiled[key(line)]) for line in group if key(line) in compiled]
        against_compiled = f"{geometric_mean(pairs):.2f}" if pairs else "-"
        spread = max(abs(math.log(median(noise[key(line)]))) for line in group)
        rows.append(
            f"| {op} | {dtype} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {against_compiled} | {geometric_mean(tax):.3f} | {max(tax):.3f} | {100 * spread:.1f} % |"
        )
    return rows


def length_rows(lines: list[dict]) -> list[str]:
    """One row a length of a norm's rows, with a column an op and dtype."""
    groups = {pair: group for pair, group in ours(lines).items() if pair[0].endswith(" rows")}
    cells = {}
    for group in groups.values():
        for line in group:
            cells.setdefault(line["shape"][1], []).append(f"{median(line):.2f}")
    heads = [f"{op.removesuffix(' rows')}, {dtype}" for op, dtype in groups]
    rows = [f"| {N} | {' | '.join(ratios)} |" for N, ratios in sorted(cells.items())]
    return table(f"| columns | {' | '.join(heads)} |", rows)


def value_rows(lines: list[dict]) -> list[str]:
    """One row an op and dtype: a column for each kind of gradient."""
    groups = {}
    for line in lines:
        if "ratio_to_normal_values" in line:
            groups.setdefault((line["op"].removesuffix(" values"), line["dtype"]), {})[line["implementation"]] = line
    kinds = list(next(iter(groups.values()), {}))[1:]
    rows = []
    for (op, dtype), group in groups.items():
        ratios = [f"{median(group[kind], 'ratio_to_normal_values'):.2f}" for kind in kinds]
        rows.append(f"| {op} | {dtype} | {' | '.join(ratios)} |")
    return table(f"| backward / with ordinary values | dtype | {' | '.join(kinds)} |", rows)


def watch_rows(lines: list[dict]) -> list[str]:
    """One row a model: its step with probes against without; then what `watch.step()` takes."""
    rows = []
    for line in lines:
        if line["implementation"] == "probes":
            ratio, shape = line["ratio_to_eager"], " x ".join(map(str, line["shape"]))
            name = line["op"].removeprefix("watch ")
            rows.append(f"| {name} on {shape} | {ratio['median']:.3f} | {ratio['p20']:.3f} to {ratio['p80']:.3f} |")
        elif line["op"] == "watch step":
            time = line["microseconds"]
            spread = f"{time['p20']:.0f} to {time['p80']:.0f} us"
            rows.append(f"| watch.step(), {line['implementation']} | {time['median']:.0f} us | {spread} |")
    return table("| watching: forward and backward, with probes / without | median | p20 to p80 |", rows)


def shape_rows(lines: list[dict]) -> list[str]:
    """One row a shape of the LSTM's ops, with the share of one large product's rate that eager and we reach."""
    eager = {key(line): line for line in lines if line["implementation"] == "eager"}
    rows = []
    for (op, dtype), group in ours(lines).items():
        for line in group if op.startswith("lstm") else ():
            shares = [share_of_product(other) for other in (eager[key(line)], line)]
            rows.append(
                f"| {op} | {dtype} | {' x '.join(map(str, line['shape']))} | {median(line):.2f} "
                f"| {median(line, 'ratio_to_telemetry_off'):.3f} | {shares[0]} | {shares[1]} |"
            )
    return rows


def share_of_product(line: dict) -> str:
    """As a figure; none for 16-bit dtypes, in which our LSTM does not compute."""
    return f"{line['share_of_product']:.2f}" if "share_of_product" in line and line["dtype"] != "bfloat16" else "-"


def step_rows(lines: list[dict]) -> list[str]:
    """One row a variant of the training step."""
    steps = [(line["implementation"], line["ratio_to_eager"]) for line in lines if line["op"] == "training step"]
    return [f"| {name} | {ratio['median']:.3f} | {ratio['p20']:.3f} to {ratio['p80']:.3f} |" for name, ratio in steps]


def table(head: str, rows: list[str]) -> list[str]:
    """A Markdown table with an empty line before it; nothing where there are no rows."""
    return ["", head, "|---" * (head.count("|") - 1) + "|", *rows] if rows else []


def step_table(lines: list[dict]) -> list[str]:
    """The training step's."""
    return table("| training step of a small transformer | time / eager PyTorch | p20 to p80 |", step_rows(lines))


def summary() -> str:
    """The README's part."""
    everyone = {name: ours(lines) for name, lines in machines().items()}
    rows = []
    for op, dtype in sorted({pair for groups in everyone.values() for pair in groups if not pair[0].endswith(" rows")}):
        cells = [
            f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
            for ratios in ([median(line) for line in groups.get((op, dtype), ())] for groups in everyone.values())
        ]
        rows.append(f"| {op} | {dtype} | {' | '.join(cells)} |")
    text = table(f"| ours with telemetry / eager without | dtype | {' | '.join(everyone)} |", rows)[1:]
    for name, lines in machines().items():
        text += [*(["", f"{name}:"] if step_rows(lines) else []), *step_table(lines)]
    return "\n".join(text)


def details() -> str:
    """All of every machine."""
    text = []
    for name, lines in machines().items():
        text += ["", f"## {name}", "", f"torch {lines[0]['torch']}."]
        text += table(
            "| op | dtype | ours with telemetry / eager | smallest to largest | / torch.compile | telemetry on / off | largest "
            "| noise |",
            op_rows(lines),
        )
        text += table(
            "| op | dtype | shape | ours with telemetry / eager | telemetry on / off | eager / a product's rate "
            "| ours / a product's rate |",
            shape_rows(lines),
        )
        text += [*length_rows(lines), *value_rows(lines), *watch_rows(lines)]
        text += step_table(lines)
    return "\n".join(text).strip()


PAGES: dict[str, Callable[[], str]] = {"README.md": summary, "docs/benchmarks.md": details}


def main(arguments: list[str]) -> None:
    """Prints the tables, or writes them between the markers of their pages."""
    for page, text in PAGES.items():
        if arguments[:1] == ["--write"]:
            head, rest = (ROOT / page).read_text().split(BEGIN)
            (ROOT / page).write_text(f"{head}{BEGIN}\n\n{text()}\n\n{END}{rest.split(END)[1]}")
        else:
            print(f"{page}\n\n{text()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
