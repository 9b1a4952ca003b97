"""python -m benchmarks.table [--write]: the page docs/benchmarks.md, made from the committed result lines.

First one row per op and dtype, with a column per machine; then all of each machine. With --write also the table of
docs/launch_cache.md and the README's chart.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
PAGE, HOST_PAGE = DOCS / "benchmarks.md", DOCS / "launch_cache.md"
HOST_MARKS = "<!-- host time -->", "<!-- end of host time -->"
HOST_COLUMNS = {  # heading: what lines call it, older ones too
    "Python": ("python",),
    "launch cache": ("captured launches", "plan"),
    "PyTorch's CPU op": ("PyTorch",),
    "the same at no rows": ("PyTorch, no rows",),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INTRODUCTION = """\
<!-- Written by `python -m benchmarks.table --write`: change that, not this page. -->

# Benchmarks

Read here how fast each layer is on each machine that was measured, gains and losses. To measure yours:

```sh
make bench
python -m benchmarks.run --threads 1 lstm_layer
```

The first measures every op, adds lines to `benchmarks/results/`, and writes this page from all lines there. The second
measures one op on one thread.

Every figure is a ratio of times; below 1 is faster. The variants take turns in one process. A figure is the median of
the rounds. A time is that of forward and backward with all gradients, allocation included. Buffers rotate beyond the
caches. An implementation that fails its check against float64 is not timed.

- **fused / eager**: the fused layer with telemetry on, against eager PyTorch. Over several shapes: the geometric mean.
- **from, to**: the smallest and the largest ratio of any shape.
- **/ compile**: the same against torch.compile of PyTorch's layer.
- **on / off**: the fused layer with telemetry on, against the same with telemetry off. **max**: its largest.
- **noise**: the largest distance from 1 of eager against itself.
- **eager / product, fused / product**: share of the rate that one product of two 512 x 512 matrices reaches, in the
  same rounds and dtype. Where eager is close to 1, arithmetic leaves nothing to win.
- **columns**: a million elements in rows of that many columns, fused / eager.
- **backward of values**: a backward with telemetry on, (2048, 768), on a gradient of those values, against the same on
  normal random numbers; "1e-30, 1e30" is half of each.
- **watching**: forward and backward of a model with probes, against the same without.
- **step with / without telemetry**: ten whole training steps of the demo's models (forward, backward, AdamW,
  `watch.step()`) with an option of `gk.watch`, against the same fused layers without; median and p20 to p80. "off
  again" is the noise.

## Where a fused layer loses

- A residual connection alone is slower than eager's at every small shape, where its one op more shows. torch.compile
  fuses the benchmark's branch into it, which is faster still. Its three norms cost more than its one addition where
  tensors are in the cache.
- The smallest shapes of GELU and the norms are slower than eager's on some machines: see "from, to".
- Statistics in bfloat16 cost more than the aim of 5 to 10 % at many shapes: see "on / off".
- Large float32 tensors are bound by memory for everybody, so there the ratios approach 1.
- An LSTM in bfloat16 computes in float32 on a CPU. That is slower than oneDNN's on CPUs with bfloat16 instructions, and
  many times faster on those without.
- Large float64 layers and large cells are bound by their products, which are PyTorch's.
"""


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
    """One row per op and dtype: with telemetry against eager and torch.compile without, and telemetry on against off."""
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
    """One row per length of a norm's rows, with a column per op and dtype."""
    groups = {pair: group for pair, group in ours(lines).items() if pair[0].endswith(" rows")}
    cells = {}
    for group in groups.values():
        for line in group:
            cells.setdefault(line["shape"][1], []).append(f"{median(line):.2f}")
    heads = [f"{op.removesuffix(' rows')}, {dtype}" for op, dtype in groups]
    rows = [f"| {N} | {' | '.join(ratios)} |" for N, ratios in sorted(cells.items())]
    return table(f"| columns | {' | '.join(heads)} |", rows)


def value_rows(lines: list[dict]) -> list[str]:
    """One row per op and dtype: a column for each kind of gradient."""
    groups = {}
    for line in lines:
        if "ratio_to_normal_values" in line:
            groups.setdefault((line["op"].removesuffix(" values"), line["dtype"]), {})[line["implementation"]] = line
    kinds = list(next(iter(groups.values()), {}))[1:]
    rows = []
    for (op, dtype), group in groups.items():
        ratios = [f"{median(group[kind], 'ratio_to_normal_values'):.2f}" for kind in kinds]
        rows.append(f"| {op} | {dtype} | {' | '.join(ratios)} |")
    heads = [kind.replace(" beside ", ", ").replace("NaN in each row", "NaN per row") for kind in kinds]
    return table(f"| backward of values | dtype | {' | '.join(heads)} |", rows)


def watch_rows(lines: list[dict]) -> list[str]:
    """One row per model: its step with probes against without; then what `watch.step()` takes."""
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
    return table("| watching | with probes / without | p20 to p80 |", rows)


def option_rows(lines: list[dict]) -> list[str]:
    """One row per option of gk.watch: a whole training step with it against the same without telemetry, by model."""
    options, models = {}, {}
    for line in lines:
        if line["op"].startswith("watch options "):
            model = line["op"].removeprefix("watch options ")
            models[model] = None
            options.setdefault(line["implementation"], {})[model] = line["ratio_to_eager"]
    rows = []
    for option, found in options.items():
        cells = [f"{r['median']:.3f} ({r['p20']:.3f} to {r['p80']:.3f})" for r in map(found.get, models)]
        rows.append(f"| {option} | {' | '.join(cells)} |")
    return table(f"| step with / without telemetry | {' | '.join(models)} |", rows)


def shape_rows(lines: list[dict]) -> list[str]:
    """One row per shape of the LSTM's ops, with the share of one large product's rate that eager and the fused layer reach."""
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
    """As a figure; none for 16-bit dtypes, in which the fused LSTM does not compute on a CPU."""
    return f"{line['share_of_product']:.2f}" if "share_of_product" in line and line["dtype"] != "bfloat16" else "-"


def step_rows(lines: list[dict]) -> list[str]:
    """One row per variant of the training step."""
    steps = [(line["implementation"], line["ratio_to_eager"]) for line in lines if line["op"] == "training step"]
    return [f"| {name} | {ratio['median']:.3f} | {ratio['p20']:.3f} to {ratio['p80']:.3f} |" for name, ratio in steps]


def table(head: str, rows: list[str]) -> list[str]:
    """A Markdown table with an empty line before it; nothing where there are no rows."""
    return ["", head, "|---" * (head.count("|") - 1) + "|", *rows] if rows else []


def step_table(lines: list[dict]) -> list[str]:
    """The training step's."""
    return table("| training step of a small transformer | time / eager PyTorch | p20 to p80 |", step_rows(lines))


def summary(everyone: dict[str, list[dict]]) -> list[str]:
    """One row per op and dtype with a column per machine, machines as letters, after the list of these."""
    groups = [ours(lines) for lines in everyone.values()]
    rows = []
    for op, dtype in sorted({pair for group in groups for pair in group if not pair[0].endswith(" rows")}):
        figures = [[median(line) for line in group.get((op, dtype), ())] for group in groups]
        shown = [f"{geometric_mean(own):.2f} ({min(own):.2f} to {max(own):.2f})" if own else "-" for own in figures]
        rows.append(f"| {op} | {dtype} | {' | '.join(shown)} |")
    names = [f"- {letter}: {name}" for letter, name in zip(LETTERS, everyone, strict=False)]
    return [*names, *table(f"| fused / eager | dtype | {' | '.join(LETTERS[: len(names)])} |", rows)]


def page() -> str:
    """The text of docs/benchmarks.md."""
    everyone = machines()
    text = [INTRODUCTION, "## All machines", "", *summary(everyone)]
    for name, lines in everyone.items():
        text += ["", f"## {name}", "", f"torch {lines[0]['torch']}."]
        text += table("| op | dtype | fused / eager | from, to | / compile | on / off | max | noise |", op_rows(lines))
        text += table(
            "| op | dtype | shape | fused / eager | on / off | eager / product | fused / product |",
            shape_rows(lines),
        )
        text += [*length_rows(lines), *value_rows(lines), *watch_rows(lines), *option_rows(lines)]
        text += step_table(lines)
    return "\n".join(text) + "\n"


def host_rows(lines: list[dict]) -> list[str]:
    """One row per op and direction: microseconds of the host's a call, as benchmarks/launch_cost.py measures them."""
    groups = {}
    for line in lines:
        if line["op"].endswith(" host time"):
            group = groups.setdefault(f"{line['op'].removesuffix(' host time')} {line['direction']}", {})
            group[line["implementation"]] = line["microseconds"]["median"]
    rows = []
    for name, group in groups.items():
        found = [next((group[word] for word in words if word in group), None) for words in HOST_COLUMNS.values()]
        rows.append(f"| {name} | {' | '.join('-' if value is None else f'{value:.1f}' for value in found)} |")
    return rows


def host_page() -> str:
    """The text of docs/launch_cache.md, with the table of the first machine that has lines for one; else as it is."""
    text, (start, end) = HOST_PAGE.read_text(), HOST_MARKS
    for name, lines in machines().items():
        if rows := host_rows(lines):
            body = [f"{name}:", *table(f"| op | {' | '.join(HOST_COLUMNS)} |", rows)]
            return text.split(start)[0] + "\n".join([start, *body, end]) + text.split(end)[1]
    return text


def main(arguments: list[str]) -> None:
    """Prints the page, or writes all that is made from the lines."""
    if arguments[:1] == ["--write"]:
        from benchmarks import chart

        PAGE.write_text(page())
        HOST_PAGE.write_text(host_page())
        chart.main()
    else:
        print(page())


if __name__ == "__main__":
    main(sys.argv[1:])
