"""Layers and directions that run concurrently, against one after the other.

test_triton.py runs this file in a process of its own, on the interpreted kernels. Streams are none here: their works
are done in orders drawn by chance among those that the streams and what each work waits for allow.
"""

import contextlib
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lstm_stacks import OnHost, Shuffled, both, check, dropping, keep, results, stack_of
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkernels as gk
from gradkernels.ops.lstm import IMPLEMENTED, sequential

if "on_triton" in sys.modules:
    from gradkernels.triton.lstm.stack import concurrent, lstm, saved_for, schedule_of, schedules_of
    from gradkernels.triton.lstm.streams import StreamGroup

ON_HOST = "on_triton" in sys.modules and not sys.modules["on_triton"].ON_GPU
pytestmark = pytest.mark.skipif(
    not ON_HOST, reason="run by test_triton.py in a process of its own; on a GPU test_gpu.py does it"
)
MODULE = "gradkernels.triton.lstm.stack"


@pytest.fixture
def shuffled():
    Shuffled.seed, Shuffled.depth = 0, []
    with mock.patch(f"{MODULE}.StreamGroup", Shuffled):
        yield Shuffled


@pytest.fixture
def on_host(body):
    recurrences, persistent = OnHost(body), "gradkernels.triton.lstm.persistent"
    with (
        mock.patch(f"{persistent}.OPS", recurrences),
        mock.patch(f"{persistent}.tiling_of", recurrences.tiling_of),
        mock.patch(f"{MODULE}.tiling_of", recurrences.tiling_of),
        mock.patch(f"{MODULE}.CHUNK_STEPS", 4),
    ):
        yield recurrences


LAYOUTS = {
    "padded": {},
    "one layer": {"layers": 1},
    "no bias": {"bias": False},
    "packed": {"sizes": [3, 2, 1]},
    "packed, steps without rows": {"sizes": [3, 2, 0, 0]},
    "in steps": {"dtype": torch.float32},
    "in steps, without rows": {"dtype": torch.float32, "sizes": [3, 2, 0, 0]},
    "in steps, projected, packed": {"dtype": torch.float32, "sizes": [3, 2, 1], "P": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_directions(shuffled, on_host, layout):
    """Whatever the order, y, both states and all gradients have the bits of one layer direction after the other."""
    stack, tensors = stack_of(**{"T": 3, "B": 3, "D": 6, "H": 7} | LAYOUTS[layout])
    together, in_sequence = both(stack, tensors)
    check(together, in_sequence)
    shuffled.seed = 1
    check(results(concurrent, stack, tensors, grads=together[3]), in_sequence)
    assert shuffled.depth[0] == 2 * stack.num_layers - 1  # a layer's directions, and what joins them
    assert (on_host.recurrences == 0) == ("in steps" in layout)


@pytest.mark.parametrize("directions", [1, 2])
def test_gradients_have_memory_of_their_own(shuffled, on_host, directions):
    """No two gradients are one tensor: not even those of a layer's two biases."""
    _, gradients, _, grads = results(concurrent, *stack_of(9, 3, 6, 7, directions=directions))
    storages = [t.untyped_storage().data_ptr() for t in (*gradients, *grads)]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize("sizes", [None, [3, 2, 1]], ids=["padded", "packed"])
def test_statistics(shuffled, on_host, sizes):
    """All tables of all layer directions, of both kinds."""
    stack, tensors = stack_of(3, 3, 6, 7, sizes=sizes, measured=True)
    together, in_sequence = both(stack, tensors)
    check(together, in_sequence)
    assert all(table.any() for table in together[2])


def test_dropout(shuffled, on_host):
    """The same elements are dropped in both passes, and as many as were asked for."""
    stack, tensors = stack_of(3, 3, 6, 7, layers=3, dropout=0.25)
    masks = []
    together = results(lambda *args: keep(masks, stack, *args), stack, tensors)
    check(together, results(lambda *args: sequential(*args, dropping(masks, stack)), stack, tensors, grads=together[3]))
    kept = torch.cat([mask.flatten() for mask in masks]).float().mean()
    assert 0.6 < kept < 0.9


@pytest.mark.parametrize("used", [(0,), (1,), (2,)], ids=str)
def test_one_output_used(shuffled, on_host, used):
    stack, tensors = stack_of(3, 3, 6, 7)
    outputs = sequential(stack, *tensors[:3], tensors[3:])
    grads = [torch.randn_like(y) if k in used else None for k, y in enumerate(outputs)]
    check(*both(stack, tensors, grads=grads, wanted=tensors[:3]))


FROZEN = {"all but the top": (slice(-8, None), 2), "x and states": (slice(3, None), 0), "one direction": (slice(7, None), 1)}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen(shuffled, on_host, frozen):
    """A layer direction below all that wants a gradient neither runs backward nor measures."""
    stack, tensors = stack_of(3, 3, 6, 7, measured=True)
    trained, still = tensors[FROZEN[frozen][0]], FROZEN[frozen][1]
    for tensor in tensors:
        tensor.requires_grad_(any(tensor is other for other in trained))
    together, in_sequence = both(stack, tensors, wanted=trained)
    check(together, in_sequence)
    assert [bool(table.any()) for table in stack.time_stats].count(False) == still


def test_differentiated_twice(shuffled):
    """The gradient of a gradient is that of one layer after the other; dropout drops the same."""
    stack, tensors = stack_of(3, 2, 3, 3, dtype=torch.float64, dropout=0.25)
    masks, found = [], []
    torch.manual_seed(1)
    for run in (partial(keep, masks, stack), lambda *args: sequential(*args, dropping(masks, stack))):
        y, h_n, _ = run(stack, *tensors[:3], tensors[3:])
        first = torch.autograd.grad((y.square().sum(), h_n.sum()), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(d.square().sum() for d in first), tensors))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", ["weights", "states", "calls"])
def test_what_is_used_twice(shuffled, shared):
    """With create_graph a gradient is counted once, where tensors are tied, or made by another call with the same weights."""
    stack, tensors = stack_of(2, 2, 6, 3, dtype=torch.float64)
    x, state, weights = tensors[0], tensors[1], tensors[3:]
    found = []
    for run in (concurrent, sequential):
        if shared == "weights":
            y = run(stack, *tensors[:3], weights[:8] + weights[:8])[0]
        elif shared == "states":
            y = run(stack, x, state, state, weights)[0]
        else:
            y = run(stack, *run(stack, *tensors[:3], weights), weights)[0]
        found.append(torch.autograd.grad(y.square().sum(), [x, state, *weights[:8]], create_graph=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_batched_gradients(shuffled):
    """torch.autograd.grad(is_grads_batched=True)."""
    stack, tensors = stack_of(2, 2, 3, 3, dtype=torch.float64)
    found = []
    for run in (concurrent, sequential):
        y = run(stack, *tensors[:3], tensors[3:])[0]
        torch.manual_seed(1)
        found.append(torch.autograd.grad(y, tensors[:4], torch.randn(3, *y.shape, dtype=y.dtype), is_grads_batched=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("directions", [1, 2])
def test_weights_of_any_layout(shuffled, on_host, directions):
    stack, tensors = stack_of(8, 3, 6, 7, directions=directions)
    tensors = [t.detach().T.contiguous().T.requires_grad_() if t.dim() == 2 else t for t in tensors]
    outputs, gradients, *_ = results(concurrent, stack, tensors)
    assert on_host.recurrences == 8  # two layer directions in two chunks, or four layer directions, both ways
    assert all(t.isfinite().all() for t in (*outputs, *gradients))


def test_only_what_a_pass_is_asked_for(shuffled, on_host):
    """A pass to x alone neither forms the gradients of weights nor measures them."""
    stack, tensors = stack_of(3, 3, 6, 7, measured=True)
    together, in_sequence = both(stack, tensors, wanted=tensors[:1])
    check(together, in_sequence)
    assert together[2][0][:2].any()
    assert not together[2][0][2:].any()


@pytest.mark.parametrize("directions", [1, 2])
def test_without_gradients(shuffled, on_host, directions):
    """The same outputs from the gates of two layers where each is done before the next."""
    stack, tensors = stack_of(13, 3, 6, 7, layers=4, directions=directions)
    expected = concurrent(stack, *tensors[:3], tensors[3:])
    with torch.no_grad(), mock.patch(f"{MODULE}.saved_for", wraps=saved_for) as rooms:
        found = concurrent(stack, *tensors[:3], tensors[3:])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    saved = saved_for(*rooms.call_args.args, **rooms.call_args.kwargs)
    assert len({t.data_ptr() for t in saved[1 : 3 * stack.layer_directions : 3]}) == 4
    assert rooms.call_args.kwargs["reuse"] == (directions == 2)


@pytest.mark.parametrize("options", [{"D": 0}, {"D": 0, "sizes": [3, 2]}, {"H": 0}], ids=str)
def test_sizes_of_zero(shuffled, on_host, options):
    """No inputs, or no units."""
    stack, tensors = stack_of(**{"T": 3, "B": 3, "D": 5, "H": 16, "dtype": torch.float32, "measured": True, **options})
    check(*both(stack, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_batch_sizes_of_any_layout(shuffled, on_host, dtype):
    """The persistent recurrences read them by pointer."""
    stack, tensors = stack_of(3, 3, 5, 16, sizes=[3, 2, 1], dtype=dtype)
    strided = replace(stack, batch_sizes=torch.tensor([[3, 9], [2, 9], [1, 9]])[:, 0])
    contiguous = results(concurrent, stack, tensors)
    check(results(concurrent, strided, tensors, contiguous[3]), contiguous)


def test_batch_sizes_changed_before_the_backward(shuffled, on_host):
    """As any tensor that a backward reads."""
    stack, tensors = stack_of(3, 3, 5, 16, sizes=[3, 2, 1])
    y, _, _ = concurrent(stack, *tensors[:3], tensors[3:])
    stack.batch_sizes.copy_(torch.tensor([3, 3, 0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_mistakes(shuffled):
    stack, tensors = stack_of(3, 2, 3, 3)
    assert schedules_of(stack, tensors[0], torch.cat([tensors[1]] * 2), tensors[2], tensors[3:]) == []
    for index, wrong in ((0, (3, 2, 4)), (2, (4, 3, 3)), (3 + 8, (12, 3))):
        given = [*tensors[:index], torch.randn(wrong, dtype=torch.bfloat16), *tensors[index + 1 :]]
        with pytest.raises(gk.ArgumentError) as ours:
            concurrent(stack, *given[:3], given[3:])
        with pytest.raises(gk.ArgumentError) as theirs:
            sequential(stack, *given[:3], given[3:])
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("dtype", "dropout", "H"),
    [(torch.bfloat16, 0.0, 16), (torch.float16, 0.25, 16), (torch.bfloat16, 0.0, 132)],
    ids=["", "dropout", "grid"],
)
def test_layers_in_chunks(shuffled, on_host, dtype, dropout, H):
    """Layers that follow one another give what they give in turn; only the input products have other shapes."""
    T, layers = 13, 3
    measured = dtype is torch.bfloat16 and not dropout and H == 16
    stack, tensors = stack_of(T, 9, 5, H, layers, 1, dropout=dropout, dtype=dtype, measured=measured)
    masks = []
    together = results(lambda *args: keep(masks, stack, *args), stack, tensors)
    assert on_host.recurrences == 2 * 3 * layers  # both ways, three chunks
    again = results(concurrent, stack, tensors, grads=together[3]) if not dropout else together
    check(together, again)
    in_sequence = results(lambda *args: sequential(*args, dropping(masks, stack)), stack, tensors, grads=together[3])
    for ours, theirs in zip(together[:3], in_sequence[:3], strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    works = 2 if dropout else 1  # a chunk, of the layers above the first: what joins them, and the recurrence
    assert shuffled.depth[0] == 1 + works * (layers - 1 + 3 - 1)  # chunks and layers, not their product
    assert shuffled.depth[1] == layers + 3 - 1 + 1  # and the weights' gradients


def test_schedules(on_host):
    """Layers run concurrently where two fit and there are enough steps; directions always, on halves if that pays."""

    def schedules(T, H, sms=132, **options):
        on_host.sms = sms
        stack, tensors = stack_of(T, 2, 3, H, **options)
        found = (schedule_of(stack, *tensors[:2], stack.weights_of(tensors[3:], 0), way) for way in (False, True))
        return [(len(schedule.chunks), schedule.num_concurrent) for schedule in found]

    assert schedules(13, 16, directions=1) == [(3, 2), (3, 2)]
    assert schedules(50, 200, directions=1) == [(8, 2), (8, 2)]
    assert schedules(13, 200, directions=1, layers=9) == [(3, 2), (3, 2)]
    for more in ({"T": 3}, {"T": 7}, {"P": 5}, {"sizes": [2] * 13}, {"dtype": torch.float32}):
        assert schedules(**{"T": 13, "H": 16, "directions": 1} | more) == [(1, 1), (1, 1)], more
    assert schedules(50, 200, sms=13, directions=1) == [(1, 1), (8, 2)]  # forward 25 blocks of 8 units, or 13 of 16
    assert schedules(13, 200) == schedules(13, 200, sizes=[2] * 13) == [(1, 2), (1, 2)]
    assert schedules(13, 200, dtype=torch.float32) == [(1, 1), (1, 1)]


def test_traced_and_transformed(shuffled, on_host):
    """Nothing of it where PyTorch traces or transforms: then the ops, one after the other, are what it sees."""
    stack, tensors = stack_of(3, 2, 3, 3)
    arguments = (tensors[0], tensors[1], tensors[2], tensors[3:])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(tensor) for tensor in tensors]
        assert schedules_of(stack, *fake[:3], fake[3:]) == []
        assert concurrent(stack, *fake[:3], fake[3:])[0].shape == (3, 2, 6)
    seen = []
    torch.func.vmap(lambda x: seen.append(schedules_of(stack, x, *arguments[1:])) or x.sum())(tensors[0].expand(2, -1, -1, -1))
    assert seen == [[]]
    assert len(schedules_of(stack, *arguments)) == 2


def test_dispatch(shuffled, on_host):
    """Registered at the keys of a device, as for CUDA: with gradients and without, the op runs concurrently there."""
    library = torch.library.Library("gradkernels", "IMPL")
    try:
        for key in ("CPU", "AutogradCPU"):
            library.impl("lstm", lstm, key)
        IMPLEMENTED.add("cpu")
        module = gk.LSTM(6, 16, bidirectional=True, dtype=torch.bfloat16)
        x = torch.randn(3, 2, 6, dtype=torch.bfloat16)
        y, _ = module(x)
        assert "_Concurrent" in type(y.grad_fn).__name__
        y.sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        with torch.inference_mode():
            before = on_host.recurrences
            torch.testing.assert_close(module(x)[0], y, rtol=0, atol=0)
            assert on_host.recurrences == before + 2
    finally:
        library._destroy()
        IMPLEMENTED.discard("cpu")
    assert "_Concurrent" not in type(module(x)[0].grad_fn).__name__


class FakeStream:
    """A stream that writes down what is asked of it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event {len(self.log)}"


@pytest.mark.parametrize("fails", [False, True])
def test_streams(fails):
    """Every stream begins after the current stream, which goes on after every stream, also where a work raises."""
    log = []
    current = FakeStream("current", log)

    @contextlib.contextmanager
    def entered(stream):
        log.append(f"{stream.name} is current")
        yield
        log.append(f"{stream.name} is not current")

    def work():
        log.append("works")
        if fails:
            raise RuntimeError("no memory")

    with (
        mock.patch("gradkernels.triton.lstm.streams.LOCAL", SimpleNamespace()),
        mock.patch("torch.cuda.Stream", side_effect=[FakeStream(name, log) for name in "ab"]),
        mock.patch("torch.cuda.current_stream", return_value=current),
        mock.patch("torch.cuda.stream", entered),
        pytest.raises(RuntimeError, match="no memory") if fails else contextlib.nullcontext(),
        StreamGroup(torch.device("cuda", 0), 2) as streams,
    ):
        assert StreamGroup(torch.device("cuda", 0), 2).streams is not streams.streams
        assert StreamGroup(torch.device("cuda", 0), 2).streams == streams.streams
        event = streams.run(0, lambda: log.append("works"))
        streams.run(1, work, [event])
    begin = ["a waits for current", "b waits for current", "a is current", "works", "a is not current", "a records"]
    inside = ["b waits for event 6", "b is current", "works", *([] if fails else ["b is not current", "b records"])]
    assert log == [*begin, *inside, "current waits for a", "current waits for b"]
