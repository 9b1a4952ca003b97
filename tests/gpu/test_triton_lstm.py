"""The LSTM's Triton kernels against the plain loop: interpreted on CPU tensors, or on a GPU (see on_triton.py).

test_triton.py runs this file in a process of its own. The ops' whole test files run on the kernels in `make slow`.
"""

import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from checks import check_case, check_case_stats, same, with_stats
from lstm_cases import (
    batch_sizes_of,
    cell_case,
    check_time_stats,
    expected_steps,
    layer_case,
    layer_inputs,
    plain_layer,
    torch_layer,
)

import gradkernels as gk
from gradkernels.testing import DTYPES, differentiate, largest, randn

pytestmark = pytest.mark.skipif("on_triton" not in sys.modules, reason="run by test_triton.py in a process of its own")
LENGTHS = (5, 3, 3, 1)
LAYOUTS = {
    "padded": {},
    "packed": {"lengths": LENGTHS},
    "packed reverse": {"lengths": LENGTHS, "reverse": True},
    "projected packed reverse": {"P": 3, "lengths": LENGTHS, "reverse": True},
    "projected": {"P": 18, "bias": False},
}
# (T, B, D, H): one of everything; more rows than a program has; a tail of units, and of a turn of the product's loop.
SHAPES = ((1, 1, 1, 1), (2, 35, 3, 17), (2, 3, 4, 65))


def inputs_of(T, B, D, H, **options):
    reverse = options.pop("reverse", False)
    return (*layer_inputs(T, B, D, H, **options), reverse)


def case_of(T=5, B=4, D=3, H=19, dtype=torch.float32, **options):
    inputs, batch_sizes, reverse = inputs_of(T, B, D, H, dtype=dtype, **options)
    eager = plain_layer if dtype is torch.float16 else torch_layer
    return layer_case(inputs, batch_sizes, reverse, eager=eager)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer(dtype, layout):
    check_case(case_of(dtype=dtype, **LAYOUTS[layout]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_shapes(dtype, shape):
    check_case(case_of(*shape, dtype=dtype))


@pytest.mark.parametrize("used", [(0,), (1,), (2,)], ids=str)
def test_one_output_used(used):
    case = case_of(**LAYOUTS["packed"])
    dys = tuple(dy if k in used else None for k, dy in enumerate(case.dys))
    inputs, batch_sizes, _ = inputs_of(5, 4, 3, 19, lengths=LENGTHS)
    case = layer_case(inputs, batch_sizes, dys=dys)
    found, exact = differentiate(case.function, inputs, dys), differentiate(case.exact, inputs, dys, torch.float64)
    for ours, truth in zip(found[1], exact[1], strict=True):
        if truth is not None:
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_time_stats(dtype, layout):
    """Every field of every step, over live rows alone; gradients have the same bits without."""
    gain = 1.0 if dtype is torch.bfloat16 else 3.0  # which would enlarge every rounding in turn
    inputs, batch_sizes, reverse = inputs_of(5, 4, 3, 19, dtype=dtype, gain=gain, **LAYOUTS[layout])
    time_stats = gk.new_time_stats(7)
    case = layer_case(inputs, batch_sizes, reverse, time_stats=time_stats)
    results = differentiate(case.function, case.inputs, case.dys)
    expected = expected_steps(inputs, case.dys, batch_sizes, reverse)
    check_time_stats(time_stats, expected, dtype)
    same(results, differentiate(layer_case(inputs, batch_sizes, reverse, case.dys).function, case.inputs, case.dys))


def test_time_stats_of_several_programs():
    """Programs over rows and over units, each with sums of its own."""
    inputs, _ = layer_inputs(2, 40, 3, 35)
    time_stats = gk.new_time_stats(2)
    case = layer_case(inputs, time_stats=time_stats)
    differentiate(case.function, case.inputs, case.dys)
    check_time_stats(time_stats, expected_steps(inputs, case.dys), torch.float32)


@pytest.mark.parametrize("recorded", [0, 1, 3])
def test_time_stats_add_up(recorded):
    """Two calls merge, norms by hypot; steps beyond the buffer are left out, which row 0 shows."""
    inputs, batch_sizes, _ = inputs_of(5, 4, 3, 19, lengths=LENGTHS)
    time_stats = gk.new_time_stats(recorded)
    case = layer_case(inputs, batch_sizes, time_stats=time_stats)
    for _ in range(2):
        differentiate(case.function, case.inputs, case.dys)
    expected = expected_steps(inputs, case.dys, batch_sizes)
    assert time_stats[0, :2].tolist() == [5, 2]
    for column, name in enumerate(gk.TIME_FIELDS):
        factor = 2**0.5 if column < 3 else 2
        torch.testing.assert_close(time_stats[1:, column], factor * expected[name][:recorded], rtol=1e-5, atol=0)


VANISHING = [(dtype, "padded") for dtype in DTYPES]
VANISHING += [(torch.float32, "packed"), (torch.float16, "projected packed reverse")]


@pytest.mark.parametrize(("dtype", "layout"), VANISHING, ids=str)
def test_vanishing_gradients(dtype, layout):
    """|dh| far below 1e-40, where float16 ends at 6e-8: the norms are right, with statistics or without the gradients same."""
    options = dict(LAYOUTS[layout])
    if "lengths" in options:
        options["lengths"] = (20, 20, 18)
    inputs, batch_sizes, reverse = inputs_of(20, 3, 2, 8, dtype=dtype, gain=0.2, **options)
    inputs = tuple(t if t is None else t - 1.1 * (k in (5, 6)) for k, t in enumerate(inputs))  # f is small
    P, size = 3 if "P" in options else 8, 1e-4 if dtype is torch.float16 else 1e-25
    y = torch.zeros((*inputs[0].shape[:-1], P), dtype=dtype)
    dys = (y, size * randn(3, P).to(dtype), size * randn(3, 8).to(dtype))
    time_stats = gk.new_time_stats(20)
    case = layer_case(inputs, batch_sizes, reverse, dys, time_stats=time_stats)
    results = differentiate(case.function, case.inputs, case.dys)
    expected = expected_steps(inputs, dys, batch_sizes, reverse)
    assert min(expected["dc"]) < (1e-20 if dtype is torch.float16 else 1e-40)
    exact, info = differentiate(case.exact, case.inputs, case.dys, torch.float64), torch.finfo(dtype)
    for found, value in zip(results[1], exact[1], strict=True):  # back in their own scale, subnormal or zero as may be
        if found is not None:
            allowed = max(1e-5, 20**0.5 * info.eps) * largest(value) + 64 * info.smallest_normal * info.eps
            assert largest(found.double() - value) <= allowed
    check_time_stats(time_stats, expected, dtype)
    same(results, differentiate(layer_case(inputs, batch_sizes, reverse, dys).function, case.inputs, case.dys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_losses_far_apart(dtype):
    """What has vanished meets gradients of any other size on its way: nothing overflows, nothing is lost."""
    sizes = ((15, 1e-6), (12, 1e3), (6, 1e-5), (1, 10.0)) if dtype is torch.float16 else ((15, 1e-30), (12, 1e25), (6, 1.0))
    inputs, _ = layer_inputs(16, 3, 2, 17, dtype=dtype, gain=0.3)
    dy = torch.zeros(16, 3, 17, dtype=dtype)
    for t, size in sizes:
        dy[t] = (size * randn(3, 17)).to(dtype)
    time_stats = gk.new_time_stats(16)
    case = layer_case(inputs, dys=(dy, None, None), time_stats=time_stats)
    results = differentiate(case.function, case.inputs, case.dys)
    expected = expected_steps(inputs, case.dys)
    check_time_stats(time_stats, expected, dtype)
    assert all(d.isfinite().all() for d in results[1] if d is not None)


def test_special_values():
    """NaN and infinities in one sequence reach that sequence and the weights alone."""
    case = case_of(4, 5, 3, 20)
    case.inputs[0][1, 1, 0], case.dys[0][2, 3, 7] = float("nan"), float("inf")
    (y, *_), gradients = differentiate(case.function, case.inputs, case.dys)
    assert y[1:, 1].isnan().all()
    assert y[:, [0, 2, 3, 4]].isfinite().all()
    assert gradients[0][:, [0, 2, 4]].isfinite().all()
    assert not gradients[0][:3, 3].isfinite().any()
    check_case_stats(case)


def test_empty_batch():
    inputs, _ = layer_inputs(3, 0, 4, 5)
    time_stats = gk.new_time_stats(4)

    def function(*inputs):
        return gk.lstm_layer(*inputs, time_stats=time_stats)

    (y, h_n, c_n), gradients = differentiate(function, inputs, (torch.zeros(3, 0, 5), None, None))
    assert [t.shape for t in (y, h_n, c_n)] == [(3, 0, 5), (0, 5), (0, 5)]
    assert not any(d.any() for d in gradients if d is not None)
    assert time_stats[0, :2].tolist() == [3, 1]
    assert not time_stats[1:].any()


def test_offset_state():
    """h0 and c0 as nn.LSTM hands them on: parts of larger tensors, from any address."""
    case = case_of(2, 3, 2, 5)
    states = torch.zeros(2, 2, 16)
    shifted = [states[k, k].flatten()[1:].as_strided((3, 5), (5, 1)) for k in range(2)]
    for view, state in zip(shifted, case.inputs[1:3], strict=True):
        view.copy_(state)
    inputs = (case.inputs[0], *shifted, *case.inputs[3:])
    same(with_stats(layer_case(inputs, dys=case.dys))[0], with_stats(case)[0])


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (3, 4, 16), (40, 9, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cell(dtype, shape):
    check_case(cell_case(*shape, dtype=dtype, bias=shape[0] != 3))


@pytest.mark.parametrize("telemetry", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed reverse"])
def test_persistent_recurrence(layout, telemetry):
    """A persistent kernel is asked before each recurrence, and gets the tensors that it takes: 16-bit, without a projection."""
    inputs, batch_sizes, reverse = inputs_of(5, 4, 3, 19, dtype=torch.bfloat16, **LAYOUTS[layout])
    seen, asked = {}, []
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    rows = 20 if sizes is None else sum(sizes)

    def tiling_of(*args):
        asked.append(args[2:])
        return 3, 100

    def forward(*args):
        seen["forward"] = args
        for t in (args[0], args[4], args[5]):
            t.fill_(0.5)

    def backward(*args):
        seen["backward"] = args
        for t in (args[1], args[2], args[7], args[8], args[9]):
            if t is not None:
                t.fill_(1)

    ops = SimpleNamespace(lstm_recurrence_fwd=forward, lstm_recurrence_bwd=backward)
    module = "gradkernels.triton.lstm.persistent"
    time_stats = gk.new_time_stats(5) if telemetry else None
    case = layer_case(inputs, batch_sizes, reverse, time_stats=time_stats)
    with mock.patch(f"{module}.tiling_of", tiling_of), mock.patch(f"{module}.OPS", ops):
        differentiate(case.function, case.inputs, case.dys)
    gates, weight_hh, h0, c0, y, cells, given, given_reverse, _ = seen["forward"]
    shapes = [tuple(t.shape) for t in (gates, weight_hh, h0, c0, y, cells)]
    assert shapes == [(rows, 76), (76, 19), (4, 19), (4, 19), (rows, 19), (rows, 19)]
    assert [t.dtype for t in (gates, weight_hh, h0, c0, y, cells)] == [
        torch.float32 if k in (0, 3, 5) else torch.bfloat16 for k in range(6)
    ]
    assert (given is batch_sizes or given.tolist() == sizes, given_reverse) == (True, reverse)
    dy, dh, dc, _, _, _, _, dgates, partials, exponents, *_ = seen["backward"]
    assert [tuple(t.shape) for t in (dy, dh, dc, dgates)] == [(rows, 19), (4, 19), (4, 19), (rows, 76)]
    assert [t.dtype for t in (dy, dh, dc, dgates)] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert all(t.is_contiguous() for t in (*seen["forward"][:6], dy, dh, dc, dgates))
    assert set(asked) == {(19, False, 4, 1), (19, True, 4, 1)}
    if telemetry:
        assert (partials.shape, exponents.shape) == ((5, 3, 11), (5,))
        assert time_stats[1, 0].item() == (3**0.5) / 2  # three programs with a sum of 1 each, in a scale of 2
    else:
        assert partials is None
        assert exponents is None


def test_lengths_of_any_size():
    """Every way in which sequences can end: alone, together, all at the last step, one step after the other."""
    for lengths in ((3, 3, 3), (3, 2, 1), (4, 1, 1), (2,)):
        inputs, _ = layer_inputs(0, 0, 2, 3, lengths=lengths)
        sizes = batch_sizes_of(lengths)
        for reverse in (False, True):
            check_case(layer_case(inputs, sizes, reverse))
