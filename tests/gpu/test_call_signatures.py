"""Launch cache (csrc/launch_cache.h): which calls have them, what tells call signatures apart, errors, threads and bounds."""

import threading
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from launch_rig import check_replay, counts, on_device_without_code, rigged, rows, stand_in, table

from gradkernels.library import _C
from gradkernels.testing import randn
from gradkernels.triton import KERNELS, launch
from gradkernels.triton import launch_cache as cache

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")


def test_first_calls_are_pythons():
    """Captured launches are replayed from the third call on; a thread's first launch is Triton's, which gives it a context."""
    args = lambda: (randn(8, 64), False)  # noqa: E731
    done = []

    def calls():
        with rigged() as (rig, ops):
            for _ in range(5):
                ops["gelu_fwd"](*args())
                done.append((len(rig.python), len(rig.replayed)))

    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()
    assert done == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]


def test_other_signatures_have_other_launches():
    """A kind differs in every value, size, stride, dtype, alignment, absence, and in what shares storage."""
    flat = randn(4 * 8 * 64)
    x, mean = flat[: 8 * 64].view(8, 64), randn(8, 1)
    rest = (mean, randn(8, 1), randn(64), randn(64), 1, [True] * 3)
    kinds = [
        (x, randn(8, 64), *rest, table(4)),
        (x, randn(8, 64), *rest, None),
        (x, randn(8, 64), *rest, torch.zeros(4, 7, 8, dtype=torch.float64)),
        (x, randn(8, 64), *rest[:3], None, *rest[4:], table(4)),
        (x, randn(8, 64), *rest[:5], [True, False, False], table(4)),
        (flat[1 : 1 + 8 * 64].view(8, 64), randn(8, 64), *rest, table(4)),
        (flat[4 : 4 + 8 * 64].view(8, 64), flat[1024 : 1024 + 8 * 64].view(8, 64), *rest, table(4)),
        (flat.view(8, 256)[:, :64], randn(8, 64), *rest, table(4)),
        (x.double(), randn(8, 64).double(), mean.double(), mean.double(), randn(64).double(), None, 1, [True] * 3, table(4)),
        (randn(4, 2, 64), randn(4, 2, 64), randn(4, 2, 1), randn(4, 2, 1), *rest[2:], table(4)),
        (randn(2, 4, 64), randn(2, 4, 64), randn(2, 4, 1), randn(2, 4, 1), *rest[2:], table(4)),
    ]
    with rigged() as (rig, ops):
        for args in kinds * 4:
            ops["layer_norm_bwd"](*args)
        assert counts(ops["layer_norm_bwd"])["kinds"] == counts(ops["layer_norm_bwd"])["captured launches"] == len(kinds)
        for args in kinds:
            check_replay(rig, ops["layer_norm_bwd"], KERNELS["layer_norm_bwd"], lambda args=args: args)


def test_alignment():
    """A view 4 bytes further does not take the aligned launches, whose kernel reads 16 bytes at a time; it gets its own."""
    memory = randn(8 * 64 + 1)
    with rigged() as (rig, ops):
        for _ in range(4):
            ops["gelu_fwd"](memory[:-1], True)
        assert counts(ops["gelu_fwd"])["captured launches"] == 1
        _, aligned = rig.take()
        ops["gelu_fwd"](memory[1:], True)
        assert (len(rig.python), rig.replayed) == (1, [])
        assert counts(ops["gelu_fwd"])["kinds"] == 2
        assert rig.python[0].handle != aligned[0].handle
        assert check_replay(rig, ops["gelu_fwd"], KERNELS["gelu_fwd"], lambda: (memory[1:], True))


def test_devices():
    """The same call on another device is of another kind. (The device is one that PyTorch has no code for.)"""
    here = torch.zeros(1)
    with rigged() as (_, ops):
        name = ops["gelu_fwd"]._schema.name
        _C.implement(name, "MAIA", lambda x, tanh: here, lambda kernel, x, tanh: (here, None))
        for kinds, index in ((1, 0), (2, 1), (2, 0), (2, 1), (3, 2)):
            x = on_device_without_code(index)
            assert x.device == torch.device("maia", index)
            ops["gelu_fwd"](x, True)
            assert counts(ops["gelu_fwd"])["kinds"] == kinds


@pytest.mark.parametrize(
    ("op", "make_args"),
    [
        ("gelu_bwd", lambda: (randn(6, 8).t(), randn(8, 6), False, None)),
        ("layer_norm_fwd", lambda: (randn(8, 6).t(), None, None, 1, 1e-5)),
        ("layer_norm_fwd", lambda: (randn(6, 8), randn(16)[::2], None, 1, 1e-5)),
        ("probe_bwd", lambda: (randn(64)[::2], table(1), 0)),
        ("gelu_bwd", lambda: (lambda x: (x, x, True, None))(randn(6, 8))),
    ],
    ids=["other strides", "transposed", "parameter", "sliced", "the same tensor twice"],
)
def test_copies_are_not_captured(op, make_args):
    """Calls that copy an input, or whose pointers could be either of two arguments', stay in Python, and are watched once."""
    captured = []

    def capture(kernel, *args):
        captured.append(args)
        return cache.capture(kernel, *args)

    with rigged(capture=capture) as (rig, ops):
        for _ in range(6):
            ops[op](*make_args())
        assert (len(rig.python), len(rig.replayed), len(captured)) == (6, 0, 1)
        assert counts(ops[op]) == {"kinds": 1, "captured launches": 0, "replays": 0}


CHANGES = {
    "cluster": {"num_ctas": 2},
    "cluster_dims": {"cluster_dims": (2, 1, 1)},
    "cooperative": {"launch_cooperative_grid": True},
    "dependent launch": {"launch_pdl": True},
    "scratch": {"global_scratch_size": 8},
    "profiling": {"profile_scratch_size": 8},
    "instrumented": {"instrumentation_mode": "gsan"},
    "shared": {"shared": 229 * 1024},
}


@pytest.mark.parametrize("change", CHANGES)
def test_special_launches_are_not_captured(change):
    def compiled_for(found, handle):
        compiled = stand_in(found, handle)
        vars(compiled.metadata).update(CHANGES[change])
        return compiled

    check_nothing_captured(compiled_for)


@pytest.mark.parametrize("change", ["one more", "wider", "none", "unknown type"])
def test_parameters_not_understood_are_not_captured(change):
    """A kernel that declares other parameters than would be passed, as a new Triton may."""

    def compiled_for(found, handle):
        compiled = stand_in(found, handle)
        if change == "one more":
            compiled.asm["ptx"] = compiled.asm["ptx"].replace("\n)", ",\n\t.param .u64 k_param_9\n)")
        elif change == "wider":
            compiled.asm["ptx"] = compiled.asm["ptx"].replace(".u32 k_param_2", ".u64 k_param_2")
        elif change == "none":
            compiled.asm.clear()
        else:
            compiled.src.signature["num_vectors"] = "u1"
        return compiled

    check_nothing_captured(compiled_for)


def check_nothing_captured(compiled_for):
    with mock.patch.dict("launch_rig.BYTES", {"u1": 4}), rigged(compiled_for) as (rig, ops):
        for _ in range(5):
            ops["gelu_fwd"](randn(8, 64), False)
        assert (len(rig.python), len(rig.replayed)) == (5, 0)


def test_nothing_captured_where_C_cannot_launch():
    with rigged() as (rig, ops), mock.patch.object(cache, "can_launch", return_value=False):
        for _ in range(5):
            ops["gelu_fwd"](randn(8, 64), False)
        assert (len(rig.python), len(rig.replayed)) == (5, 0)


def test_bounded():
    """Shapes that never repeat fill the table no further than its bound; captured launches are made again afterwards."""
    with rigged() as (_, ops):
        for size in range(1, 2100):
            ops["take_rows"](table(0).new_empty(0, size, 8), rows(0))
            assert counts(ops["take_rows"])["kinds"] <= 1024
        for _ in range(3):
            ops["take_rows"](table(0).new_empty(0, 1, 8), rows(0))
        assert counts(ops["take_rows"])["replays"] == 1


def test_launches_are_bounded():
    """Long recurrences fill the table by their launches: with 65,536 of them it starts again."""

    def recurrence(T):
        h, wide = torch.zeros(1, 1), torch.zeros(T, 1)
        return torch.zeros(T, 4), torch.zeros(4, 1), None, h, torch.zeros(1, 1), wide, wide.clone(), False, False

    with rigged() as (rig, ops):
        op = ops["lstm_stepwise_fwd"]
        op(*recurrence(1))
        (compiled,) = rig.compiled.values()
        with mock.patch.object(launch, "run", return_value=compiled):
            for T, kinds in ((22000, 2), (22001, 3), (22002, 4), (22003, 1)):
                for _ in range(2):
                    op(*recurrence(T))
                assert counts(op)["kinds"] == kinds
            assert counts(op)["captured launches"] == 1


def test_error_of_the_driver():
    """It names op, kernel and code; the call after it is right again."""
    with rigged() as (rig, ops):
        args = (randn(8, 64), False)
        check_replay(rig, ops["gelu_fwd"], KERNELS["gelu_fwd"], lambda: args)
        rig.code = 701
        with pytest.raises(RuntimeError, match=r"gelu_fwd: launching k failed with the driver's error 701"):
            ops["gelu_fwd"](*args)
        rig.code = 0
        check_replay(rig, ops["gelu_fwd"], KERNELS["gelu_fwd"], lambda: args)


def test_errors_of_python():
    """What the Python function raises arrives as it is, also while it is captured, and later calls work."""
    with rigged() as (rig, ops):
        run = rig.run
        with mock.patch("gradkernels.triton.launch.run", side_effect=KeyError("no such kernel")):
            for _ in range(3):
                with pytest.raises(KeyError, match="no such kernel"):
                    ops["gelu_fwd"](randn(8, 64), False)
        assert run == rig.run
        check_replay(rig, ops["gelu_fwd"], KERNELS["gelu_fwd"], lambda: (randn(8, 64), False))


def test_nothing_captured_under_a_mode():
    """Where a dispatch mode is on, as torch.compile's is while it traces, the mode is given the launch."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with rigged() as (rig, ops):
        x = randn(8, 64)
        check_replay(rig, ops["gelu_fwd"], KERNELS["gelu_fwd"], lambda: (x, False))
        rig.take()
        python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
        with mock.patch("torch.library.wrap_triton") as wrapped, Mode(), torch._C._ExcludeDispatchKeyGuard(python):
            ops["gelu_fwd"](x, False)
        assert wrapped.called
        assert rig.take() == ([], [])


def test_threads():
    """Threads capture and replay launches of several signatures at once; each call gets its own memory and launch."""
    shapes = [(8, 64), (16, 64), (24, 128), (8, 128)]
    wrong = []

    def work(ops, shape):
        for _ in range(300):
            y, mean, rstd = ops["layer_norm_fwd"](torch.randn(shape), None, None, 1, 1e-5)
            if (y.shape, mean.shape, rstd.shape) != (shape, (shape[0], 1), (shape[0], 1)):
                wrong.append(shape)

    with rigged() as (rig, ops):
        threads = [threading.Thread(target=work, args=(ops, shape)) for shape in shapes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        python, replayed = rig.take()
        assert len(python) == 3 * len(shapes)  # two calls without a capture, and a thread's first launch
        rows = [seen.parameters[-3] for seen in (*python, *replayed)]
        assert {value: rows.count((size, value)) for size, value in rows} == {8: 600, 16: 300, 24: 300}


def test_deterministic_fill():
    """Memory of a capture is filled like any other where PyTorch is told to (as conftest.py does)."""
    with rigged() as (rig, ops):
        for _ in range(4):
            y = ops["gelu_fwd"](randn(8, 64), False)
        assert rig.replayed
        assert y.isnan().all()
