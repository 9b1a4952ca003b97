"""One case an op: our function, its twin in plain PyTorch, inputs, gradients, and what each port should see."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import gradkernels as gk
from gradkernels.ops import OPS
from gradkernels.testing import accumulator, largest, norm_terms

DEFAULT = object()


@dataclass(frozen=True)
class Case:
    """`function(*inputs, stats=...)` is ours, `eager(*inputs)` the twin; `seen(gradients)` is {port: gradient}.

    `exact(*inputs)` is the truth when run in float64: `eager`, unless something is rounded on the way by definition.
    `again(inputs, dys)` is the same case of other tensors; a gradient that is None belongs to an output that is not used.
    """

    op: str
    function: Callable
    eager: Callable
    inputs: tuple
    dys: tuple
    seen: Callable
    terms: dict = field(default_factory=dict)
    exact: Callable | None = None
    again: Callable | None = None

    @property
    def ports(self):
        return OPS[self.op].PORTS


def there(ports):
    """The ports that a gradient came through."""
    return {port: gradient for port, gradient in ports.items() if gradient is not None}


def gelu_case(x, dy=None, approximate="none"):
    dy = torch.randn_like(x) if dy is None else dy

    def function(x, stats=None):
        return gk.gelu(x, approximate, stats=stats)

    def eager(x):
        return F.gelu(x, approximate=approximate)

    def again(inputs, dys):
        return gelu_case(*inputs, *dys, approximate)

    terms = gelu_terms(x, dy)
    return Case("gelu", function, eager, (x,), (dy,), lambda d: {"dy": dy, "dx": d[0]}, terms, again=again)


def gelu_terms(x, dy):
    """What eager's float64, which is the truth, is made of: 1 + erf and 1 - tanh^2 cancel in the left tail."""
    finer = torch.finfo(torch.float64).eps / torch.finfo(accumulator(x.dtype)).eps
    x, dy = x.detach().double(), dy.double()
    return {"y0": finer * largest(x), "d0": finer * largest(dy * (1 + x.abs() * (1 + 0.134145 * x.square())))}


def size_of_norm(x, weight, dy, num_dims, eps, residual=None):
    """norm_terms. In float64 eager is the truth, and its backward expands (x - mean), which cancels for a large mean."""
    size = norm_terms(x if residual is None else residual.double() + x.double(), weight, dy, num_dims, eps)
    if x.dtype is torch.float64:
        size["dx"] *= size["offset"]
    return size


def layer_norm_case(x, weight=None, bias=None, dy=None, num_dims=1, eps=1e-5):
    dy = torch.randn_like(x) if dy is None else dy
    shape = tuple(x.shape[-num_dims:])

    def function(x, weight, bias, stats=None):
        return gk.layer_norm(x, shape, weight, bias, eps, stats=stats)

    def eager(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)

    def seen(d):
        return there({"dy": dy, "dx": d[0], "dweight": d[1], "dbias": d[2]})

    def again(inputs, dys):
        return layer_norm_case(*inputs, *dys, num_dims, eps)

    size = size_of_norm(x, weight, dy, num_dims, eps)
    terms = {"y0": size["y"], "d0": size["dx"], "d1": size["dweight"], "d2": size["dbias"]}
    return Case("layer_norm", function, eager, (x, weight, bias), (dy,), seen, terms, again=again)


def add_layer_norm_case(x, residual, weight=None, bias=None, dy=DEFAULT, dnew_residual=DEFAULT, num_dims=1, eps=1e-5):
    dy = torch.randn_like(x) if dy is DEFAULT else dy
    dnew_residual = torch.randn_like(residual) if dnew_residual is DEFAULT else dnew_residual
    shape = tuple(x.shape[-num_dims:])

    def function(x, residual, weight, bias, stats=None):
        return gk.add_layer_norm(x, residual, shape, weight, bias, eps, stats=stats)

    def eager(x, residual, weight, bias):
        h = residual + x
        columns = [p if p is None else p.to(torch.promote_types(p.dtype, h.dtype)) for p in (weight, bias)]
        return F.layer_norm(h, shape, *columns, eps).to(x.dtype), h

    def exact(x, residual_float32, weight, bias):
        """y is the norm of new_residual as stored, in residual's dtype."""
        h = residual_float32 + x
        h = h + (h.detach().to(residual.dtype).to(h.dtype) - h.detach())
        return F.layer_norm(h, shape, weight, bias, eps), h

    def seen(d):
        return there({"dy": dy, "dnew_residual": dnew_residual, "dx": d[1], "dweight": d[2], "dbias": d[3]})

    def again(inputs, dys):
        return add_layer_norm_case(*inputs, *dys, num_dims, eps)

    size = size_of_norm(x, weight, dy, num_dims, eps, residual)
    dx = size["dx"] + largest(dnew_residual)
    terms = {"y0": size["y"], "d0": dx, "d1": dx, "d2": size["dweight"], "d3": size["dbias"]}
    inputs = (x, residual, weight, bias)
    return Case("add_layer_norm", function, eager, inputs, (dy, dnew_residual), seen, terms, exact, again)


def residual_case(x, dskip=DEFAULT, dbranch=DEFAULT):
    dskip = torch.randn_like(x) if dskip is DEFAULT else dskip
    dbranch = torch.randn_like(x) if dbranch is DEFAULT else dbranch

    def function(x, stats=None):
        return gk.residual_fork(x, stats=stats)

    def eager(x):
        return x.view_as(x), x.view_as(x)

    def seen(d):
        return there({"dskip": dskip, "dbranch": dbranch, "dx": d[0]})

    terms = {"d0": largest(dskip) + largest(dbranch)}
    again = lambda inputs, dys: residual_case(*inputs, *dys)  # noqa: E731
    return Case("residual", function, eager, (x,), (dskip, dbranch), seen, terms, again=again)


def probe_case(x, dy=None):
    dy = torch.randn_like(x) if dy is None else dy

    def function(x, stats=None):
        return gk.probe(1 * x, stats=stats)

    again = lambda inputs, dys: probe_case(*inputs, *dys)  # noqa: E731
    return Case("probe", function, lambda x: 1 * x, (x,), (dy,), lambda d: {"dy": dy}, again=again)


def make_case(op, *shape, dtype=torch.float32, scale=1.0):
    """A case with everything an op has: random inputs, weight and bias, and gradients times `scale`."""
    from descriptions import DESCRIPTIONS

    return DESCRIPTIONS[op].make(*shape, dtype=dtype, scale=scale)
