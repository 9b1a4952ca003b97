"""The page of `make gpu` from made-up lines: right figures, targets missed and met, lines that are not there yet."""

import json

import pytest

from benchmarks import gpu, gpu_summary

ABOUT = {"device": "Made-up GPU", "torch": "2.13", "commit": "abc", "date": "2026-01-01", "tests": 0}
MICROSECONDS = {  # direction, launched: implementation
    ("forward", "graph"): {"copy": 90.0, "telemetry on": 100.0},
    ("forward+backward", "graph"): {"copy": 225.0, "telemetry on": 250.0, "telemetry off": 248.0, "torch.compile": 260.0},
    ("forward+backward", "call"): {"eager": 500.0, "telemetry on": 260.0, "telemetry off": 258.0},
}


def made_up(op="layer_norm", dtype="bfloat16", shape=(8192, 4096), changes=None):
    """The lines of one op and shape; changes: {(direction, launched, implementation): microseconds, or None for no line}."""
    lines = []
    for (direction, launched), times in MICROSECONDS.items():
        for implementation, time in times.items():
            time = (changes or {}).get((direction, launched, implementation), time)
            if time is None:
                continue
            line = {"op": op, "implementation": implementation, "direction": direction, "launched": launched, "dtype": dtype}
            moved = 2000 if direction == "forward" else 5000
            host = {"host_microseconds": time / 10} if launched == "call" else {}
            lines.append({**line, "shape": list(shape), "bytes_moved": moved, "microseconds": time, **host, **ABOUT})
    return lines


def row(lines, number=0):
    """The cells of a row of the table, right of its name."""
    return gpu_summary.summary(lines).splitlines()[3 + number][37:].split()


def change(direction, launched, implementation, time, **options):
    return made_up(changes={(direction, launched, implementation): time}, **options)


def test_figures():
    """Copy 90 of 100; backward 135 of 150; 260 of 500; 250 of 260 and of 248; 26 and 50 us of the host's."""
    assert row(made_up()) == ["0.900", "0.900", "0.520", "0.962", "1.008", "26", "/", "50"]
    assert gpu_summary.summary(made_up()).endswith("every target met that was measured")
    head = gpu_summary.summary(made_up()).splitlines()[0]
    assert head == "Made-up GPU, torch 2.13, commit abc, 2026-01-01; GPU tests passed"


MISSES = [
    (("forward", "graph", "telemetry on", 101.0), {}, "forward 0.891, target >= 0.9"),
    (("forward+backward", "graph", "copy", 211.0), {}, "backward 0.844, target >= 0.85"),
    (("forward+backward", "graph", "telemetry off", 247.0), {}, "on / off 1.012, target <= 1.01"),
    (("forward+backward", "graph", "telemetry off", 245.0), {"op": "gelu"}, "on / off 1.020, target <= 1.02"),
    (("forward+backward", "call", "telemetry on", 501.0), {"shape": (512, 768)}, "/ eager 1.002, target <= 1.0"),
    (("forward+backward", "graph", "torch.compile", 249.0), {}, "/ compile 1.004, target <= 1.0"),
    (
        ("forward+backward", "call", "telemetry on", 251.0),
        {"op": "lstm", "shape": (16, 1024, 768)},
        "/ eager 0.502, target <= 0.5",
    ),
    (("forward+backward", "graph", "torch.compile", 373.0), {"shape": (4096, 4096)}, "/ compile 0.670, target <= 0.67"),
]


@pytest.mark.parametrize(("changed", "options", "expected"), MISSES, ids=[expected for *_, expected in MISSES])
def test_misses_are_marked(changed, options, expected):
    text = gpu_summary.summary(change(*changed, **options))
    name = f"{options.get('op', 'layer_norm')} bfloat16 {'x'.join(map(str, options.get('shape', (8192, 4096))))}"
    assert f"  {name}: {expected}" in text.splitlines()
    column = next(k for k, title in enumerate(gpu_summary.COLUMNS) if expected.startswith(title))
    marked = [cell.endswith("!") for cell in row(change(*changed, **options))]
    assert [k for k, wrong in enumerate(marked) if wrong] == [column]


def test_no_target_no_mark():
    """Shares of the copy have targets at two shapes in bfloat16; eager at small shapes, torch.compile at others."""
    slow = change("forward", "graph", "telemetry on", 180.0, dtype="float32")
    assert gpu_summary.summary(slow).endswith("every target met that was measured")
    slow = change("forward+backward", "call", "telemetry on", 600.0)
    assert gpu_summary.summary(slow).endswith("every target met that was measured")
    slow = change("forward+backward", "graph", "torch.compile", 200.0, shape=(8, 64))
    assert gpu_summary.summary(slow).endswith("every target met that was measured")


def test_lines_that_are_not_there():
    """A run that was stopped, or without graphs: dashes."""
    assert row(change("forward", "graph", "copy", None)) == ["-", "-", "0.520", "0.962", "1.008", "26", "/", "50"]
    calls = [line for line in made_up() if line["launched"] == "call"]
    assert row(calls) == ["-", "-", "0.520", "-", "1.008", "26", "/", "50"]
    assert gpu_summary.summary([]) == "no lines of benchmarks.gpu"


def test_the_last_run_counts():
    """Lines are appended; those of another op, dtype or shape have rows of their own; failed tests are shown."""
    failed = [{**line, "tests": 1} for line in change("forward+backward", "call", "eager", 260.0)]
    lines = [*made_up(), *made_up(dtype="float32"), *made_up(op="gelu"), *made_up(shape=(8, 64)), *failed]
    assert row(lines)[2] == "1.000"
    assert row(lines, 1)[2] == "0.520"
    text = gpu_summary.summary(lines)
    assert len(text.splitlines()) == 3 + 4 + 2
    assert "GPU tests FAILED (exit code 1)" in text.splitlines()[0]


def test_command(tmp_path, capsys):
    """python -m benchmarks.gpu --summary FILE, on a machine without a GPU."""
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in made_up()))
    assert gpu.main(["--summary", str(path)]) == 0
    assert capsys.readouterr().out.strip() == gpu_summary.summary(made_up())


def test_page_is_narrow():
    lines = [*made_up(op="add_layer_norm", shape=(16384, 1024)), *made_up(dtype="float32")]
    assert max(map(len, gpu_summary.summary(lines).splitlines())) <= 100
