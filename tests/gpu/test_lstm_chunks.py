"""A backward recurrence that is cut into chunks of steps, one launch each, on the host: the same bits as in one launch."""

import itertools
from ctypes import byref, c_int64

import pytest
import torch
from recurrence_on_host import DONE, DTYPES, Layer, Request, check_forward, gradients, pointer

CUTS = (0, 1, 8, 9, 30)  # chunks of several steps, and of one


def backward_in_chunks(layer, dy, dh_n, dc_n):
    """(dgates, dh0, dc0, partials, exponents) of launches for the steps between CUTS."""
    B, H = layer.B, layer.H
    programs = layer.tiling(True)["programs"]
    dh, dc, carried_state = dh_n.clone(), dc_n.clone(), torch.full((programs, 2), -7, dtype=torch.int32)
    dgates, partials = torch.empty_like(layer.dgates), torch.empty_like(layer.partials)
    exponents = torch.empty_like(layer.exponents)
    chunks = list(itertools.pairwise(CUTS))
    chunks = chunks if layer.reverse else chunks[::-1]
    for k, (begin, end) in enumerate(chunks):
        request = Request.from_buffer_copy(layer.request)
        request.T = end - begin
        rows = slice(begin * B, end * B)
        before = (end * B if layer.reverse else (begin - 1) * B) if k < len(chunks) - 1 else None
        c0 = layer.c0 if before is None else layer.cells[before : before + B]
        inputs = (layer.weight, dy[rows], c0, layer.gates[rows], layer.cells[rows])
        outputs = (dh, dc, dgates[rows], partials[begin:end], exponents[begin:end], carried_state)
        last = (k > 0, k < len(chunks) - 1)
        assert layer.body.backward(byref(request), c_int64(request.T * B), *map(pointer, inputs + outputs), *last) == DONE
    assert tuple(t.shape for t in (dh, dc)) == ((B, H), (B, H))
    return dgates, dh, dc, partials, exponents


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 20), (9, 20), (9, 132)], ids=str)
@pytest.mark.parametrize("vanishing", [False, True], ids=["", "vanishing"])
def test_chunks(body, shape, dtype, reverse, vanishing):
    """Also where float32 would have lost the gradient at the first cut: its scale is passed on."""
    (B, H), T = shape, CUTS[-1]
    layer = Layer(body, B, H, [B] * T, dtype, reverse, gain=0.05 if vanishing else 1.0)
    layer.x.view(-1, 4, H)[:, 1] -= 12.0 if vanishing else 0.0
    check_forward(layer)
    dy, dh_n, dc_n = gradients(layer)
    if vanishing:
        dy.zero_()
    assert layer.backward(dy, dh_n, dc_n) == DONE
    if vanishing:
        assert layer.exponents[0 if not reverse else -1] > 126
    whole = (layer.dgates, layer.dh, layer.dc, layer.partials, layer.exponents)
    for found, expected in zip(backward_in_chunks(layer, dy, dh_n, dc_n), whole, strict=True):
        assert torch.equal(found, expected)
