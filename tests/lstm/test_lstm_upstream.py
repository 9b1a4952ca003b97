"""PyTorch's own inputs and error inputs of nn.LSTM and nn.LSTMCell, as module_db has them, on ours."""

import pytest
import torch
from lstm_modules import check_same, flat, pair
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import gradkernels as gk

OURS = {"nn.LSTM": gk.LSTM, "nn.LSTMCell": gk.LSTMCell}
INFOS = {info.name: info for info in module_db if info.name in OURS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INFOS)
def test_module_inputs(name, dtype):
    """PyTorch's own inputs: outputs and all gradients are torch's, and those of the sample's own reference function."""
    info, count = INFOS[name], 0
    for given in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
        construct, forward = given.constructor_input, given.forward_input
        ours, twin = pair(*construct.args, cls=(OURS[name], info.module_cls), **construct.kwargs, dtype=dtype)
        leaves = [t for t in flat(forward.args) if t.requires_grad]
        check_same(ours, twin, forward.args, leaves)
        if given.reference_fn is not None:
            expected = flat(given.reference_fn(ours, *forward.args))
            for a, b in zip(flat(ours(*forward.args)), expected, strict=True):
                torch.testing.assert_close(a, b)
        count += 1
    assert count >= 2


@pytest.mark.parametrize("name", INFOS)
def test_module_gradcheck(name):
    info = INFOS[name]
    for given in list(info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)):
        construct, forward = given.constructor_input, given.forward_input
        ours = OURS[name](*construct.args, **construct.kwargs, dtype=torch.float64)
        names = [key for key, _ in ours.named_parameters()]
        shape = forward.args

        def function(x, *rest, ours=ours, names=names, shape=shape):
            hx, values = (None, rest) if len(shape) == 1 else ((rest[0], rest[1]), rest[2:])
            return tuple(flat(torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x, hx))))

        leaves = [*flat(forward.args), *(p.detach().requires_grad_() for p in ours.parameters())]
        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", INFOS)
def test_module_error_inputs(name):
    info, count = INFOS[name], 0
    for error in info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        construct, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        module = None
        if error.error_on is ModuleErrorEnum.FORWARD_ERROR:
            module = OURS[name](*construct.args, **construct.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            OURS[name](*construct.args, **construct.kwargs) if module is None else module(*forward.args, **forward.kwargs)
        count += 1
    assert count
