"""README and docs: code runs, commands and links exist, and what is generated is that of the result lines."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels import cli

ROOT = Path(__file__).parents[2]
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md")
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MAX_COLUMNS, MAX_README_LINES = 120, 100
OUTPUT = "text"  # blocks that show what is printed, or drawn
MAY_CLONE = ("git clone", "cd ")
FOLDERS = ("gradkernels", "csrc", "tests", "benchmarks", "docs", "examples")
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # what torchrun says to one process
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.activation = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.activation(self.linear(self.norm(x)))


class Model(nn.Module):
    """The `model` of the pages: an encoder of blocks, an LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block(), Block())
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.encoder(x))[0][:, -1])


def preamble() -> dict[str, object]:
    """What the Python of every page finds defined before its first block."""
    model = Model()
    return {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "loader": list(torch.randn(4, 2, 6, 8)),
        "loss_fn": lambda y: y.square().mean(),
    }


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return iter(re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    """The code spans of a page's prose, in one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises where a command names what is not there. Nothing that takes long runs."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), command
    elif words[0] == "gradkernels":
        monkeypatch.setattr(cli, "_demo", lambda options: 0)
        assert cli.main(words[1:]) == 0, command
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None, command
    elif words[0] in ("python", "torchrun"):
        assert (ROOT / words[-1]).is_file(), command
    elif words[:3] == ["pip", "install", "-e"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert re.fullmatch(rf"\.(\[({'|'.join(extras)})\])?", words[3]), command
    else:
        assert command.startswith(MAY_CLONE), f"no check for {command!r}"


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_blocks_say_what_they_are(page: Path) -> None:
    assert page.read_text().count("\n```") == 2 * len(list(blocks(page)))
    assert {language for language, _ in blocks(page)} <= {"python", "sh", OUTPUT}


@every_page
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "init_process_group(" in page.read_text() and not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    monkeypatch.chdir(tmp_path)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    scope = preamble()
    try:
        for number, (language, text) in enumerate(blocks(page)):
            if language == "python":
                exec(compile(text, f"{page.name}, block {number}", "exec"), scope)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@every_page
def test_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for language, text in blocks(page):
        for command in text.splitlines() if language == "sh" else ():
            check_command(command, monkeypatch)
    for span in inline_code(page):
        if re.match(r"(make|gradkernels|python -m|pip install -e) ?\b", span) and " " in span:
            check_command(span, monkeypatch)


@every_page
def test_names_exist(page: Path) -> None:
    """`gk.name` and `watch.name`, in prose and code."""
    for path in set(re.findall(r"\bgk((?:\.\w+)+)", page.read_text())):
        value = gk
        for name in path[1:].split("."):
            assert hasattr(value, name), f"gk{path}"
            value = getattr(value, name)
    for name in set(re.findall(r"\bwatch\.(\w+)", page.read_text())):
        assert hasattr(gk.Watch, name), f"watch.{name}"


@every_page
def test_files_exist(page: Path) -> None:
    """Links, pictures, anchors, and files named in code spans."""
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for span in inline_code(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./]*", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / name for name in OTHERS)], ids=[*NAMES, *OTHERS])
def test_lines_are_short(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > MAX_COLUMNS] == []


@every_page
def test_page_opens_from_the_index(page: Path) -> None:
    """Every page of docs is linked from docs/index.md, and that from the README."""
    if page.parent != ROOT:
        index = README if page.stem == "index" else ROOT / "docs" / "index.md"
        assert f"{page.name})" in index.read_text()


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_status_is_said_once() -> None:
    """That no GPU has run the kernels stands under Status in the README alone: one place to change when one has."""
    said = {page.name: len(re.findall(r"\bno GPU has run\b", page.read_text(), re.IGNORECASE)) for page in PAGES}
    assert {name: count for name, count in said.items() if count} in ({}, {"README.md": 1})


def test_no_path_of_one_machine() -> None:
    found = [
        match for page in PAGES for match in re.findall(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|mnt|var)\b", page.read_text())
    ]
    assert found == []


def test_generated_pages_are_those_of_the_lines() -> None:
    table = pytest.importorskip("benchmarks.table")
    for page, text in ((table.PAGE, table.page()), (table.HOST_PAGE, table.host_page())):
        assert page.read_text() == text, "python -m benchmarks.table --write"


def test_cost_of_watching_is_that_of_the_lines() -> None:
    """The two percentages under Performance in the README: the most that any machine showed."""
    table = pytest.importorskip("benchmarks.table")
    lines = [line for own in table.machines().values() for line in own if line["implementation"] == "probes"]
    tiny = [100 * (table.median(line) - 1) for line in lines if line["op"].endswith("mlp 64")]
    rest = [100 * (table.median(line) - 1) for line in lines if not line["op"].endswith("mlp 64")]
    said = re.findall(r"up to ([\d.]+) percent", " ".join(README.read_text().split()))
    assert said == [f"{max(rest):.1f}", f"{max(tiny):.0f}"]


def test_chart_is_that_of_the_lines() -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    chart = pytest.importorskip("benchmarks.chart")
    with Image.open(chart.PICTURE) as picture:
        assert json.loads(picture.text["Description"]) == chart.figures(), "python -m benchmarks.chart"
