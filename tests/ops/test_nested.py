"""Nested tensors of both layouts through LayerNorm, GELU and probes, and encoders that make them of a padded batch."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkernels as gk
from gradkernels.telemetry import merge_slots, record_of

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
LENGTHS = [[3, 5], [1], [4, 0, 2]]


def parts_of(lengths, *shape):
    torch.manual_seed(0)
    return [torch.randn(n, *shape) for n in lengths]


def nested(components, layout, form="plain"):
    """A leaf with these components. "holes": a jagged tensor whose components do not lie one behind the other."""
    if form == "holes":
        padded = torch.cat(
            [torch.cat([component, torch.full((2, *component.shape[1:]), torch.nan)]) for component in components]
        )
        lengths = torch.tensor([len(component) for component in components])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + 2).cumsum(0)])
        return torch.nested.nested_tensor_from_jagged(padded, offsets, lengths).detach().requires_grad_()
    return torch.nested.nested_tensor(components, layout=layout, requires_grad=True)


FORMS = [(torch.jagged, "plain"), (torch.jagged, "holes"), (torch.strided, "plain")]
LAYERS = {
    "layer_norm": (lambda x, stats=None: gk.layer_norm(x, (8,), stats=stats), lambda x: F.layer_norm(x, (8,)), 4, 2),
    "gelu": (gk.gelu, F.gelu, 2, 2),
    "gelu tanh": (lambda x, stats=None: gk.gelu(x, "tanh", stats=stats), lambda x: F.gelu(x, approximate="tanh"), 2, 2),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("layout", "form"), FORMS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, layout, form, lengths):
    """Each part as if it were alone: y, dx, and the statistics of all of them."""
    ours, eager, num_ports, shown = LAYERS[name]
    components = parts_of(lengths, 8)
    x, stats = nested(components, layout, form), gk.new_stats(num_ports)
    y = ours(x, stats=stats)
    assert y.is_nested
    assert y.layout is layout
    leaves = [component.clone().requires_grad_() for component in components]
    expected = [eager(leaf) for leaf in leaves]
    for own, other in zip(y.unbind(), expected, strict=True):
        torch.testing.assert_close(own, other)
    sum((own.sin()).sum() for own in y.unbind()).backward()
    sum((other.sin()).sum() for other in expected).backward()
    for own, leaf in zip(x.grad.unbind(), leaves, strict=True):
        torch.testing.assert_close(own, leaf.grad)
    dys = torch.cat([other.detach().cos() for other in expected])
    rows = [record_of("", "", row) for row in merge_slots(stats).tolist()[:shown]]
    for row, gradient in zip(rows, (dys, torch.cat([leaf.grad for leaf in leaves])), strict=True):
        assert row.numel == gradient.numel()
        assert row.norm == pytest.approx(gradient.double().norm().item(), rel=1e-5)


def test_what_comes_out_adds_to_what_went_in():
    """A residual connection: torch adds jagged tensors whose lengths are known to be the same."""
    x = nested(parts_of([3, 5], 8), torch.jagged)
    (x + gk.gelu(x)).values().sum().backward()
    assert x.grad.values().shape == (8, 8)


def test_transposed():
    x = nested(parts_of([3, 5], 8), torch.jagged)
    y = gk.gelu(x.transpose(1, 2))
    for own, component in zip(y.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(own, F.gelu(component).mT)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_parameters(layout):
    components = parts_of([3, 5], 8)
    ours, eager = gk.LayerNorm(8), nn.LayerNorm(8)
    for module in (ours, eager):
        sum((component**2).sum() for component in module(nested(components, layout)).unbind()).backward()
    for own, other in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_the_ragged_dimension_is_not_normalized():
    with pytest.raises(ValueError, match="x must end in the normalized shape"):
        gk.layer_norm(nested(parts_of([3, 5], 8), torch.jagged), (5, 8))


@pytest.mark.parametrize(("layout", "form"), FORMS, ids=str)
def test_probe(layout, form):
    x, stats = nested(parts_of([3, 5], 8), layout, form), gk.new_stats(1)
    y = 2 * gk.probe(1 * x, stats=stats)
    sum(component.sum() for component in y.unbind()).backward()
    row = record_of("", "", merge_slots(stats)[0].tolist())
    assert row.norm == pytest.approx(2 * 64**0.5)
    assert row.numel == 64


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, x, src_key_padding_mask):
        return self.net(x, x, src_key_padding_mask=src_key_padding_mask)


@pytest.mark.parametrize("state", ["converted", "watched", "paused", "closed", "reverted"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("make", [encoder, Translator])
def test_validation_of_a_padded_batch(make, steps, state):
    """nn.TransformerEncoder hands a nested tensor to its layers where nothing needs gradients."""
    torch.manual_seed(0)
    x, pad = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    pad[1, 3:] = pad[2, 2:] = True
    plain = make()
    ours = copy.deepcopy(plain)
    watch = None if state == "converted" else gk.watch(ours)
    ours = gk.convert(ours)
    for _ in range(steps):
        ours(x, src_key_padding_mask=pad)[~pad].sum().backward()
        if watch:
            watch.step()
    if state in ("paused", "closed", "reverted"):
        watch.pause() if state == "paused" else watch.close()
    if state == "reverted":
        gk.revert(ours)
    plain.eval()
    ours.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, found = (model(x, src_key_padding_mask=pad) for model in (plain, ours))
    torch.testing.assert_close(found[~pad], expected[~pad])
