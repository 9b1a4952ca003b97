"""gk.LSTM and gk.LSTMCell as modules: everything that torch.nn.LSTM and torch.nn.LSTMCell promise."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from lstm_modules import check_same, flat, pair, results
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gradkernels as gk
from gradkernels.testing import randn

OPTIONS = (
    dict(),
    dict(num_layers=2, bidirectional=True),
    dict(num_layers=2, proj_size=3),
    dict(bias=False, batch_first=True),
    dict(bidirectional=True, proj_size=2, num_layers=2, batch_first=True),
    dict(num_layers=3),
)


CONSTRUCTOR_ERRORS = (
    dict(hidden_size=0),
    dict(hidden_size=2.0),
    dict(input_size=0),
    dict(num_layers=0),
    dict(bias=0),
    dict(batch_first="True"),
    dict(dropout=1.5),
    dict(dropout=True),
    dict(proj_size=-1),
    dict(proj_size=4),
)


@pytest.mark.parametrize("options", CONSTRUCTOR_ERRORS, ids=str)
def test_constructor_errors(options):
    raised = []
    for cls in (gk.LSTM, nn.LSTM):
        with pytest.raises((ValueError, TypeError)) as caught:
            cls(**{"input_size": 3, "hidden_size": 4, **options})
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def test_constructor_warning():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        gk.LSTM(3, 4, dropout=0.5)


FORWARD_ERRORS = (
    lambda m: m(torch.randn(5)),
    lambda m: m(torch.randn(5, 2, 3, 1)),
    lambda m: m(torch.randn(5, 2, 4)),
    lambda m: m(torch.randn(5, 2, 3).double()),
    lambda m: m(torch.randn(0, 2, 3)),
    lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 3, 4), torch.randn(1, 2, 4))),
    lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 5))),
    lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 4), torch.randn(1, 4))),
    lambda m: m(torch.randn(5, 3), (torch.randn(1, 1, 4), torch.randn(1, 1, 4))),
)


@pytest.mark.parametrize("call", FORWARD_ERRORS)
def test_forward_errors(call):
    raised = []
    for module in pair(3, 4):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call(module)
        raised.append(caught.value)
    assert isinstance(raised[0], type(raised[1]))
    assert str(raised[1]) in str(raised[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padded(options, dtype):
    """With and without hx, batched and not, training and eval mode; the same seed gives the same weights."""
    ours, twin = pair(5, 6, dtype=dtype, **options)
    assert repr(ours) == repr(twin)
    assert list(ours.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), twin.parameters(), strict=True))
    parts = (2 if ours.bidirectional else 1) * ours.num_layers
    for shape in ((7, 3, 5), (1, 3, 5), (4, 5)):
        x = randn(*shape, dtype=dtype).requires_grad_()
        batch = shape[0 if ours.batch_first else 1 : len(shape) - (1 if ours.batch_first else 0)][:1] if len(shape) == 3 else ()
        hx = [randn(parts, *batch, n, dtype=dtype).requires_grad_() for n in (ours.proj_size or 6, 6)]
        check_same(ours, twin, (x,), [x])
        check_same(ours, twin, (x, tuple(hx)), [x, *hx])
        check_same(ours.eval(), twin.eval(), (x,), [x])


@pytest.mark.parametrize("sorted_lengths", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed(options, sorted_lengths):
    ours, twin = pair(5, 6, **{**options, "batch_first": False})
    parts = (2 if ours.bidirectional else 1) * ours.num_layers
    for lengths in ((6, 4, 4, 1), (2, 2), (1,), (9, 1)):
        lengths = lengths if sorted_lengths else lengths[::-1]
        sequences = [randn(n, 5).requires_grad_() for n in lengths]
        packed = pack_sequence(sequences, enforce_sorted=sorted_lengths)
        hx = [randn(parts, len(lengths), n).requires_grad_() for n in (ours.proj_size or 6, 6)]
        y, _ = ours(packed)
        assert y.sorted_indices is packed.sorted_indices
        assert y.batch_sizes is packed.batch_sizes
        check_same(ours, twin, (packed,), sequences)
        check_same(ours, twin, (packed, tuple(hx)), [*sequences, *hx])


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(proj_size=2), dict(batch_first=True)], ids=str)
def test_dropout_between_layers(options):
    """The same seed drops the same elements."""
    ours, twin = pair(5, 6, num_layers=3, dropout=0.5, dtype=torch.float64, **options)
    x, found = randn(7, 3, 5, dtype=torch.float64).requires_grad_(), []
    for module in (ours, twin):
        torch.manual_seed(3)
        found.append(results(module, (x,), [x]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(ours(x)[0], ours(x)[0])
    torch.testing.assert_close(ours.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("shape", [(3, 0, 5), (1, 0, 5)], ids=str)
def test_empty_batch(shape):
    ours, twin = pair(5, 6, 2, bidirectional=True)
    x = torch.randn(shape, requires_grad=True)
    check_same(ours, twin, (x,), [x])


@pytest.mark.parametrize("hidden", [1, 17, 65])
def test_hidden_sizes(hidden):
    ours, twin = pair(3, hidden)
    x = torch.randn(1, 2, 3, requires_grad=True)
    check_same(ours, twin, (x,), [x])


def test_state_and_copies():
    ours, twin = pair(3, 4, 2, bidirectional=True)
    ours.stats_l0, ours.time_stats_l1_reverse = gk.new_stats(6), gk.new_time_stats(4)
    x = torch.randn(5, 2, 3)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert not any("stats" in name for name in other.__dict__)
        assert other.stats_names() == ours.stats_names()
        torch.testing.assert_close(other(x), twin(x))
    assert ours.stats_l0 is not None
    assert not any("stats" in name for name in ours.state_dict())
    ours.load_state_dict(twin.state_dict(), strict=True)
    ours.share_memory().double().float().flatten_parameters()
    torch.testing.assert_close(ours(x), twin(x))


def test_old_pickles():
    """A module pickled before PyTorch 1.8 had no proj_size, and lists of parameters for names."""
    ours, twin = pair(3, 4, 2)
    state = ours.__getstate__()
    del state["proj_size"]
    state["_all_weights"] = [[ours._parameters[name] for name in names] for names in ours._all_weights]
    old = gk.LSTM.__new__(gk.LSTM)
    old.__setstate__(state)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(old(x), twin(x))


def test_functional_call_and_parametrizations():
    ours, twin = pair(3, 4)
    x, values = torch.randn(5, 2, 3), {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(ours, values, (x,)), torch.func.functional_call(twin, values, (x,)))

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(ours, "weight_hh_l0", Doubled())
    with torch.no_grad():
        twin.weight_hh_l0.mul_(2)
    torch.testing.assert_close(ours(x), twin(x))
    ours(x)[0].sum().backward()
    assert ours.parametrizations.weight_hh_l0.original.grad.abs().sum() > 0


def test_weights_replaced_after_construction():
    """Parameters are read when they are used: a new one, and .to(), are seen."""
    ours, twin = pair(3, 4)
    new = nn.Parameter(torch.randn(16, 3))
    ours.weight_ih_l0 = twin.weight_ih_l0 = new
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x), twin(x))
    torch.testing.assert_close(ours.double()(x.double()), twin.double()(x.double()))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_autocast(options):
    """As torch.nn.LSTM on the CPU: outputs in the region's dtype, gradients of weights in theirs.

    On a CPU for which oneDNN has no bfloat16 LSTM torch's raises an error; ours is then held to bfloat16's rounding alone.
    """
    ours, twin = pair(5, 16, **options)
    x = torch.randn(7, 3, 5)
    wide = twin(x)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = ours(x)
        try:
            expected = twin(x)
        except RuntimeError as error:
            if "could not create a primitive descriptor" not in str(error):
                raise
            expected = [t.bfloat16() for t in flat(wide)]
        h, c = gk.LSTMCell(5, 6)(x[0])
    for a, b, w in zip(flat(outputs), flat(expected), flat(wide), strict=True):
        assert a.dtype is torch.bfloat16
        error, eager_error = ((t.double() - w.double()).abs().max() for t in (a, b))
        assert error <= 1.5 * eager_error + torch.finfo(torch.bfloat16).eps
    outputs[0].float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())
    assert h.dtype is c.dtype is torch.float32


def test_vmap():
    ours, twin = pair(3, 4, 2, dtype=torch.float64)
    x = randn(6, 5, 2, 3, dtype=torch.float64)
    for k, y in enumerate(torch.vmap(lambda v: ours(v)[0])(x)):
        torch.testing.assert_close(y, twin(x[k])[0])
    names = [name for name, _ in ours.named_parameters()]

    def loss(values, v):
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (v,))[0].square().sum()

    values = tuple(p.detach() for p in ours.parameters())
    gradients = torch.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for k in range(6):
        expected = torch.autograd.grad(twin(x[k])[0].square().sum(), list(twin.parameters()))
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a[k], b)


@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
def test_compile(options, fresh_compiler):
    """No graph break; one graph for every T and B; the bits of eager mode, statistics of every step included."""
    ours = gk.LSTM(5, 6, **options)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for part in ours.suffixes:
        setattr(ours, f"stats{part}", gk.new_stats(6))
        setattr(ours, f"time_stats{part}", gk.new_time_stats(50))
    for T, B in ((9, 3), (13, 4), (21, 7)):
        x, found = torch.randn(T, B, 5, requires_grad=True), []
        for module in (ours, compiled):
            found.append(results(module, (x,), [x]))
            for name in ours.stats_names():
                found[-1].append(getattr(ours, name).clone())
                getattr(ours, name).zero_()
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert found[0][-1].any()
    assert not fresh_compiler["graph_break"]
    assert fresh_compiler["stats"]["unique_graphs"] == 1


def test_compile_packed(fresh_compiler):
    ours = gk.LSTM(5, 6, bidirectional=True)
    compiled = torch.compile(lambda data, sizes: ours(PackedSequence(data, sizes))[0].data, fullgraph=True, backend="aot_eager")
    for lengths in ((5, 3, 2), (8, 8, 1, 1)):
        packed = pack_sequence([torch.randn(n, 5) for n in lengths])
        assert torch.equal(compiled(packed.data, packed.batch_sizes), ours(packed)[0].data)
    assert not fresh_compiler["graph_break"]


def test_export():
    ours = gk.LSTM(5, 6, 2).eval()
    x = torch.randn(7, 3, 5)
    time, batch = torch.export.Dim("time", min=2), torch.export.Dim("batch", min=2)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: time, 1: batch},))
    for shape in ((7, 3, 5), (11, 4, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), ours(x))


def test_convert_and_revert():
    net = nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.1), nn.LSTMCell(4, 5), nn.GRU(3, 4))
    before, state = dict(net.named_parameters()), {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(5, 2, 3)
    net.eval()
    expected = net[0](x), net[1](x[0] @ torch.ones(3, 4))
    assert gk.convert(net) is net
    assert [type(module) for module in net] == [gk.LSTM, gk.LSTMCell, nn.GRU]
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close((net[0](x), net[1](x[0] @ torch.ones(3, 4))), expected)
    watch = gk.watch(net)
    gk.revert(net)
    assert [type(module) for module in net] == [nn.LSTM, nn.LSTMCell, nn.GRU]
    assert not any("stats" in name for module in net for name in module.__dict__)
    torch.testing.assert_close(net[0](x), expected[0], rtol=0, atol=0)
    watch.close()
    lstm = nn.LSTM(3, 4)
    assert gk.convert(lstm) is lstm
    assert isinstance(lstm, gk.LSTM)


def test_training_equals_torch():
    """200 steps of Adam: the losses are nn.LSTM's to 1e-5."""
    losses = []
    for module in pair(4, 16):
        torch.manual_seed(1)
        head, generator = nn.Linear(16, 1), torch.Generator().manual_seed(2)
        optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 2e-3)
        losses.append([])
        for _ in range(200):
            x = torch.randn(12, 8, 4, generator=generator)
            loss = (head(module(x)[0][-1]).squeeze(-1) - x[:, :, 0].mean(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)
    assert losses[0][-1] < 0.5 * losses[0][0]
