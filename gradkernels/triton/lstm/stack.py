"""A stack of LSTM layers on a GPU, its recurrences at the same time: one autograd node above the layers' kernels.

The two directions of a layer know nothing of each other: each runs on a stream of its own. Layers of one direction follow
one another in chunks of time: while a layer runs through one, the layer above runs through the one before. Persistent
recurrences
are then tiled for half of the device each. None waits for another one to be resident, so that where the driver does not run
two at once it runs them in turn. Results and statistics are those of one layer after the other, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.autograd import Function, forward_ad

from gradkernels.autocast import autocast_off
from gradkernels.library import LIBRARY
from gradkernels.ops._steps import rows_of, rows_per_step
from gradkernels.ops.layer_norm import upcast
from gradkernels.ops.lstm import IMPLEMENTED, Stack, sequential
from gradkernels.ops.lstm_layer import check_layer
from gradkernels.triton.lstm.backward import BackwardResult
from gradkernels.triton.lstm.direction import Call, LayerDirection
from gradkernels.triton.lstm.gates import NUM_SUMS
from gradkernels.triton.lstm.persistent import tiling_of
from gradkernels.triton.lstm.sequence import Steps, last_rows, of_both_biases
from gradkernels.triton.lstm.streams import StreamGroup

CHUNK_STEPS = 128  # steps at least: beside them it is little that every launch loads W_hh anew
MAX_CHUNKS = 8


def concurrent(
    stack: Stack, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `sequential` gives, of CUDA tensors. It is called where nothing would run at the same time, and where PyTorch traces
    or transforms what runs.
    """
    schedules = schedules_of(stack, x, h0, c0, weights)
    in_chunks = any(len(schedule.chunks) > 1 for schedule in schedules)
    if not schedules or not (stack.bidirectional or in_chunks):
        return sequential(stack, x, h0, c0, weights)
    return _Concurrent.apply(stack, schedules, stack.batch_sizes, x, h0, c0, *weights)


def schedules_of(
    stack: Stack, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, weights: Sequence[torch.Tensor]
) -> list[Schedule]:
    """How the forward pass goes, and the backward pass where there will be one. Empty where layers have to go one by one.

    Raises what `lstm_layer` raises.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (x, h0, c0, *weights))
    one = stack.layer_directions == 1
    if one or transformed or not plain or torch.jit.is_tracing() or not len(h0) == len(c0) == stack.layer_directions:
        return []
    for index in range(stack.layer_directions):
        of_layer = x if index < stack.directions else x.new_empty(1).expand(*x.shape[:-1], h0.shape[-1] * stack.directions)
        own, measured = stack.weights_of(weights, index), (stack.stats[index], stack.time_stats[index])
        check_layer(of_layer, h0[index], c0[index], own, stack.batch_sizes, *measured)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h0, c0, *weights))
    passes = (False, True) if differentiable else (False,)
    return [schedule_of(stack, x, h0, stack.weights_of(weights, 0), backward) for backward in passes]


@dataclass(frozen=True)
class Schedule:
    """How a pass goes through a stack: the chunks of time, (begin, end), in which layers follow one another, one of all steps
    where they do not run concurrently; and the number of persistent recurrences between which the device is divided.
    """

    chunks: list[tuple[int, int]]
    num_concurrent: int


def schedule_of(
    stack: Stack, x: torch.Tensor, h0: torch.Tensor, weights: list[torch.Tensor | None], backward: bool
) -> Schedule:
    """Two recurrences at the same time, each on half of the device, where that is predicted to take less time in all.

    More layers than two take turns on the halves: at most two of their chunks run at a time.
    """
    T, L = len(x) if stack.batch_sizes is None else len(stack.batch_sizes), stack.num_layers
    _, weight_hh, _, _, weight_hr = weights
    case = (x, weight_hr, weight_hh.shape[1], backward, h0.shape[1])
    (_, alone), (programs, beside) = tiling_of(*case), tiling_of(*case, num_concurrent=2)
    count = min(MAX_CHUNKS, T // CHUNK_STEPS) if programs and stack.batch_sizes is None and stack.directions == 1 else 1
    if count < 2 or max(count + L - 1, count * L // 2 + 1) * beside >= count * L * alone:
        count = 1
    halves = count > 1 or (stack.directions == 2 and programs and beside < 2 * alone)
    return Schedule(list(pairwise(T * k // count for k in range(count + 1))), 2 if halves else 1)


def call_of(stack: Stack, schedule: Schedule, tensors: Sequence[torch.Tensor], saved: Sequence[torch.Tensor]) -> Call:
    """The call of tensors = (x, h0, c0, *weights), with what `saved_for` has made room for."""
    x, h0, c0, *weights = tensors
    outputs, others = saved[: 3 * stack.layer_directions], saved[3 * stack.layer_directions :]
    masks, inputs = (others[: stack.num_layers - 1], others[stack.num_layers - 1 :]) if stack.dropout else ((), others)
    sizes, rows, layer_directions = rows_per_step(x, h0[0], stack.batch_sizes), rows_of(x), []
    for index in range(stack.layer_directions):
        layer, direction = divmod(index, stack.directions)
        if layer and not direction:
            rows = inputs[layer - 1] if inputs else layer_directions[-1].y
        steps = Steps.of(sizes, h0.shape[1], direction == 1, stack.batch_sizes)
        y, gates, cells = outputs[3 * index : 3 * index + 3]
        own = stack.weights_of(weights, index)
        layer_directions.append(
            LayerDirection(steps, own, rows, h0[index], c0[index], rows_of(y), gates, cells, schedule.num_concurrent)
        )
    return Call(stack, schedule.chunks, layer_directions, list(masks))


def saved_for(stack: Stack, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, reuse: bool) -> list[torch.Tensor]:
    """Room for (y, gates, cells) of each layer direction; dropout's masks; the inputs of upper layers, unless they are y.

    reuse: nobody looks at gates later, and a layer is done before the one above begins: two layers' room is enough for them.
    """
    num_rows, P, H, dtype = rows_of(x).shape[0], h0.shape[2], c0.shape[2], upcast(c0[:0]).dtype
    shapes = (((*x.shape[:-1], P), x.dtype), ((num_rows, 4 * H), dtype), ((num_rows, H), dtype))
    saved = []
    for index in range(stack.layer_directions):
        y, gates, cells = (x.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
        before = index - 2 * stack.directions
        saved += [y, saved[3 * before + 1] if reuse and before >= 0 else gates, cells]
    between, columns = range(stack.num_layers - 1), P * stack.directions
    if stack.dropout:
        saved += [x.new_empty(num_rows, columns, dtype=torch.bool).bernoulli_(1 - stack.dropout) for _ in between]
    if stack.dropout or stack.directions == 2:
        saved += [x.new_empty(num_rows, columns) for _ in between]
    return saved


def forward_pass(call: Call) -> None:
    """The forward pass of all layer directions."""
    directions = call.stack.directions
    with StreamGroup(call.layer_directions[0].x.device, len(call.layer_directions)) as streams:
        for chunk in call.chunks:
            after = []
            for layer in range(call.stack.num_layers):
                first, layer_directions = layer * directions, call.layer(layer)
                if layer and layer_directions[0].x is not call.layer_directions[first - 1].y:
                    after = [streams.run(first, partial(call.join, layer, *chunk), after)]
                after = [
                    streams.run(first + k, partial(layer_direction.forward, *chunk), after)
                    for k, layer_direction in enumerate(layer_directions)
                ]


def backward_pass(call: Call, active: list[int], of_weights: list[list[bool | None]]) -> None:
    """The backward pass of the layer directions in `active`, for which `prepare` has been called.

    of_weights: of each layer direction, which of its weights want a gradient.
    """
    directions = call.stack.directions
    with StreamGroup(call.layer_directions[0].x.device, len(call.layer_directions)) as streams:
        for chunk in reversed(call.chunks):
            done = {}
            for index in reversed(active):
                above = range((index // directions + 1) * directions, (index // directions + 2) * directions)
                after = [done[other] for other in above if other in done]
                done[index] = streams.run(index, partial(call.backward, index, *chunk), after)
        for index in active:
            if any(of_weights[index]):
                streams.run(index, partial(call.layer_directions[index].multiply, of_weights[index]))
    for layer_direction in call.layer_directions:
        result = () if layer_direction.result is None else (layer_direction.result.partials, layer_direction.result.exponents)
        streams.hand_over(*result, *layer_direction.of_weights)


def prepare(
    call: Call, index: int, dy: torch.Tensor | None, dh_n: torch.Tensor | None, dc_n: torch.Tensor | None, inputs: bool
) -> None:
    """Makes room for what a backward recurrence receives and leaves; those of the layer above come first."""
    (layer, direction), layer_direction = divmod(index, call.stack.directions), call.layer_directions[index]
    (rows, P), above = layer_direction.y.shape, call.layer(layer + 1)
    if above:
        dy = above[0].dx if layer_direction.y is above[0].x else layer_direction.y.new_empty(rows, P)
    elif dy is not None:
        dy = rows_of(dy)[:, direction * P : (direction + 1) * P].contiguous()
    layer_direction.receive(dy, *(None if d is None else d[index] for d in (dh_n, dc_n)), inputs)
    if len(call.chunks) == 1:
        return
    programs, _ = tiling_of(
        layer_direction.y, None, layer_direction.c0.shape[1], True, layer_direction.steps.B, layer_direction.num_concurrent
    )
    T, new = len(layer_direction.steps.sizes), layer_direction.cells.new_zeros
    layer_direction.state = (*layer_direction.state, new(programs, 2, dtype=torch.int32))
    sums = (None, None)
    if call.stack.time_stats[index] is not None:
        sums = new(T, programs, NUM_SUMS.value, dtype=torch.float64), new(T, dtype=torch.int32)
    layer_direction.result = BackwardResult(layer_direction.y.new_empty(layer_direction.gates.shape), None, *sums)


def go_back(call: Call, grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> None:
    """The backward pass, and what is measured in it. `grads`: of y, h_n and c_n.

    `needs`: which of (x, h0, c0, *weights) want a gradient. LayerDirections that none of them needs do not run.
    """
    stack, every = call.stack, any(needs[:3])
    of_weights = [stack.weights_of(needs[3:], index) for index in range(stack.layer_directions)]
    trained = [any(wanted) for wanted in of_weights]
    lowest = 0 if every else trained.index(True) // stack.directions
    active = [k for k in range(stack.layer_directions) if every or trained[k] or k // stack.directions > lowest]
    for index in reversed(active):
        prepare(call, index, *grads, needs[0] or index // stack.directions > lowest)
    backward_pass(call, active, of_weights)
    for index in active:
        call.layer_directions[index].record(stack.stats[index], stack.time_stats[index])


@contextmanager
def below(x: torch.Tensor) -> Iterator[None]:
    """Below autograd and autocast, where ops are kernels."""
    with autocast_off(x), torch._C._AutoDispatchBelowAutograd():
        yield


class _Concurrent(Function):
    """Of a whole call: saves its inputs, and what `saved_for` has made room for."""

    @staticmethod
    def forward(
        ctx: Any, stack: Stack, schedules: list[Schedule], batch_sizes: torch.Tensor | None, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x = tensors[0]
        with below(x):
            saved = saved_for(stack, *tensors[:3], reuse=len(schedules) == len(schedules[0].chunks) == 1)
            call = call_of(stack, schedules[0], tensors, saved)
            forward_pass(call)
            ys = saved[3 * (stack.layer_directions - stack.directions) : 3 * stack.layer_directions : 3]
            y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
            h_n = torch.stack(
                [last_rows(layer_direction.steps, layer_direction.y) for layer_direction in call.layer_directions]
            )
            c_n = torch.stack(
                [last_rows(layer_direction.steps, layer_direction.cells) for layer_direction in call.layer_directions]
            ).to(x.dtype)
        ctx.stack, ctx.schedule = stack, schedules[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *saved, batch_sizes)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needs = needed(ctx)
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(needs))
        *everything, batch_sizes = ctx.saved_tensors
        stack = replace(ctx.stack, batch_sizes=batch_sizes)
        tensors, saved = everything[: len(needs)], everything[len(needs) :]
        batched = any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
        if batched or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return None, None, None, *differentiable_gradients(stack, tensors, saved, grads, needs)
        with below(tensors[0]):
            call = call_of(stack, ctx.schedule, tensors, saved)
            go_back(call, grads, needs)
            found = collect(call, tensors)
        return None, None, None, *(d if need else None for d, need in zip(found, needs, strict=True))


def needed(ctx: Any) -> list[bool]:
    """Which of (x, h0, c0, *weights) this backward pass is to reach, as a C++ node asks; some that could be reached are not."""
    found, wanted = [], ctx.needs_input_grad[3:]
    for need, (node, _) in zip(wanted, ctx.next_functions[-len(wanted) :], strict=True):
        try:
            found.append(need and node is not None and torch._C._will_engine_execute_node(node))
        except RuntimeError:  # a leaf that torch.autograd.grad has been asked for
            found.append(need)
    return found


def collect(call: Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradients of (x, h0, c0, *weights) out of the layer directions."""
    x, first = tensors[0], call.layer(0)
    dx = None if first[0].dx is None else sum((layer_direction.dx for layer_direction in first[1:]), first[0].dx).view(x.shape)
    found = [dx, None, None]
    if all(layer_direction.state for layer_direction in call.layer_directions):
        found[1:] = (
            torch.stack([layer_direction.state[k] for layer_direction in call.layer_directions]).to(x.dtype) for k in (0, 1)
        )
    for layer_direction in call.layer_directions:
        dweight_ih, dweight_hh, dbias, dweight_hr = layer_direction.of_weights
        given = zip(
            (dweight_ih, dweight_hh, *of_both_biases(dbias, True, True), dweight_hr), layer_direction.weights, strict=True
        )
        found += [d for d, weight in given if weight is not None]
    return found


def differentiable_gradients(
    stack: Stack,
    tensors: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The same through one layer after the other, whose nodes can be differentiated once more."""
    masks, again = saved[3 * stack.layer_directions :], torch.is_grad_enabled()

    def drop(y: torch.Tensor, layer: int) -> torch.Tensor:
        return y * masks[layer].view(y.shape) * stack.scale

    with torch.enable_grad():
        # Aliases of our own: one tensor may be given twice, or be made from another, and the outer pass goes on from here.
        tensors = [tensor.view_as(tensor) if need else tensor for tensor, need in zip(tensors, needs, strict=True)]
        outputs = sequential(stack, *tensors[:3], tensors[3:], drop)
        used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
        outputs, given = zip(*used, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needs]


def lstm(
    x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, weights: Sequence[torch.Tensor], *stack: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`concurrent` of the op's arguments."""
    return concurrent(Stack(*stack), x, h0, c0, weights)


for key in ("CUDA", "AutogradCUDA"):
    LIBRARY.impl("lstm", lstm, key)
IMPLEMENTED.add("cuda")
