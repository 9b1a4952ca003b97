"""revert, after somebody else changed a converted layer."""

import functools
import re
import warnings

import pytest
import torch
from derived_layers import Channels, Exp, train
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import gradkernels as gk


def replace_forward(layer):
    inner = layer.forward
    layer.forward = lambda *args: inner(*args)


def keep_old_forward(layer):
    """As accelerate does."""
    layer._old_forward = layer.forward
    layer.forward = functools.update_wrapper(lambda *args: layer._old_forward(*args), layer._old_forward)


def derive(layer):
    layer.__class__ = type("Derived", (type(layer),), {"forward": lambda self, *args: super(type(self), self).forward(*args)})


def first_weight(layer):
    return next(name for name, _ in layer.named_parameters() if "weight" in name)


# What somebody may do to a converted layer -> the reason that revert gives, or None where it takes the layer back.
CHANGES = {
    "parametrize": (lambda layer: parametrize.register_parametrization(layer, first_weight(layer), Exp()), "parametrized"),
    "weight_norm": (lambda layer: parametrizations.weight_norm(layer, first_weight(layer)), "parametrized"),
    "spectral_norm": (lambda layer: parametrizations.spectral_norm(layer.eval(), first_weight(layer)), "parametrized"),
    "parametrize, weight_hh": (lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"), "parametrized"),
    "old weight_norm": (lambda layer: nn.utils.weight_norm(layer, first_weight(layer)), None),
    "old spectral_norm": (lambda layer: nn.utils.spectral_norm(layer.eval(), first_weight(layer)), None),
    "prune": (lambda layer: prune.l1_unstructured(layer, first_weight(layer), 0.5), None),
    "forward": (replace_forward, "forward was replaced"),
    "_old_forward": (keep_old_forward, "forward was replaced"),
    "class": (derive, "class was changed"),
    "hook": (lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,)), None),
}
LAYERS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 4)),
    "GELU": (nn.GELU, (3, 4)),
    "LSTM": (lambda: nn.LSTM(4, 4, 2, bidirectional=True), (5, 2, 4)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 4), (3, 4)),
    "subclass": (lambda: Channels(4), (2, 4, 3, 5)),
}
CASES = [
    (layer, change)
    for layer in LAYERS
    for change in CHANGES
    if not (layer == "GELU" and change not in ("forward", "_old_forward", "class", "hook"))
    and not (layer in ("LayerNorm", "subclass") and change == "old spectral_norm")
    and not (layer != "LSTM" and change == "parametrize, weight_hh")
]


def changed(layer, change):
    torch.manual_seed(0)
    net = gk.convert(nn.Sequential(nn.Identity(), LAYERS[layer][0]()).double())
    CHANGES[change][0](net[1])
    return net


@pytest.mark.parametrize(("layer", "change"), CASES)
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_revert_of_a_changed_layer(layer, change):
    """Function and training stay, whether the layer was taken back or left; what is left is named once."""
    shape, reason = LAYERS[layer][1], CHANGES[change][1]
    expected, parameters = train(changed(layer, change), shape)
    net = changed(layer, change)
    net(torch.randn(shape).double())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gk.revert(net)
    assert len(caught) == (reason is not None)
    if reason is not None:
        assert re.search(rf"revert: .* 1 \(\w+\): .*{reason}", str(caught[0].message))
    assert isinstance(net[1], gk.nn._Measuring) == (reason is not None)
    got, after = train(net, shape)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(after, parameters)


def test_parameters_of_a_changed_lstm_have_effect():
    net, x = changed("LSTM", "parametrize, weight_hh"), torch.randn(5, 2, 4).double()
    with pytest.warns(UserWarning, match="parametrized"):
        gk.revert(net)
    before = net(x)[0]
    with torch.no_grad():
        net[1].parametrizations.weight_hh_l0.original0.mul_(5)
    assert not torch.allclose(net(x)[0], before)


@pytest.mark.parametrize("layer", ["LayerNorm", "LSTM", "subclass"])
def test_revert_follows_when_the_change_is_taken_back(layer):
    undo = {
        "parametrize": lambda module: parametrize.remove_parametrizations(module, first_weight_of(module)),
        "forward": lambda module: delattr(module, "forward"),
        "class": lambda module: setattr(module, "__class__", type(module).__bases__[0]),
    }

    def first_weight_of(module):
        return next(iter(module.parametrizations))

    for change, take_back in undo.items():
        net = changed(layer, change)
        with pytest.warns(UserWarning, match="stay as they are"):
            gk.revert(net)
        take_back(net[1])
        x = torch.randn(LAYERS[layer][1]).double()
        fused = net(x)
        gk.revert(net)
        assert type(net[1]) is type(LAYERS[layer][0]())
        torch.testing.assert_close(net(x), fused)
        train(net, x.shape)


def test_revert_names_all_layers_in_one_warning():
    net = gk.convert(nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.LayerNorm(4)))
    net[0].forward = net[0].forward
    net.kept = net[2].forward
    with pytest.warns(
        UserWarning, match=r"0 \(LayerNorm\): its forward was replaced.*; 2 \(LayerNorm\): an attribute"
    ) as caught:
        gk.revert(net)
    assert len(caught) == 1
    assert type(net[1]) is nn.GELU
    net.kept(net(torch.randn(2, 4)))


def test_revert_after_the_original_class_was_set():
    net = gk.convert(nn.Sequential(nn.LayerNorm(4)))
    net[0].__class__ = nn.LayerNorm
    gk.revert(net)
    assert type(net[0]) is nn.LayerNorm
    assert not any("gradkernels" in name for name in vars(net[0]))
