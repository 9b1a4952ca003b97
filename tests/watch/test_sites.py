"""Where a Watch reads the gradient: every model that trains, whatever its blocks return, wherever it moves."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from watched import WRAP, Block, Blocks, X, total, train

import gradkernels as gk
from gradkernels.watch.tables import values_of


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc1, self.fc2 = nn.Linear(64, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1))))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.mean, self.variance, self.fc3, self.fc4 = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        h = F.relu(self.fc1(x))
        z = self.mean(h) + torch.randn_like(h) * (self.variance(h) / 2).exp()
        return self.fc4(F.relu(self.fc3(z))), z


class GraphLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x, adjacency):
        return adjacency @ (x @ self.weight)


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.gc1, self.gc2 = GraphLayer(), GraphLayer()

    def forward(self, x, adjacency):
        return self.gc2(F.relu(self.gc1(x, adjacency)), adjacency)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.EmbeddingBag(20, 8), nn.Linear(8, 2)

    def forward(self, words, offsets):
        return self.fc(self.embedding(words, offsets))


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.action_head, self.value_head = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x):
        h = F.relu(self.body(x))
        return F.softmax(self.action_head(h), -1), self.value_head(h)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers, self.head = nn.ModuleList(layer(8, 8) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x)


class Listed(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = layer(x)
        return x


class Attributes(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        for index in range(depth):
            setattr(self, f"fc{index}", nn.Linear(8, 8))

    def forward(self, x):
        for layer in self.children():
            x = torch.sigmoid(layer(x))
        return x


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight


def pairs(count=4):
    return [nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()) for _ in range(count)]


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 3)


MODELS = {
    "a convolutional net": (ConvNet, (torch.randn(2, 3, 8, 8),), ("conv1…2", "fc1…2")),
    "an autoencoder": (Autoencoder, (X,), ("fc1…4",)),
    "a graph net": (GraphNet, (X, torch.rand(5, 5)), ("gc1…2",)),
    "a bag of words": (Bag, (torch.arange(6), torch.tensor([0, 3])), ()),
    "an actor and a critic": (ActorCritic, (torch.randn(5, 4),), ("body … action_head",)),
    "GRU": (lambda: Recurrent(nn.GRU), (torch.randn(3, 2, 8),), ("layers.0…2",)),
    "RNN": (lambda: Recurrent(nn.RNN), (torch.randn(3, 2, 8),), ("layers.0…2",)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (torch.randn(3, 2, 8),), ("layers.0…2.l0",)),
    "packed": (lambda: Recurrent(nn.GRU), (nn.utils.rnn.pack_sequence([X, X[:3]]),), ("layers.0…2",)),
    "a list of pairs": (lambda: Listed(nn.ModuleList(pairs())), (X,), ("layers.0…3.0",)),
    "a dictionary": (lambda: Listed(nn.ModuleDict({f"l{k}": nn.Linear(8, 8) for k in range(4)})), (X,), ("layers.l0…3",)),
    "Sequential of Sequential": (lambda: nn.Sequential(*pairs()), (X,), ("0…3.0",)),
    "flat": (lambda: nn.Sequential(*[layer for pair in pairs() for layer in pair]), (X,), ("0…6",)),
    "attributes": (Attributes, (X,), ("fc0…3",)),
    "an encoder in a Sequential": (
        lambda: nn.Sequential(encoder(), nn.Linear(8, 8)),
        (torch.randn(2, 3, 8),),
        ("0.layers.0…2",),
    ),
    "one layer": (lambda: nn.Linear(8, 2), (X,), ()),
    "a parameter": (Weight, (X,), ()),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3, ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_that_trains(name):
    """It is watched, a gradient is seen at every site, and what lies in line is compared."""
    make, args, stacks = MODELS[name]
    watch = train(make(), *args)
    assert {site.name for site in watch.sites} == {record.site for record in watch.records()}
    profile = watch.depth_profile()
    for stack in stacks:
        assert len(profile[stack]) > 1
    assert not watch.coverage().silent
    assert str(watch.coverage())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("wrap", WRAP)
def test_whatever_a_block_returns(wrap, backend):
    if (wrap, backend) == ("complex", "aot_eager"):
        pytest.skip("a complex output in a graph is not read: the op takes real numbers")
    net = Blocks(wrap)
    watch = gk.watch(net)
    model = net if backend == "eager" else torch.compile(net, backend=backend)
    total(model(X)).backward()
    watch.step()
    gradients = []

    def note(module, args, output):
        WRAP[wrap][1](output).register_hook(gradients.append)

    hooks = [block.register_forward_hook(note) for block in net.blocks]
    total(net(X)).backward()
    for hook in hooks:
        hook.remove()
    norms = [record.norm for record in watch.depth_profile()["blocks.0…3"]]
    if wrap == "complex":
        assert len(norms) == 4
    else:
        assert norms == pytest.approx([gradient.norm().item() for gradient in reversed(gradients)], rel=1e-5)


def test_named_sites():
    net = Blocks()
    watch = train(net, X, watch=gk.watch(net, sites=["blocks.*.linear", "blocks.0"]))
    assert sorted(site.name for site in watch.sites) == ["blocks.0", *(f"blocks.{k}.linear" for k in range(4))]
    assert len(watch.records()) == 5
    with pytest.raises(ValueError, match="watch: sites must match modules of the model, got 'head', which matches none"):
        gk.watch(Blocks(), sites=["blocks.*", "head"])


def test_names_are_unique():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self._orig_mod, self._fsdp_wrapped_module = (nn.Linear(8, 8) for _ in range(3))
            self.inner = nn.ModuleDict({"module": nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner["module"](self._fsdp_wrapped_module(self._orig_mod(self.module(x))))

    watch = train(Odd(), X)
    names = [site.name for site in watch.sites]
    assert len(set(names)) == len(names) == 4
    assert {"module", "inner.module"} < set(names)


def test_numbers_alone_are_shown_with_their_layer():
    assert "[0] Linear" in str(train(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), X))


def test_coverage_says_why_a_site_is_silent():
    net = Blocks(detached=1)
    watch = train(net, X)
    silent = dict(watch.coverage().silent)
    assert set(silent) == {"blocks.0", "blocks.0.norm", "blocks.1", "blocks.1.norm"}
    assert all("detached" in why for why in silent.values())
    assert "No gradient in this step: blocks.0.norm, blocks.0" in str(watch)
    net.detached = None
    net.blocks[0].requires_grad_(False)
    net.skipped = (2,)
    train(net, X, watch=watch)
    silent = dict(watch.coverage().silent)
    assert "frozen" in silent["blocks.0"]
    assert silent["blocks.2"] == "did not run since step 3"
    net.blocks[3] = nn.Linear(8, 8)
    assert dict(watch.coverage().silent)["blocks.3"] == "its module is no longer in the model"


def test_coverage_of_a_model_that_only_ran_without_gradients():
    net = Blocks()
    watch = gk.watch(net)
    with torch.no_grad():
        net(X)
    watch.step()
    assert all(why.startswith("ran, but no gradient came back") for _, why in watch.coverage().silent)
    assert len(watch.coverage().silent) == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((lambda x: x,), "model must be a torch.nn.Module, got function"), ((nn.Linear(2, 2), None, "*"), "got the string '\\*'")],
)
def test_bad_arguments(arguments, words):
    model, *rest = arguments
    with pytest.raises(TypeError, match=words):
        gk.watch(model, sites=rest[-1] if rest else None)


def test_coverage_of_many_layers_is_short():
    net = nn.Sequential(*[Block() for _ in range(80)])
    text = str(train(net, X, steps=1).coverage())
    assert len(text.splitlines()) == 3
    assert "*.norm (80)" in text


def test_coverage_lists_calls_in_code():
    assert ("ConvNet", "F.relu", 1) in gk.watch(ConvNet()).coverage().functional


@pytest.mark.parametrize("ran", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(ran, dtype):
    net = Blocks()
    watch = train(net, X, steps=ran)
    train(net.to(dtype), X.to(dtype), watch=watch, steps=1)
    assert {record.site for record in watch.records()} == {site.name for site in watch.sites}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("ran", [0, 1])
def test_another_device(ran, mode):
    """The meta device stands for a second one: what was measured stays, all rows go on, nothing raises."""
    net = Blocks()
    watch = gk.watch(net)
    if ran:
        total(net(X)).backward()
    net.to("meta")
    with mode():
        net(X.to("meta"))
    total(net(X.to("meta"))).backward()
    watch.step()
    assert len(watch.records()) == (4 * 4 + 4 if ran else 0)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.normal_(parameter.data)
    with mode():
        net(X)
    train(net, X, watch=watch, steps=1)
    assert len(watch.records()) == 4 * 4 + 4
    assert {record.observation_count for record in watch.records()} == {1}


def test_rows_of_two_tables_merge():
    tables = [torch.tensor([[4.0, 1, 2, 0, 0, largest, 1, 2]], dtype=torch.float64) for largest in (3.0, 2.0)]
    assert values_of([([1], table) for table in tables], 3).tolist() == [[0.0] * 8, [8, 2, 4, 0, 0, 3, 2, 4], [0.0] * 8]


def test_statistics_elsewhere_do_not_stop_a_forward_without_gradients():
    norm = gk.LayerNorm(8)
    norm.stats = gk.new_stats(4, "meta")
    with torch.no_grad():
        norm(X)
    with pytest.raises(ValueError, match="layer_norm: stats must be on x's device"):
        norm(X)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_blocks_compiled_one_by_one(backend):
    net, plain = Blocks(), Blocks()
    plain.load_state_dict(net.state_dict())
    watch, other = gk.watch(net), gk.watch(plain)
    for block in net.blocks:
        block.compile(backend=backend)
    train(net, X, watch=watch)
    train(plain, X, watch=other)
    ours, theirs = ([(record.site, record.port) for record in own.records()] for own in (watch, other))
    assert ours == theirs
    for one, two in zip(watch.records(), other.records(), strict=True):
        assert math.isclose(one.norm, two.norm, rel_tol=1e-4)
        assert one.observation_count == 1


def test_graph_breaks():
    class Broken(Blocks):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return x

    net = Broken()
    watch = gk.watch(net)
    train(torch.compile(net, backend="aot_eager"), X, watch=watch)
    assert len(watch.depth_profile()["blocks.0…3"]) == 4
    assert {record.observation_count for record in watch.records()} == {1}
