"""Watch: sites, order, records that equal what autograd says, accumulation, checkpointing, compile, errors."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkernels as gk


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    """Registers its head before its body, so that registration order is not the order of the forward pass."""

    def __init__(self, width=12, depth=3, checkpointing=None):
        super().__init__()
        self.head = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.checkpointing = checkpointing

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.checkpointing is None else checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(x)


def expected(net, x, dy):
    """{(site, port): gradient} of a plain model, from hooks and .grad, which owe nothing to our kernels."""
    found = {}

    def note(name, module, args, output):
        output.register_hook(lambda gradient: found.__setitem__((name, "dy"), gradient.clone()))
        if not isinstance(module, Block):
            args[0].register_hook(lambda gradient: found.__setitem__((name, "dx"), gradient.clone()))

    for name, module in net.named_modules():
        if isinstance(module, nn.LayerNorm | nn.GELU | Block):
            module.register_forward_hook(lambda module, args, output, name=name: note(name, module, args, output))
    net(x.clone().requires_grad_()).backward(dy)
    for name, module in net.named_modules():
        if isinstance(module, nn.LayerNorm):
            found[name, "dweight"], found[name, "dbias"] = module.weight.grad.clone(), module.bias.grad.clone()
    return found


def gradients_at_the_ops(net, x, dy):
    """As `expected`, with each layer's input cut off the rest by an identity, so that dx is that layer's alone."""
    for module in net.modules():
        if isinstance(module, nn.LayerNorm | nn.GELU):
            module.register_forward_pre_hook(lambda module, args: (args[0] * 1,))
    return expected(net, x, dy)


def plain_and_watched(**arguments):
    torch.manual_seed(3)
    plain = Net(**arguments)
    watched = Net(**arguments)
    watched.load_state_dict(plain.state_dict())
    return plain, watched


def test_records_equal_autograd_in_depth_order():
    plain, net = plain_and_watched()
    x, dy = torch.randn(5, 12), torch.randn(5, 12)
    gradients = gradients_at_the_ops(plain, x, dy)
    watch = gk.watch(net)
    net(x).backward(dy)
    watch.step()
    records = watch.records()
    inside = [f"blocks.{k}{layer}" for k in range(3) for layer in (".norm", ".act", "")]
    assert list(dict.fromkeys(record.site for record in records)) == [*inside, "head"]
    for record in records:
        gradient = gradients[record.site, record.port].double()
        assert math.isclose(record.norm, gradient.norm().item(), rel_tol=1e-5), record
        assert math.isclose(record.square_sum, gradient.square().sum().item(), rel_tol=1e-5)
        assert math.isclose(record.rms, gradient.square().mean().sqrt().item(), rel_tol=1e-5)
        assert math.isclose(record.abs_max, gradient.abs().max().item(), rel_tol=1e-5)
        assert (record.numel, record.nonfinite_count, record.zero_count) == (gradient.numel(), 0, 0)
    assert {(record.site, record.port) for record in records} == set(gradients)


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_compile_equals_eager(mode):
    plain, net = plain_and_watched()
    x, dy = torch.randn(5, 12), torch.randn(5, 12)
    gradients = gradients_at_the_ops(plain, x, dy)
    watch = gk.watch(net)
    compiled = net if mode == "eager" else torch.compile(net, fullgraph=True, backend=mode)
    for _ in range(2):
        compiled(x).backward(dy)
        watch.step()
        for record in watch.records():
            assert math.isclose(record.norm, gradients[record.site, record.port].norm().item(), rel_tol=1e-4), record
            assert record.observation_count == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_backward_once(reentrant):
    _, reference = plain_and_watched()
    _, net = plain_and_watched(checkpointing=reentrant)
    x, dy = torch.randn(5, 12), torch.randn(5, 12)
    rows = []
    for model in (reference, net):
        watch = gk.watch(model)
        model(x.clone().requires_grad_()).backward(dy)
        watch.step()
        rows.append({(record.site, record.port): record for record in watch.records()})
    assert rows[0] == rows[1]


def test_accumulation_merges_and_step_starts_again():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    watch = gk.watch(net)
    parts = [(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(3)]
    squares = []
    for x, dy in parts:
        net(x).backward(dy)
        watch.step()
        squares.append({(record.site, record.port): record for record in watch.records()})
    for x, dy in parts:
        net(x).backward(dy)
    watch.step()
    for record in watch.records():
        single = [rows[record.site, record.port] for rows in squares]
        assert math.isclose(record.square_sum, sum(part.square_sum for part in single), rel_tol=1e-12)
        assert record.abs_max == max(part.abs_max for part in single)
        assert record.numel == sum(part.numel for part in single)
        assert record.observation_count == 3
    watch.step()
    assert watch.records() == []


def test_a_module_used_twice_is_one_site():
    shared = nn.LayerNorm(4)
    net = nn.Sequential(shared, nn.Linear(4, 4), shared)
    watch = gk.watch(net)
    net(torch.randn(3, 4)).backward(torch.randn(3, 4))
    watch.step()
    rows = {record.port: record for record in watch.records() if record.site == "0"}
    assert rows["dy"].observation_count == 2
    assert rows["dy"].numel == 24


def test_residual_and_add_layer_norm_are_the_stream():
    net = nn.Sequential(*(gk.Residual(nn.Sequential(gk.LayerNorm(6), nn.Linear(6, 6))) for _ in range(3)))
    watch = gk.watch(net)
    x = torch.randn(4, 6, requires_grad=True)
    net(x).backward(torch.randn(4, 6))
    watch.step()
    stream = watch.stream()
    assert [record.site for record in stream] == ["0", "1", "2"]
    assert {record.port for record in stream} == {"dx"}
    assert math.isclose(stream[0].norm, x.grad.norm().item(), rel_tol=1e-5)
    for site in ("0", "1", "2"):
        assert {record.port for record in watch.records() if record.site == site} == {"dskip", "dbranch", "dx"}


def test_nonfinite_gradients_are_counted_and_kept_out():
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    watch = gk.watch(net)
    dy = torch.ones(3, 4)
    dy[0, 0], dy[1, 1] = math.nan, math.inf
    net(torch.randn(3, 4)).backward(dy)
    watch.step()
    incoming = next(record for record in watch.records() if (record.site, record.port) == ("1", "dy"))
    assert incoming.nonfinite_count == 2
    assert math.isclose(incoming.square_sum, 10.0)
    (finding,) = watch.diagnose()
    assert (finding.code, finding.site, finding.since_step) == ("NONFINITE", "1", 1)
    assert finding.evidence == "gradients of 2 sites are NaN or infinite in step 1, the loss handed them to 1"


def test_pause_resume_close():
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    watch = gk.watch(net)

    def run():
        net(torch.randn(2, 4)).backward(torch.randn(2, 4))
        watch.step()
        return len(watch.records())

    assert run() > 0
    watch.pause()
    assert run() == 0
    watch.resume()
    assert run() > 0
    watch.close()
    assert run() == 0
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    gk.watch(net).close()


def test_table_is_narrow_and_says_so_before_the_first_step():
    net = nn.Sequential()
    inner = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    net.add_module("a_block_with_a_very_long_name_indeed", nn.ModuleDict({"with_another_long_name_inside": inner}))
    net.forward = lambda x: inner(x)
    watch = gk.watch(net)
    assert "no finished step" in str(watch)
    for _ in range(4):
        net(torch.randn(2, 4)).backward(torch.randn(2, 4))
        watch.step(torch.tensor(1.25))
    lines = str(watch).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "step 4, loss 1.2500"
    assert len(watch.history) == 4


def test_errors():
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="watch: optimizer must hold parameters of model, got one that holds none of them"):
        gk.watch(net, other)
    with pytest.raises(RuntimeError, match="model has no parameters and no layer with a fused kernel"):
        gk.watch(nn.Sequential(nn.ReLU()))
    watch = gk.watch(net, torch.optim.SGD(net.parameters(), 0.25))
    with pytest.raises(RuntimeError, match="watched already"):
        gk.watch(net)
    net(torch.randn(2, 4)).backward(torch.randn(2, 4))
    watch.step()
    assert watch.history.snapshots[-1].learning_rates == (0.25,)


def test_wrapper_prefixes_are_stripped():
    net = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU()), backend="eager")
    watch = gk.watch(net)
    assert [site.name for site in watch.sites] == ["0", "1"]


def test_step_is_cheap():
    """No op for each site, and no memory of its own for each step: far below the time of any training step."""
    net = nn.Sequential(*(nn.LayerNorm(4) for _ in range(200)))
    watch = gk.watch(net)
    for _ in range(2):
        watch.step()
        net(torch.randn(2, 4)).backward(torch.randn(2, 4))
    with torch.profiler.profile() as profile:
        watch.step()
    assert sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")) < 3


class Prompt(nn.Module):
    """A block whose output is a parameter, which stays alive with what is hooked to it."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return self.prompt


def test_a_block_that_returns_a_parameter():
    """Not measured while paused, counted once after any number of pauses, and without a hook after close()."""
    net = nn.Sequential(Prompt(), nn.Linear(8, 8), nn.Linear(8, 8))
    watch = gk.watch(net)

    def step():
        net(0).sum().backward()
        watch.step()
        return [(record.site, record.observation_count, record.norm) for record in watch.records()]

    first = step()
    for _ in range(3):
        watch.pause()
        assert not step()
        watch.resume()
        assert step() == first
    assert len(net[0].prompt._backward_hooks) == 1
    watch.close()
    assert not net[0].prompt._backward_hooks
    net(0).sum().backward()


def num_hooks(net):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def blocks():
    return nn.Sequential(*[nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_watch_that_is_lost_closes_itself(steps):
    """A cell of a notebook, or train(), that runs again."""
    net = blocks()
    net[0][0].register_forward_hook(lambda *args: None)

    def train():
        watch = gk.watch(net)
        for _ in range(steps):
            net(torch.randn(2, 8)).sum().backward()
            watch.step()
        return [record.observation_count for record in watch.records()]

    for _ in range(3):
        assert set(train()) <= {1}
        assert num_hooks(net) == 1
        assert net[0][0].stats is None
    net(torch.randn(2, 8)).sum().backward()


def test_a_closed_watch_leaves_the_next_alone():
    """It is dropped only after the next one has begun to measure."""
    net = blocks()
    for _ in range(3):
        watch = gk.watch(net)
        net(torch.randn(2, 8)).sum().backward()
        watch.step()
        assert [record.observation_count for record in watch.records()] == 10 * [1]
        watch.close()


@pytest.mark.parametrize("net", [blocks(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))], ids=["fused", "probes"])
def test_a_model_is_watched_once(net):
    """Where the Watch is still held, by the traceback of an error say, revert() takes it off."""
    held = []
    for _ in range(3):
        held.append(gk.watch(net))
        with pytest.raises(RuntimeError, match=r"watched already: close\(\) that Watch first, or gk.revert"):
            gk.watch(net)
        gk.revert(net)
        assert num_hooks(net) == 0
    again = gk.watch(net)
    net(torch.randn(2, 8)).sum().backward()
    again.step()
    assert {record.observation_count for record in again.records()} == {1}


def test_a_copy_of_a_watched_model_can_be_watched():
    net = blocks()
    watch = gk.watch(net)
    other = copy.deepcopy(net)
    second = gk.watch(other)
    other(torch.randn(2, 8)).sum().backward()
    second.step()
    watch.step()
    assert second.records()
    assert not watch.records()
