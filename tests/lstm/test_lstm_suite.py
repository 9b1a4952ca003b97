"""What PyTorch's own suite checks of its recurrent modules beyond module_db: those tests are not in its package."""

import pytest
import torch
import torch.distributed as dist
from lstm_modules import check_same, flat, pair
from test_lstm import OPTIONS
from torch import multiprocessing, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import gradkernels as gk
from gradkernels.testing import randn


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_initial_state_defaults_to_zero(options):
    ours, _ = pair(5, 6, **options)
    parts, x = len(ours.suffixes), randn(4, 3, 5)
    zeros = tuple(torch.zeros(parts, x.shape[0 if ours.batch_first else 1], n) for n in (ours.proj_size or 6, 6))
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(x)), flat(ours(x, zeros)), strict=True))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_retained_graph(options):
    """Every backward through one graph gives the same gradients."""
    ours, _ = pair(5, 6, **options)
    x = randn(4, 3, 5).requires_grad_()
    y, (h, c) = ours(x)
    loss = (y * randn(*y.shape)).sum() + (h * randn(*h.shape)).sum() + (c * randn(*c.shape)).sum()
    first, *others = (torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_packed_is_one_sequence_at_a_time(options):
    ours, _ = pair(5, 6, dtype=torch.float64, **options)
    sequences = [randn(n, 5, dtype=torch.float64).requires_grad_() for n in (3, 7, 1, 7)]
    y, (h, c) = ours(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(y)
    together = torch.autograd.grad(padded.sin().sum() + c.sin().sum(), sequences)
    for k, (sequence, length, gradient) in enumerate(zip(sequences, lengths, together, strict=True)):
        alone, (h_alone, c_alone) = ours(sequence)
        torch.testing.assert_close(padded[:length, k], alone)
        torch.testing.assert_close((h[:, k], c[:, k]), (h_alone, c_alone))
        (expected,) = torch.autograd.grad(alone.sin().sum() + c_alone.sin().sum(), sequence)
        torch.testing.assert_close(gradient, expected)


def test_bad_packed_sequence():
    ours, twin = pair(3, 4)
    packed = PackedSequence(torch.randn(5, 3), torch.tensor([2, 2, 2]))
    with pytest.raises(RuntimeError):
        twin(packed)
    with pytest.raises((ValueError, RuntimeError), match="batch_sizes must add up to 5, got 6"):
        ours(packed)


def test_tied_weights():
    """One parameter in both directions receives the sum of both gradients, once."""
    ours, twin = pair(5, 6, bidirectional=True)
    for module in (ours, twin):
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            setattr(module, f"{name}_reverse", getattr(module, name))
        assert len(list(module.parameters())) == 4
    x = randn(4, 3, 5).requires_grad_()
    check_same(ours, twin, (x,), [x])


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_normalized_weights(norm):
    """A weight that is made of others: outputs, and the gradients of those."""
    ours, twin = pair(5, 6)
    for module in (ours, twin):
        torch.manual_seed(3)
        norm(module, "weight_hh_l0")
        norm(module, "weight_ih_l0")
        module.eval()  # spectral_norm moves its estimate in training
    x = randn(4, 3, 5).requires_grad_()
    check_same(ours, twin, (x,), [x])
    assert len(list(ours.parameters())) == len(list(twin.parameters()))


def test_pruned_weights():
    ours, twin = pair(5, 6)
    x = randn(4, 3, 5).requires_grad_()
    for module in (ours, twin):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.3)
    check_same(ours, twin, (x,), [x])
    for module in (ours, twin):
        prune.remove(module, "weight_hh_l0")
    check_same(ours, twin, (x,), [x])
    assert (ours.weight_hh_l0 == 0).sum() == round(0.3 * ours.weight_hh_l0.numel())


def test_all_dropped():
    """dropout=1: the last layer sees zeros, and neither x nor the first layer gets a gradient through it."""
    ours, twin = pair(5, 6, 2, dropout=1.0)
    x = randn(4, 3, 5).requires_grad_()
    assert torch.equal(ours(x)[0], ours(x * 2)[0])
    torch.testing.assert_close(ours(x)[0], twin(x)[0])
    assert not torch.autograd.grad(ours(x)[0].sin().sum(), x)[0].any()


@pytest.mark.parametrize("cls", [gk.LSTM, gk.LSTMCell])
def test_built_without_memory(cls):
    """device="meta", to_empty and skip_init, as for large models."""
    module = cls(3, 4, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype is torch.float64 for p in module.parameters())
    module.to_empty(device="cpu").reset_parameters()
    assert all(p.abs().max() <= 0.5 for p in module.parameters())
    skipped = nn.utils.skip_init(cls, 3, 4)
    skipped.load_state_dict(module.state_dict())
    outputs = skipped(torch.ones(2, 3))
    assert all(t.isfinite().all() for t in flat(outputs))


def test_layouts_of_inputs():
    """Strided x and states, and gradients that are expanded."""
    ours, twin = pair(5, 6)
    x = randn(3, 5, 4).permute(2, 0, 1)
    hx = tuple(randn(1, 6, 3).transpose(1, 2) for _ in range(2))
    found = []
    for module in (ours, twin):
        leaves = [t.detach().requires_grad_() for t in (x, *hx)]
        assert not leaves[0].is_contiguous()
        y, (h, c) = module(leaves[0], tuple(leaves[1:]))
        dys = [torch.ones(()).expand_as(y), randn(1, 1, 6).expand_as(h) * 0 + 0.5, torch.full_like(c, 2.0)]
        found.append([y, h, c, *torch.autograd.grad((y, h, c), [*leaves, *module.parameters()], dys)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_penalty():
    """Second order through a training step: the gradient of a gradient's norm reaches every weight, in float32."""
    ours, twin = pair(5, 6, 2, bidirectional=True)
    x, found = randn(4, 3, 5).requires_grad_(), []
    for module in (ours, twin):
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's backward cannot be differentiated
            (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *module.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace():
    """torch.jit.trace records the ops; a traced module can be saved and loads again."""
    ours, _ = pair(5, 6, 2)
    x = randn(4, 3, 5)
    traced = torch.jit.trace(ours.eval(), x)
    other = randn(7, 2, 5)
    for a, b in zip(flat(traced(other)), flat(ours(other)), strict=True):
        torch.testing.assert_close(a, b)


def _train_one_of_two(rank, path, batches, state, outcome):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = gk.LSTM(5, 6, 2)
    model.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(model)
    groups = [dist.new_group([other]) for other in range(2)]
    watch = gk.watch(parallel, process_group=groups[rank])
    parallel(batches[rank])[0].square().mean().backward()
    watch.step()
    outcome[rank] = ([p.grad for p in model.parameters()], [p.dc for p in watch.time_profile()])
    dist.destroy_process_group()


def test_data_parallel(tmp_path):
    """Under DistributedDataParallel gradients are the mean over the ranks, and each rank's profile is that of its own batch."""
    ours, _ = pair(5, 6, 2)
    batches = [randn(4, 3, 5) for _ in range(2)]
    with multiprocessing.get_context("spawn").Manager() as manager:
        outcome = manager.dict()
        arguments = (str(tmp_path / "store"), batches, ours.state_dict(), outcome)
        multiprocessing.spawn(_train_one_of_two, arguments, nprocs=2)
        ranks = [outcome[rank] for rank in range(2)]
    alone = [torch.autograd.grad(ours(x)[0].square().mean(), list(ours.parameters())) for x in batches]
    for k, gradients in enumerate(zip(*alone, strict=True)):
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][0][k], sum(gradients) / 2)
    for rank, x in enumerate(batches):
        watch = gk.watch(ours)
        ours(x)[0].square().mean().backward()
        watch.step()
        for profile, dc in zip(watch.time_profile(), ranks[rank][1], strict=True):
            torch.testing.assert_close(torch.from_numpy(profile.dc), torch.from_numpy(dc), rtol=1e-5, atol=0)
        watch.close()
