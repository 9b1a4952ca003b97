"""Examples of gelu, residual and probe."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from fuzz.compare import check_equal, check_like, check_within, floor, rounding
from fuzz.tensors import DTYPE_NAMES, NAMES, THREADS, Drawn, drawn, shapes, values

OPS = torch.ops.gradkernels
TANH_FACTOR, TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
# The tables that bfloat16 takes on AVX-512: csrc/cpu/make_gelu_tables.py.
TABLE_ERROR = {"bfloat16": 2.0**-17}


@dataclass(frozen=True)
class Gelu:
    """y and dx of one call."""

    dtype: str
    shape: tuple[int, ...]
    tanh: bool
    x: Drawn
    dy: Drawn
    threads: int = 1
    op = "gelu"

    def tensors(self) -> dict:
        return {"x": self.x.build(self.dtype, self.shape), "dy": self.dy.build(self.dtype, self.shape)}

    def run(self, tensors: dict, stats: torch.Tensor | None) -> dict:
        x, dy = tensors["x"], tensors["dy"]
        return {"y": OPS.gelu_fwd(x, self.tanh), "dx": OPS.gelu_bwd(dy, x, self.tanh, stats)}

    def ports(self, tensors: dict, results: dict) -> dict:
        return {"dy": tensors["dy"], "dx": results["dx"]}

    def compare(self, tensors: dict, results: dict) -> None:
        """Errors are a few roundings of x and dy. What is NaN or infinite is so in the places where F.gelu's float64 has it."""
        x, dy = (tensors[name].resolve_neg().double() for name in ("x", "dy"))
        eps, least, table = rounding(NAMES[self.dtype]), floor(NAMES[self.dtype]), TABLE_ERROR.get(self.dtype, 0.0)
        probability, slope = gelu_truth(x, self.tanh)
        check_like("y", results["y"], NAMES[self.dtype], self.shape)
        check_like("dx", results["dx"], NAMES[self.dtype], self.shape)
        check_within("y", results["y"], x * probability, 4 * eps * x.abs() + table + least, x.isfinite())
        terms = 8 + torch.zeros_like(x)
        if self.tanh and self.dtype == "float64":  # as PyTorch has it, from 1 - tanh^2, which cancels in the tails
            terms += 2 * x.abs().clamp(max=10) * (1 + 3 * TANH_CUBE * x.clamp(-10, 10).square())
        error = (terms * eps + table) * dy.abs() + 8 * least
        check_within("dx", results["dx"], dy * slope, error, x.isfinite() & dy.isfinite() & self.has_slope(x))
        self.compare_special(x, dy, slope, results)

    def has_slope(self, x: torch.Tensor) -> torch.Tensor:
        """Where PyTorch's own slope is a number: its tanh form makes NaN of an infinite x^2."""
        return x.square().isfinite() if self.tanh else torch.ones_like(x, dtype=torch.bool)

    def compare_special(self, x: torch.Tensor, dy: torch.Tensor, slope: torch.Tensor, results: dict) -> None:
        approximate = "tanh" if self.tanh else "none"
        y, dx = torch.nn.functional.gelu(x, approximate=approximate), slope * dy
        dx[~x.isfinite()] = math.nan
        special = ~x.isfinite()
        check_equal("y", results["y"].double()[special], y[special])
        # Where the slope is all but 0, a slope of 0 makes NaN of an infinite dy.
        known = (special | ~dy.isfinite()) & ~((slope.abs() < 1e-6) & dy.isinf()) & (special | self.has_slope(x))
        check_equal("dx", results["dx"].double()[known], dx[known])
        assert not results["dx"][special | ~dy.isfinite()].isfinite().any(), "dx: a number out of x or dy that is none"


def gelu_truth(x: torch.Tensor, tanh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """y / x and the slope, in float64, in forms in which nothing cancels or leaves its range."""
    v = x.clamp(-50, 50)
    if not tanh:
        probability = 0.5 * torch.special.erfc(-v * math.sqrt(0.5))
        return probability, probability + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    probability = torch.sigmoid(2 * TANH_FACTOR * (v + TANH_CUBE * v**3))
    other = torch.sigmoid(-2 * TANH_FACTOR * (v + TANH_CUBE * v**3))
    slope = probability * other * 2 * TANH_FACTOR * (1 + 3 * TANH_CUBE * v * v)
    return probability, probability + v * slope


@dataclass(frozen=True)
class Residual:
    """dx of two gradients, or of one."""

    dtype: str
    shape: tuple[int, ...]
    dskip: Drawn | None
    dbranch: Drawn | None
    threads: int = 1
    op = "residual"

    def tensors(self) -> dict:
        given = {"dskip": self.dskip, "dbranch": self.dbranch}
        return {name: d and d.build(self.dtype, self.shape) for name, d in given.items()}

    def run(self, tensors: dict, stats: torch.Tensor | None) -> dict:
        return {"dx": OPS.residual_bwd(tensors["dskip"], tensors["dbranch"], stats)}

    def ports(self, tensors: dict, results: dict) -> dict:
        return {name: d for name, d in {**tensors, **results}.items() if d is not None}

    def compare(self, tensors: dict, results: dict) -> None:
        dskip, dbranch = tensors["dskip"], tensors["dbranch"]
        expected = dskip + dbranch if dskip is not None and dbranch is not None else dbranch if dskip is None else dskip
        check_equal("dx", results["dx"], expected)


@dataclass(frozen=True)
class Probe:
    """The statistics of a gradient."""

    dtype: str
    shape: tuple[int, ...]
    dy: Drawn
    threads: int = 1
    op = "probe"

    def tensors(self) -> dict:
        return {"dy": self.dy.build(self.dtype, self.shape)}

    def run(self, tensors: dict, stats: torch.Tensor | None) -> dict:
        if stats is not None:
            OPS.probe_bwd(tensors["dy"], stats, 0)
        return {}

    def ports(self, tensors: dict, results: dict) -> dict:
        return tensors

    def compare(self, tensors: dict, results: dict) -> None:
        """There are no results."""


@st.composite
def gelus(draw: st.DrawFn) -> Gelu:
    dtype = draw(DTYPE_NAMES)
    around_one = values(dtype, (-2, 1))
    x, dy = draw(drawn(st.one_of(around_one, values(dtype)))), draw(drawn(values(dtype)))
    return Gelu(dtype, draw(shapes()), draw(st.booleans()), x, dy, draw(THREADS))


@st.composite
def residuals(draw: st.DrawFn) -> Residual:
    dtype = draw(DTYPE_NAMES)
    dskip, dbranch = (draw(drawn(values(dtype))) for _ in range(2))
    only = draw(st.sampled_from(("both", "both", "both", "skip", "branch")))
    dskip, dbranch = None if only == "branch" else dskip, None if only == "skip" else dbranch
    return Residual(dtype, draw(shapes()), dskip, dbranch, draw(THREADS))


@st.composite
def probes(draw: st.DrawFn) -> Probe:
    dtype = draw(DTYPE_NAMES)
    return Probe(dtype, draw(shapes()), draw(drawn(values(dtype))), draw(THREADS))
