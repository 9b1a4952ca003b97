"""revert, after somebody else changed a converted layer."""

import copy
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
    "forward": (replace_forward, None),
    "_old_forward": (keep_old_forward, None),
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
    assert isinstance(net[1], gk.nn.FusedModule) == (reason is not None)
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
    derive(net[0])
    parametrize.register_parametrization(net[2], "weight", Exp())
    with pytest.warns(
        UserWarning, match=r"0 \(Derived\): its class was changed; 2 \(ParametrizedLayerNorm\): its parameters are"
    ) as caught:
        gk.revert(net)
    assert len(caught) == 1
    assert type(net[1]) is nn.GELU


def test_revert_of_a_layer_with_zoneout():
    """What its original class has not is not lost without a word."""
    net, x = gk.convert(nn.Sequential(nn.LSTM(4, 4))).eval(), torch.randn(5, 2, 4)
    net[0].zoneout_c = 0.5
    expected = net(x)[0]
    with pytest.warns(UserWarning, match=r"0 \(LSTM\): it has zoneout, which its original class has not"):
        gk.revert(net)
    assert torch.equal(net(x)[0], expected)
    net[0].zoneout_c = 0.0
    assert type(gk.revert(net)[0]) is nn.LSTM


@pytest.mark.parametrize("layer", LAYERS)
def test_a_kept_forward_calls_the_original(layer):
    """Wherever a fused forward was put away, it works after revert, in a second step of training too."""
    make, shape = LAYERS[layer]
    net = gk.convert(nn.Sequential(make()))
    kept = net[0].forward
    net.kept, net.more = kept, {"inner": [functools.partial(kept)]}
    net.forward = lambda x: kept(x)
    expected, parameters = train(copy.deepcopy(gk.revert(nn.Sequential(copy.deepcopy(net[0])))), shape)
    gk.revert(net)
    assert type(net[0]) is type(make())
    got, after = train(net, shape)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(list(after.values()), list(parameters.values()), rtol=0, atol=0)
    x = torch.randn(shape)
    for function in (net.kept, net.more["inner"][0]):
        torch.testing.assert_close(function(x), net[0](x))


def test_revert_after_the_original_class_was_set():
    net = gk.convert(nn.Sequential(nn.LayerNorm(4)))
    net[0].__class__ = nn.LayerNorm
    gk.revert(net)
    assert type(net[0]) is nn.LayerNorm
    assert not any("gradkernels" in name for name in vars(net[0]))
