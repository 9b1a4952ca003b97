"""Every op on DTensors: its inputs, and one call checked against the same call in one process, for dtensor_cases.py."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gradkernels as gk
from gradkernels.ops import OPS
from gradkernels.telemetry import measure_reference

T, B, D, H, P = 3, 4, 8, 6, 5


@dataclass(frozen=True)
class Op:
    """`function(*inputs, stats)` gives one tensor for each of `outputs`; x stays sharded along the dimensions in `stays`."""

    name: str
    function: object
    inputs: dict
    outputs: tuple
    stays: tuple
    twin: object = None  # of torch.nn.functional


WEIGHTS = {"weight_ih": (4 * H, D), "weight_hh": (4 * H, P), "bias_ih": (4 * H,), "bias_hh": (4 * H,), "weight_hr": (P, H)}
CELL = {"x": (B, D), "h": (B, H), "c": (B, H), "weight_ih": (4 * H, D), "weight_hh": (4 * H, H), "bias_ih": (4 * H,)}
NORM = {"x": (T, B, D), "weight": (D,), "bias": (D,)}
LSTM = ("y", "h_n", "c_n")
VARIANTS = {
    "gelu": Op("gelu", lambda x, stats: gk.gelu(x, stats=stats), {"x": (T, B, D)}, ("y",), (0, 1, 2), F.gelu),
    "gelu_tanh": Op("gelu", lambda x, stats: gk.gelu(x, "tanh", stats=stats), {"x": (T, B, D)}, ("y",), (0, 1, 2)),
    "layer_norm": Op(
        "layer_norm",
        lambda x, w, b, stats: gk.layer_norm(x, (D,), w, b, stats=stats),
        NORM,
        ("y",),
        (0, 1),
        lambda x, w, b: F.layer_norm(x, (D,), w, b),
    ),
    "layer_norm_of_two": Op(
        "layer_norm",
        lambda x, w, stats: gk.layer_norm(x, (B, D), w, stats=stats),
        {"x": (T, B, D), "weight": (B, D)},
        ("y",),
        (0,),
        lambda x, w: F.layer_norm(x, (B, D), w),
    ),
    "add_layer_norm": Op(
        "add_layer_norm",
        lambda x, r, w, b, stats: gk.add_layer_norm(x, r, (D,), w, b, stats=stats),
        {"x": (T, B, D), "residual": (T, B, D), "weight": (D,), "bias": (D,)},
        ("y", "new_residual"),
        (0, 1),
    ),
    "residual": Op(
        "residual", lambda x, stats: gk.residual_fork(x, stats=stats), {"x": (T, B, D)}, ("skip", "branch"), (0, 1, 2)
    ),
    "probe": Op("probe", lambda x, stats: 1 * gk.probe(1 * x, stats=stats), {"x": (T, B, D)}, ("y",), (0, 1, 2)),
    "lstm_layer": Op(
        "lstm_layer",
        lambda *tensors: gk.lstm_layer(*tensors[:-1], reverse=True, stats=tensors[-1]),
        {"x": (T, B, D), "h0": (B, P), "c0": (B, H), **WEIGHTS},
        LSTM,
        (1,),
    ),
    "lstm_layer_packed": Op(
        "lstm_layer",
        lambda *tensors: gk.lstm_layer(*tensors[:-1], batch_sizes=torch.tensor([4, 3, 1]), stats=tensors[-1]),
        {"x": (8, D), "h0": (B, P), "c0": (B, H), **WEIGHTS},
        LSTM,
        (),
    ),
    "lstm_cell": Op(
        "lstm_cell",
        lambda *tensors: gk.lstm_cell(*tensors[:-1], stats=tensors[-1]),
        {**CELL, "bias_hh": (4 * H,)},
        ("h_next", "c_next"),
        (0,),
    ),
}


def spread(whole, mesh, placement):
    """A tensor that both processes have, as a DTensor."""
    if placement == Partial():
        return DTensor.from_local(whole / 2, mesh, [placement])
    return distribute_tensor(whole, mesh, [placement])


def outputs_of(results):
    return results if isinstance(results, tuple) else (results,)


def check_op(op, mesh, placement, dtype, of_dy=None, of_weights=None):
    """Results, gradients, their placements and the statistics of one call, against the same call in one process.

    x has `placement`, what comes back to the results `of_dy`, or the results' own; all other inputs `of_weights`.
    """
    wholes = [torch.randn(shape, dtype=dtype) for shape in op.inputs.values()]
    leaves = [whole.clone().requires_grad_() for whole in wholes]
    expected = outputs_of(op.function(*leaves, None))
    whole_dys = [torch.randn_like(y) for y in expected]
    wholes_back = torch.autograd.grad(expected, leaves, whole_dys)

    placed = (placement, *(of_weights or Replicate() for _ in wholes[1:]))
    inputs = [spread(whole, mesh, how).requires_grad_() for whole, how in zip(wholes, placed, strict=True)]
    stats = gk.new_stats(len(OPS[op.name].PORTS))
    found = outputs_of(op.function(*inputs, stats))
    dys = [spread(dy, mesh, of_dy or y.placements[0]) for dy, y in zip(whole_dys, found, strict=True)]
    back = torch.autograd.grad(found, inputs, dys)
    for one, other in zip((*found, *back), (*expected, *wholes_back), strict=True):
        torch.testing.assert_close(one.full_tensor(), other)

    of_rows = placement if op.name != "residual" else dys[0].placements[0]
    stays = isinstance(of_rows, Shard) and of_rows.dim in op.stays
    row = of_rows.dim - wholes[0].dim() if stays else None
    check_placements(op, placement, row, found, back)
    gradients = dict(zip((f"d{name}" for name in op.inputs), zip(back, wholes_back, strict=True), strict=True))
    gradients.update(zip((f"d{name}" for name in op.outputs), zip(dys, whole_dys, strict=True), strict=True))
    check_statistics(op, mesh, row, gradients, stats)
    if op.twin is not None:
        theirs = op.twin(*inputs)
        assert theirs.placements == found[0].placements
        for one, other in zip(back[1:], torch.autograd.grad(theirs, inputs, dys)[1:], strict=True):
            assert one.placements == other.placements or of_dy is not None


def check_placements(op, placement, row, found, back):
    """Rows stay where they are, and the gradient of a weight is a sum over the processes that share them out."""
    if op.name in ("residual", "probe"):
        assert [y.placements for y in found] == [(placement,)] * len(found)
        return
    assert found[0].placements == (Replicate() if row is None else Shard(found[0].dim() + row),)
    for name, gradient in zip(op.inputs, back, strict=True):
        if name.startswith("weight"):
            assert gradient.placements == (Replicate() if row is None else Partial(),), name


def check_statistics(op, mesh, row, gradients, stats):
    """Each port has seen this process's part of its gradient; `gradients`: (as found, whole) of each."""
    expected = torch.zeros_like(stats)
    for port, name in enumerate(OPS[op.name].PORTS):
        name = "dbias_ih" if name == "dbias" and op.name.startswith("lstm") else name
        if name not in gradients:
            continue
        found, whole = gradients[name]
        if op.name == "probe" or name.startswith(("dweight", "dbias")):
            part = found.to_local()
        else:
            part = spread(whole, mesh, Replicate() if row is None else Shard(whole.dim() + row)).to_local()
        measure_reference(part, expected, port)
    torch.testing.assert_close(stats, expected, rtol=1e-5, atol=0)
