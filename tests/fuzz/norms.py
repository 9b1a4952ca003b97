"""Examples of layer_norm and add_layer_norm. The truth is the formula in long double, which no float64 overflows."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fuzz.compare import check_equal, check_like, check_within, floor, rounding, sum_error
from fuzz.tensors import DTYPE_NAMES, NAMES, THREADS, Drawn, drawn, sizes, values
from gradkernels.testing import accumulator

OPS = torch.ops.gradkernels
FLAT = ("contiguous", "offset", "sliced", "expanded", "negative")  # layouts of a weight
LANES = 4  # of a row's sums, on the instruction set with the fewest
FINITE = ("zero", "subnormal", "smallest")


def long(t: torch.Tensor | None, *shape: int) -> np.ndarray | None:
    """The tensor in long double, or None."""
    return t if t is None else t.resolve_neg().double().numpy().astype(np.longdouble).reshape(shape)


def plain(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Long doubles as a float64 tensor of like's shape."""
    return torch.from_numpy(np.ascontiguousarray(values.astype(np.float64))).reshape(like.shape)


@dataclass
class Truth:
    """A norm of rows h in long double: each result, the error it may have, and where nothing leaves the accumulator's range."""

    h: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    dy: np.ndarray
    dresidual: np.ndarray
    eps: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Row statistics, and how far off x_hat may be: a rounding of h in standard deviations, which also shifts rstd."""
        count = max(self.h.shape[1], 1)
        centred = self.h - self.h.sum(1, keepdims=True) / count
        square_sum = np.square(centred).sum(1, keepdims=True)
        self.rstd = 1 / np.sqrt(square_sum / count + self.eps)
        self.x_hat = centred * self.rstd
        largest_h = np.abs(self.h).max(1, keepdims=True, initial=0)
        self.offset = 1 + largest_h * self.rstd
        self.size = (1 + np.abs(self.x_hat).max(1, keepdims=True, initial=0)) * self.offset
        self.limit = float(torch.finfo(accumulator(self.dtype)).max) / 64
        # Where the mean is off by a rounding of h, so is each h - mean, whose squares are summed.
        off = np.square(rounding(self.dtype) * largest_h) * count
        sizes = (np.abs(self.h).sum(1, keepdims=True), square_sum, largest_h * self.rstd, off)
        self.row_is_safe = ~np.isfinite(sizes[0]) | np.logical_and.reduce([size <= self.limit for size in sizes])

    def y(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(exact, error, where) of y."""
        exact = self.x_hat * self.weight + self.bias
        parts = np.abs(self.weight) * self.size + np.abs(self.bias) + np.abs(exact)
        error = sum_error(self.dtype, self.h.shape[1], LANES) * parts
        least = floor(self.dtype) * 8 * (1 + self.rstd) * (1 + np.abs(self.weight))
        return exact, error + least, self.row_is_safe

    def dx(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(exact, error, where) of dx."""
        g, count = self.dy * self.weight, max(self.h.shape[1], 1)
        product = g * self.x_hat
        mean = lambda values: values.sum(1, keepdims=True) / count  # noqa: E731
        exact = self.rstd * (g - mean(g) - self.x_hat * mean(product)) + self.dresidual
        large_g, large_product = mean(np.abs(g)), mean(np.abs(product))
        parts = (np.abs(g) + large_g) * self.offset + (1 + np.abs(self.x_hat)) * (large_g + large_product) * self.size
        error = sum_error(self.dtype, count, LANES) * (self.rstd * parts + np.abs(self.dresidual))
        least = floor(self.dtype) * 8 * (1 + self.rstd) * (1 + np.abs(self.weight)) * np.square(self.size)
        largest = (large_g + large_product + np.abs(g).max(1, keepdims=True, initial=0)) * count * self.size * (1 + self.rstd)
        return exact, error + least, self.row_is_safe & ~(np.isfinite(largest) & (largest > self.limit))

    def columns(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(exact, error, where) of dweight and dbias."""
        found, M = {}, self.h.shape[0]
        where = np.asarray(self.row_is_safe.all())
        for name, factor, size in (("dweight", self.x_hat, self.size), ("dbias", np.ones_like(self.x_hat), 1)):
            exact, parts = (self.dy * factor).sum(0), (np.abs(self.dy) * size).sum(0)
            least = floor(self.dtype) * (M + 1) * 4
            safe = ~(np.isfinite(parts) & (parts > self.limit))
            found[name] = (exact, sum_error(self.dtype, M) * parts + least, safe & (where if name == "dweight" else True))
        return found


def check_part(name: str, ours: torch.Tensor, part: tuple) -> None:
    """One of the Truth's results."""
    exact, error, where = (np.broadcast_to(value, part[0].shape) for value in part)
    check_within(name, ours, plain(exact, ours), plain(error, ours), torch.from_numpy(where.copy()).reshape(ours.shape))


@dataclass(frozen=True)
class LayerNorm:
    """y, dx, dweight and dbias over the last `num_dims` dimensions. parameters: the dtype of weight and bias."""

    dtype: str
    shape: tuple[int, ...]
    num_dims: int
    parameters: str
    x: Drawn
    dy: Drawn
    weight: Drawn | None
    bias: Drawn | None
    wanted: tuple[bool, bool] = (True, True)  # dweight, dbias
    eps: float = 1e-5
    threads: int = 1
    op = "layer_norm"

    def tensors(self) -> dict:
        normalized = self.shape[-self.num_dims :]
        built = {name: getattr(self, name).build(self.dtype, self.shape) for name in ("x", "dy")}
        for name in ("weight", "bias"):
            given = getattr(self, name)
            built[name] = given and given.build(self.parameters, normalized)
        return built

    def run(self, tensors: dict, stats: torch.Tensor | None) -> dict:
        x, dy, weight, bias = (tensors[name] for name in ("x", "dy", "weight", "bias"))
        y, mean, rstd = OPS.layer_norm_fwd(x, weight, bias, self.num_dims, self.eps)
        gradients = OPS.layer_norm_bwd(dy, x, mean, rstd, weight, bias, self.num_dims, [True, *self.wanted], stats)
        return dict(zip(("y", "mean", "rstd", "dx", "dweight", "dbias"), (y, mean, rstd, *gradients), strict=True))

    def ports(self, tensors: dict, results: dict) -> dict:
        return {"dy": tensors["dy"], "dx": results["dx"], **column_ports(self, results)}

    def compare(self, tensors: dict, results: dict) -> None:
        compare_norm(self, tensors["x"], None, tensors, results)


def column_ports(example: Any, results: dict) -> dict:
    """The gradients of the parameters that are there and wanted."""
    given = zip(("dweight", "dbias"), (example.weight, example.bias), example.wanted, strict=True)
    return {name: results[name] for name, parameter, want in given if parameter is not None and want}


def compare_norm(example: Any, h: torch.Tensor, dresidual: torch.Tensor | None, tensors: dict, results: dict) -> None:
    """Every result of a norm of h, the sum as it was stored."""
    normalized = example.shape[-example.num_dims :]
    N = math.prod(normalized)
    M = math.prod(example.shape[: -example.num_dims])
    weight = np.ones(N, np.longdouble) if tensors["weight"] is None else long(tensors["weight"], N)
    bias = np.zeros(N, np.longdouble) if tensors["bias"] is None else long(tensors["bias"], N)
    dy = np.zeros((M, N), np.longdouble) if tensors["dy"] is None else long(tensors["dy"], M, N)
    beside = np.zeros((M, N), np.longdouble) if dresidual is None else long(dresidual, M, N)
    truth = Truth(long(h, M, N), weight, bias, dy, beside, example.eps, h.dtype)
    check_like("y", results["y"], NAMES[example.dtype], example.shape)
    check_like("dx", results["dx"], h.dtype, example.shape)
    check_part("y", results["y"], truth.y())
    check_part("dx", results["dx"], truth.dx())
    there, parts = column_ports(example, results), truth.columns()
    for name in ("dweight", "dbias"):
        if name in there:
            check_like(name, there[name], NAMES[example.parameters], normalized)
            check_part(name, there[name], parts[name])
        else:
            assert results[name].numel() == 0, f"{name}: not asked for"


@dataclass(frozen=True)
class AddLayerNorm:
    """The norm of residual + x, and its gradients. residual_dtype: float32 beside a 16-bit x, or x's."""

    dtype: str
    residual_dtype: str
    shape: tuple[int, ...]
    num_dims: int
    parameters: str
    x: Drawn
    residual: Drawn
    dy: Drawn | None
    dnew_residual: Drawn | None
    weight: Drawn | None
    bias: Drawn | None
    wanted_dx: tuple[bool, bool] = (True, True)  # dx, dresidual
    wanted: tuple[bool, bool] = (True, True)  # dweight, dbias
    eps: float = 1e-5
    threads: int = 1
    op = "add_layer_norm"

    def tensors(self) -> dict:
        dtypes = {"x": self.dtype, "residual": self.residual_dtype, "dy": self.dtype, "dnew_residual": self.residual_dtype}
        built = {}
        for name, dtype in {**dtypes, "weight": self.parameters, "bias": self.parameters}.items():
            given = getattr(self, name)
            shape = self.shape if name in dtypes else self.shape[-self.num_dims :]
            built[name] = given and given.build(dtype, shape)
        return built

    def run(self, tensors: dict, stats: torch.Tensor | None) -> dict:
        x, residual, dy, dnew_residual, weight, bias = tensors.values()
        y, h, mean, rstd = OPS.add_layer_norm_fwd(x, residual, weight, bias, self.num_dims, self.eps)
        last = (weight, bias, self.num_dims, NAMES[self.dtype], [*self.wanted_dx, *self.wanted], stats)
        dx, dresidual, *of_columns = OPS.add_layer_norm_bwd(dy, dnew_residual, h, mean, rstd, *last)
        if self.shared:
            dx, dresidual = dresidual, dx
        names = ("y", "new_residual", "mean", "rstd", "dx_downcast", "dx", "dweight", "dbias")
        return dict(zip(names, (y, h, mean, rstd, dx, dresidual, *of_columns), strict=True))

    @property
    def shared(self) -> bool:
        """Whether one gradient is that of x and of the residual, and comes as that of x."""
        return self.wanted_dx == (True, False) and self.dtype == self.residual_dtype

    def ports(self, tensors: dict, results: dict) -> dict:
        came = {name: tensors[name] for name in ("dy", "dnew_residual") if tensors[name] is not None}
        return {**came, "dx": results["dx"], **column_ports(self, results)}

    def compare(self, tensors: dict, results: dict) -> None:
        h = tensors["residual"] + tensors["x"]
        check_equal("new_residual", results["new_residual"], h.to(NAMES[self.residual_dtype]))
        if self.wanted_dx[0] and not self.shared:
            check_equal("dx_downcast", results["dx_downcast"], results["dx"].to(NAMES[self.dtype]))
        else:
            assert results["dx_downcast"].numel() == 0, "dx: not asked for"
        compare_norm(self, results["new_residual"], tensors["dnew_residual"], tensors, results)


@st.composite
def norm_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """(shape, num_dims): rows of up to 8193 columns, and so many of them that there is work for three threads at times."""
    kind = draw(st.sampled_from(("matrix", "matrix", "thin", "row", "deep", "two")))
    if kind == "thin":
        return (draw(st.sampled_from((512, 2048, 4097, 9000))), draw(st.integers(1, 9))), 1
    N = draw(sizes(8200))
    most = max(1, 40000 // max(N, 1))
    M = draw(st.sampled_from((0, 1, 1, 2, 3, 4, 5, 8, 13, 64, 300, 2000)))
    if kind == "row":
        return (N,), 1
    if kind == "two":
        return (min(M, most), draw(st.integers(0, 3)), N), 2
    return ((2, min(M, most // 2), N), 1) if kind == "deep" else ((min(M, most), N), 1)


@st.composite
def norm_words(draw: st.DrawFn) -> dict:
    """What both norms are described by."""
    dtype = draw(DTYPE_NAMES)
    (shape, num_dims), parameters = draw(norm_shapes()), dtype
    if NAMES[dtype].itemsize == 2:
        parameters = draw(st.sampled_from((dtype, "float32")))
    parameter = st.none() | drawn(values(parameters, (-3, 3), (*FINITE, "nan", "signalling")), FLAT)
    return {
        "dtype": dtype,
        "shape": shape,
        "num_dims": num_dims,
        "parameters": parameters,
        "x": draw(drawn(st.one_of(values(dtype, (-2, 2)), values(dtype)))),
        "dy": draw(drawn(st.one_of(values(dtype, (-6, 2)), values(dtype)))),
        "weight": draw(parameter),
        "bias": draw(parameter),
        "wanted": (draw(st.sampled_from((True, True, False))), draw(st.sampled_from((True, True, False)))),
        "eps": draw(st.sampled_from((1e-5, 1e-5, 1e-12, 1e-3))),
        "threads": draw(THREADS),
    }


def layer_norms() -> st.SearchStrategy:
    """Examples of layer_norm."""
    return norm_words().map(lambda words: LayerNorm(**words))


@st.composite
def add_layer_norms(draw: st.DrawFn) -> AddLayerNorm:
    words = draw(norm_words())
    wide = words["dtype"]
    if NAMES[wide].itemsize == 2:
        wide = draw(st.sampled_from((wide, "float32")))
    if wide == "float32" and words["parameters"] != "float32":
        words["parameters"] = words["dtype"]
    residual = draw(drawn(st.one_of(values(wide, (-2, 2)), values(wide))))
    dnew_residual = draw(drawn(values(wide)))
    only = draw(st.sampled_from(("both", "both", "both", "dy", "dnew_residual")))
    words["dy"] = None if only == "dnew_residual" else words["dy"]
    last = {"residual_dtype": wide, "residual": residual, "dnew_residual": None if only == "dy" else dnew_residual}
    return AddLayerNorm(**words, **last, wanted_dx=draw(st.tuples(st.booleans(), st.booleans())))
