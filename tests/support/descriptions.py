"""What the tests that every op shares know of each: the one place where a new op gets them all, by a description of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cases import Case, add_layer_norm_case, gelu_case, layer_norm_case, probe_case, residual_case
from lstm_cases import cell_case, layer_case, layer_inputs, plain_layer
from torch import nn

import gradkernels as gk
from gradkernels.testing import randn

HALF, FLOAT = torch.bfloat16, torch.float32
LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class Description:
    """`function` is the public one, `names` what it calls the inputs of a case, `more` what else it needs.

    make(*shape, dtype, scale): the case with everything an op has, `shape` rows of some columns. large: a shape for `make` that
    is shared by threads. variants: {what takes another way through the op: its case at a small shape, of a dtype}. module: a
    module and its inputs.
    """

    function: Callable
    names: tuple
    make: Callable
    large: tuple = (70_001,)
    more: Callable = lambda x: {}
    variants: dict = field(default_factory=dict)
    module: Callable | None = None

    def cases(self, dtype=FLOAT):
        """{name: case} of everything and of each variant, at small shapes."""
        return {"everything": self.make(3, 5, dtype=dtype), **{name: make(dtype) for name, make in self.variants.items()}}

    def call(self, **changes):
        """The public function on good arguments but for some."""
        case = self.make(3, 5)
        given = dict(zip(self.names, case.inputs, strict=True))
        return self.function(**{**given, **self.more(case.inputs[0]), **changes})


def gradient(shape, dtype, scale):
    """A random gradient times `scale`, which may be one that a dtype has no normal number for."""
    return randn(*shape, dtype=torch.float64).mul(scale).to(dtype)


def make_gelu(*shape, dtype=FLOAT, scale=1.0):
    return gelu_case(randn(*shape, dtype=dtype), gradient(shape, dtype, scale))


def make_probe(*shape, dtype=FLOAT, scale=1.0):
    return probe_case(randn(*shape, dtype=dtype), gradient(shape, dtype, scale))


def make_residual(*shape, dtype=FLOAT, scale=1.0):
    dy = gradient(shape, dtype, scale)
    return residual_case(randn(*shape, dtype=dtype), dy, 0.75 * dy.flip(0))


def columns(shape, dtype, num_dims=1):
    """A weight around 1 and a bias."""
    return randn(*shape[-num_dims:], dtype=dtype, mean=1.0), randn(*shape[-num_dims:], dtype=dtype)


def make_layer_norm(*shape, dtype=FLOAT, scale=1.0):
    return layer_norm_case(randn(*shape, dtype=dtype), *columns(shape, dtype), gradient(shape, dtype, scale))


def make_add_layer_norm(*shape, dtype=FLOAT, scale=1.0):
    x, residual, dy = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), gradient(shape, dtype, scale)
    return add_layer_norm_case(x, residual, *columns(shape, dtype), dy, dy.flip(0).neg())


def make_lstm_cell(rows, columns, units=7, dtype=FLOAT, scale=1.0):
    return cell_case(rows, columns, units, dtype=dtype, scale=scale)


def make_lstm_layer(rows, columns, B=2, units=5, P=3, dtype=FLOAT, scale=1.0):
    """`rows` steps and one more, of a layer with a projection; its twin is plain PyTorch."""
    T = rows + 1
    shapes = ((T, B, P or units), (B, P or units), (B, units))
    dys = tuple(gradient(shape, dtype, scale) for shape in shapes)
    return layer_case(layer_inputs(T, B, columns, units, P=P, dtype=dtype)[0], dys=dys, eager=plain_layer)


def norm_variants(make):
    """Those of LayerNorm and AddLayerNorm: make(shape, dtype, weight, bias, num_dims)."""

    def variant(*shape, num_dims=1, keep=("weight", "bias"), wide=False):
        def of(dtype) -> Case:
            weight, bias = columns(shape, FLOAT if wide and dtype.itemsize == 2 else dtype, num_dims)
            return make(shape, dtype, weight if "weight" in keep else None, bias if "bias" in keep else None, num_dims)

        return of

    return {
        "two dimensions": variant(3, 2, 5, num_dims=2),
        "weight alone": variant(3, 5, keep=("weight",)),
        "bias alone": variant(3, 5, keep=("bias",)),
        "no parameters": variant(3, 5, keep=()),
        "float32 parameters": variant(3, 5, wide=True),
        "one row": variant(4),  # nothing to add up: dbias is dy
    }


def plain_norm(shape, dtype, weight, bias, num_dims):
    return layer_norm_case(randn(*shape, dtype=dtype), weight, bias, num_dims=num_dims)


def add_norm(shape, dtype, weight, bias, num_dims, residual_dtype=None):
    residual = randn(*shape, dtype=residual_dtype or dtype)
    return add_layer_norm_case(randn(*shape, dtype=dtype), residual, weight, bias, num_dims=num_dims)


def wide_residual(dtype):
    """A float32 residual beside a 16-bit x."""
    return add_norm((3, 5), dtype, *columns((5,), dtype), 1, FLOAT if dtype.itemsize == 2 else dtype)


def lstm_variant(reverse=False, **options):
    def of(dtype) -> Case:
        return layer_case(*layer_inputs(3, 2, 4, 5, dtype=dtype, **options), reverse, eager=plain_layer)

    return of


DESCRIPTIONS = {
    "gelu": Description(
        gk.gelu,
        ("x",),
        make_gelu,
        variants={"tanh": lambda dtype: gelu_case(randn(3, 5, dtype=dtype), approximate="tanh")},
        module=lambda: (gk.GELU("tanh"), (randn(3, 5),)),
    ),
    "layer_norm": Description(
        gk.layer_norm,
        ("x", "weight", "bias"),
        make_layer_norm,
        large=(131, 509),
        more=lambda x: {"normalized_shape": x.shape[-1:]},
        variants=norm_variants(plain_norm),
        module=lambda: (gk.LayerNorm(5), (randn(3, 5),)),
    ),
    "add_layer_norm": Description(
        gk.add_layer_norm,
        ("x", "residual", "weight", "bias"),
        make_add_layer_norm,
        large=(131, 509),
        more=lambda x: {"normalized_shape": x.shape[-1:]},
        variants={**norm_variants(add_norm), "float32 residual": wide_residual},
        module=lambda: (gk.AddLayerNorm(5), (randn(3, 5), randn(3, 5))),
    ),
    "residual": Description(
        gk.residual_fork,
        ("x",),
        make_residual,
        variants={"one row": lambda dtype: residual_case(randn(4, dtype=dtype))},
        module=lambda: (gk.Residual(nn.Linear(5, 5)), (randn(3, 5),)),
    ),
    "lstm_layer": Description(
        gk.lstm_layer,
        ("x", "h0", "c0", *LSTM, "weight_hr"),
        make_lstm_layer,
        large=(2, 9, 50, 150, 0),
        variants={
            "not projected": lstm_variant(),
            "no bias": lstm_variant(bias=False),
            "packed": lstm_variant(lengths=(3, 1, 1)),
            "projected packed reverse": lstm_variant(lengths=(3, 2, 2), P=3, reverse=True),
            "one of all": lambda dtype: layer_case(layer_inputs(1, 1, 1, 1, dtype=dtype)[0], eager=plain_layer),
        },
        module=lambda: (gk.LSTM(5, 4, 2, bidirectional=True), (randn(3, 2, 5),)),
    ),
    "lstm_cell": Description(
        gk.lstm_cell,
        ("x", "h", "c", *LSTM),
        make_lstm_cell,
        large=(131, 9, 150),
        variants={"no bias": lambda dtype: cell_case(3, 2, 4, dtype=dtype, bias=False)},
        module=lambda: (gk.LSTMCell(5, 4), (randn(3, 5),)),
    ),
    "probe": Description(gk.probe, ("x",), make_probe),
}
