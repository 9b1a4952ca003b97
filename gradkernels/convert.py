"""Swap supported layers of an existing model for the fused ones, in place, and back."""

from __future__ import annotations

import re
import warnings
from types import MethodType
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gradkernels.integrations import timm, transformers
from gradkernels.integrations.subclasses import CANDIDATES, fused_subclass, mixed
from gradkernels.nn import GELU, LSTM, FusedModule, LayerNorm, LSTMCell
from gradkernels.nn.fused_module import NAMESPACE, remove_hooks

FUSED = {layer.TWIN: layer for layer in (GELU, LayerNorm, LSTM, LSTMCell)}
GELU_CLASSES = {**timm.GELU_CLASSES, **transformers.GELU_CLASSES}
ORIGINAL = "_gradkernels_original_class"
LAYER_NAME = re.compile(r"(Norm(Act)?\d*d?(Fp32)?|GELU|GeLU|Activation|LSTM|LSTMCell|GRU|GRUCell|RNN|RNNCell)$")
LAYER_MODULES = ("activation", "normalization", "batchnorm", "instancenorm", "rnn")


class Uncovered(NamedTuple):
    """A norm, activation or recurrent layer that stays what it is."""

    site: str
    layer: str
    reason: str


def check_module(function: str, model: nn.Module) -> None:
    """Raises TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def convert(model: nn.Module) -> nn.Module:
    """`model` itself, with each layer that has a fused twin turned into it: nn.LayerNorm, nn.GELU, transformers' and timm's
    GELUs, nn.LSTM (whose twin is no subclass of it, see `gradkernels.nn.recurrent`) and nn.LSTMCell.

    A subclass of nn.LayerNorm or nn.GELU is tried first: its forward and a fused one, or a fused one over the channels of
    (batch, channels, ...), run on small random inputs, forward and backward. Where all numbers are equal within rounding, and
    its forward writes to nothing, the layer becomes fused. Every layer but nn.LSTM stays an instance of its class.

    Only the class of a layer changes: its parameters, buffers, hooks, names, place in state_dict and in optimizers stay.
    A subclass that computes something else, a parametrized layer, one on the meta device or with very long rows that would
    have to be tried, or one whose `forward` was replaced is left alone: `uncovered(model)` lists them with the reason. Layers
    that are already fused stay as they are. `revert` undoes it.
    """
    check_module("convert", model)
    for module in model.modules():
        fused, attributes, _ = _fused_class(module)
        if fused is not None:
            attributes = {**attributes, "__module__": NAMESPACE}
            module.__dict__.pop("forward", None)  # its class's own: see _replaced
            object.__setattr__(module, ORIGINAL, (type(module), tuple(attributes)))
            module.__dict__.update(attributes)
            module.__class__ = fused
    return model


def revert(model: nn.Module) -> nn.Module:
    """`model` itself, with every layer that `convert` changed back in its original class, and measured by no Watch.

    A layer that somebody else has changed since so that a swap would break it (parametrize, weight_norm, another class,
    zoneout) stays fused; one warning names these layers. Reverted again after that change was taken back, they follow. A
    fused forward that somebody keeps, a wrapper on the instance say, calls that of the original class from then on.
    """
    check_module("revert", model)
    left = []
    for name, module in model.named_modules():
        remove_hooks(module)
        if ORIGINAL not in module.__dict__:
            continue
        original, attributes = vars(module)[ORIGINAL]
        for ours in ("on_forward", *module.stats_names()) if isinstance(module, FusedModule) else ():
            module.__dict__.pop(ours, None)
        reason = _changed_since(module)
        if reason is not None:
            left.append(f"{name or '(the model)'} ({type(module).__name__}): {reason}")
            continue
        if not _replaced(module):
            module.__dict__.pop("forward", None)
        del module.__dict__[ORIGINAL]
        for attribute in attributes:
            module.__dict__.pop(attribute, None)
        module.__class__ = original
    if left:
        warnings.warn(f"revert: layers that somebody else has changed stay as they are: {'; '.join(left)}", stacklevel=2)
    return model


def uncovered(model: nn.Module) -> list[Uncovered]:
    """The norms, activations and recurrent layers of `model` for which there is no fused twin, with the reason."""
    result = []
    for name, module in model.named_modules():
        if isinstance(module, FusedModule) or "parametrizations" in name.split("."):
            continue
        cls = type(module)
        torch_layer = cls.__module__.startswith("torch.nn.modules.") and cls.__module__.endswith(LAYER_MODULES)
        leaf = next(module.children(), None) is None
        if isinstance(module, tuple(FUSED)) or (leaf and (torch_layer or LAYER_NAME.search(cls.__name__))):
            fused, _, reason = _fused_class(module)
            if fused is None:
                result.append(Uncovered(name, cls.__name__, reason))
    return result


def _fused_class(module: nn.Module) -> tuple[type | None, dict, str]:
    """The fused class of a layer and the attributes that it needs beside the layer's own; or None, and the reason."""
    cls = type(module)
    base = next((base for base in FUSED if isinstance(module, base)), None)
    approximate = GELU_CLASSES.get(f"{cls.__module__}.{cls.__qualname__}")
    if isinstance(module, FusedModule) or (base is None and approximate is None):
        return None, {}, "no fused kernel for this layer"
    if _replaced(module):
        return None, {}, "its forward was replaced on the instance"
    if is_parametrized(module):
        return None, {}, "its parameters are parametrized"
    if hasattr(module, "stats"):
        return None, {}, "it has an attribute stats of its own"
    if cls in FUSED:
        return FUSED[cls], {}, ""
    if approximate is not None:
        return mixed(GELU, cls), {"approximate": approximate}, ""
    if base in CANDIDATES:
        fused, reason = fused_subclass(module)
        return fused, {}, reason
    return None, {}, f"a subclass of nn.{base.__name__} that may compute something else"


def _replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward other than its class's; that one too may be there, where accelerate was."""
    own = MethodType(type(module).forward, module)
    return module.__dict__.get("forward", own) != own


def _changed_since(module: nn.Module) -> str | None:
    """What somebody else has done to a converted layer so that its class cannot be put back, or None."""
    if isinstance(module, LSTM) and (module.zoneout_h or module.zoneout_c):
        return "it has zoneout, which its original class has not"
    if is_parametrized(module):
        return "its parameters are parametrized"
    # A fused class names its twin itself; one that somebody derived from it does not.
    ours = type(module) is vars(module)[ORIGINAL][0] or "TWIN" in vars(type(module))
    return None if ours else "its class was changed"
