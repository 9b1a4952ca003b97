"""Subclasses of nn.LayerNorm and nn.GELU: the fused layer that computes what one of them computes, found by a trial.

The trial runs the subclass's `forward` and a fused one on small random inputs, with random parameters and buffers, forward
and backward, and compares every number. Only a copy runs: parameters, buffers, `.grad`, hooks, mode and torch's random
numbers stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gradkernels.nn import GELU, FusedModule, LayerNorm


class _CastLayerNorm(LayerNorm):
    """A LayerNorm that gives its input's dtype in an autocast region too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(input.dtype)


class _LayerNorm2d(LayerNorm):
    """A LayerNorm over the channels of (batch, channels, height, width), or of any other number of places."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class _CastLayerNorm2d(_LayerNorm2d):
    """Both of it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(input.dtype)


CANDIDATES = {nn.LayerNorm: (LayerNorm, _CastLayerNorm, _LayerNorm2d, _CastLayerNorm2d), nn.GELU: (GELU,)}
WIDENING = (LayerNorm, _LayerNorm2d)  # those whose result is float32 in an autocast region of a GPU
OTHERWISE = "its forward computes something else"
# Longer rows take too long to try, shorter ones are all rounding: their dx is the difference of equal numbers.
ROW_LENGTHS = range(3, 2**16 + 1)
OURS = ("enter", "on_forward", "parts", "stats", "stats_names", "PORTS", "TWIN")  # what a fused class adds to a layer

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# Dtypes of parameters and input that are tried after the layer's own, for a layer may be cast later.
PAIRS = ((SINGLE, SINGLE), (SINGLE, HALF), (HALF, HALF))


class _Case(NamedTuple):
    """One trial: the input's shape and size, dtypes, mode, and whether in an autocast region of a GPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    input_dtype: torch.dtype
    scale: float = 1.0
    training: bool = True
    autocast: bool = False


class _Failure(NamedTuple):
    """How a fused class is not the layer: 0, other numbers; 1, another kind of result; 2, none. The least tells most."""

    kind: int
    difference: float
    reason: str


class _Autocast(TorchFunctionMode):
    """What an autocast region of a GPU does with layer_norm, on any device; counts the calls of it and of gelu.

    It may do something to other functions too: so what one makes of a forward is known only where it calls these.
    """

    calls = 0

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.calls += func in (nn.functional.layer_norm, torch.layer_norm, nn.functional.gelu)
        if func in (nn.functional.layer_norm, torch.layer_norm) and torch.is_autocast_enabled(self.device_type):
            args = tuple(_upcast(value) for value in args)
            kwargs = {name: _upcast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _upcast(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype.itemsize == 2 else value


def fused_subclass(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The class that makes a subclass of nn.LayerNorm or nn.GELU a fused layer, or None with the reason."""
    reason = _obstacle(module)
    if reason:
        return None, reason
    failures = []
    try:
        with _isolated(_device(module)):
            for fused in next(candidates for twin, candidates in CANDIDATES.items() if isinstance(module, twin)):
                cls = mixed(fused, type(module))
                failure = _first_failure(module, fused, cls)
                if failure is None:
                    return cls, ""
                failures.append(failure)
    except Exception as error:
        return None, f"a trial of its forward was not possible: {_first_line(error)}"
    return None, min(failures).reason


@functools.cache
def mixed(fused: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's class that is also the fused one, and computes with it; its forward takes one argument."""
    name = _argument(cls)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FusedModule):  # kept by somebody from before `revert`
            return type(self).forward(self, *args, **kwargs)
        return fused.forward(self, *(args or (kwargs.pop(name),)), **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _blank, (fused, cls), self.__getstate__()

    namespace = {"TWIN": cls, "forward": forward, "extra_repr": cls.extra_repr, "__reduce_ex__": reduce}
    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (fused, cls), namespace)


def _blank(fused: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    """What copies and pickles fill."""
    return FusedModule.__new__(mixed(fused, cls))


def _argument(cls: type[nn.Module]) -> str | None:
    """The name of a forward's only argument beside self; None where there are others."""
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    only = len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return parameters[0].name if only else None


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module._parameters.values() if parameter is not None}


def _obstacle(module: nn.Module) -> str | None:
    """Why no trial can be made, or none would tell enough."""
    tensors, dtypes = _tensors(module), _dtypes(module)
    taken = next((name for name in OURS if hasattr(module, name)), None)
    numel = math.prod(getattr(module, "normalized_shape", (4,)))
    other = next((type(tensor) for tensor in tensors if type(tensor) not in (torch.Tensor, nn.Parameter)), None)
    if any(tensor.is_meta for tensor in tensors):
        return "on the meta device its forward cannot be tried: convert it where it has values"
    if numel not in ROW_LENGTHS:
        return f"a subclass is tried with {ROW_LENGTHS[0]} to {ROW_LENGTHS[-1]} elements per row, not with {numel}"
    if taken is not None:
        return f"a subclass with an attribute {taken} of its own"
    if other is not None:
        return f"a subclass whose parameters are {other.__name__}s"
    if len(dtypes) > 1 or not dtypes <= {HALF, torch.float16, SINGLE, DOUBLE}:
        return f"a subclass with parameters of {', '.join(sorted(str(dtype) for dtype in dtypes))}"
    if next(module.children(), None) is not None:
        return "a subclass that holds other layers"
    if _argument(type(module)) is None:
        return "its forward takes other arguments than one tensor"
    return None


def _isolated(device: torch.device) -> ExitStack:
    """A context with gradients, without autocast, that gives torch's random numbers back."""
    stack = ExitStack()
    devices = [] if device.type == "cpu" else [device]
    stack.enter_context(torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type))
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    if torch.amp.is_autocast_available(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack


def _cases(module: nn.Module) -> Iterator[_Case]:
    own = _own_pair(module)
    # An input with a variance near eps, where another eps shows, and a large one. In float16 too dx must be finite.
    smallest = 1e-6 if own[0] is torch.float16 else 1e-10
    scales = (max(getattr(module, "eps", 0.01), smallest) ** 0.5, 30.0)
    for shape in _shapes(module):
        yield _Case(shape, *own)
        yield _Case(shape, *own, training=False)
        yield from (_Case(shape, *own, scale) for scale in scales)
    # What has no parameters may get an input of any dtype.
    pairs = PAIRS if _dtypes(module) else (*PAIRS, (SINGLE, DOUBLE))
    yield from (_Case(shape, *pair) for pair in pairs if pair != own for shape in _shapes(module))
    if torch.amp.is_autocast_available(_device(module).type):
        dtype = SINGLE if own[0] is DOUBLE else own[0]
        for input_dtype in (SINGLE, HALF):
            yield from (_Case(shape, dtype, input_dtype, autocast=True) for shape in _shapes(module))


def _own_pair(module: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    return (next(iter(_dtypes(module)), SINGLE),) * 2


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Small inputs of several ranks, two with the channels in the second place; no size above 1 is that of the channels."""
    last = tuple(getattr(module, "normalized_shape", (4,)))
    first, second = [size for size in (3, 2, 5) if size != last[0]][:2]
    shapes = [(first, *last), (second, first, *last), (second, 1, first, *last), last]
    return [*shapes, (second, *last, first), (second, *last, 1, first)] if len(last) == 1 else shapes


def _first_failure(module: nn.Module, fused: type, cls: type) -> _Failure | None:
    """The first case in which the fused class does not do what the layer does."""
    own, answered, refusal = _own_pair(module), False, ""
    for seed, case in enumerate(_cases(module)):
        if not answered and (case.dtype, case.input_dtype) != own:
            break
        try:
            expected = _run(module, type(module), case, seed)
        except Exception as error:
            refusal = refusal or _first_line(error)
            continue
        answered = True
        written = expected.pop("written", None)
        if written:
            return _Failure(1, 0, f"its forward does more than compute: it writes to {written}")
        if case.autocast and not expected.pop("calls"):
            return _Failure(1, 0, "its forward does not call torch.nn.functional: what autocast makes of it is not known")
        try:
            got = _run(module, cls, case._replace(dtype=SINGLE, input_dtype=SINGLE) if case.autocast else case, seed)
        except Exception as error:
            return _Failure(
                2, 0, f"its forward takes an input of shape {case.shape} that a fused one does not: {_first_line(error)}"
            )
        if case.autocast:
            got["y"] = got["y"].to(SINGLE if fused in WIDENING else case.input_dtype)
        failure = _difference(got, expected, min(case.dtype, case.input_dtype, key=lambda dtype: dtype.itemsize))
        if failure is not None:
            return failure
    return None if answered else _Failure(2, 0, f"its forward takes none of the trial inputs: {refusal}")


def _run(module: nn.Module, cls: type, case: _Case, seed: int) -> dict[str, Any]:
    """y and all gradients of a copy of the layer in class `cls`; under autocast, y and the number of calls.

    Of the layer's own class also what its forward has written to.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = _device(module)
    x = (_random(case.shape, generator) * case.scale).to(device, case.input_dtype)
    layer = _copy(module, cls, case, generator)
    if case.autocast and cls is type(module):
        with torch.autocast(device.type, HALF), _Autocast(device.type) as mode:
            return {"y": layer.forward(x), "calls": mode.calls}
    before = _contents(layer)
    y = layer.forward(x.requires_grad_())
    if case.autocast:
        return {"y": y}
    written = {} if cls is not type(module) else {"written": _changed(before, _contents(layer))}
    inputs = {"dx": x, **{f"d{name}": value for name, value in layer._parameters.items() if value is not None}}
    dy = _random(y.shape, generator).to(y)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy, allow_unused=True)
    return {"y": y, **dict(zip(inputs, gradients, strict=True)), **written}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=SINGLE)


def _copy(module: nn.Module, cls: type, case: _Case, generator: torch.Generator) -> nn.Module:
    """The layer in class `cls`, with random parameters and buffers; what a forward may write is not shared."""

    def random(tensor: torch.Tensor | None, gradient: bool) -> torch.Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor if tensor is None else tensor.clone()
        value = 1 + _random(tensor.shape, generator) / 2
        return value.to(tensor.device, case.dtype if gradient else tensor.dtype).requires_grad_(gradient)

    layer = object.__new__(type(module))
    for name, value in module.__dict__.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().clone()
        layer.__dict__[name] = value.copy() if isinstance(value, dict | list | set) else value
    layer.__dict__["training"] = case.training
    layer.__dict__["_parameters"] = {name: random(value, True) for name, value in module._parameters.items()}
    layer.__dict__["_buffers"] = {name: random(value, False) for name, value in module._buffers.items()}
    layer.__class__ = cls
    return layer


def _contents(layer: nn.Module) -> dict[str, Any]:
    """What a forward may write to: attributes, the sizes of containers, the values of tensors."""
    contents = {**layer.__dict__, **layer._parameters, **layer._buffers}
    for name, value in contents.items():
        if isinstance(value, torch.Tensor):
            contents[name] = value.detach().clone()
        elif isinstance(value, dict | list | set):
            contents[name] = len(value)
    return contents


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of something that was changed or added."""

    def same(old: Any, new: Any) -> bool:
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
            return torch.equal(old, new)
        return old is new or (isinstance(new, int | float | str) and old == new)

    return next((name for name, value in after.items() if name not in before or not same(before[name], value)), None)


def _difference(got: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype) -> _Failure | None:
    """The first result that is not equal within rounding to dtype."""
    allowed = (8 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps
    for name, want in expected.items():
        have = got[name]
        if have is None and want is None:
            continue
        for what, of in (("dtype", _dtype), ("shape and strides", _shape)):
            if of(have) != of(want):
                return _Failure(1, 0, f"{OTHERWISE}: {name} has {what} {of(want)} on a trial input, not {of(have)}")
        have, want = (value.detach().cpu().double() for value in (have, want))
        difference = (have - want).abs().max().item()
        if not difference <= allowed * want.abs().max().item():
            return _Failure(0, difference, f"{OTHERWISE}: {name} differs by {difference:.2g} on a trial input")
    return None


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__


def _shape(value: torch.Tensor) -> tuple:
    return tuple(value.shape), value.stride()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]
