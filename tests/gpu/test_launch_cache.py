"""The launch cache: what C++ launches is what the Python functions launch, and for calls of the same signature only."""

import re
import tempfile
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from launch_rig import check_replay, for_hopper, rigged, rows, stand_in, table

from benchmarks.codegen import TARGETS, compile_for, tool
from gradkernels.library import _C
from gradkernels.testing import DTYPES, randn
from gradkernels.triton import KERNELS
from gradkernels.triton import launch_cache as cache

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")
BF16, F32 = torch.bfloat16, torch.float32


def pointwise_calls(shape, dtype, on):
    """{op: its arguments} of the pointwise ops."""
    make = lambda: randn(*shape, dtype=dtype)  # noqa: E731
    return {
        "gelu_fwd": (make(), on),
        "gelu_bwd": (make(), make(), not on, table(2, on)),
        "residual_bwd": (make(), make(), table(3, on)),
        "probe_bwd": (make(), table(2), 1),
    }


def norm_calls(
    shape, dtype, on, num_dims=1, weight=True, bias=True, columns=True, dresidual=True, narrow=False, dy=True, dh=True
):
    """{op: its arguments} of the norms; narrow: a float32 residual beside x."""
    make = lambda *sizes: randn(*sizes, dtype=dtype)  # noqa: E731
    x, residual = make(*shape), randn(*shape, dtype=F32 if narrow else dtype)
    wide = torch.float64 if dtype is torch.float64 else F32
    mean = lambda: randn(*shape[:-num_dims], *[1] * num_dims, dtype=wide)  # noqa: E731
    parameters = lambda: (make(*shape[-num_dims:]) if weight else None, make(*shape[-num_dims:]) if bias else None, num_dims)  # noqa: E731
    dnew_residual = torch.randn_like(residual) if dh else None
    calls = {
        "layer_norm_fwd": (x, *parameters(), 1e-5),
        "add_layer_norm_fwd": (x, residual, *parameters(), 1e-5),
        "add_layer_norm_bwd": (
            make(*shape) if dy else None,
            dnew_residual,
            torch.randn_like(residual),
            mean(),
            mean(),
            *parameters(),
            dtype,
            [True, dresidual, columns, columns],
            table(5, on),
        ),
    }
    if dy:
        calls["layer_norm_bwd"] = (
            make(*shape),
            make(*shape),
            mean(),
            mean(),
            *parameters(),
            [True, columns, columns],
            table(4, on),
        )
    return calls


def check(make_calls, compiled_for=stand_in, only=None, **options):
    """check_replay of every op; {op: launches}."""
    seen = {}
    with rigged(compiled_for, **options) as (rig, ops):
        for op in only or make_calls():
            seen[op] = check_replay(rig, ops[op], KERNELS[op], lambda op=op: make_calls()[op])
    return seen


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("shape", [(8, 64), (3, 1367), (0, 5), (1, 1), (40, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise(dtype, shape, on):
    seen = check(partial(pointwise_calls, shape, dtype, on))
    assert {op: len(launches) for op, launches in seen.items()} == dict.fromkeys(seen, 1)


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("shape", [(8, 64), (2, 3, 48), (0, 5), (7, 20000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype, shape, on):
    seen = check(partial(norm_calls, shape, dtype, on))
    assert len(seen["layer_norm_bwd"]) == len(seen["add_layer_norm_bwd"]) == 2
    assert len(seen["layer_norm_fwd"]) == len(seen["add_layer_norm_fwd"]) == (shape[0] > 0)


@pytest.mark.parametrize("options", [{name: False} for name in ("weight", "bias", "columns", "dresidual", "dy", "dh")], ids=str)
def test_absent_arguments(options):
    check(partial(norm_calls, (9, 40), BF16, True, **options))
    x = lambda: randn(6, 7)  # noqa: E731
    check(lambda: {"residual_bwd": (None, x(), table(3))})
    check(lambda: {"residual_bwd": (x(), None, None)})


def test_float32_residual_and_two_dimensions():
    check(partial(norm_calls, (9, 40), BF16, True, narrow=True))
    check(partial(norm_calls, (5, 8, 12), F32, True, num_dims=2))


def test_layouts():
    """Rows with a stride of their own, and dense tensors in another order of dimensions, are captured: they are no copies."""
    check(lambda: {"layer_norm_fwd": (randn(9, 100)[:, :64], randn(64), None, 1, 1e-6)})
    check(lambda: {"gelu_bwd": (randn(4, 6, 8).transpose(0, 2), randn(4, 6, 8).transpose(0, 2), True, None)})
    check(lambda: {"take_rows": (table(7), rows(7))})
    check(lambda: {"take_rows": (table(0), rows(0))})


def test_shared_storage():
    """A weight and bias that are parts of one parameter are told apart by their addresses."""

    def calls():
        flat = randn(128)
        return {"layer_norm_fwd": (randn(8, 64), flat[:64], flat[64:], 1, 1e-5)}

    check(calls)


MUTATIONS = {
    "grid": lambda launch: (*launch[:2], (launch[2][0] + 1, *launch[2][1:]), *launch[3:]),
    "handle": lambda launch: (launch[0], launch[1] % 2 + 1, *launch[2:]),
    "threads": lambda launch: (*launch[:3], launch[3] + 32, *launch[4:]),
    "shared": lambda launch: (*launch[:4], 0, launch[5]),
    "pointers": lambda launch: (*launch[:5], [launch[5][1], launch[5][0], *launch[5][2:]]),
    "offset": lambda launch: (*launch[:5], [(launch[5][0][0], launch[5][0][1] + 16), *launch[5][1:]]),
    "literal": lambda launch: (*launch[:5], [(t, v + (t < 0)) for t, v in launch[5]]),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_capture_is_seen(mutation):
    """The comparison fails for a capture with one thing wrong, in the first launch or the last."""

    def capture(index, kernel, *args):
        result, captured = cache.capture(kernel, *args)
        captured[1][index] = MUTATIONS[mutation](captured[1][index])
        return result, captured

    for index in (0, -1):
        with pytest.raises(AssertionError):
            check(partial(norm_calls, (9, 40), BF16, True), only=["layer_norm_bwd"], capture=partial(capture, index))


@pytest.mark.parametrize("what", ["outputs", "allocation", "launches"])
def test_a_wrong_outcome_is_seen(what):
    def capture(kernel, *args):
        result, (allocations, launches, outputs, kept) = cache.capture(kernel, *args)
        if what == "outputs":
            outputs = [outputs[0], outputs[2], outputs[1]]
        elif what == "allocation":
            allocations[0] = (allocations[0][0], [1, 9], allocations[0][2])
        else:
            launches = launches[::-1]
        return result, (allocations, launches, outputs, kept)

    with pytest.raises(AssertionError):
        check(partial(norm_calls, (9, 40), BF16, True), only=["layer_norm_bwd"], capture=capture)


def recurrence_calls(T, B, H, P, dtype, dy=True, on=True, reverse=False):
    """{op: its arguments} of a padded recurrence, forward and backward; P: units of a projection, or 0."""
    rows, P, wide, projected = T * B, P or H, torch.float64 if dtype is torch.float64 else F32, P > 0
    operand = F32 if dtype is torch.float16 else dtype
    make, empty = partial(randn, dtype=dtype), partial(torch.empty, dtype=wide)
    programs = -(-max(H, P) // 16) * -(-B // 32)
    return {
        "lstm_stepwise_fwd": (
            randn(rows, 4 * H, dtype=wide),
            make(4 * H, P),
            make(P, H) if projected else None,
            make(B, P),
            randn(B, H, dtype=wide),
            make(rows, P),
            empty(rows, H),
            reverse,
            False,
        ),
        "lstm_stepwise_bwd": (
            make(rows, P) if dy else None,
            randn(B, P, dtype=wide),
            randn(B, H, dtype=wide),
            randn(P, 4 * H, dtype=operand),
            randn(H, P, dtype=operand) if projected else None,
            randn(B, H, dtype=wide),
            randn(rows, 4 * H, dtype=wide),
            randn(rows, H, dtype=wide),
            make(rows, 4 * H),
            make(rows, P) if projected else None,
            torch.zeros(T + 1, dtype=wide),
            torch.zeros(T + 1, programs, dtype=wide),
            torch.zeros(T + 1, dtype=torch.int32),
            torch.zeros(T + 1, programs, 11, dtype=torch.float64) if on else None,
            reverse,
            False,
        ),
    }


@pytest.mark.parametrize("projection", [0, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_time_loops(dtype, projection):
    """A launch a step, two with a projection; backward one step more, and the scan of what comes in."""
    for options in ({}, {"dy": False, "on": False}, {"reverse": True}):
        seen = check(partial(recurrence_calls, 5, 35, 40, projection, dtype, **options))
        each = 2 if projection else 1
        assert len(seen["lstm_stepwise_fwd"]) == 5 * each
        assert len(seen["lstm_stepwise_bwd"]) == 1 + 6 * each


def test_recurrences_need_no_other_kernels_for_other_lengths_and_batches():
    """What Triton would specialise kernels on, in all launches of a recurrence, is the same for every T and B."""
    with rigged() as (rig, ops):
        for T, B in ((2, 1), (5, 35), (16, 16), (33, 64), (64, 100)):
            for projection in (0, 24):
                for op, args in recurrence_calls(T, B, 40, projection, BF16).items():
                    ops[op](*args)
            assert (
                len(rig.compiled) == 8
            )  # forward, what comes in, backward; and with a projection one more of both recurrences


def parameter_table(compiled):
    """[(offset, bytes)] of a cubin's parameters, from its EIATTR_KPARAM_INFO."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = tool("cuobjdump", "-elf", file.name)
    rows = re.findall(r"Ordinal : (0x\w+)\s+Offset\s+: (0x\w+)\s+Size\s+: (0x\w+)", text)
    return [tuple(row) for _, *row in sorted([int(number, 16) for number in row] for row in rows)]


def test_parameters_are_the_compiled_kernels():
    """Every kernel, compiled: sizes and natural offsets of what is passed are those of its parameter table."""
    kernels = {}

    def compiled_for(found, handle):
        kernels[found.kernel.fn.__name__] = found, for_hopper(found, handle)
        return kernels[found.kernel.fn.__name__][1]

    check(partial(pointwise_calls, (40, 512), BF16, True), compiled_for)
    check(lambda: {"take_rows": (table(7), rows(7))}, compiled_for)
    seen = check(partial(norm_calls, (9, 512), BF16, True, narrow=True), compiled_for)
    check(partial(norm_calls, (5, 20000), F32, True), compiled_for)
    check(partial(recurrence_calls, 3, 5, 32, 16, BF16), compiled_for)
    assert len(seen["layer_norm_bwd"]) == 2
    assert {"gelu_fwd_kernel", "gelu_bwd_kernel", "residual_bwd_kernel", "probe_bwd_kernel", "take_rows_kernel"} <= set(kernels)
    assert {f"norm_{what}_kernel" for what in ("fwd", "bwd", "fwd_looped", "bwd_looped", "finalize")} <= set(kernels)
    assert {f"lstm_{way}_{what}_kernel" for way in ("fwd", "bwd") for what in ("step", "project")} <= set(kernels)
    for found, compiled in kernels.values():
        sizes = cache.declared_sizes(compiled)
        offsets, end = [], 0
        for size in sizes:
            offsets.append(-(-end // size) * size)
            end = offsets[-1] + size
        assert parameter_table(compiled) == list(zip(offsets, sizes, strict=True))
        assert cache.declared_sizes(compile_for(found, TARGETS["gfx942"])) == sizes
        assert cache.is_plain(compiled.metadata)
