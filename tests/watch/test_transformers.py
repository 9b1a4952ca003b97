"""Unmodified models of Hugging Face transformers, small and randomly initialised."""

import copy

import pytest
import torch

import gradkernels as gk

transformers = pytest.importorskip("transformers")


def gpt2():
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config)


def loss_and_gradients(model, ids, weight):
    model.zero_grad()
    output = model(ids)
    hidden = output.logits if hasattr(output, "logits") else output.last_hidden_state
    loss = (hidden * weight[..., : hidden.shape[-1]]).mean() + (0 if "logits" in output else output.pooler_output.mean())
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize(("make", "num_norms", "num_gelus"), [(gpt2, 7, 3), (bert, 7, 3)])
def test_watch_on_an_unmodified_model(make, num_norms, num_gelus):
    torch.manual_seed(0)
    model = make()
    original = copy.deepcopy(model)
    ids, weight = torch.randint(50, (4, 16)), torch.randn(4, 16, 50)
    wide = copy.deepcopy(model).double()
    loss, gradients = loss_and_gradients(original, ids, weight)
    _, exact = loss_and_gradients(wide, ids, weight.double())
    watch = gk.watch(model)
    watched_loss, watched_gradients = loss_and_gradients(model, ids, weight)
    watch.step(watched_loss)

    assert sum(type(module) is gk.LayerNorm for module in model.modules()) == num_norms
    assert sum(isinstance(module, gk.GELU) for module in model.modules()) == num_gelus
    assert watched_loss == pytest.approx(loss, rel=1e-5)
    assert set(watched_gradients) == set(gradients)
    for name, gradient in watched_gradients.items():
        scale = exact[name].norm()
        allowed = 4 * (gradients[name].double() - exact[name]).norm() + 1e-6 * scale + 1e-12
        assert (gradient.double() - exact[name]).norm() <= allowed, name

    coverage = watch.coverage()
    assert len(coverage.fused) == num_norms + num_gelus
    blocks = [name for name in coverage.probes if name.rpartition(".")[2].isdigit()]
    assert len(blocks) == 3
    assert max(map(len, watch.depth_profile().values())) >= 3
    assert [layer.layer for layer in coverage.uncovered] == ([] if make is gpt2 else ["Tanh"])
    assert all(record.norm > 0 for record in watch.records())
    assert max(len(line) for line in str(watch).splitlines()) <= 80

    watch.close()
    gk.revert(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    reverted_loss, reverted = loss_and_gradients(model, ids, weight)
    assert reverted_loss == loss
    assert all(torch.equal(reverted[name], gradients[name]) for name in gradients)


def test_every_gelu_class_is_gelu():
    """The table of classes holds only formulas that equal ours, and classes that exist or are known older names."""
    from gradkernels.integrations.transformers import GELU_CLASSES

    x = torch.randn(1000, dtype=torch.float64)
    found = 0
    for path, approximate in GELU_CLASSES.items():
        cls = getattr(transformers.activations, path.rsplit(".", 1)[1], None)
        if cls is not None:
            found += 1
            torch.testing.assert_close(cls()(x), gk.gelu(x, approximate), rtol=1e-8, atol=1e-9)
    assert found >= 4
