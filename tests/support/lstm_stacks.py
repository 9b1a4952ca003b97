"""What test_lstm_stack.py runs on: a StreamGroup without streams, and the recurrences of csrc/cuda on the host."""

import random
import sys
from ctypes import POINTER, byref, c_int64

import numpy as np
import recurrence_on_host as host
import torch

import gradkernels as gk
from gradkernels.ops.lstm import Stack, sequential
from gradkernels.testing import randn

if "on_triton" in sys.modules:
    from gradkernels.triton.lstm.stack import concurrent


class Shuffled:
    """StreamGroup whose works are done at the end. depth: of each call, the works that wait for one another, at most."""

    seed, depth = 0, []

    def __init__(self, device, count):
        self.works, self.last = [], [None] * count

    def __enter__(self):
        return self

    def run(self, index, work, after=()):
        before = {*after, *({self.last[index]} - {None})}
        self.works.append((work, before, 1 + max((self.works[k][2] for k in before), default=0)))
        self.last[index] = len(self.works) - 1
        return self.last[index]

    def __exit__(self, *raised):
        Shuffled.depth.append(max(depth for _, _, depth in self.works))
        draw, todo, done = random.Random(Shuffled.seed), set(range(len(self.works))), set()
        while todo:
            chosen = draw.choice([k for k in sorted(todo) if self.works[k][1] <= done])
            self.works[chosen][0]()
            todo.remove(chosen)
            done.add(chosen)

    def hand_over(self, *tensors):
        pass


def stack_of(T, B, D, H, layers=2, directions=2, P=0, bias=True, sizes=None, dropout=0.0, dtype=torch.bfloat16, measured=False):
    """(a Stack, with statistics for every layer direction where `measured`; its tensors, which all require gradients)."""
    torch.manual_seed(0)
    layer_directions, rows = layers * directions, T * B if sizes is None else sum(sizes)
    x = randn(T, B, D, dtype=dtype) if sizes is None else randn(rows, D, dtype=dtype)
    weights = []
    for layer_direction in range(layer_directions):
        inputs = D if layer_direction < directions else directions * (P or H)
        shapes = [(4 * H, inputs), (4 * H, P or H), *([(4 * H,)] * 2 if bias else []), *([(P, H)] if P else [])]
        weights += [(max(1, H) ** -0.5 * randn(*shape, dtype=torch.float32)).to(dtype) for shape in shapes]
    tensors = [
        x,
        0.5 * randn(layer_directions, B, P or H, dtype=dtype),
        0.5 * randn(layer_directions, B, H, dtype=dtype),
        *weights,
    ]
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    stats = tuple(gk.new_stats(6) if measured else None for _ in range(layer_directions))
    time_stats = tuple(gk.new_time_stats(T) if measured else None for _ in range(layer_directions))
    stack = Stack(layers, directions == 2, bias, batch_sizes, dropout, stats, time_stats)
    return stack, [tensor.detach().requires_grad_() for tensor in tensors]


def results(run, stack, tensors, grads=None, wanted=None):
    """(outputs, gradients, statistics) of a call and its backward; statistics are zeroed before."""
    measured = [table for table in (*stack.stats, *stack.time_stats) if table is not None]
    for table in measured:
        table.zero_()
    outputs = run(stack, *tensors[:3], tensors[3:])
    grads = [torch.randn_like(y, generator=None) for y in outputs] if grads is None else grads
    used = [(y, d) for y, d in zip(outputs, grads, strict=True) if d is not None]
    wanted = tensors if wanted is None else wanted
    found = torch.autograd.grad([y for y, _ in used], wanted, [d for _, d in used])
    return outputs, found, [table.clone() for table in measured], grads


def both(stack, tensors, drop=None, **more):
    """`results` of concurrent recurrences and of one after the other."""
    together = results(concurrent, stack, tensors, **more)
    more["grads"] = together[3]
    return together, results(lambda *args: sequential(*args, drop), stack, tensors, **more)


def check(together, sequential):
    """The same bits."""
    for ours, theirs in zip(together[:3], sequential[:3], strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def dropping(masks, stack):
    """sequential's dropout of what `masks` do not hold."""
    return lambda y, layer: (y * masks[layer].view(y.shape)) * stack.scale


def keep(masks, stack, *args):
    """concurrent; what dropout keeps goes into `masks`."""
    outputs = concurrent(*args)
    saved = outputs[0].grad_fn.saved_tensors[3 + len(args[-1]) + 3 * stack.layer_directions :]
    masks[:] = saved[: stack.num_layers - 1]
    return outputs


class OnHost:
    """The ops of csrc/cuda, whose body runs on the host as in recurrence_on_host.py: padded, from the first step on."""

    def __init__(self, library):
        self.library, self.recurrences, self.sms = library, 0, host.H100[0]

    def request(self, rows, B, weight_hh, batch_sizes, reverse, num_concurrent):
        half, sizes = weight_hh.dtype is torch.float16, None
        T = rows // B if batch_sizes is None else len(batch_sizes)
        if batch_sizes is not None:
            assert batch_sizes.is_contiguous()
            self.offsets = np.concatenate([[0], np.cumsum(batch_sizes.numpy())]).astype(np.int64)
            sizes = self.offsets.ctypes.data_as(POINTER(c_int64))
        request = host.Request(T, B, weight_hh.shape[1], sizes, reverse, half, self.sms // num_concurrent, host.H100[1])
        request.seed, request.silent_block, request.timeout_seconds = 1, -1, 120.0
        self.recurrences += 1
        return byref(request), c_int64(rows)

    def lstm_recurrence_fwd(self, gates, weight_hh, h0, c0, y, cells, *order):
        tensors = (weight_hh, h0, c0, gates, cells, y)
        assert all(tensor.is_contiguous() for tensor in tensors)
        request = self.request(len(gates), len(h0), weight_hh, *order)
        assert self.library.forward(*request, *map(host.pointer, tensors)) == host.DONE

    def lstm_recurrence_bwd(self, dy, dh, dc, weight_hh, c0, gates, cells, dgates, partials, exponents, carried_state, *last):
        tensors = (weight_hh, dy, c0, gates, cells, dh, dc, dgates, partials, exponents, carried_state)
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        request = self.request(len(gates), len(dh), weight_hh, *last[2:])
        assert self.library.backward(*request, *map(host.pointer, tensors), *last[:2]) == host.DONE

    def tiling_of(self, y, weight_hr, H, backward, B, num_concurrent=1):
        if y.dtype not in host.DTYPES or weight_hr is not None:
            return 0, 0
        request = host.Request(B=B, H=H, sms=self.sms // num_concurrent, shared_bytes=host.H100[1])
        tiling = host.tiling_of_request(self.library, request, backward)
        return tiling["programs"], tiling["cycles"]
