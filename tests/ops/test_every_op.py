"""What every op promises, once for all: statistics, which gradients there are, bad arguments, and modules.

An op is here by its description in tests/support/descriptions.py. test_every_op_transformed.py: torch.compile, torch.func and
the like; test_<op>.py: the numbers, and what an op alone promises.
"""

import copy
import io
import pickle
import re
from functools import partial

import pytest
import torch
from cases import make_case
from checks import (
    EXTREMES,
    check_accumulation,
    check_against_eager,
    check_case,
    check_case_stats,
    check_repeatable,
    check_row_by_row,
    check_threads,
    close,
    same,
    spoil,
    tuple_of,
    used,
    with_stats,
)
from descriptions import DESCRIPTIONS
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from gradkernels.library import FLOATS
from gradkernels.ops import OPS
from gradkernels.testing import DTYPES, check_stats, differentiate, is_floating, lay_out

LAYOUTS = ("transposed", "sliced", "channels_last", "expanded", "scalar")
MODULES = [op for op, description in DESCRIPTIONS.items() if description.module]

every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_every_op_is_described():
    assert set(DESCRIPTIONS) == set(OPS)


def leaves_of(tensors, wanted=None):
    """Copies that need gradients; of `wanted` alone, where that is given."""
    return [t.clone().requires_grad_(wanted is None or k in wanted) if is_floating(t) else t for k, t in enumerate(tensors)]


def floating(tensors):
    return [t for t in tensors if is_floating(t)]


@every_dtype
@every_op
def test_implementation(op, dtype):
    """Everything an op has, and each way through it: values, gradients, statistics; and with nothing in it."""
    for case in DESCRIPTIONS[op].cases(dtype).values():
        check_case(case)
    check_case(make_case(op, 0, 5, dtype=dtype))


@every_op
def test_gradcheck(op):
    """Derivatives of the first and second order, backward and forward, with what is measured on the way."""
    for case in DESCRIPTIONS[op].cases(torch.float64).values():
        leaves, function = leaves_of(case.inputs), used(case.function, gk.new_stats(len(case.ports)))
        assert gradcheck(function, leaves, check_forward_ad=True)
        assert gradgradcheck(function, leaves, fast_mode=len(leaves) > 6)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
@every_op
def test_layouts(op, dtype, layout):
    """Each input and each gradient in another layout, alone, and all of them together; of one number, all gradients."""
    few_rows = (2, 2, 3, 77)  # the sum of many equal numbers rounds the same way each time, the truth's too
    shape = (5, 77) if op.startswith("lstm") else few_rows if op.endswith("norm") else (2, 3, 37, 41)
    case = make_case(op, *shape, dtype=dtype)
    tensors, split = [*case.inputs, *case.dys], len(case.inputs)
    least = {"transposed": 2, "channels_last": 4}.get(layout, 1)
    strided = [lay_out(t, layout) if t.dim() >= least else t for t in tensors]
    choices = [[k] for k, t in enumerate(tensors) if t.dim() >= least] + [
        range(split if layout in ("expanded", "scalar") else 0, len(tensors))
    ]
    if layout == "channels_last" and case.inputs[0].dim() < 4:
        return
    for chosen in choices:
        given = [strided[k] if k in chosen else t for k, t in enumerate(tensors)]
        check_case(case.again(tuple(given[:split]), tuple(given[split:])))


@pytest.mark.parametrize("num_threads", [2, 3])
@every_dtype
@every_op
def test_threads(op, dtype, num_threads):
    check_threads(make_case(op, *DESCRIPTIONS[op].large, dtype=dtype), num_threads)


@pytest.mark.parametrize(("dtype", "scale"), EXTREMES, ids=str)
@every_op
def test_stats_extremes(op, dtype, scale):
    check_case_stats(make_case(op, 9, 1033, dtype=dtype, scale=scale))


@every_dtype
@every_op
def test_stats_special_values(op, dtype):
    """NaN, infinities and zeros are counted and kept out of sums; so are tensors of nothing but zeros or NaN."""
    check_case_stats(spoil(make_case(op, 7, 1031, dtype=dtype)))
    for value in (0.0, float("nan"), -float("inf")):
        case = make_case(op, 3, 21, dtype=dtype)
        for dy in case.dys:
            dy.fill_(value)
        check_case_stats(case)


@every_dtype
@every_op
def test_stats_repeatable(op, dtype):
    check_repeatable(make_case(op, 7, 1128, dtype=dtype))


@every_op
def test_stats_accumulate(op):
    check_accumulation(op)


@every_op
def test_no_gradients(op):
    """No gradient wanted, none computed: outputs need none, as the twin's, and nothing is measured."""
    for case in DESCRIPTIONS[op].cases().values():
        stats = gk.new_stats(len(case.ports))
        outputs = tuple_of(case.function(*case.inputs, stats=stats))
        with torch.no_grad():
            outputs += tuple_of(used(case.function, stats)(*leaves_of(case.inputs)))
        assert not any(y.requires_grad for y in outputs)
        assert not stats.any()


def without(case, outputs):
    """The case with `outputs` unused."""
    return case.again(case.inputs, tuple(None if k in outputs else dy for k, dy in enumerate(case.dys)))


@every_dtype
@pytest.mark.parametrize("op", [op for op in DESCRIPTIONS if len(make_case(op, 1, 1).dys) > 1])
def test_one_output_used(op, dtype):
    """What is not in the loss: gradients are the twin's, or zeros where that leaves one out, and ports stay empty."""
    shapes = ((0, 5), (6, 77), DESCRIPTIONS[op].large)
    for case in (*(make_case(op, *shape, dtype=dtype) for shape in shapes), *DESCRIPTIONS[op].cases(dtype).values()):
        every = set(range(len(case.dys)))
        for unused in [every - {k} for k in every] + [{k} for k in every if len(every) > 2]:
            part = without(case, unused)
            results, stats = with_stats(part)
            same(results, differentiate(part.function, part.inputs, part.dys))
            check_row_by_row(part, results, stats)
            eager = differentiate(part.eager, part.inputs, part.dys)[1]
            left_out = [d is None and ours is not None for d, ours in zip(eager, results[1], strict=True)]
            assert not any(ours.any() for ours, no in zip(results[1], left_out, strict=True) if no)
            gradients = tuple(None if no else ours for ours, no in zip(results[1], left_out, strict=True))
            check_against_eager(part, (results[0], gradients))


@every_op
def test_frozen_inputs(op):
    """What needs no gradient gets none, all else the same bits; what is measured is right, and no port is made up."""
    names = DESCRIPTIONS[op].names
    for case in DESCRIPTIONS[op].cases().values():
        expected = differentiate(case.function, case.inputs, case.dys)[1]
        there = [k for k, t in enumerate(case.inputs) if t is not None]
        parameters = {k for k in there if names[k].startswith(("weight", "bias"))}
        choices = [{k} for k in there] + [{*there} - {k} for k in there] + [{*there} - parameters]
        for wanted in filter(None, choices):
            leaves, stats = leaves_of(case.inputs, wanted), gk.new_stats(len(case.ports))
            torch.autograd.backward(used(case.function, stats)(*leaves), case.dys)
            for k in there:
                assert (leaves[k].grad is None) == (k not in wanted)
                assert k not in wanted or torch.equal(leaves[k].grad, expected[k])
            needed = case.seen([d if k in wanted else None for k, d in enumerate(expected)])
            needed = {port: d for port, d in needed.items() if d is not None}
            found = {port: d for port, d in case.seen(expected).items() if stats[case.ports.index(port)].any()}
            assert set(needed) <= set(found)
            check_stats(stats, case.ports, found)
            trained = {f"d{'bias' if names[k].startswith('bias') else names[k]}" for k in wanted & parameters}
            assert {port for port in found if port.startswith(("dweight", "dbias"))} == trained
            assert not op.startswith("lstm") or (0 in wanted) == ("dx" in found)


@every_op
def test_double_backward(op):
    """The gradient of a gradient is the twin's; the second backward is no observation of its own."""
    for name, case in DESCRIPTIONS[op].cases(torch.float64).items():
        if op.endswith("layer_norm") and name == "bias alone":
            continue  # where PyTorch's own second backward fails
        stats, found = gk.new_stats(len(case.ports)), []
        for function in (used(case.function, stats), used(lambda *inputs, stats, eager=case.eager: eager(*inputs))):
            inputs, dys = leaves_of(case.inputs), leaves_of(case.dys)
            leaves = floating(inputs)
            first = torch.autograd.grad(function(*inputs), leaves, dys, create_graph=True)
            deep = [d for d in first if d.requires_grad]
            second = torch.autograd.grad(deep, [*leaves, *dys], [d.detach().sin() for d in deep], allow_unused=True)
            second = [torch.zeros_like(t) if d is None else d for d, t in zip(second, [*leaves, *dys], strict=True)]
            found.append(tuple(d.detach() for d in (*first, *second)))
        close(*found)
        gradients = iter(found[0])
        seen = case.seen([next(gradients) if is_floating(t) else None for t in case.inputs])
        if op == "add_layer_norm":  # whose node saves new_residual, its own output: the second backward goes through it again
            stats, seen = stats[:1], {"dy": seen["dy"]}
        check_stats(stats, case.ports[: len(stats)], seen)


@every_op
def test_second_backward(op):
    """Of the same bits where the graph was kept, and an error where the twin has one: nothing saved was written to."""
    for case in DESCRIPTIONS[op].cases().values():
        errors = []
        for function in (case.function, case.eager):
            inputs = leaves_of(case.inputs)
            leaves, outputs = floating(inputs), tuple_of(function(*inputs))
            first = torch.autograd.grad(outputs, leaves, case.dys, retain_graph=True)
            same(first, torch.autograd.grad(outputs, leaves, case.dys))
            try:
                errors.append(bool(torch.autograd.grad(outputs, leaves, case.dys)) and "")
            except RuntimeError as error:
                errors.append(str(error))
        assert errors[0] == errors[1]


@every_op
def test_changed_in_place(op):
    """An input or an output that is written to after the forward: PyTorch's error, or the gradients of the call as it was."""
    for case in DESCRIPTIONS[op].cases().values():
        expected = floating(differentiate(case.function, case.inputs, case.dys)[1])
        errors = 0
        for k in range(len(case.inputs) + len(case.dys)):
            leaves = leaves_of(case.inputs)
            inputs = [t * 1 if is_floating(t) else t for t in leaves]
            outputs = tuple_of(case.function(*inputs))
            changed = [*inputs, *outputs][k]
            if changed is None:
                continue
            try:
                changed.add_(1)
                same(torch.autograd.grad(outputs, floating(leaves), case.dys), expected)
            except RuntimeError as error:
                errors += 1
                assert re.search("modified by an inplace operation|modified inplace", str(error))  # noqa: PT017
        assert errors or op == "probe"


TABLES = {
    "float32": (lambda table: table.float(), TypeError, "stats must be float64, got torch.float32"),
    "float16": (lambda table: table.half(), TypeError, "stats must be float64, got torch.float16"),
    "a port more": (
        lambda table: torch.cat([table, table[:1]]),
        gk.ArgumentError,
        "stats must have shape",
    ),
    "a port less": (lambda table: table[1:], gk.ArgumentError, "stats must have shape"),
    "a field more": (lambda table: torch.cat([table] * 2, 2), gk.ArgumentError, r"stats must have shape .*, 1, 16\)"),
    "a field less": (lambda table: table[..., 1:], gk.ArgumentError, r"stats must have shape .*, 1, 7\)"),
    "no slots": (lambda table: table[:, :0], gk.ArgumentError, r"stats must have a slot or more, got shape \(\d, 0, 8\)"),
    "two dimensions": (lambda table: table[:, 0], gk.ArgumentError, r"stats must have shape .*, slots, 8\), got \(\d, 8\)"),
    "meta": (lambda table: table.to("meta"), gk.ArgumentError, "stats must be on x's device, cpu, got meta"),
}


def check_error(op, error, message, **changes):
    description = DESCRIPTIONS[op]
    with pytest.raises(error, match=f"^{description.function.__name__}: .*{message}") as caught:
        description.call(**changes)
    assert caught.type is error


@pytest.mark.parametrize("table", TABLES)
@every_op
def test_wrong_stats(op, table):
    spoiled, error, message = TABLES[table]
    right = torch.zeros(len(OPS[op].PORTS), 1, 8, dtype=torch.float64)
    check_error(op, error, message, stats=spoiled(right))


@every_op
def test_wrong_arguments(op):
    """Each input of another dtype, on another device, of another shape: an error that names the op and the argument."""
    names, case = DESCRIPTIONS[op].names, make_case(op, 3, 5)
    for name, t in zip(names, case.inputs, strict=True):
        for dtype in (torch.int32, torch.bool, torch.complex64, *(FLOATS - {torch.float32} if name != "x" else ())):
            check_error(op, TypeError, rf"\b{name} must be .*, got {dtype}", **{name: t.to(dtype)})
        if name != "x":
            check_error(op, gk.ArgumentError, f"{name} must be on x's device, cpu, got meta", **{name: t.to("meta")})
            for wrong in (t[None], t[1:], torch.cat([t, t[:1]]), t[..., 1:]):
                got = rf"\b{name}\b.* must have .*{re.escape(str(tuple(wrong.shape)))}"
                # weight_hh says how large h0 must be, which may then be the one that is wrong.
                check_error(op, gk.ArgumentError, f"(h0 must have|{got})" if name == "weight_hh" else got, **{name: wrong})


@pytest.mark.parametrize("strides", [(64, 64, 2), (24, 1, 3)], ids=str)
@every_op
def test_strided_stats(op, strides):
    """A statistics tensor that is part of a larger one: its own elements are written and no others, or it is refused."""
    case, table = make_case(op, 3, 5), torch.zeros(1024, dtype=torch.float64)
    stats = table.as_strided((len(case.ports), 1, 8), strides)
    try:
        results = differentiate(partial(case.function, stats=stats), case.inputs, case.dys)
    except gk.ArgumentError:
        return
    check_row_by_row(case, results, stats)
    assert table.sum() == stats.sum()


@pytest.mark.parametrize("op", MODULES)
def test_module_copies(op):
    """A copy and a pickle compute the same bits, and carry no statistics; nor does the state_dict."""
    module, inputs = DESCRIPTIONS[op].module()
    names = [name for name in module.stats_names() if not name.startswith("time_stats")]
    for name in names:
        setattr(module, name, gk.new_stats(len(OPS[op].PORTS)))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)
    for other in (copy.copy(module), *copies):
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert other.load_state_dict(module.state_dict()) == ([], [])
        same(tuple_of(other(*inputs)), tuple_of(module(*inputs)))
    for other in copies:
        assert not any("stats" in name for name in (*other.__dict__, *other.state_dict()))
    assert all(getattr(module, name) is not None for name in names)


@pytest.mark.parametrize("op", MODULES)
def test_module_measures(op):
    """Every port of a module with statistics is seen once a backward; without them results are the same bits."""
    module, inputs = DESCRIPTIONS[op].module()
    names, found = [name for name in module.stats_names() if not name.startswith("time_stats")], []
    for measured in (True, False):
        for name in names:
            setattr(module, name, gk.new_stats(len(OPS[op].PORTS)) if measured else None)
        leaves = [*leaves_of(inputs), *module.parameters()]
        outputs = [y for part in tuple_of(module(*leaves[: len(inputs)])) for y in tuple_of(part)]
        torch.manual_seed(0)
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])))
        for table in (getattr(module, name) for name in names if measured):
            absent = {"dweight_hr"} if op == "lstm_layer" else set()  # without a projection
            assert [bool(row[0, 1] == 1) for row in table] == [port not in absent for port in OPS[op].PORTS]
    same(*found)


@pytest.mark.parametrize("op", MODULES)
def test_module_functional_call(op):
    """Parameters from outside, under vmap too: those of a module that has them."""
    module, inputs = DESCRIPTIONS[op].module()
    stacked = {name: torch.stack([p.detach(), torch.randn_like(p)]) for name, p in module.named_parameters()}
    batch = torch.vmap(lambda values: torch.func.functional_call(module, values, inputs))(stacked) if stacked else None
    for k in range(2):
        values = {name: p[k] for name, p in stacked.items()}
        found = torch.func.functional_call(module, values, inputs)
        other = copy.deepcopy(module)
        other.load_state_dict(values)
        expected = other(*inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if stacked:
            torch.testing.assert_close(torch.utils._pytree.tree_map(lambda y, k=k: y[k], batch), expected)
