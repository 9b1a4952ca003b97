"""watch.time_profile, and what a TimeProfile concludes; zoneout and resets, which it does not see."""

import math

import numpy as np
import pytest
import torch
from lstm_cases import expected_steps
from torch import nn

import gradkernels as gk
from gradkernels.telemetry import profile_of


class Net(nn.Module):
    """Two LSTM sites beside layers of other kinds."""

    def __init__(self, **options):
        super().__init__()
        self.first = nn.LSTM(4, 6, 2, **options)
        self.norm = nn.LayerNorm(12 if options.get("bidirectional") else 6)
        self.second = nn.LSTM(self.norm.normalized_shape[0], 5)

    def forward(self, x):
        return self.second(self.norm(self.first(x)[0]))[0]


def train(net, *lengths):
    """A backward pass for each length."""
    for T in lengths:
        net(torch.randn(T, 3, 4)).square().sum().backward()


def test_profiles_of_a_model():
    net = Net(bidirectional=True)
    watch = gk.watch(net)
    assert watch.time_profile() == []
    train(net, 9)
    watch.step()
    found = [(p.site, p.layer, p.direction, p.steps) for p in watch.time_profile()]
    first = [(f"first.l{k}{d}", k, "reverse" if d else "forward", 9) for k in (0, 1) for d in ("", "_reverse")]
    assert found == [*first, ("second.l0", 0, "forward", 9)]
    assert [p.site for p in watch.time_profile("first")] == [site for site, *_ in first]
    assert [p.site for p in watch.time_profile("first.l1_reverse")] == ["first.l1_reverse"]
    with pytest.raises(ValueError, match=r"^time_profile: site must be one of \['first', .*, got 'norm'"):
        watch.time_profile("norm")
    sites = {record.site for record in watch.records()}
    assert {"first.l0", "first.l1_reverse", "second.l0", "norm"} <= sites
    ports = [record.port for record in watch.records() if record.site == "second.l0"]
    assert ports == ["dy", "dx", "dweight_ih", "dweight_hh", "dbias"]
    assert "first.l0_reverse" in str(watch)


def test_numbers_are_those_of_a_loop():
    """Through watch, model and merge of two backwards: as expected_steps has them."""
    net = nn.LSTM(4, 6)
    x, dys = torch.randn(8, 3, 4), []
    watch = gk.watch(net)
    for half in (x[:, :1], x[:, 1:]):
        y, _ = net(half)
        dys.append(torch.randn_like(y))
        y.backward(dys[-1])
    watch.step()
    (profile,) = watch.time_profile()
    assert profile.site == "(model).l0"
    zeros = torch.zeros(3, 6)
    inputs = (x, zeros, zeros, *(p.detach() for p in net.parameters()), None)
    expected = expected_steps(inputs, (torch.cat(dys, 1), None, None))
    for name in ("dh", "dc", "dh_recurrent", "gate_count", "input_low", "output_high"):
        np.testing.assert_allclose(getattr(profile, name), expected[name].numpy(), rtol=1e-5)
    np.testing.assert_allclose(profile.forget_mean, (expected["forget_sum"] / expected["gate_count"]).numpy(), rtol=1e-5)
    watch.step()
    assert watch.time_profile() == []


def test_room_grows_between_forward_and_backward():
    """A longer sequence makes room in place: the backward of an earlier forward still finds its row."""
    net = nn.LSTM(4, 6)
    watch = gk.watch(net)
    short, long = net(torch.randn(5, 3, 4))[0], net(torch.randn(700, 2, 4))[0]
    long.square().sum().backward()
    short.square().sum().backward()
    watch.step()
    (profile,) = watch.time_profile()
    assert profile.steps == 700
    assert profile.gate_count[:5].tolist() == [30.0] * 5
    assert profile.gate_count[5:].tolist() == [12.0] * 695
    assert np.isfinite(profile.dh).all()


def test_compiled_call_longer_than_the_room(fresh_compiler):
    """What a graph has no room for reads NaN, not 0; from the next step on there is room."""
    net = nn.LSTM(4, 6)
    watch = gk.watch(net)
    compiled, x = torch.compile(net, fullgraph=True, backend="aot_eager"), torch.randn(300, 2, 4)
    found = []
    for _ in range(2):
        compiled(x)[0].square().sum().backward()
        watch.step()
        found.append(watch.time_profile()[0])
    assert [p.steps for p in found] == [300, 300]
    assert np.isfinite(found[0].dc[:256]).all()
    assert np.isnan(found[0].dc[256:]).all()
    assert np.isfinite(found[1].dc).all()
    assert math.isnan(found[0].floor_ratio())


def test_pause_and_close():
    net = Net()
    watch = gk.watch(net)
    watch.pause()
    train(net, 5)
    watch.step()
    assert watch.time_profile() == []
    watch.resume()
    train(net, 5)
    watch.step()
    assert len(watch.time_profile()) == 3
    watch.close()
    assert not any(getattr(net.first, name) is not None for name in net.first.stats_names() if hasattr(net.first, name))


def profile_from(dc, part="_l0"):
    """A profile whose |dc| is given by time step."""
    time_stats = gk.new_time_stats(len(dc))
    time_stats[0, 0] = len(dc)
    time_stats[1:, gk.TIME_FIELDS.index("dc")] = torch.tensor(dc, dtype=torch.float64)
    return profile_of("site", part, time_stats)


def test_conclusions():
    decay = [10.0**-lag for lag in range(8)]
    for profile in (profile_from(decay[::-1]), profile_from(decay, "_l2_reverse")):
        assert profile.reach() == 4  # 1e-3 itself is not below
        assert profile.floor_ratio() == pytest.approx(1e-7, abs=0)
        assert profile.slope() == pytest.approx(-1)
    assert (profile.layer, profile.direction) == (2, "reverse")
    assert profile_from([1.0] * 5).reach() == 5
    assert profile_from([1.0, 1e-9, 1.0]).reach() == 3
    assert profile_from([0.0, 0.0, 1.0]).reach() == 1
    assert profile_from([0.0, 0.0]).reach() == 0
    assert math.isnan(profile_from([1.0, 0.0]).floor_ratio())
    assert profile_from([1e-300, 1e-200, 1e-100]).slope() == pytest.approx(-100)
    assert math.isnan(profile_from([0.0, 1.0]).slope())
    assert profile_of("site", "_l0", gk.new_time_stats(3)) is None


@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_mask(batch_first):
    """A reset in the middle is two sequences; through it no gradient flows."""
    net = gk.LSTM(3, 5, 2, batch_first=batch_first)
    x, mask = torch.randn(7, 2, 3, requires_grad=True), torch.zeros(7, 2, dtype=torch.bool)
    mask[4, 1] = True
    turn = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    y, (h, c) = net(turn(x), reset_mask=turn(mask))
    y, whole = turn(y), turn(net(turn(x))[0])
    late, (h_late, c_late) = net(turn(x[4:, 1:]))
    torch.testing.assert_close(y[:, 0], whole[:, 0])
    torch.testing.assert_close(y[:4, 1], whole[:4, 1])
    torch.testing.assert_close(y[4:, 1:], turn(late))
    torch.testing.assert_close((h[:, 1:], c[:, 1:]), (h_late, c_late))
    (dx,) = torch.autograd.grad(y[6, 1].sum(), x)
    assert not dx[:4, 1].any()
    assert dx[4:, 1].any()
    with pytest.raises(gk.ArgumentError, match=r"^lstm: reset_mask must have shape"):
        net(turn(x), reset_mask=mask[:3])
    with pytest.raises(TypeError, match=r"^lstm: reset_mask must be bool, got torch\.float32"):
        net(turn(x), reset_mask=turn(mask).float())


def test_zoneout():
    """0 is torch's LSTM; 1 keeps the first state for ever; between them, elements keep their value or move on."""
    torch.manual_seed(1)
    x, hx = torch.randn(9, 2, 3), (torch.randn(1, 2, 50), torch.randn(1, 2, 50))
    plain = gk.LSTM(3, 50)
    kept = gk.LSTM(3, 50, zoneout_h=1.0, zoneout_c=1.0)
    assert repr(kept) == "LSTM(3, 50, zoneout_h=1.0, zoneout_c=1.0)"
    torch.testing.assert_close(kept(x, hx)[0], hx[0].expand(9, 2, 50))
    half = gk.LSTM(3, 50, zoneout_h=0.5)
    half.load_state_dict(plain.state_dict())
    y = half(x, hx)[0]
    new = plain(x[:1], hx)[0][0]
    stayed, moved = (y[0] == hx[0][0]).float().mean(), torch.isclose(y[0], new).float().mean()
    assert 0.3 < stayed < 0.7
    assert stayed + moved > 0.99
    torch.testing.assert_close(half.eval()(x, hx)[0][0], 0.5 * hx[0][0] + 0.5 * new)
    for options in ({"bidirectional": True}, {"proj_size": 2}):
        with pytest.raises(gk.ArgumentError, match=r"^LSTM: zoneout and reset_mask must be used with padded input"):
            gk.LSTM(3, 5, zoneout_c=0.1, **options)(x)
    with pytest.raises(gk.ArgumentError, match=r"^LSTM: zoneout_h must be in \[0, 1\], got 1.5"):
        gk.LSTM(3, 5, zoneout_h=1.5)
