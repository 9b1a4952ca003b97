"""Launch plans (csrc/plans.h): what C++ launches is what the Python functions launch, and only ever for the same kind of call."""

import importlib.util
import re
import tempfile
import threading
from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from plan_rig import check_replay, counts, for_hopper, on_device_without_code, rigged, stand_in

from benchmarks.codegen import TARGETS, compile_for, tool
from gradkernels.library import _C
from gradkernels.telemetry import NUM_CELLS
from gradkernels.testing import DTYPES, randn
from gradkernels.triton import KERNELS, plans

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")
BF16, F32 = torch.bfloat16, torch.float32


def table(ports, on=True):
    return torch.zeros(ports, NUM_CELLS, 8, dtype=torch.float64) if on else None


def pointwise_calls(shape, dtype, on):
    """{op: its arguments} of the pointwise ops."""
    make = lambda: randn(*shape, dtype=dtype)  # noqa: E731
    return {
        "gelu_fwd": (make(), on),
        "gelu_bwd": (make(), make(), not on, table(2, on)),
        "residual_bwd": (make(), make(), table(3, on)),
        "probe_bwd": (make(), table(2), 1),
    }


def norm_calls(shape, dtype, on, num_dims=1, weight=True, bias=True, columns=True, narrow=False, dy=True, dh=True):
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
            columns,
            table(5, on),
        ),
    }
    if dy:
        calls["layer_norm_bwd"] = (make(*shape), make(*shape), mean(), mean(), *parameters(), columns, table(4, on))
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


@pytest.mark.parametrize("options", [{name: False} for name in ("weight", "bias", "columns", "dy", "dh")], ids=str)
def test_absent_arguments(options):
    check(partial(norm_calls, (9, 40), BF16, True, **options))
    x = lambda: randn(6, 7)  # noqa: E731
    check(lambda: {"residual_bwd": (None, x(), table(3))})
    check(lambda: {"residual_bwd": (x(), None, None)})


def test_float32_residual_and_two_dimensions():
    check(partial(norm_calls, (9, 40), BF16, True, narrow=True))
    check(partial(norm_calls, (5, 8, 12), F32, True, num_dims=2))


def test_layouts():
    """Rows with a stride of their own, and dense tensors in another order of dimensions, are no copies: they have plans."""
    check(lambda: {"layer_norm_fwd": (randn(9, 100)[:, :64], randn(64), None, 1, 1e-6)})
    check(lambda: {"gelu_bwd": (randn(4, 6, 8).transpose(0, 2), randn(4, 6, 8).transpose(0, 2), True, None)})
    check(lambda: {"fold": (table(7),)})
    check(lambda: {"fold": (table(0),)})


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
def test_a_wrong_plan_is_seen(mutation):
    """The comparison fails for a plan with one thing wrong, in the first launch or the last."""

    def watch(index, kernel, *args):
        result, plan = plans.watch(kernel, *args)
        plan[1][index] = MUTATIONS[mutation](plan[1][index])
        return result, plan

    for index in (0, -1):
        with pytest.raises(AssertionError):
            check(partial(norm_calls, (9, 40), BF16, True), only=["layer_norm_bwd"], watch=partial(watch, index))


@pytest.mark.parametrize("what", ["outputs", "allocation", "launches"])
def test_a_wrong_outcome_is_seen(what):
    def watch(kernel, *args):
        result, (allocations, launches, outputs, kept) = plans.watch(kernel, *args)
        if what == "outputs":
            outputs = [outputs[0], outputs[2], outputs[1]]
        elif what == "allocation":
            allocations[0] = (allocations[0][0], [1, 9], allocations[0][2])
        else:
            launches = launches[::-1]
        return result, (allocations, launches, outputs, kept)

    with pytest.raises(AssertionError):
        check(partial(norm_calls, (9, 40), BF16, True), only=["layer_norm_bwd"], watch=watch)


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
    check(lambda: {"fold": (table(7),)}, compiled_for)
    seen = check(partial(norm_calls, (9, 512), BF16, True, narrow=True), compiled_for)
    check(partial(norm_calls, (5, 20000), F32, True), compiled_for)
    assert len(seen["layer_norm_bwd"]) == 2
    assert {"gelu_fwd_kernel", "gelu_bwd_kernel", "residual_bwd_kernel", "probe_bwd_kernel", "fold_kernel"} <= set(kernels)
    assert {f"norm_{what}_kernel" for what in ("fwd", "bwd", "fwd_looped", "bwd_looped", "finalize")} <= set(kernels)
    for found, compiled in kernels.values():
        sizes = plans.declared_sizes(compiled)
        offsets, end = [], 0
        for size in sizes:
            offsets.append(-(-end // size) * size)
            end = offsets[-1] + size
        assert parameter_table(compiled) == list(zip(offsets, sizes, strict=True))
        assert plans.declared_sizes(compile_for(found, TARGETS["gfx942"])) == sizes
        assert plans.is_plain(compiled.metadata)


def test_first_calls_are_pythons():
    """A kind has a plan from its third call on; a thread's first launch is Triton's own, which gives it a context."""
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


def test_other_kinds_have_other_plans():
    """A kind differs in every value, size, stride, dtype, alignment, absence, and in what shares storage; nothing is mixed up."""
    flat = randn(4 * 8 * 64)
    x, mean = flat[: 8 * 64].view(8, 64), randn(8, 1)
    rest = (mean, randn(8, 1), randn(64), randn(64), 1, True)
    kinds = [
        (x, randn(8, 64), *rest, table(4)),
        (x, randn(8, 64), *rest, None),
        (x, randn(8, 64), *rest, torch.zeros(4, 7, 8, dtype=torch.float64)),
        (x, randn(8, 64), *rest[:3], None, *rest[4:], table(4)),
        (x, randn(8, 64), *rest[:5], False, table(4)),
        (flat[1 : 1 + 8 * 64].view(8, 64), randn(8, 64), *rest, table(4)),
        (flat[4 : 4 + 8 * 64].view(8, 64), flat[1024 : 1024 + 8 * 64].view(8, 64), *rest, table(4)),
        (flat.view(8, 256)[:, :64], randn(8, 64), *rest, table(4)),
        (x.double(), randn(8, 64).double(), mean.double(), mean.double(), randn(64).double(), None, 1, True, table(4)),
        (randn(4, 2, 64), randn(4, 2, 64), randn(4, 2, 1), randn(4, 2, 1), *rest[2:], table(4)),
        (randn(2, 4, 64), randn(2, 4, 64), randn(2, 4, 1), randn(2, 4, 1), *rest[2:], table(4)),
    ]
    with rigged() as (rig, ops):
        for args in kinds * 4:
            ops["layer_norm_bwd"](*args)
        assert counts(ops["layer_norm_bwd"])["kinds"] == counts(ops["layer_norm_bwd"])["plans"] == len(kinds)
        for args in kinds:
            check_replay(rig, ops["layer_norm_bwd"], KERNELS["layer_norm_bwd"], lambda args=args: args)


def test_alignment():
    """A view 4 bytes further does not take the aligned plan, whose kernel reads 16 bytes at a time; it gets its own."""
    memory = randn(8 * 64 + 1)
    with rigged() as (rig, ops):
        for _ in range(4):
            ops["gelu_fwd"](memory[:-1], True)
        assert counts(ops["gelu_fwd"])["plans"] == 1
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
def test_copies_have_no_plan(op, make_args):
    """Calls that copy an input, or whose pointers could be either of two arguments', stay in Python, and are watched once."""
    watched = []

    def watch(kernel, *args):
        watched.append(args)
        return plans.watch(kernel, *args)

    with rigged(watch=watch) as (rig, ops):
        for _ in range(6):
            ops[op](*make_args())
        assert (len(rig.python), len(rig.replayed), len(watched)) == (6, 0, 1)
        assert counts(ops[op]) == {"kinds": 1, "plans": 0, "replays": 0}


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
def test_special_launches_have_no_plan(change):
    def compiled_for(found, handle):
        compiled = stand_in(found, handle)
        vars(compiled.metadata).update(CHANGES[change])
        return compiled

    check_no_plan(compiled_for)


@pytest.mark.parametrize("change", ["one more", "wider", "none", "unknown type"])
def test_parameters_not_understood_have_no_plan(change):
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

    check_no_plan(compiled_for)


def check_no_plan(compiled_for):
    with mock.patch.dict("plan_rig.BYTES", {"u1": 4}), rigged(compiled_for) as (rig, ops):
        for _ in range(5):
            ops["gelu_fwd"](randn(8, 64), False)
        assert (len(rig.python), len(rig.replayed)) == (5, 0)


def test_no_plan_where_C_cannot_launch():
    with rigged() as (rig, ops), mock.patch.object(plans, "can_launch", lambda device: False):
        for _ in range(5):
            ops["gelu_fwd"](randn(8, 64), False)
        assert (len(rig.python), len(rig.replayed)) == (5, 0)


def test_bounded():
    """Shapes that never repeat fill the table no further than its bound; plans are made again afterwards."""
    with rigged() as (rig, ops):
        for size in range(1, 2100):
            ops["fold"](table(0).new_empty(0, size, 8))
            assert counts(ops["fold"])["kinds"] <= 1024
        for _ in range(3):
            ops["fold"](table(0).new_empty(0, 1, 8))
        assert counts(ops["fold"])["replays"] == 1


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
    """What the Python function raises arrives as it is, also while it is watched, and later calls work."""
    with rigged() as (rig, ops):
        run = rig.run
        with mock.patch("gradkernels.triton.launch.run", side_effect=KeyError("no such kernel")):
            for _ in range(3):
                with pytest.raises(KeyError, match="no such kernel"):
                    ops["gelu_fwd"](randn(8, 64), False)
        assert run == rig.run
        check_replay(rig, ops["gelu_fwd"], KERNELS["gelu_fwd"], lambda: (randn(8, 64), False))


def test_modes_see_the_op():
    """Under a dispatch mode nothing is replayed behind its back; under torch.compile's the launches are in the graph."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with rigged() as (rig, ops):
        check_replay(rig, ops["gelu_fwd"], KERNELS["gelu_fwd"], lambda: (randn(8, 64), False))
        with Seeing():
            ops["gelu_fwd"](torch.ones(8, 64), False)
        assert ops["gelu_fwd"] in seen


def test_threads():
    """Threads make and replay plans of different kinds at once; each call gets its own memory and its own launch."""
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
        assert len(python) == 3 * len(shapes)  # two calls without a plan, and a thread's first launch
        rows = [seen.parameters[-3] for seen in (*python, *replayed)]
        assert {value: rows.count((size, value)) for size, value in rows} == {8: 600, 16: 300, 24: 300}


def test_deterministic_fill():
    """Memory of a plan is filled like any other where PyTorch is told to (as conftest.py does)."""
    with rigged() as (rig, ops):
        for _ in range(4):
            y = ops["gelu_fwd"](randn(8, 64), False)
        assert rig.replayed
        assert y.isnan().all()
