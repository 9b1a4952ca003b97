"""The LSTM with gradients to x and all weights, against torch.lstm: oneDNN on a CPU where it takes the case, cuDNN on a GPU.

On a CPU one layer: padded, packed, in float64, with a projection; and against the stock way of seeing dL/dh_t and dL/dc_t, a
loop over cells with hooks. On a GPU also two layers and two directions; float32 with TF32 on both sides and on neither.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import gradkernels as gk
from benchmarks.case import Case, flops_of
from gradkernels.ops.lstm_layer import PORTS

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
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OTHERS = (("lstm_layer", BF16), ("lstm_layer", F64), ("lstm_layer packed", F32), ("lstm_layer projected", F32))
ON_CPU = (
    *(("lstm_layer", F32, shape) for shape in PADDED),
    *((op, dtype, shape) for shape in SOME for op, dtype in OTHERS),
    ("lstm_layer packed", F32, LONG),
)
ON_GPU = (  # where cuDNN is slow first; (16, 1024, 768) in float16 is cuDNN's own persistent kernel
    ("lstm", BF16, (16, 1024, 768)),
    ("lstm", F16, (16, 1024, 768)),
    ("lstm", BF16, (16, 1024, 256)),
    ("lstm", BF16, (64, 512, 512)),
    ("lstm", BF16, (16, 1024, 128)),
    ("lstm packed", BF16, (64, 512, 512)),
    ("lstm 2 layers", BF16, (16, 1024, 256)),
    ("lstm bidirectional", BF16, (16, 1024, 256)),
    ("lstm 2 layers", BF16, (64, 256, 512)),
    ("lstm bidirectional", BF16, (64, 256, 512)),
    ("lstm", BF16, (64, 256, 200)),
    ("lstm", BF16, (64, 256, 300)),
    ("lstm", BF16, (64, 256, 650)),
    ("lstm", F16, (16, 1024, 256)),
    ("lstm", F16, (64, 256, 650)),
    ("lstm 2 layers", F16, (64, 256, 512)),
    ("lstm packed", F16, (64, 512, 512)),
    ("lstm", F32, (16, 1024, 256)),
    ("lstm TF32", F32, (16, 1024, 256)),
    ("lstm TF32", F32, (64, 256, 650)),
    ("lstm packed TF32", F32, (64, 512, 512)),
)
DRY_RUN = (("lstm", BF16, (3, 5, 20)), ("lstm 2 layers bidirectional packed", F32, (3, 5, 20)))
CASES = {"cpu": ON_CPU, "cuda": ON_GPU, "dry run": DRY_RUN}
GATE_STEPS = 48  # at most on a GPU, of the sequences that correctness is checked on


def cases(where: str) -> Iterator[Case]:
    """As listed."""
    return (case(*each) for each in CASES[where])


def case(op: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Case:
    """B sequences of T steps, H inputs each, and nn.LSTM's parameters, which cuDNN finds in one piece of memory.

    The op's name says what is special. Packed: lengths fall evenly from T to a quarter of it. Projected: to H / 2.
    """
    (B, T, H), packed, bidirectional = shape, "packed" in op, "bidirectional" in op
    layers, P = 2 if "2 layers" in op else 1, H // 2 if "projected" in op else 0
    count, sizes = layers * (2 if bidirectional else 1), batch_sizes(B, T) if packed else None
    rows = B * T if sizes is None else int(sizes.sum())

    def zeros(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(count, B, width, dtype=x.dtype, device=x.device) for width in (P or H, H))

    def make_inputs(device: torch.device) -> list[torch.Tensor]:
        x = torch.randn((rows, H) if packed else (T, B, H), device=device).to(dtype)
        args = {"bidirectional": bidirectional, "proj_size": P, "device": device, "dtype": dtype}
        return [x, *nn.LSTM(H, H, layers, **args).parameters()]

    def eager(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        last = (True, layers, 0.0, True, bidirectional)
        if sizes is None:
            return torch.lstm(x, zeros(x), weights, *last, False)[0]
        return torch.lstm(x, sizes, zeros(x), weights, *last)[0]

    def fused(x: torch.Tensor, *weights: torch.Tensor, **tables: list[torch.Tensor]) -> torch.Tensor:
        return gk.lstm(x, zeros(x), weights, layers, bidirectional=bidirectional, batch_sizes=sizes, **tables)[0]

    def tables(device: torch.device) -> dict[str, list[torch.Tensor]]:
        stats = [gk.new_stats(len(PORTS), device) for _ in range(count)]
        return {"stats": stats, "time_stats": [gk.new_time_stats(T, device) for _ in range(count)]}

    others = {}
    if op == "lstm_layer" and dtype is F32 and shape in SOME:
        others = {
            "cell loop": lambda x, *weights: cell_loop(x, weights, zeros(x), hooks=False),
            "cell loop + hooks": lambda x, *weights: cell_loop(x, weights, zeros(x), hooks=True),
        }
    return Case(
        op,
        dtype,
        shape,
        make_inputs,
        eager=eager,
        fused=fused,
        tables=tables,
        compiled=False,
        others=others,
        flops=flops_of(rows, make_inputs),
        replayed=() if packed else ("telemetry off", "telemetry on"),  # the sizes of packed steps come from the host
        check=case(op, dtype, (B, GATE_STEPS, H)) if T > GATE_STEPS and (op, dtype, shape) in ON_GPU else None,
        tf32="TF32" in op,
    )


def cell_loop(x: torch.Tensor, weights: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...], hooks: bool) -> torch.Tensor:
    """y by torch.lstm_cell, one call a step; with `hooks`, the norms of dL/dh_t and dL/dc_t are taken in backward."""
    (h, c), ys, norms = (part[0] for part in state), [], []
    for step in x:
        h, c = torch.lstm_cell(step, (h, c), *weights)
        if hooks:
            h.register_hook(lambda dh: norms.append(dh.norm()))
            c.register_hook(lambda dc: norms.append(dc.norm()))
        ys.append(h)
    return torch.stack(ys)


def batch_sizes(B: int, T: int) -> torch.Tensor:
    """Of B sequences whose lengths fall evenly from T to a quarter of it."""
    lengths = torch.linspace(T, max(1, T // 4), B, device="cpu").long()
    return (lengths > torch.arange(T, device="cpu")[:, None]).sum(1)
