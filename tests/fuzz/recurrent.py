"""Examples of lstm_layer and lstm_cell. What forward saved is checked step by step, and taken for granted in backward."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import gradkernels as gk
from fuzz.compare import check_equal, check_like, check_within, floor, rounding, sum_error
from fuzz.lstm_truth import Inputs, Near, Step, backward_reference, time_fields
from fuzz.tensors import DTYPE_NAMES, MODERATE, NAMES, THREADS, Drawn, drawn, values
from gradkernels.ops.lstm_layer import order_of, previous_rows, rows_per_step
from gradkernels.testing import accumulator, largest

OPS = torch.ops.gradkernels
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
FINITE = ("zero", "subnormal", "smallest")
COUNTS = slice(3, 11)  # columns of time_stats that are counted


def wide(t: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in float64, or None."""
    return t if t is None else t.resolve_neg().double()


def of_both(dweight_ih: torch.Tensor, dweight_hh: torch.Tensor, dbias_ih: torch.Tensor, dbias_hh: torch.Tensor) -> dict:
    """The gradients of the weights by name: equal ones of the biases under one."""
    dbias = dbias_ih if dbias_ih.numel() else dbias_hh
    if dbias_ih.numel() and dbias_hh.numel():
        check_equal("dbias_hh", dbias_hh, dbias_ih)
    return {"dweight_ih": dweight_ih, "dweight_hh": dweight_hh, "dbias": dbias}


@dataclass(frozen=True)
class LSTMLayer:
    """All results of one layer. B, T: sequences and steps; lengths: packed, B = how many. P: None without a projection."""

    dtype: str
    T: int
    B: int
    D: int
    H: int
    P: int | None
    lengths: tuple[int, ...] | None
    x: Drawn
    state: Drawn
    weights: Drawn
    bias: bool
    dy: Drawn | None
    dh_n: Drawn | None
    dc_n: Drawn | None
    reverse: bool = False
    wanted: tuple[bool, ...] = (True,) * 8  # of x, either state, and WEIGHTS
    threads: int = 1
    op = "lstm_layer"

    def tensors(self) -> dict:
        lengths, out = self.lengths, self.H if self.P is None else self.P
        B = self.B if lengths is None else len(lengths)
        shape = (self.T, B) if lengths is None else (sum(lengths),)
        shapes = {"x": (*shape, self.D), "h0": (B, out), "c0": (B, self.H)}
        given = dict.fromkeys(shapes, self.state) | {"x": self.x}
        parameters = ((4 * self.H, self.D), (4 * self.H, out), (4 * self.H,), (4 * self.H,), (out, self.H))
        for name, size in zip(WEIGHTS, parameters, strict=True):
            shapes[name], given[name] = size, self.weights
        for name, size in {"dy": (*shape, out), "dh_n": (B, out), "dc_n": (B, self.H)}.items():
            shapes[name], given[name] = size, getattr(self, name)
        given |= {} if self.bias else {"bias_ih": None, "bias_hh": None}
        given |= {"weight_hr": None} if self.P is None else {}
        built = {name: d and d.build(self.dtype, shapes[name]) for name, d in given.items()}
        sizes = None if lengths is None else [sum(length > t for length in lengths) for t in range(lengths[0])]
        return {**built, "batch_sizes": sizes and torch.tensor(sizes)}

    def arguments(self, tensors: dict) -> tuple:
        """Of the forward op, but for `reverse`."""
        return tuple(tensors[name] for name in ("x", "h0", "c0", *WEIGHTS, "batch_sizes"))

    def run(self, tensors: dict, stats: torch.Tensor | None) -> dict:
        arguments, dys = self.arguments(tensors), [tensors[name] for name in ("dy", "dh_n", "dc_n")]
        y, h_n, c_n, gates, cells = OPS.lstm_layer_fwd(*arguments, self.reverse)
        time_stats = None if stats is None else gk.new_time_stats(self.num_steps(tensors))
        gradients = OPS.lstm_layer_bwd(*dys, *arguments, y, gates, cells, self.reverse, self.wanted, stats, time_stats)
        dx, dh0, dc0, *of_weights, dweight_hr = gradients
        results = {"dx": dx, "dh0": dh0, "dc0": dc0, **of_both(*of_weights), "dweight_hr": dweight_hr}
        results |= {"y": y, "h_n": h_n, "c_n": c_n, "gates": gates, "cells": cells}
        return results if stats is None else {"time_stats": time_stats, **results}

    def num_steps(self, tensors: dict) -> int:
        """How many steps the longest sequence has."""
        return self.T if self.lengths is None else len(tensors["batch_sizes"])

    def ports(self, tensors: dict, results: dict) -> dict:
        of_x, _, _, of_ih, of_hh, of_bias_ih, of_bias_hh, of_hr = self.wanted
        there = {"dx": of_x, "dweight_ih": of_ih, "dweight_hh": of_hh}
        there |= {"dbias": (of_bias_ih or of_bias_hh) and self.bias, "dweight_hr": of_hr and self.P is not None}
        found = {name: results[name] for name, is_there in there.items() if is_there}
        return found if tensors["dy"] is None else {"dy": tensors["dy"], **found}

    def compare(self, tensors: dict, results: dict) -> None:
        compare_forward(self, tensors, results)
        x, h0, c0, w_ih, w_hh, w_hr, dy, dh_n, dc_n = (
            wide(tensors[name]) for name in ("x", "h0", "c0", "weight_ih", "weight_hh", "weight_hr", "dy", "dh_n", "dc_n")
        )
        y, gates, cells = (wide(results[name]) for name in ("y", "gates", "cells"))
        sizes = rows_per_step(tensors["x"], tensors["h0"], tensors["batch_sizes"])
        rows = (x.flatten(0, -2), h0, c0, w_ih, w_hh, w_hr, y.flatten(0, -2), gates, cells)
        dy = dy if dy is None else dy.flatten(0, -2)
        exact, steps = backward_reference(Inputs(*rows, dy, dh_n, dc_n, sizes, self.reverse, NAMES[self.dtype]))
        if compare_backward(self, tensors, results, exact, steps):
            compare_steps(results["time_stats"], steps, gates.split(sizes), self.dtype)


def compare_forward(example: LSTMLayer, tensors: dict, results: dict) -> None:
    """Each step from the states before it as they were saved, so that no error is carried from step to step."""
    dtype, H = NAMES[example.dtype], example.H
    eps, least = rounding(dtype), floor(dtype)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = (wide(tensors[name]) for name in ("x", "h0", "c0", *WEIGHTS))
    sizes = rows_per_step(tensors["x"], tensors["h0"], tensors["batch_sizes"])
    gates, cells = wide(results["gates"]), wide(results["cells"])
    if not sizes:
        return
    i, f, g, o = gates.split(H, 1) if H else (gates,) * 4
    h = o * cells.tanh()
    h = h if w_hr is None else h @ w_hr.mT
    before, c_before = (previous_rows(t, first, sizes, example.reverse) for t, first in ((h, h0), (cells, c0)))
    bias, magnitude = (0.0, 0.0) if b_ih is None else (b_ih + b_hh, b_ih.abs() + b_hh.abs())
    rows = x.reshape(len(before), example.D)
    preactivations = rows @ w_ih.mT + before @ w_hh.mT + bias
    parts = rows.abs() @ w_ih.abs().mT + before.abs() @ w_hh.abs().mT + magnitude
    exact = preactivations.sigmoid()
    exact[:, 2 * H : 3 * H] = preactivations[:, 2 * H : 3 * H].tanh()
    parts = torch.where(parts.isfinite(), parts, 0.0)
    terms = sum_error(dtype, example.D + example.H)
    check_within("gates", results["gates"], exact, 8 * eps + terms * parts)
    error = 4 * eps * ((f * c_before).abs() + (i * g).abs()).nan_to_num(0.0, 0.0) + least
    check_within("cells", results["cells"], f * c_before + i * g, error)
    size = 1.0 + (0.0 if w_hr is None else w_hr.abs().sum(1))
    check_like("y", results["y"], dtype, (*tensors["x"].shape[:-1], tensors["h0"].shape[1]))
    check_within("y", results["y"].flatten(0, -2), h, torch.as_tensor(terms * size))
    order, at = order_of(sizes, example.reverse), [sum(sizes[:t]) for t in range(len(sizes))]
    last = [at[next(t for t in order[::-1] if sizes[t] > b)] + b for b in range(len(h0))]
    check_equal("h_n", results["h_n"], results["y"].flatten(0, -2)[last])
    check_equal("c_n", results["c_n"], results["cells"][last].to(dtype))


def compare_backward(example: Any, tensors: dict, results: dict, exact: dict[str, Near], steps: list[Step]) -> bool:
    """Every gradient against the truth; False, and nothing compared, where numbers on the way may leave their range."""
    limit = torch.finfo(accumulator(NAMES[example.dtype])).max / 64
    widest = 8 * example.H * (1 + largest(wide(tensors["weight_hh"])) + largest(wide(tensors["weight_ih"])))
    seen = [d.value for step in steps for d in (step.dh, step.dc, step.dgates)] + [d.value for d in exact.values()]
    if max((largest(value) for value in seen), default=0.0) * max(widest, 1.0) > limit:
        return False
    given = {"dx": tensors["x"], "dbias": tensors["bias_ih"]}
    given |= {name: tensors.get(name[1:]) for name in ("dh", "dc", "dh0", "dc0", "dweight_ih", "dweight_hh", "dweight_hr")}
    there = {**example.ports(tensors, results), **{name: results[name] for name in ("dh0", "dc0") if name in results}}
    for name, near in exact.items():
        if name not in there:
            assert results[name].numel() == 0, f"{name}: not asked for"
            continue
        check_like(name, there[name], NAMES[example.dtype], given[name].shape)
        value, error = (part.reshape(given[name].shape) for part in (near.value, near.error))
        check_within(name, there[name], value, error)
    return True


def compare_steps(ours: torch.Tensor, steps: list[Step], gates: tuple[torch.Tensor, ...], dtype: str) -> None:
    """The statistics of time steps: counts exactly; norms of gradients as computed, and sums, to 1e-5 (float64: 1e-10)."""
    assert ours[0, :2].tolist() == [len(steps), 1], f"time_stats: {ours[0].tolist()}"
    fields = [time_fields(step, part) for step, part in zip(steps, gates, strict=True)]
    exact, error = (torch.stack(part) for part in zip(*fields, strict=True))
    check_equal("time_stats counts", ours[1:, COUNTS], exact[:, COUNTS])
    relative = 1e-10 if dtype == "float64" else 1e-5
    check_within("time_stats", ours[1:], exact, error + relative * exact.abs().nan_to_num(0.0, 0.0, 0.0))


@dataclass(frozen=True)
class LSTMCell:
    """All results of one step."""

    dtype: str
    B: int
    D: int
    H: int
    x: Drawn
    state: Drawn
    weights: Drawn
    bias: bool
    dh_next: Drawn | None
    dc_next: Drawn | None
    wanted: tuple[bool, ...] = (True,) * 8  # of x, either state, and WEIGHTS
    threads: int = 1
    op = "lstm_cell"

    def tensors(self) -> dict:
        state, columns = (self.B, self.H), 4 * self.H
        shapes = {"x": (self.B, self.D), "h": state, "c": state, "weight_ih": (columns, self.D), "weight_hh": (columns, self.H)}
        shapes |= {"bias_ih": (columns,), "bias_hh": (columns,), "dh_next": state, "dc_next": state}
        given = {"x": self.x, "h": self.state, "c": self.state, "dh_next": self.dh_next, "dc_next": self.dc_next}
        given |= {name: self.weights for name in WEIGHTS[:2]} | {
            name: self.weights if self.bias else None for name in WEIGHTS[2:4]
        }
        return {name: given[name] and given[name].build(self.dtype, shape) for name, shape in shapes.items()}

    def run(self, tensors: dict, stats: torch.Tensor | None) -> dict:
        *arguments, dh_next, dc_next = tensors.values()
        h_next, c_next, gates = OPS.lstm_cell_fwd(*arguments)
        dx, dh, dc, *of_weights = OPS.lstm_cell_bwd(dh_next, dc_next, *arguments, gates, self.wanted[:7], stats)
        results = {"h_next": h_next, "c_next": c_next, "gates": gates, "dx": dx, "dh": dh, "dc": dc}
        return {**results, **of_both(*of_weights)}

    def ports(self, tensors: dict, results: dict) -> dict:
        of_x, _, _, of_ih, of_hh, of_bias_ih, of_bias_hh, _ = self.wanted
        there = {"dx": of_x, "dh": True, "dc": True, "dweight_ih": of_ih, "dweight_hh": of_hh}
        there |= {"dbias": (of_bias_ih or of_bias_hh) and self.bias}
        came = {name: tensors[name] for name in ("dh_next", "dc_next") if tensors[name] is not None}
        return {**came, **{name: results[name] for name, is_there in there.items() if is_there}}

    def compare(self, tensors: dict, results: dict) -> None:
        *arguments, dh_next, dc_next = (wide(t) for t in tensors.values())
        x, h, c, w_ih, w_hh, b_ih, b_hh = arguments
        gates, dtype, H = wide(results["gates"]), NAMES[self.dtype], self.H
        preactivations = x @ w_ih.mT + h @ w_hh.mT + (0.0 if b_ih is None else b_ih + b_hh)
        parts = x.abs() @ w_ih.abs().mT + h.abs() @ w_hh.abs().mT + (0.0 if b_ih is None else b_ih.abs() + b_hh.abs())
        exact = preactivations.sigmoid()
        exact[:, 2 * H : 3 * H] = preactivations[:, 2 * H : 3 * H].tanh()
        error = 8 * rounding(dtype) + sum_error(dtype, self.D + H) * torch.where(parts.isfinite(), parts, 0.0)
        check_within("gates", results["gates"], exact, error)
        i, f, g, o = gates.chunk(4, 1) if H else (gates,) * 4
        c_next = f * c + i * g
        size = ((f * c).abs() + (i * g).abs()).nan_to_num(0.0, 0.0)
        error = 4 * rounding(dtype) * size + floor(dtype)
        check_within("c_next", results["c_next"], c_next, error)
        check_within("h_next", results["h_next"], o * c_next.tanh(), error + 8 * rounding(dtype))
        rows = (x, h, c, w_ih, w_hh, None, h, gates, c_next, None, dh_next, dc_next)
        exact, steps = backward_reference(Inputs(*rows, [self.B], False, dtype, 4 * rounding(dtype) * largest(size)))
        exact |= {"dh": exact.pop("dh0"), "dc": exact.pop("dc0")}
        compare_backward(self, tensors, results, exact, steps)


NUMBERS = st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65))


@st.composite
def lstm_words(draw: st.DrawFn) -> dict:
    """What both are described by."""
    dtype = draw(DTYPE_NAMES)
    return {
        "dtype": dtype,
        "D": draw(NUMBERS),
        "H": draw(NUMBERS),
        "x": draw(drawn(values(dtype, (-3, 1), MODERATE))),
        "state": draw(drawn(values(dtype, (-3, 1), MODERATE))),
        "weights": draw(drawn(values(dtype, (-2, -1), FINITE, (0.0,)))),
        "bias": draw(st.booleans()),
        "wanted": draw(st.one_of(st.just((True,) * 8), st.tuples(*(st.booleans(),) * 8))),
        "threads": draw(THREADS),
    }


@st.composite
def lstm_cells(draw: st.DrawFn) -> LSTMCell:
    words = draw(lstm_words())
    dh, dc = (draw(drawn(values(words["dtype"]))) for _ in range(2))
    only = draw(st.sampled_from(("both", "both", "h", "c")))
    return LSTMCell(**words, B=draw(NUMBERS), dh_next=None if only == "c" else dh, dc_next=None if only == "h" else dc)


@st.composite
def lstm_layers(draw: st.DrawFn) -> LSTMLayer:
    words = draw(lstm_words())
    came = [draw(st.none() | drawn(values(words["dtype"]))) for _ in range(3)]
    if came == [None] * 3:
        came[0] = Drawn(draw(values(words["dtype"])))
    T, B, P = draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.none() | NUMBERS)
    lengths = draw(
        st.none() | st.lists(st.integers(1, 6), min_size=1, max_size=6).map(lambda n: tuple(sorted(n, reverse=True)))
    )
    if draw(st.sampled_from((False,) * 9 + (True,))):  # enough work for three threads
        T, B, lengths = 2, 40, None if lengths is None else (3,) * 20 + (2,) * 20
        words["H"], P = 150, None if P is None else 100
    dy, dh_n, dc_n = came
    last = {"dy": dy, "dh_n": dh_n, "dc_n": dc_n, "reverse": draw(st.booleans())}
    return LSTMLayer(**words, T=T, B=B, P=P, lengths=lengths, **last)
