"""What people look at: the table and the pictures, of histories of known content and of real nets that vanish or do not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import decades, history_of
from torch import nn

import gradkernels as gk
from gradkernels.diagnose import Severity
from gradkernels.report.flow import UNDEFINED_COLOUR, ZERO_COLOUR, flow_picture
from gradkernels.report.labels import COLUMNS
from gradkernels.report.terminal import table
from gradkernels.report.time import _decades, profile_picture, time_picture
from gradkernels.telemetry import profile_of


class Spoiled(torch.autograd.Function):
    """Hands on a gradient of one value."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.full_like(dy, ctx.value), None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_table_of_what_is_not_finite(value: float) -> None:
    class Block(nn.Module):
        def __init__(self, spoils):
            super().__init__()
            self.linear, self.spoils = nn.Linear(8, 8), spoils

        def forward(self, x):
            return x + self.linear(Spoiled.apply(x, value) if self.spoils else x)

    net = nn.Sequential(*[Block(index == 2) for index in range(4)])
    watch = gk.watch(net)
    for _ in range(4):
        net(torch.randn(4, 8)).square().sum().backward()
        watch.step()
    text = " ".join(str(watch).split())
    assert "VANISHING" not in text
    assert (
        "NONFINITE (error) since step 1 at 1: gradients of 2 sites are NaN or infinite in step 1, made between 2 and 1." in text
    )
    assert [line.split()[2] for line in str(watch).splitlines()[-4:-2]] == ["nan", "nan"]


def trained(model: nn.Module, width: int, steps: int = 4) -> gk.Watch:
    """The watch of `model` after a few steps on random data and targets."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = gk.watch(model, optimizer)
    for _ in range(steps):
        x, target = torch.randn(2, 32, width, generator=generator)
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss)
    return watch


def test_deep_sigmoid_net_vanishes() -> None:
    torch.manual_seed(0)
    watch = trained(nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(128, 128), nn.Sigmoid()))), 128)
    (finding,) = watch.diagnose()
    assert (finding.code, finding.severity, finding.since_step) == ("VANISHING", Severity.ERROR, 1)
    assert finding.stack == "0…38"
    lines = str(watch).splitlines()
    assert any(line.startswith("VANISHING (error) since step 1") for line in lines)
    assert max(map(len, lines)) <= COLUMNS
    assert len(lines) < 20
    assert len(watch.table(all=True).splitlines()) > 20


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_residual_net_with_norms_is_healthy(seed: int) -> None:
    torch.manual_seed(seed)

    def branch() -> nn.Module:
        return nn.Sequential(gk.LayerNorm(64), nn.Linear(64, 64), gk.GELU(), nn.Linear(64, 64))

    watch = trained(nn.Sequential(nn.Linear(64, 64), *(gk.Residual(branch()) for _ in range(20))), 64)
    assert len(watch.depth_profile()["1…20"]) == 20
    assert all(finding.severity is Severity.NOTE for finding in watch.diagnose())


def test_table_of_many_alike() -> None:
    """The ends, the worst, and how many more there are; bars to the scale of the run; empty columns are not there."""
    history = history_of([decades(*(-0.1 * (index == 60) for index in range(200)))] * 3)
    lines = table(history, []).splitlines()
    assert lines[:3] == ["step 3", "No finding. 3 rules checked on 3 steps, 1 stack.", ""]
    assert [line.split()[0] for line in lines[4:]] == ["layers.0", "…", "layers.60", "…", "layers.199"]
    assert "nonfinite" not in lines[3]
    assert "zeros" not in lines[3]
    assert "-1    decades   +1" in lines[3]
    assert len(table(history, [], all=True).splitlines()) == 204


def test_table_names_what_got_no_gradient() -> None:
    lines = table(history_of([decades(None, None, 0.0, 0.0)] * 3), []).splitlines()
    assert lines[2] == "No gradient in this step: layers.0, layers.1. watch.coverage() says why."


def test_table_of_a_step_that_measured_nothing() -> None:
    assert "This step measured nothing" in table(history_of([decades(0.0, 0.0), decades(None, None)]), [])
    assert "no finished step yet" in table(history_of([]), [])


def pixels(history: gk.History, path: Path) -> np.ndarray:
    """The picture of `history`, (700, 1200, 3) of 0 to 1."""
    image = pytest.importorskip("matplotlib.image")
    flow_picture(history, [], path)
    picture = image.imread(path)[..., :3]
    assert picture.shape == (700, 1200, 3)
    return picture


def area(picture: np.ndarray, colour: str) -> float:
    """The share of the picture that has exactly one colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return float((np.rint(picture * 255) == wanted).all(-1).mean())


def test_picture_has_the_input_on_top(tmp_path: Path) -> None:
    for first, strong in ((-3.0, 2), (3.0, 0)):
        picture = pixels(history_of([decades(first, 0.0, 0.0)] * 5), tmp_path / "flow.png")
        top, bottom = picture[150, 600], picture[550, 600]
        assert top[strong] > top[2 - strong] + 0.2  # blue where it vanishes, red where it explodes
        assert bottom.min() > 0.9
        assert area(picture, ZERO_COLOUR) < 0.03
        assert area(picture, UNDEFINED_COLOUR) < 0.01


def test_picture_of_zero_gradients(tmp_path: Path) -> None:
    assert area(pixels(history_of([decades(-math.inf, 0.0)] * 5), tmp_path / "flow.png"), ZERO_COLOUR) > 0.3


@pytest.mark.parametrize(
    "history",
    [
        history_of([decades(0.0, 0.0)] * 6, bad={(step, index) for step in range(1, 6) for index in (0, 1)}),
        history_of([decades(0.0, 0.0), *[decades(None, None)] * 9]),
    ],
)
def test_picture_of_undefined_gradients(tmp_path: Path, history: gk.History) -> None:
    assert area(pixels(history, tmp_path / "flow.png"), UNDEFINED_COLOUR) > 0.5


def test_picture_of_one_step(tmp_path: Path) -> None:
    picture = pixels(history_of([decades(-9.0, -2.0, 0.0)]), tmp_path / "flow.png")
    assert picture[150, 600, 2] > picture[150, 600, 0] + 0.2


def test_picture_of_many_sites_with_long_names(tmp_path: Path) -> None:
    names = [f"transformer.encoder.layers.{index}.self_attention.branch.$norm" for index in range(200)]
    pixels(history_of([decades(*[0.0] * 200)] * 300, names=names), tmp_path / "flow.png")


def test_picture_of_nothing(tmp_path: Path) -> None:
    for history in (history_of([]), history_of([decades(None, None)]), history_of([decades(0.0)])):
        with pytest.raises(ValueError, match="history must hold a stack of two sites"):
            flow_picture(history, [], tmp_path / "flow.png")


def time_profile(dc, part="_l0"):
    """A profile whose |dc| is given by time step, with some gates."""
    time_stats = gk.new_time_stats(len(dc))
    time_stats[0, 0] = len(dc)
    time_stats[1:] = torch.rand(len(dc), len(gk.TIME_FIELDS), dtype=torch.float64)
    time_stats[1:, gk.TIME_FIELDS.index("dc")] = torch.tensor(dc, dtype=torch.float64)
    return profile_of("net.lstm.l0", part, time_stats)


@pytest.mark.parametrize("dc", [[1e-9, 1e-5, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0], [float("nan"), 1.0], [1.0], [1e-300, 1e300]])
@pytest.mark.parametrize("part", ["_l0", "_l0_reverse"])
def test_time_pictures(tmp_path, dc, part):
    profile_picture(time_profile(dc, part), tmp_path / "profile.png")
    time_picture([time_profile(dc, part), time_profile([1.0, *dc])], tmp_path / "time.png")
    for name in ("profile.png", "time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_time_picture_shows_lags_and_zeros():
    """Lag 0 is the end of the sequence, or its beginning in the reverse direction; an exact 0 lies under the colours."""
    assert _decades(time_profile([0.0, 1e-20, 1e-3, 1.0])).tolist() == [0.0, -3.0, -8.0, -16.0]
    assert _decades(time_profile([1.0, 1e-3], "_l0_reverse")).tolist() == [0.0, -3.0]


def test_time_picture_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"^time_picture: history must hold at least one profile, got none$"):
        time_picture([], tmp_path / "time.png")
