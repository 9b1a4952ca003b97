"""One LSTM layer, forward and backward to x and the weights: against torch.lstm (oneDNN where it takes the case), padded,
packed, in float64 and with a projection; and against the stock way of seeing dL/dh_t and dL/dc_t, a loop over cells with hooks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradkernels as gk
from benchmarks.harness import Case

PADDED = (
    (1, 200, 64),
    (8, 100, 64),
    (32, 100, 64),
    (32, 100, 128),
    (16, 100, 256),
    (64, 50, 256),
    (32, 50, 512),
    (16, 30, 1024),
)  # B, T, H
SOME = ((8, 100, 64), (32, 100, 128), (16, 100, 256))
LONG = (16, 1000, 64)


def cases() -> Iterator[Case]:
    """Padded in every dtype; packed, with lengths from a quarter of T to T; projected to H / 2."""
    for shape in PADDED:
        yield case("lstm_layer", torch.float32, shape)
    for shape in SOME:
        yield case("lstm_layer", torch.bfloat16, shape)
        yield case("lstm_layer", torch.float64, shape)
        yield case("lstm_layer packed", torch.float32, shape)
        yield case("lstm_layer projected", torch.float32, shape)
    yield case("lstm_layer packed", torch.float32, LONG)


def case(op: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Case:
    """Floor: read x, write y; read dy and x, write dx; each weight in, and its gradient out; gates and cells both ways."""
    B, T, H = shape
    P = H // 2 if op.endswith("projected") else H
    sizes = _batch_sizes(B, T) if op.endswith("packed") else None
    rows = B * T if sizes is None else int(sizes.sum())
    state = {d: (torch.zeros(B, P, dtype=d), torch.zeros(B, H, dtype=d)) for d in {dtype, torch.float64}}
    stats, time_stats = gk.new_stats(6), gk.new_time_stats(T)

    def ours(*inputs: torch.Tensor, **measured: torch.Tensor) -> torch.Tensor:
        x, *weights = inputs
        return gk.lstm_layer(x, *state[x.dtype], *weights, batch_sizes=sizes, **measured)[0]

    def eager(*inputs: torch.Tensor) -> torch.Tensor:
        x, *weights = inputs
        hx, last = tuple(s[None] for s in state[x.dtype]), (True, 1, 0.0, False, False)
        if sizes is None:
            return torch.lstm(x, hx, weights, *last, False)[0]
        return torch.lstm(x, sizes, hx, weights, *last)[0]

    def cells(*inputs: torch.Tensor) -> torch.Tensor:
        return cell_loop(inputs, state[inputs[0].dtype], hooks=False)

    def hooked(*inputs: torch.Tensor) -> torch.Tensor:
        return cell_loop(inputs, state[inputs[0].dtype], hooks=True)

    variants = {
        "eager": eager,
        "telemetry off": ours,
        "telemetry on": lambda *inputs: ours(*inputs, stats=stats, time_stats=time_stats),
    }
    if op == "lstm_layer" and dtype is torch.float32 and shape in SOME:
        variants.update({"cell loop": cells, "cell loop + hooks": hooked})

    def make_inputs() -> list[torch.Tensor]:
        x = torch.randn(T, B, H) if sizes is None else torch.randn(rows, H)
        shapes = ((4 * H, H), (4 * H, P), (4 * H,), (4 * H,), *(((P, H),) if P < H else ()))
        return [x.to(dtype), *((torch.randn(s) * H**-0.5).to(dtype) for s in shapes)]

    saved = 2 * 5 * rows * H * max(4, dtype.itemsize)
    weights = 4 * H * (H + P + 2) + (P * H if P < H else 0)
    floor = (3 * rows * H + 2 * rows * P + 3 * weights) * dtype.itemsize + saved
    multiplied = 4 * H * H + 4 * H * P + (P * H if P < H else 0)  # a row; backward has two products for each one forward
    return Case(op, dtype, shape, make_inputs, variants, floor, flops=3 * 2 * rows * multiplied)


def cell_loop(inputs: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...], hooks: bool) -> torch.Tensor:
    """y by torch.lstm_cell, one call a step; with `hooks`, the norms of dL/dh_t and dL/dc_t are taken in backward."""
    x, *weights = inputs
    (h, c), ys, norms = state, [], []
    for step in x:
        h, c = torch.lstm_cell(step, (h, c), *weights)
        if hooks:
            h.register_hook(lambda dh: norms.append(dh.norm()))
            c.register_hook(lambda dc: norms.append(dc.norm()))
        ys.append(h)
    return torch.stack(ys)


def _batch_sizes(B: int, T: int) -> torch.Tensor:
    """Of B sequences whose lengths fall evenly from T to a quarter of it."""
    lengths = torch.linspace(T, T // 4, B).long()
    return (lengths > torch.arange(T)[:, None]).sum(1)
