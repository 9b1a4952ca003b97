"""Recurrent ops on sizes of zero, and on batch_sizes of any layout, changed or wrong: torch's numbers, or an error."""

from functools import partial

import pytest
import torch
from cases import Case
from checks import check_case, same
from lstm_cases import layer_inputs, torch_layer
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gradkernels as gk
from gradkernels.nn.zoneout import lstm_steps
from gradkernels.ops import lstm_cell as cell_module
from gradkernels.ops import lstm_layer as layer_module
from gradkernels.testing import DTYPES, randn

OP = torch.ops.gradkernels
SIZES = {  # D, H, P, and the rows of each step
    "no inputs": (0, 4, None, [3, 3, 3]),
    "no inputs, projected": (0, 4, 2, [3, 3, 3]),
    "no outputs": (5, 4, 0, [3, 3, 3]),
    "nothing in or out": (0, 4, 0, [3, 3, 3]),
    "no sequences": (5, 4, None, [0, 0]),
    "no sequences, no inputs": (0, 4, 2, [0, 0]),
    "packed, no inputs": (0, 4, None, [3, 2, 1]),
    "packed, no outputs": (5, 4, 0, [3, 2, 1]),
    "packed, no sequences": (5, 4, None, [0]),
    "packed, steps without rows": (5, 4, 2, [3, 1, 0, 0]),
    "packed, no units": (5, 0, None, [3, 1]),
    "no units, projected": (5, 0, 2, [3, 3]),
}


def wide_layer(*args):
    """torch's layer in float64, rounded at the end: it does not take every 16-bit dtype of these sizes."""
    *tensors, batch_sizes, reverse = args
    outputs = torch_layer(*(t if t is None else t.double() for t in tensors), batch_sizes, reverse)
    return tuple(y.to(tensors[0].dtype) for y in outputs)


def inputs_of(D, H, P, sizes, packed, bias, dtype):
    B, columns = sizes[0], H if P is None else P
    biases = (randn(4 * H, dtype=dtype), randn(4 * H, dtype=dtype)) if bias else (None, None)
    x = randn(sum(sizes), D, dtype=dtype) if packed else randn(len(sizes), B, D, dtype=dtype)
    state = (randn(B, columns, dtype=dtype), randn(B, H, dtype=dtype))
    projection = None if P is None else randn(P, H, dtype=dtype)
    return x, *state, randn(4 * H, D, dtype=dtype), randn(4 * H, columns, dtype=dtype), *biases, projection


def case_of(name, reverse, bias, dtype):
    packed = name.startswith("packed")
    inputs = inputs_of(*SIZES[name], packed, bias, dtype)
    x, h0, c0, *_ = inputs
    batch_sizes = torch.tensor(SIZES[name][3]) if packed else None
    dys = (randn(*x.shape[:-1], h0.shape[1], dtype=dtype), torch.randn_like(h0), torch.randn_like(c0))

    def function(*inputs, stats=None):
        return gk.lstm_layer(*inputs, batch_sizes=batch_sizes, reverse=reverse, stats=stats, time_stats=gk.new_time_stats(9))

    def seen(d):
        found = {"dy": dys[0], "dx": d[0], "dweight_ih": d[3], "dweight_hh": d[4], "dbias": d[5], "dweight_hr": d[7]}
        return {port: gradient for port, gradient in found.items() if gradient is not None}

    def twin(*inputs):
        return wide_layer(*inputs, batch_sizes, reverse)

    terms = {**dict.fromkeys(("y0", "y1", "y2"), 20.0), **{f"d{k}": 100.0 for k in range(8)}}
    return Case("lstm_layer", function, twin, inputs, dys, seen, terms)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer(dtype, name, reverse, bias):
    check_case(case_of(name, reverse, bias, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_without_units(dtype):
    """torch.lstm ends the process for some of these: outputs of no elements, gradients of zeros."""
    inputs = [t.requires_grad_() for t in inputs_of(5, 0, None, [3, 3], False, True, dtype)[:-1]]
    outputs = gk.lstm_layer(*inputs)
    assert [y.shape for y in outputs] == [(2, 3, 0), (3, 0), (3, 0)]
    gradients = torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])
    assert [d.shape for d in gradients] == [t.shape for t in inputs]
    assert not gradients[0].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(2, 0, 4), (2, 4, 0), (0, 4, 3), (0, 0, 4), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cell(dtype, sizes, bias):
    B, D, H = sizes
    x, *others, _ = inputs_of(D, H, None, [B], False, bias, dtype)
    inputs, dys = (x[0], *others), (randn(B, H, dtype=dtype), randn(B, H, dtype=dtype))

    def twin(x, h, c, *weights):
        outputs = torch.lstm_cell(x.double(), (h.double(), c.double()), *(w if w is None else w.double() for w in weights))
        return tuple(y.to(dtype) for y in outputs)

    def seen(d):
        found = dict(zip(cell_module.PORTS, (*dys, *d), strict=False))
        return {port: gradient for port, gradient in found.items() if gradient is not None}

    terms = {**dict.fromkeys(("y0", "y1"), 20.0), **{f"d{k}": 100.0 for k in range(7)}}
    check_case(
        Case("lstm_cell", lambda *inputs, stats=None: gk.lstm_cell(*inputs, stats=stats), twin, inputs, dys, seen, terms)
    )


@pytest.mark.parametrize("sizes", [[3, 3], [3, 2, 0], [0]], ids=str)
@pytest.mark.parametrize(("D", "P"), [(0, None), (0, 2), (5, 0), (5, None)])
def test_stack(D, P, sizes):
    """gk.functional.lstm, two layers in two directions, as torch has it."""
    B, H, columns, weights = sizes[0], 4, 4 if P is None else P, []
    for part in range(4):
        inputs = D if part < 2 else 2 * columns
        shapes = [(4 * H, inputs), (4 * H, columns), (4 * H,), (4 * H,), *([(P, H)] if P is not None else [])]
        weights += [randn(*shape, dtype=torch.float64) for shape in shapes]
    hx = (randn(4, B, columns, dtype=torch.float64), randn(4, B, H, dtype=torch.float64))
    packed = sizes != [3, 3]
    x = randn(sum(sizes), D, dtype=torch.float64) if packed else randn(len(sizes), B, D, dtype=torch.float64)
    leaves, batch_sizes, found = [t.requires_grad_() for t in (x, *hx, *weights)], torch.tensor(sizes), []
    ours = gk.functional.lstm(x, hx, weights, 2, bidirectional=True, batch_sizes=batch_sizes if packed else None)
    given = (x, batch_sizes, hx, weights) if packed else (x, hx, weights)
    twin = torch._VF.lstm(*given, True, 2, 0.0, False, True, *([] if packed else [False]))
    for outputs in (ours, twin):
        dys = [torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) for y in outputs]
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, dys)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[], [3, -1], [-1], [2, 3], [3, 2], [-3, -2], [1 << 62, 1 << 62]], ids=str)
def test_wrong_batch_sizes(sizes):
    """An error from functions, from the ops that they call, and from modules, which may be PyTorch's about the state's size."""
    (x, *others), batch_sizes = layer_inputs(1, 3, 5, 4)[0], torch.tensor(sizes, dtype=torch.int64)
    x = x[0]
    for call in (
        lambda: gk.lstm_layer(x, *others, batch_sizes=batch_sizes),
        lambda: gk.functional.lstm(x, [s[None] for s in others[:2]], others[2:6], batch_sizes=batch_sizes),
        lambda: gk.LSTM(5, 4)(PackedSequence(x, batch_sizes)),
        lambda: OP.lstm_layer_fwd(x, *others, batch_sizes, False),
        lambda: layer_module.lstm_layer_fwd_reference(x, *others, batch_sizes, False),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"batch_sizes must|sequence length|negative dimension|overflowed"):
            call()


def test_no_steps():
    inputs = layer_inputs(1, 3, 5, 4)[0]
    state = (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    for call in (
        lambda: gk.lstm_layer(inputs[0][:0], *inputs[1:]),
        lambda: gk.functional.lstm(inputs[0][:0], state, inputs[3:7]),
        lambda: lstm_steps(inputs[0][:0], state, inputs[3:7]),
        lambda: gk.LSTM(5, 4, zoneout_h=0.5)(inputs[0][:0]),
    ):
        with pytest.raises(gk.ArgumentError, match="Expected sequence length to be larger than 0 in RNN"):
            call()


def test_wrong_numbers_of_parts():
    inputs, state = layer_inputs(2, 3, 5, 4)[0], (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    for num_layers in (0, -1):
        with pytest.raises(gk.ArgumentError, match=r"^lstm: num_layers must be at least 1"):
            gk.functional.lstm(inputs[0], state, inputs[3:7], num_layers)
    for wrong in ((state[0][0], state[1]), (state[0], state[1][:0]), (state[0], state[1].expand(2, 3, 4))):
        with pytest.raises(gk.ArgumentError, match=r"^lstm: [hc]_0 must have shape \(1, B, \.\), got"):
            gk.functional.lstm(inputs[0], wrong, inputs[3:7])
    with pytest.raises(gk.ArgumentError, match=r"^lstm_layer: x must have shape"):
        gk.functional.lstm(inputs[0][0, 0], state, inputs[3:7], batch_first=True)


def test_modules():
    """Modules refuse what torch's refuse, and compute what those compute."""
    for make in (gk.LSTM, nn.LSTM):
        for arguments in ((0, 4), (5, 0), (-1, 4)):
            with pytest.raises(ValueError, match="must be greater than zero"):
                make(*arguments)
    for arguments in ((0, 4), (4, 0)):
        ours, twin = gk.LSTMCell(*arguments), nn.LSTMCell(*arguments)
        ours.load_state_dict(twin.state_dict())
        x = torch.randn(2, arguments[0])
        torch.testing.assert_close(ours(x), twin(x))


LAYOUTS = {
    "every second": (lambda sizes: torch.stack([sizes, 7 - sizes], 1).flatten()[::2], [4, 3, 1]),
    "column": (lambda sizes: torch.stack([torch.full_like(sizes, -1), sizes, sizes + 9], 1)[:, 1], [4, 3, 1]),
    "expanded": (lambda sizes: sizes[:1].expand(3), [4, 4, 4]),
    "at the end of its memory": (lambda sizes: torch.cat([sizes.new_full((5,), 99), sizes])[5:], [4, 3, 1]),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_batch_sizes(layout, reverse):
    """batch_sizes of any strides, to the layer and to the ops that it calls: the bits of contiguous ones."""
    lay_out, sizes = LAYOUTS[layout]
    contiguous, found = torch.tensor(sizes), []
    inputs = [t if t is None else t.requires_grad_() for t in layer_inputs(1, sizes[0], 5, 9, P=3)[0]]
    inputs[0] = randn(sum(sizes), 5).requires_grad_()
    dy = randn(sum(sizes), 3)
    for batch_sizes in (contiguous, lay_out(contiguous)):
        assert batch_sizes.tolist() == sizes
        y, h_n, c_n = gk.lstm_layer(*inputs, batch_sizes=batch_sizes, reverse=reverse)
        gradients = torch.autograd.grad(y, [t for t in inputs if t is not None], dy)
        with torch.no_grad():
            outputs = OP.lstm_layer_fwd(*inputs, batch_sizes, reverse)
            last = (*outputs[3:], reverse, [True] * 8, None, None)
            raw = OP.lstm_layer_bwd(dy, None, None, *inputs, batch_sizes, outputs[0], *last)
        found.append((y.detach(), h_n.detach(), c_n.detach(), *gradients, *outputs, *raw))
    same(*found)


@pytest.mark.parametrize("wrong", [torch.tensor([3, 2], dtype=torch.int32), torch.tensor([3.0, 2.0]), torch.tensor([[3, 2]])])
def test_ops_check_batch_sizes(wrong):
    inputs = layer_inputs(1, 3, 5, 4)[0]
    with pytest.raises(ValueError, match=r"batch_sizes must be int64 of shape \(T,\) on the CPU"):
        OP.lstm_layer_fwd(randn(5, 5), *inputs[1:], wrong, False)


def changed_by_function(layer, batch_sizes):
    inputs = layer_inputs(1, 3, 5, 4)[0]
    return layer(randn(6, 5).requires_grad_(), *inputs[1:], batch_sizes)


WAYS = {
    "function": partial(changed_by_function, lambda *args: gk.lstm_layer(*args[:-1], batch_sizes=args[-1])[0]),
    "Function": partial(changed_by_function, lambda *args: layer_module._LSTMLayer.apply(*args, False, None, None)[0]),
    "stack": partial(
        changed_by_function,
        lambda x, h, c, *rest: gk.functional.lstm(x, (h[None], c[None]), rest[:4], batch_sizes=rest[-1])[0],
    ),
}


@pytest.mark.parametrize("change", [lambda sizes: sizes.copy_(torch.tensor([3, 3, 0])), lambda sizes: sizes.zero_()])
@pytest.mark.parametrize("way", [*WAYS, "module"])
def test_batch_sizes_changed_before_the_backward(way, change):
    """As any tensor that a backward reads: PyTorch's error, where the gradients would be those of other sequences."""
    if way == "module":
        packed = pack_padded_sequence(torch.randn(3, 3, 5), [3, 2, 1])
        batch_sizes, y = packed.batch_sizes, gk.LSTM(5, 4)(packed)[0].data
    else:
        batch_sizes = torch.tensor([3, 2, 1])
        y = WAYS[way](batch_sizes)
    change(batch_sizes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("size", [1, 3, 33])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001], ids=hex)
def test_nan_stays_nan(bits, size):
    """Whatever a NaN holds in its low bits: it reaches every gate, output, state, and gradient that depends on it."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    x, state, w_ih, w_hh = torch.ones(2, 1, 1), torch.ones(1, size), torch.ones(4 * size, 1), torch.full((4 * size, size), 0.5)
    leaves = [t.requires_grad_() for t in (x, torch.cat([nan, torch.ones(size - 1)])[None], state, w_ih, w_hh)]
    outputs = gk.lstm_layer(*leaves)
    assert all(y.isnan().all() for y in outputs)
    assert all(d.isnan().all() for d in torch.autograd.grad(outputs[0].sum(), leaves[:3]))
    h_next, c_next = gk.lstm_cell(x[0], *leaves[1:])
    assert h_next.isnan().all()
    assert c_next.isnan().all()
    x, *others = (t.detach() for t in leaves)
    assert torch.ops.gradkernels.lstm_layer_fwd(x, *others, None, None, None, None, False)[3].isnan().all()
    assert torch.ops.gradkernels.lstm_cell_fwd(x[0], *others, None, None)[2].isnan().all()


@pytest.mark.parametrize("args", [(8, 4), (8, 4, 2, True, True, 0.0, True, 2)], ids=str)
def test_on_meta(args):
    """Shapes without memory, inside of an autocast region of another device too."""
    x, row = torch.empty(3, 2, 8, device="meta"), torch.empty(2, 8, device="meta")
    with torch.autocast("cpu", enabled=len(args) == 2):
        ours, eager = (module(*args, device="meta")(x) for module in (gk.LSTM, torch.nn.LSTM))
        cell, eager_cell = (module(8, 4, device="meta")(row) for module in (gk.LSTMCell, torch.nn.LSTMCell))
    for y, expected in zip((ours[0], *ours[1], *cell), (eager[0], *eager[1], *eager_cell), strict=True):
        assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
