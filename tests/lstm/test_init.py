"""Initialisers: what the gates start at, in every layer and direction, of torch's modules and ours."""

import pytest
import torch
from torch import nn

import gradkernels as gk

MODULES = (
    lambda: nn.LSTM(3, 8, 2, bidirectional=True),
    lambda: gk.LSTM(3, 8, 2, bidirectional=True, proj_size=4),
    lambda: nn.LSTMCell(3, 8),
    lambda: gk.LSTMCell(3, 8),
)


def summed_biases(module):
    """bias_ih + bias_hh of every part, as (parts, gates, H)."""
    named = dict(module.named_parameters())
    return torch.stack([(named[n] + named[n.replace("_ih", "_hh")]).detach() for n in named if "bias_ih" in n]).unflatten(
        1, (4, -1)
    )


@pytest.mark.parametrize("make", MODULES)
def test_forget_bias(make):
    module = make()
    before = summed_biases(module)
    assert gk.init.forget_bias_(module, 1.5) is module
    after = summed_biases(module)
    assert (after[:, 1] == 1.5).all()
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("make", MODULES)
def test_chrono(make):
    module = make()
    before = summed_biases(module)
    gk.init.chrono_(module, 1000, generator=torch.Generator().manual_seed(0))
    i, f, g, o = summed_biases(module).unbind(1)
    assert torch.equal(i, -f)
    assert torch.equal(torch.stack([g, o], 1), before[:, 2:])
    lags = f.exp()
    assert ((lags >= 1) & (lags <= 999)).all()
    assert len(lags.unique()) == lags.numel()  # drawn for every unit of every part
    assert 350 < lags.mean() < 650 or lags.numel() < 30


@pytest.mark.parametrize("make", MODULES)
def test_orthogonal_recurrent(make):
    module = make()
    gk.init.orthogonal_recurrent_(module, 2.0)
    for name, weight in module.named_parameters():
        if "weight_hh" in name:
            for block in weight.detach().chunk(4):
                torch.testing.assert_close(block.mT @ block, 4 * torch.eye(block.shape[1]))
    blocks = [block for name, w in module.named_parameters() if "weight_hh" in name for block in w.detach().chunk(4)]
    assert not any(torch.equal(blocks[0], block) for block in blocks[1:])


ERRORS = (
    (lambda: gk.init.forget_bias_(nn.GRU(3, 4)), TypeError, "forget_bias_: module must be an LSTM or an LSTMCell, got GRU"),
    (lambda: gk.init.chrono_(nn.LSTM(3, 4, bias=False), 10), gk.ArgumentError, "chrono_: module must have biases"),
    (lambda: gk.init.chrono_(nn.LSTM(3, 4), 2), gk.ArgumentError, "chrono_: longest must be at least 3, got 2"),
    (lambda: gk.init.orthogonal_recurrent_(nn.Linear(3, 4)), TypeError, "orthogonal_recurrent_: .* got Linear"),
)


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
