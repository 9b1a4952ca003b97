"""What a capture is made of (triton/launch_cache.py): one call at a time, with launches that are only told of."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.backends.compiler import GPUTarget

from gradkernels.triton import launch_cache as cache
from gradkernels.triton.launch_cache import LITERAL, capture

X = torch.arange(12.0).view(3, 4)
CONSTANT = torch.ones(3)
SCRATCH = [(LITERAL, 0), (LITERAL, 0)]


def kernel_of(**kinds):
    """A compiled kernel with parameters of these types, 4 warps of 64 lanes."""
    sizes = [8 * (8 if kind.startswith("*") else cache.size_of(kind)) for kind in kinds.values() if kind != "constexpr"]
    lines = ",\n".join(f"\t.param .u{size} k_param_{k}" for k, size in enumerate([*sizes, 64, 64]))
    metadata = SimpleNamespace(name="k", num_warps=4, target=GPUTarget("hip", "gfx942", 64), shared=32)
    text = f".visible .entry k(\n{lines}\n)\n{{\n"
    return SimpleNamespace(src=SimpleNamespace(signature=kinds), metadata=metadata, asm={"ptx": text}, function=7)


POINTERS = kernel_of(x_ptr="*fp32", y_ptr="*fp32", N="constexpr")


def tell(x, y, compiled=POINTERS, grid=(5,), **values):
    """A launch over x and y."""
    _get_current_dispatch_mode().launched(compiled, grid, {"x_ptr": x, "y_ptr": y, "N": 4, **values})


def captured_launches_of(work, *inputs):
    """The captured launches of work(*inputs), on a device that C++ can launch on."""
    with mock.patch.object(cache, "can_launch", return_value=True):
        return capture(work, *inputs)[1]


def test_plan():
    """Allocations that are used, in their order; launches by place of their tensors; outputs; and what keeps the kernels."""

    def work(x):
        x.new_empty(100)  # nobody looks at it
        temporary, y = torch.empty_like(x), x.new_empty(4, 3, dtype=torch.float64)
        tell(x, temporary)
        tell(temporary.view(-1)[3:], y.t()[1:], grid=(2, 3))
        return y

    allocations, launches, outputs, kept = captured_launches_of(work, X)
    assert allocations == [([3, 4], [4, 1], torch.float32), ([4, 3], [3, 1], torch.float64)]
    assert launches == [
        ("k", 7, (5, 1, 1), 256, 32, [(0, 0), (1, 0), *SCRATCH]),
        ("k", 7, (2, 3, 1), 256, 32, [(1, 12), (2, 8), *SCRATCH]),
    ]
    assert (outputs, kept) == ([1], [POINTERS, POINTERS])


def test_nothing_and_several_outputs():
    def work(x):
        first, second = torch.empty_like(x), torch.empty_like(x)
        tell(first, second)
        return second, first

    assert captured_launches_of(work, X)[2] == [1, 0]
    assert captured_launches_of(lambda x: tell(x, x.view(-1)[:0]), X)[:3] == (
        [],
        [("k", 7, (5, 1, 1), 256, 32, [(0, 0), *[(LITERAL, 0)] * 3])],
        [],
    )


NOT_THE_ALLOCATION = {
    "transposed": lambda y: y.t(),
    "later": lambda y: y[1:],
    "shorter": lambda y: y[:2],
    "of another dtype": lambda y: y.view(torch.int32),
    "made before": lambda y: CONSTANT,
    "the input": lambda y: X,
    "computed": lambda y: X + 1,
}


@pytest.mark.parametrize("output", NOT_THE_ALLOCATION)
def test_outputs_are_allocations(output):
    """All of one, as it was made: nothing else can be returned from C++."""

    def work(x):
        y = torch.empty_like(x)
        tell(x, y)
        return NOT_THE_ALLOCATION[output](y)

    assert captured_launches_of(work, X) is None


SIDE_EFFECTS = {
    "written to": lambda x: x.new_empty(3).zero_(),
    "random numbers": lambda x: torch.rand(3),
    "on another device": lambda x: torch.empty(3, device="meta"),
    "not compiled": lambda x: tell(x, x, compiled=None),
    "no programs": lambda x: tell(x, x, grid=(5, 0)),
    "memory from elsewhere": lambda x: tell(CONSTANT, x),
    "behind the end": lambda x: tell(x.as_strided((1,), (1,), 12), x),
}


@pytest.mark.parametrize("effect", SIDE_EFFECTS)
def test_what_is_not_understood(effect):
    """Anything but allocations, views and plain launches over them leaves the call to Python."""

    def work(x):
        SIDE_EFFECTS[effect](x)
        y = torch.empty_like(x)
        tell(x, y)
        return y

    memory = torch.zeros(13)[:12].view(3, 4)
    assert captured_launches_of(work, memory) is None


def test_the_end_of_a_tensor_is_in_it():
    last = torch.zeros(20)[4:16]
    *_, parameters = captured_launches_of(lambda x: tell(x[11:], x), last)[1][0]
    assert parameters[:2] == [(0, 44), (0, 0)]
    assert captured_launches_of(lambda x: tell(torch.as_strided(x, (1,), (1,), 3), x), last) is None


@pytest.mark.parametrize(
    ("kind", "value", "bits"),
    [("i32", -1, 2**32 - 1), ("i64", -2, 2**64 - 2), ("i8", 3, 3), ("fp32", 1.0, 0x3F800000), ("fp64", 1.0, 0x3FF << 52)],
)
def test_literals(kind, value, bits):
    compiled = kernel_of(x_ptr="*fp32", y_ptr="*fp32", number=kind, N="constexpr")
    *_, parameters = captured_launches_of(lambda x: tell(x, x.view(-1)[:0], compiled, number=value), X)[1][0]
    assert parameters == [(0, 0), (LITERAL, 0), (LITERAL, bits), *SCRATCH]


def test_where_the_stream_is_another_s():
    """C++ launches on PyTorch's current stream; where it sees another one than Python does, everything stays in Python."""
    for ours, theirs in ((1, 1), (1, 2)):
        cache.can_launch.cache_clear()
        with (
            mock.patch.object(cache, "_C", mock.Mock(**{"stream_of.return_value": ours})),
            mock.patch("torch.cuda.current_stream", return_value=SimpleNamespace(cuda_stream=theirs)),
            mock.patch.object(cache, "launch_address", return_value=0),
        ):
            assert cache.can_launch(torch.device("cuda", 0)) == (ours == theirs)
    cache.can_launch.cache_clear()
