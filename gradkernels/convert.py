"""Swap supported layers of an existing model for the fused ones, in place, and back."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from gradkernels.integrations.transformers import GELU_CLASSES
from gradkernels.nn import GELU, LSTM, LayerNorm, LSTMCell, _Measuring
from gradkernels.nn.measuring import NAMESPACE, remove_hooks

FUSED = {layer.TWIN: layer for layer in (GELU, LayerNorm, LSTM, LSTMCell)}
ORIGINAL = "_gradkernels_original_class"
LAYER_NAME = re.compile(r"(Norm\d*d?|GELU|GeLU|Activation|LSTM|LSTMCell|GRU|GRUCell|RNN|RNNCell)$")
LAYER_MODULES = ("activation", "normalization", "batchnorm", "instancenorm", "rnn")


class Uncovered(NamedTuple):
    """A norm, activation or recurrent layer that stays what it is."""

    site: str
    layer: str
    reason: str


def convert(model: nn.Module) -> nn.Module:
    """`model` itself, with each layer that has a fused twin turned into it: nn.LayerNorm, nn.GELU and transformers' GELUs,
    nn.LSTM (whose twin is no subclass of it, see `gradkernels.nn.recurrent`) and nn.LSTMCell.

    Only the class of a layer changes: its parameters, buffers, hooks, names, place in state_dict and in optimizers stay.
    A subclass that is not known, a parametrized layer, or one whose `forward` was replaced is left alone: `uncovered(model)`
    lists them. Layers that are already fused stay as they are. `revert` undoes it.
    """
    for module in model.modules():
        fused, attributes = _fused_class(module)
        if fused is not None:
            attributes = {**attributes, "__module__": NAMESPACE}
            object.__setattr__(module, ORIGINAL, (type(module), tuple(attributes)))
            module.__dict__.update(attributes)
            module.__class__ = fused
    return model


def revert(model: nn.Module) -> nn.Module:
    """`model` itself, with every layer that `convert` changed back in its original class, and measured by no Watch."""
    for module in model.modules():
        remove_hooks(module)
        original, attributes = module.__dict__.pop(ORIGINAL, (None, ()))
        if original is not None:
            for name in (*attributes, "on_forward", *module.stats_names()):
                module.__dict__.pop(name, None)
            module.__class__ = original
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
            reason = _reason(module)
            if reason:
                result.append(Uncovered(name, cls.__name__, reason))
    return result


def _fused_class(module: nn.Module) -> tuple[type | None, dict]:
    """The fused class of a layer, or None, and the attributes that the fused class needs beside the layer's own."""
    cls = type(module)
    if "forward" in module.__dict__:
        return None, {}
    if cls in FUSED:
        return FUSED[cls], {}
    approximate = GELU_CLASSES.get(f"{cls.__module__}.{cls.__qualname__}")
    return (None, {}) if approximate is None else (GELU, {"approximate": approximate})


def _reason(module: nn.Module) -> str | None:
    cls = type(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    base = next((base.__name__ for base in FUSED if isinstance(module, base)), None)
    if base is not None and cls not in FUSED:
        return f"a subclass of nn.{base} that may compute something else"
    return None if _fused_class(module)[0] is not None else "no fused kernel for this layer"
