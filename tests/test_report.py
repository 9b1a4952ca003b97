"""What is concluded and drawn: the slope of dL/dh, its finding, the picture, and real nets that vanish or do not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels.diagnose import Severity, slope, slope_finding
from gradkernels.report.flow import UNDEFINED_COLOUR, ZERO_COLOUR, flow_picture
from gradkernels.report.terminal import COLUMNS, origin
from gradkernels.report.time import _decades, profile_picture, time_picture
from gradkernels.telemetry import Record, profile_of


def record(site: str, norm: float, nonfinite_count: int = 0) -> Record:
    return Record(site, "dx", 64, 1, norm**2, norm, nonfinite_count, 64 if norm == 0 else 0, norm)


def stream(*norms: float) -> list[Record]:
    return [record(f"layers.{index}", norm) for index, norm in enumerate(norms)]


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ((1e-3, 5.0, 1.0), -3.0),
        ((100.0, 1.0), 2.0),
        ((1e-150, 1e150), -300.0),
        ((0.0, 1.0), -math.inf),
        ((1.0, 0.0), None),
        ((0.0, 0.0), None),
        ((1.0,), None),
        ((), None),
    ],
)
def test_slope(norms: tuple[float, ...], expected: float | None) -> None:
    assert slope(stream(*norms)) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(("sign", "code"), [(-1, "VANISHING"), (1, "EXPLODING")])
@pytest.mark.parametrize(
    ("decades", "severity"),
    [
        (0.99, None),
        (1.0, Severity.NOTE),
        (1.49, Severity.NOTE),
        (1.5, Severity.WARNING),
        (2.99, Severity.WARNING),
        (3.0, Severity.ERROR),
        (math.inf, Severity.ERROR),
    ],
)
def test_grades(sign: int, code: str, decades: float, severity: Severity | None) -> None:
    finding = slope_finding([sign * decades] * 3, "first", "last")
    if severity is None:
        assert finding is None
    else:
        assert (finding.code, finding.severity, finding.site, finding.since_step) == (code, severity, "first", 1)
        assert "first" in finding.evidence
        assert "last" in finding.evidence
        assert finding.advice


@pytest.mark.parametrize(
    "slopes",
    [[], [-5.0], [-5.0, -5.0], [-5.0, -5.0, -0.5], [-5.0, 5.0, -5.0], [-5.0, None, -5.0], [-5.0] * 9 + [None], [None] * 3],
)
def test_nothing_is_said(slopes: list[float | None]) -> None:
    assert slope_finding(slopes, "first", "last") is None


@pytest.mark.parametrize("bad", [(64, 0), (0, 1), (64, 64)])
def test_slope_of_what_is_not_finite(bad: tuple[int, int]) -> None:
    """Not small: what is left of it says nothing."""
    found = slope([record(str(index), 0.0 if count == 64 else 1.0, count) for index, count in enumerate(bad)])
    assert found is not None
    assert math.isnan(found)


@pytest.mark.parametrize(
    ("slopes", "code", "since"),
    [
        ([0.1, 3.5, 3.5, 3.5, math.nan], "EXPLODING", 2),
        ([3.5, 3.5, 3.5, math.nan, math.nan, math.nan, math.nan], "EXPLODING", 1),
        ([-3.5, -3.5, -3.5, math.nan], "VANISHING", 1),
        ([3.5, 3.5, math.nan, 3.5], None, None),
        ([math.nan] * 5, None, None),
        ([0.1, 0.1, 0.1, math.nan, math.nan], None, None),
        ([-math.inf, math.nan, -4.0, -4.0, -4.0], "VANISHING", 3),
    ],
)
def test_what_was_seen_before_it_was_not_finite(slopes: list[float], code: str | None, since: int | None) -> None:
    finding = slope_finding(slopes, "first", "last")
    assert (finding and finding.code, finding and finding.since_step) == (code, since)


def port(site: str, name: str, bad: int = 0) -> Record:
    return Record(site, name, 64, 1, 1.0, 1.0, bad, 0, 1.0)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([port("a", "dy"), port("a", "dx", 1), port("b", "dy"), port("b", "dx")], "made in a"),
        ([port("a", "dy", 9), port("a", "dx", 9), port("b", "dy"), port("b", "dx")], "made between b and a"),
        ([port("a", "dy", 9), port("b", "dy", 1)], "the loss handed them to b"),
        ([port("a", "dy", 9), port("b", "dy", 9), port("b", "dx", 9), port("c", "dy")], "made between c and b"),
        ([port("a", "dx"), port("b", "dy"), port("b", "dx"), port("b", "dweight", 1)], "made in b"),
        ([port("a", "dskip"), port("a", "dbranch", 1), port("a", "dx", 1), port("b", "dskip")], "made between b and a"),
    ],
)
def test_origin(records: list[Record], expected: str) -> None:
    assert origin(records) == expected


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
    lines = str(watch).splitlines()
    assert "VANISHING" not in str(watch)
    assert lines[1] == "No verdict: dL/dh from 3 back to 0 is no longer finite."
    assert lines[2] == "NaN or infinite: 64 gradient elements; made between 2 and 1."
    assert [line.split()[1] for line in lines[-4:-2]] == ["nan", "nan"]


def test_weakest_of_the_last_three_steps_grades() -> None:
    assert slope_finding([-9.0, -9.0, -1.6, -9.0], "first", "last").severity is Severity.WARNING


@pytest.mark.parametrize(
    ("slopes", "since"),
    [
        ([0.1, -0.2, -2.0, -2.0, -2.0, -2.0], 3),
        ([-2.0, -0.1, -2.0, -2.0, -2.0], 3),
        ([-2.0, None, -2.0, -2.0, -2.0], 3),
        ([2.0, -2.0, -2.0, -2.0], 2),
        ([-1.2, -2.0, -2.0, -2.0], 2),
        ([-math.inf] * 5, 1),
    ],
)
def test_since_step(slopes: list[float | None], since: int) -> None:
    assert slope_finding(slopes, "first", "last").since_step == since


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
    sites = watch.stream()
    finding = slope_finding(watch.slopes(), sites[0].site, sites[-1].site)
    assert (finding.code, finding.severity, finding.since_step) == ("VANISHING", Severity.ERROR, 1)
    assert watch.slopes()[-1] < -10
    lines = str(watch).splitlines()
    assert any(line.startswith("VANISHING (error) since step 1") for line in lines)
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_residual_net_with_norms_is_healthy(seed: int) -> None:
    torch.manual_seed(seed)

    def branch() -> nn.Module:
        return nn.Sequential(gk.LayerNorm(64), nn.Linear(64, 64), gk.GELU(), nn.Linear(64, 64))

    watch = trained(nn.Sequential(nn.Linear(64, 64), *(gk.Residual(branch()) for _ in range(20))), 64)
    sites = watch.stream()
    assert len(sites) == 21
    finding = slope_finding(watch.slopes(), sites[0].site, sites[-1].site)
    assert finding is None or finding.severity is Severity.NOTE


def pixels(history: list[list[Record]], path: Path) -> np.ndarray:
    """The picture of `history`, (700, 1200, 3) of 0 to 1."""
    image = pytest.importorskip("matplotlib.image")
    flow_picture(history, path)
    picture = image.imread(path)[..., :3]
    assert picture.shape == (700, 1200, 3)
    return picture


def area(picture: np.ndarray, colour: str) -> float:
    """The share of the picture that has exactly one colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return float((np.rint(picture * 255) == wanted).all(-1).mean())


def test_picture_has_the_input_on_top(tmp_path: Path) -> None:
    for first, strong in ((1e-3, 2), (1e3, 0)):
        picture = pixels([stream(first, 1.0, 1.0)] * 5, tmp_path / "flow.png")
        top, bottom = picture[150, 600], picture[550, 600]
        assert top[strong] > top[2 - strong] + 0.2  # blue where it vanishes, red where it explodes
        assert bottom.min() > 0.9
        assert area(picture, ZERO_COLOUR) < 0.03
        assert area(picture, UNDEFINED_COLOUR) < 0.01


def test_picture_of_zero_gradients(tmp_path: Path) -> None:
    assert area(pixels([stream(0.0, 1.0)] * 5, tmp_path / "flow.png"), ZERO_COLOUR) > 0.3


@pytest.mark.parametrize(
    "history",
    [
        [stream(math.nan, math.nan)] * 4,
        [stream(1.0, 0.0)] * 4,
        [[record("first", 1.0, 3), record("last", 1.0, 3)]] * 4,
        [stream(1.0, 1.0), *[stream(1.0)] * 9],
    ],
)
def test_picture_of_undefined_gradients(tmp_path: Path, history: list[list[Record]]) -> None:
    assert area(pixels(history, tmp_path / "flow.png"), UNDEFINED_COLOUR) > 0.5


def test_picture_of_one_step(tmp_path: Path) -> None:
    picture = pixels([stream(1e-9, 1e-2, 1.0)], tmp_path / "flow.png")
    assert picture[150, 600, 2] > picture[150, 600, 0] + 0.2


def test_picture_of_many_sites_with_long_names(tmp_path: Path) -> None:
    sites = [f"transformer.encoder.layers.{index}.self_attention.branch.$norm" for index in range(200)]
    pixels([[record(site, 1.0) for site in sites]] * 300, tmp_path / "flow.png")


def test_picture_of_nothing(tmp_path: Path) -> None:
    for history in ([], [[], []]):
        with pytest.raises(ValueError, match="history must hold at least one record"):
            flow_picture(history, tmp_path / "flow.png")


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
