"""Swap supported layers of an existing model for the fused ones, in place, and back."""

from __future__ import annotations

import re
import warnings
from types import MethodType
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gradkernels.integrations import timm, transformers
from gradkernels.integrations.subclasses import CANDIDATES, fused_subclass
from gradkernels.nn import GELU, LSTM, LayerNorm, LSTMCell, _Measuring
from gradkernels.nn.measuring import NAMESPACE, remove_hooks

FUSED = {layer.TWIN: layer for layer in (GELU, LayerNorm, LSTM, LSTMCell)}
GELU_CLASSES = {**timm.GELU_CLASSES, **transformers.GELU_CLASSES}
ORIGINAL = "_gradkernels_original_class"
LAYER_NAME = re.compile(r"(Norm\d*d?|GELU|GeLU|Activation|LSTM|LSTMCell|GRU|GRUCell|RNN|RNNCell)$")
LAYER_MODULES = ("activation", "normalization", "batchnorm", "instancenorm", "rnn")


class Uncovered(NamedTuple):
    """A norm, activation or recurrent layer that stays what it is."""

    site: str
    layer: str
    reason: str


def convert(model: nn.Module) -> nn.Module:
    """`model` itself, with each layer that has a fused twin turned into it: nn.LayerNorm, nn.GELU, transformers' and timm's
    GELUs, nn.LSTM (whose twin is no subclass of it, see `gradkernels.nn.recurrent`) and nn.LSTMCell.

    A subclass of nn.LayerNorm or nn.GELU is tried first: its forward and a fused one, or a fused one over the channels of
    (batch, channels, height, width), run on small random inputs, forward and backward. Where all numbers are equal within
    rounding, the layer becomes fused and stays an instance of its class.

    Only the class of a layer changes: its parameters, buffers, hooks, names, place in state_dict and in optimizers stay.
    A subclass that computes something else, a parametrized layer, one on the meta device that would have to be tried, or one
    whose `forward` was replaced is left alone: `uncovered(model)` lists them with the reason. Layers that are already fused
    stay as they are. `revert` undoes it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        fused, attributes, _ = _fused_class(module)
        if fused is not None:
            attributes = {**attributes, "__module__": NAMESPACE}
            object.__setattr__(module, ORIGINAL, (type(module), tuple(attributes)))
            module.__dict__.update(attributes)
            module.__class__ = fused
    return model


def revert(model: nn.Module) -> nn.Module:
    """`model` itself, with every layer that `convert` changed back in its original class, and measured by no Watch.

    A layer whose class or forward somebody else has changed since (parametrize, weight_norm, a wrapper that holds the fused
    forward) stays fused, for a swap would break it; one warning names these layers. Reverted again after that change was
    taken back, they follow.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    held, left = _held(model), []
    for name, module in model.named_modules():
        remove_hooks(module)
        if ORIGINAL not in module.__dict__:
            continue
        original, attributes = vars(module)[ORIGINAL]
        for ours in ("on_forward", *module.stats_names()) if isinstance(module, _Measuring) else ():
            module.__dict__.pop(ours, None)
        reason = _changed_since(module, id(module) in held)
        if reason is not None:
            left.append(f"{name or '(the model)'} ({type(module).__name__}): {reason}")
            continue
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
        if isinstance(module, _Measuring) or "parametrizations" in name.split("."):
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
    if isinstance(module, _Measuring) or (base is None and approximate is None):
        return None, {}, "no fused kernel for this layer"
    if "forward" in module.__dict__:
        return None, {}, "its forward was replaced on the instance"
    if is_parametrized(module):
        return None, {}, "its parameters are parametrized"
    if hasattr(module, "stats"):
        return None, {}, "it has an attribute stats of its own"
    if cls in FUSED:
        return FUSED[cls], {}, ""
    if approximate is not None:
        return GELU, {"approximate": approximate}, ""
    if base in CANDIDATES:
        fused, reason = fused_subclass(module)
        return fused, {}, reason
    return None, {}, f"a subclass of nn.{base.__name__} that may compute something else"


def _held(model: nn.Module) -> set[int]:
    """The layers whose forward, as it is now, some module keeps in an attribute."""
    methods = [value for module in model.modules() for value in vars(module).values() if isinstance(value, MethodType)]
    return {id(method.__self__) for method in methods if method.__func__ is getattr(type(method.__self__), "forward", None)}


def _changed_since(module: nn.Module, held: bool) -> str | None:
    """What somebody else has done to a converted layer so that its class cannot be put back, or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if held:
        return "an attribute of a module holds its fused forward"
    if is_parametrized(module):
        return "its parameters are parametrized"
    # A fused class names its twin itself; one that somebody derived from it does not.
    ours = type(module) is vars(module)[ORIGINAL][0] or "TWIN" in vars(type(module))
    return None if ours else "its class was changed"
