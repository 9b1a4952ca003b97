"""Every record of a checkpointed model of Hugging Face transformers equals what autograd says of an unwatched twin."""

import copy

import pytest
import torch
from independent import Autograd, same_as_autograd
from torch import nn

import gradkernels as gk

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_enable(use_reentrant):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0, use_cache=False
    )  # with dropout
    plain = transformers.GPT2LMHeadModel(config).double()
    net = copy.deepcopy(plain)
    activation = type(plain.transformer.h[0].mlp.act)
    probes = [f"transformer.{name}" for name in ("h.0", "h.1")]
    autograd = Autograd(plain, ["transformer.wte", "transformer.wpe", "lm_head", *probes], (nn.LayerNorm, activation))
    watch = gk.watch(net)
    net.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert net.is_gradient_checkpointing
    ids = torch.randint(20, (2, 8))
    for _ in range(2):
        with torch.no_grad():
            net(ids)
        for model in (plain, net):
            torch.manual_seed(1)
            model(ids, labels=ids).loss.backward()
        watch.step()
        same_as_autograd(watch, autograd.step())
