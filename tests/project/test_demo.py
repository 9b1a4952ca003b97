"""The command line and the demo: a real run with few steps, and one line on stderr for each bad argument."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from pathlib import Path

import pytest
import torch

import gradkernels as gk
from gradkernels.cli import main
from gradkernels.demo import story as demo_story
from gradkernels.demo import text as demo
from gradkernels.demo.models import CONTEXT, FUSED, LAYERS, PLAIN, CharacterTransformer, cross_entropy
from gradkernels.report.labels import COLUMNS

STEPS = 3
TEXT = "Gradients flow back through every layer; some of them arrive as nothing at all.\n" * 40


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The lines that a demo of three steps printed, and its output folder."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    out = folder / "new" / "out"
    torch.set_num_threads(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for model in ("--model=transformer", None):
            files = ["--text", str(folder / "text.txt"), "--out", str(out / (model or "story"))]
            assert main(["demo", *files, "--steps", str(STEPS), "--seed", "7", *([model] if model else [])]) == 0
            printed.write("SECOND\n")
    return printed.getvalue().splitlines(), out


def test_demo_of_a_model(finished: tuple[list[str], Path]) -> None:
    lines, out = finished
    lines = lines[: lines.index("SECOND")]
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "\r" not in text
    assert max(len(line) for line in lines if str(out.parent.parent) not in line) <= COLUMNS
    assert [line.split()[1] for line in lines if "tokens/s" in line] == ["1/3", "2/3", "3/3"]
    assert "No finding. 3 rules checked on 3 steps" in text
    for site in ("blocks.0.attention", f"blocks.{LAYERS - 1}.mlp", "blocks.0.mlp.branch.gelu", "norm"):
        assert any(line.startswith(f"{site} ") for line in lines), site
    for name in ("telemetry on", "telemetry off", "plain PyTorch"):
        assert sum(line.startswith(f"  {name} ") and line.endswith(" ms") for line in lines) == 1
    assert "nats/char" in text
    assert "bits/char" in text
    assert str(out / "--model=transformer" / "flow.png") in text


def test_files_of_a_model(finished: tuple[list[str], Path]) -> None:
    out = finished[1] / "--model=transformer"
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")
    history = gk.History.load(out / "stats.jsonl")
    assert list(history.steps) == list(range(1, STEPS + 1))
    for snapshot in history.snapshots:
        assert math.isfinite(snapshot.loss)
        assert snapshot.learning_rates == (demo.learning_rate(snapshot.step, STEPS),)
    for name in (f"blocks.{index}.{branch}" for index in range(LAYERS) for branch in ("attention", "mlp")):
        assert (history.column("norm", name) > 0).all()


def test_the_story(finished: tuple[list[str], Path]) -> None:
    """What the first net is told, before it has learned anything, is not said of the second."""
    lines, out = finished
    lines = lines[lines.index("SECOND") + 1 :]
    assert max(len(line) for line in lines if str(out.parent.parent) not in line) <= COLUMNS
    first, second = (lines[start:] for start in (0, lines.index(next(line for line in lines if line.startswith("2. ")))))
    assert any(line.startswith("VANISHING (error) since step 1 in blocks.0…11: dL/dh at blocks.0 is") for line in first)
    assert any(line.startswith("Try: replace Sigmoid between layers by ReLU or GELU") for line in first)
    assert not any("VANISHING (" in line for line in second[:-4])
    assert any(line.startswith("No finding.") for line in second)
    before, after = (gk.History.load(out / "story" / name) for name in (demo.BEFORE, demo.STEPS))
    assert [finding.code for finding in gk.diagnose(before)] == ["VANISHING"]
    assert not gk.diagnose(after)
    assert (out / "story" / "flow.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_second_net_of_the_story_learns() -> None:
    corpus = demo.corpus_of(demo.read_text(None))
    losses = []
    for advised in (False, True):
        torch.manual_seed(0)
        model = demo_story.Predictor(len(corpus.alphabet), advised)
        losses.append(demo_story.last_loss(demo_story.train(model, corpus, 150, 0).history))
    assert losses[0] > 0.95 * corpus.entropy
    assert losses[1] < 0.8 * corpus.entropy


def test_plain_progress_prints_every_tenth(capsys: pytest.CaptureFixture) -> None:
    show = demo.plain_progress(200)
    for step in range(1, 201):
        show(step, 1.0, 2000.0)
    printed = [int(line.split("/")[0].removeprefix("step")) for line in capsys.readouterr().out.splitlines()]
    assert printed == [1, *range(20, 201, 20)]


def test_plain_twin_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    fused, plain = (CharacterTransformer(11, layers).double() for layers in (FUSED, PLAIN))
    plain.load_state_dict(fused.state_dict())
    ids = torch.randint(11, (2, CONTEXT + 1), generator=generator)
    losses = [cross_entropy(model, ids) for model in (fused, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_corpus_round_trip() -> None:
    corpus = demo.corpus_of(TEXT)
    ids = torch.cat([corpus.train, corpus.validation]).tolist()
    assert "".join(corpus.alphabet[index] for index in ids) == TEXT
    assert len(corpus.validation) == len(TEXT) // 10
    shares = [TEXT.count(character) / len(TEXT) for character in set(TEXT)]
    assert corpus.entropy == pytest.approx(-sum(share * math.log(share) for share in shares), rel=1e-5)
    assert corpus.folded == 0


def test_corpus_folds_the_rarest() -> None:
    common = "".join(chr(0x4E00 + index) for index in range(demo.KINDS)) * 3
    rare = "".join(chr(0x100 + index) for index in range(40))
    corpus = demo.corpus_of(rare + common)
    assert corpus.folded == 40
    assert len(corpus.alphabet) == demo.KINDS + 1
    ids = torch.cat([corpus.train, corpus.validation]).tolist()
    assert "".join(corpus.alphabet[index] for index in ids) == demo.UNKNOWN * 40 + common


def test_shortest_text_has_a_window_on_either_side() -> None:
    corpus = demo.corpus_of("ab" * (demo.SHORTEST // 2))
    assert len(corpus.train) == len(corpus.validation) == CONTEXT + 1
    windows = demo.random_windows(corpus.train, torch.Generator().manual_seed(0))
    assert torch.equal(windows, corpus.train.expand(demo.BATCH, -1))


def test_default_text_comes_with_python() -> None:
    assert len(demo.read_text(None)) > 100_000


def error_line(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line on stderr of a command that fails with exit code 2 and prints nothing else."""
    with pytest.raises(SystemExit) as exit:
        main(["demo", *arguments])
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("gradkernels demo: ")
    return printed.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("readable text file", "No such file")),
        (b"", ("at least 258 characters", "an empty file")),
        (b"too short", ("at least 258 characters", "9 characters")),
        (b"x" * 300 + b"\xff", ("UTF-8", "at byte 300")),
    ],
)
def test_bad_text(tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes | None, words: tuple[str, ...]) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    line = error_line(capsys, "--text", str(path), "--out", str(tmp_path / "out"))
    assert all(word in line for word in ("--text", "expected", "got", str(path), *words))
    assert not (tmp_path / "out").exists()


def test_text_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = error_line(capsys, "--text", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "--text" in line
    assert "directory" in line


def test_text_without_permission(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(demo, "open", refuse, raising=False)
    line = error_line(capsys, "--text", "secret")
    assert "--text" in line
    assert "'secret': Permission denied" in line


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "ten", "", "9" * 5000])
def test_bad_steps(capsys: pytest.CaptureFixture, value: str) -> None:
    line = error_line(capsys, f"--steps={value}")
    assert f"argument --steps: expected a positive integer, got {value!r}" in line


@pytest.mark.parametrize("value", ["-1", "x", str(2**63)])
def test_bad_seed(capsys: pytest.CaptureFixture, value: str) -> None:
    assert f"argument --seed: expected an integer from 0 to 2^63 - 1, got {value!r}" in error_line(capsys, f"--seed={value}")


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_output_folder_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture, below: str) -> None:
    (tmp_path / "file").write_text("kept")
    line = error_line(capsys, "--out", str(tmp_path / "file") + below)
    assert "argument --out: expected a folder that can be written, got" in line
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", [demo.PICTURE, demo.STEPS])
def test_output_file_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    (tmp_path / name).mkdir()
    assert "argument --out: expected a folder that can be written" in error_line(capsys, "--out", str(tmp_path))


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f'{package} not installed: pip install "gradkernels[demo]"' in error_line(capsys)


def test_help_without_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: gradkernels")
    assert "demo" in printed


def test_unknown_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["nonsense"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_implementations(capsys: pytest.CaptureFixture) -> None:
    assert main(["implementations"]) == 0
    assert any(line.startswith("layer_norm on cpu: ") for line in capsys.readouterr().out.splitlines())
