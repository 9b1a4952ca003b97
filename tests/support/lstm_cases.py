"""What the LSTM tests compare with: a loop over single sequences in plain PyTorch, written from the formula alone."""

import sys

import torch
from cases import Case

import gradkernels as gk
from gradkernels.testing import largest, randn

ON_TRITON = "on_triton" in sys.modules


def batch_sizes_of(lengths):
    """PackedSequence's batch_sizes of sequences of falling lengths."""
    return torch.tensor([sum(length > t for length in lengths) for t in range(lengths[0])], device="cpu")


def plain_layer(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes=None, reverse=False, seen=None):
    """(y, h_n, c_n): one sequence after the other, one step after the other.

    `seen(t, h, c, gates)` watches every step, and gives what the step after reads for h.
    """
    T, B = (x.shape[:2]) if batch_sizes is None else (len(batch_sizes), int(batch_sizes[0]))
    sizes = [B] * T if batch_sizes is None else batch_sizes.tolist()
    rows, start = x.flatten(0, -2), [sum(sizes[:t]) for t in range(T)]
    ys, last_h, last_c = {}, [], []
    for b in range(B):
        h = read = h0[b]
        c = c0[b]
        length = sum(size > b for size in sizes)
        for t in range(length)[:: -1 if reverse else 1]:
            a = weight_ih @ rows[start[t] + b] + weight_hh @ read
            a = a if bias_ih is None else a + bias_ih + bias_hh
            i, f, g, o = a.chunk(4)
            gates = (i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid())
            c = gates[1] * c + gates[0] * gates[2]
            h = gates[3] * c.tanh()
            h = h if weight_hr is None else weight_hr @ h
            read = h if seen is None else seen(t, h, c, gates)
            ys[start[t] + b] = h
        last_h.append(h)
        last_c.append(c)
    y = torch.stack([ys[row] for row in range(len(ys))])
    return y.reshape(*x.shape[:-1], -1), torch.stack(last_h), torch.stack(last_c)


def torch_layer(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes=None, reverse=False):
    """The same out of torch.lstm: a reverse direction is the second half of a bidirectional call."""
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if w is not None]
    P, directions = h0.shape[1], 2 if reverse else 1
    hx = (torch.stack([h0] * directions), torch.stack([c0] * directions))
    last = (bias_ih is not None, 1, 0.0, False, reverse)
    if batch_sizes is None:
        y, h_n, c_n = torch.lstm(x, hx, weights * directions, *last, False)
    else:
        y, h_n, c_n = torch.lstm(x, batch_sizes, hx, weights * directions, *last)
    return y[..., -P:], h_n[-1], c_n[-1]


def layer_inputs(T, B, D, H, P=0, bias=True, lengths=None, dtype=torch.float32, gain=1.0):
    """Random inputs of lstm_layer, weights of nn.LSTM's size times `gain`, and batch_sizes where there are lengths."""
    batch_sizes = None if lengths is None else batch_sizes_of(lengths)
    x = randn(T, B, D, dtype=dtype) if lengths is None else randn(sum(lengths), D, dtype=dtype)
    B = B if lengths is None else len(lengths)
    scale = gain * H**-0.5

    def weight(*shape):
        return (scale * randn(*shape, dtype=torch.float64)).to(dtype)

    biases = (weight(4 * H), weight(4 * H)) if bias else (None, None)
    projection = weight(P, H) if P else None
    state = (0.5 * randn(B, P or H, dtype=dtype), 0.5 * randn(B, H, dtype=dtype))
    return (x, *state, weight(4 * H, D), weight(4 * H, P or H), *biases, projection), batch_sizes


def layer_case(inputs, batch_sizes=None, reverse=False, dys=None, eager=torch_layer, time_stats=None):
    """One call with all three outputs used, unless `dys` says which."""
    outputs = plain_layer(*(t if t is None else t.detach() for t in inputs), batch_sizes, reverse)
    dys = tuple(torch.randn_like(t) for t in outputs) if dys is None else dys
    rows = outputs[0].shape[0]

    def function(*inputs, stats=None):
        return gk.lstm_layer(*inputs, batch_sizes=batch_sizes, reverse=reverse, stats=stats, time_stats=time_stats)

    def twin(*inputs):
        return eager(*inputs, batch_sizes, reverse)

    def exact(*inputs):
        return plain_layer(*inputs, batch_sizes, reverse)

    def seen(d):
        found = {"dy": dys[0], "dx": d[0], "dweight_ih": d[3], "dweight_hh": d[4], "dbias": d[5], "dweight_hr": d[7]}
        return {port: gradient for port, gradient in found.items() if gradient is not None}

    size = 4 * rows**0.5 * sum(largest(dy) for dy in dys)
    terms = {**{f"y{k}": 2 * rows**0.5 for k in range(3)}, **{f"d{k}": size for k in range(8)}}
    terms["d3"] *= max(1.0, largest(inputs[0]))
    again = lambda inputs, dys: layer_case(inputs, batch_sizes, reverse, dys, eager, time_stats)  # noqa: E731
    return Case("lstm_layer", function, twin, inputs, dys, seen, terms, exact, again)


def plain_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    """(h_next, c_next) from the formula."""
    a = x @ weight_ih.mT + h @ weight_hh.mT
    i, f, g, o = (a if bias_ih is None else a + bias_ih + bias_hh).chunk(4, -1)
    c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_next.tanh(), c_next


def cell_case(B, D, H, dtype=torch.float32, bias=True, dys=None, scale=1.0):
    """One step with both outputs used, unless `dys` says which."""
    (x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, _), _ = layer_inputs(1, B, D, H, bias=bias, dtype=dtype)
    if dys is None:
        dys = tuple((scale * randn(B, H, dtype=torch.float64)).to(dtype) for _ in range(2))
    return cell_case_of((x[0], h, c, weight_ih, weight_hh, bias_ih, bias_hh), dys)


def cell_case_of(inputs, dys):
    """One step from `inputs`; a gradient that is None belongs to an output that is not used."""

    def function(*inputs, stats=None):
        return gk.lstm_cell(*inputs, stats=stats)

    def seen(d):
        names = ("dh_next", "dc_next", "dx", "dh", "dc", "dweight_ih", "dweight_hh", "dbias")
        return {port: gradient for port, gradient in zip(names, (*dys, *d), strict=False) if gradient is not None}

    size = 4 * (len(inputs[0]) + 1) ** 0.5 * sum(largest(dy) for dy in dys)
    terms = {"y0": 8.0, "y1": 8.0, **{f"d{k}": size for k in range(7)}}
    return Case("lstm_cell", function, plain_cell, inputs, dys, seen, terms, again=cell_case_of)


def expected_steps(inputs, dys, batch_sizes=None, reverse=False):
    """{field: float64 tensor over the steps} of what `time_stats` must hold, from autograd through the plain loop.

    Where h is handed on in x's dtype, as the Triton kernels do it, it is here too.
    """
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    T = inputs[0].shape[0] if batch_sizes is None else len(batch_sizes)
    steps = [{"dh": [], "dc": [], "dh_recurrent": [], "gates": []} for _ in range(T)]

    def seen(t, h, c, gates):
        recurrent = h.clone()
        for name, value in (("dh", h), ("dc", c), ("dh_recurrent", recurrent)):
            value.retain_grad()
            steps[t][name].append(value)
        steps[t]["gates"].append(torch.stack(gates).detach())
        return recurrent + (h.to(inputs[0].dtype).double() - h).detach() if ON_TRITON else recurrent

    outputs = plain_layer(*wide, batch_sizes, reverse, seen=seen)
    used = [(y, dy.double()) for y, dy in zip(outputs, dys, strict=True) if dy is not None]
    torch.autograd.backward([y for y, _ in used], [dy for _, dy in used])
    return {name: torch.stack([_fields_of(step)[name] for step in steps]) for name in gk.TIME_FIELDS}


def _fields_of(step):
    """The fields of one time step."""
    i, f, g, o = torch.stack(step["gates"]).unbind(1)
    norms = {name: _norm(step[name]) for name in ("dh", "dc", "dh_recurrent")}
    counts = {
        "gate_count": f.numel(),
        "input_low": (i < 0.1).sum(),
        "input_high": (i > 0.9).sum(),
        "forget_low": (f < 0.1).sum(),
        "forget_high": (f > 0.9).sum(),
        "candidate_high": (g.abs() > 0.9).sum(),
        "output_low": (o < 0.1).sum(),
        "output_high": (o > 0.9).sum(),
        "forget_sum": f.sum(),
    }
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in {**norms, **counts}.items()}


def _norm(values):
    """The norm of the gradients of `values`, none where nothing came; by the largest, as squares may leave float64."""
    found = torch.cat([value.grad.flatten() for value in values if value.grad is not None] or [torch.zeros(1).double()])
    largest_one = found.abs().max().clamp_min(1e-300)
    return (found / largest_one).norm() * largest_one


def check_time_stats(time_stats, expected, dtype):
    """Asserts that `time_stats` holds one call whose fields are `expected`, counts equal.

    Norms and sums to 1e-10 in float64, 1e-5 where float32 is computed in. The Triton kernels multiply h and dG in a 16-bit
    dtype: a rounding a step, which add up as a random walk does.
    """
    T, computed = len(expected["dh"]), 1e-10 if dtype is torch.float64 else 1e-5
    rounded = ON_TRITON and dtype in (torch.bfloat16, torch.float16)
    relative = T**0.5 * torch.finfo(dtype).eps if rounded else computed
    assert time_stats[0, :2].tolist() == [T, 1]
    for column, name in enumerate(gk.TIME_FIELDS):
        found, rtol = time_stats[1 : 1 + T, column], computed if 3 <= column < 11 else relative
        torch.testing.assert_close(found, expected[name], rtol=rtol, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert not time_stats[1 + T :].any()


LENGTHS = (7, 4, 4, 1)
LAYOUTS = {
    "padded": {},
    "reverse": {"reverse": True},
    "packed": {"lengths": LENGTHS},
    "packed reverse": {"lengths": LENGTHS, "reverse": True},
    "projected": {"P": 3},
    "projected packed reverse": {"P": 3, "lengths": LENGTHS, "reverse": True},
    "no bias": {"bias": False},
}


def case_of(T=7, B=4, D=5, H=19, dtype=torch.float32, reverse=False, **options):
    inputs, batch_sizes = layer_inputs(T, B, D, H, dtype=dtype, **options)
    eager = plain_layer if dtype is torch.float16 else torch_layer  # torch.lstm does not take float16 on every CPU
    return layer_case(inputs, batch_sizes, reverse, eager=eager)
