"""PyTorch's own cases for the twins: op_db's sample and error inputs, module_db's constructor and forward inputs."""

import copy
import re

import pytest
import torch
from cases import gelu_terms, size_of_norm
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import gradkernels as gk
from gradkernels.testing import DTYPES, check, check_results, compare, differentiate, is_floating


def native_layer_norm(x, normalized_shape, weight, bias, eps):
    """torch.native_layer_norm's first result: mean and rstd are not ours to return."""
    return gk.layer_norm(x, normalized_shape, weight, bias, eps)


OURS = {"nn.functional.layer_norm": gk.layer_norm, "native_layer_norm": native_layer_norm, "nn.functional.gelu": gk.gelu}
OPS = {op.name: op for op in op_db if op.name in OURS and not op.variant_test_name}
MODULES = {"nn.LayerNorm": gk.LayerNorm, "nn.GELU": gk.GELU}
MODULE_INFOS = {info.name: info for info in module_db if info.name in MODULES}


def first(outputs):
    """The first of an op's results."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def samples(name, dtype):
    """(ours, twin, tensors) for each sample: functions of the sample's tensors alone."""
    op = OPS[name]
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        arguments = [sample.input, *sample.args]
        places = [k for k, argument in enumerate(arguments) if is_floating(argument)]

        def bind(function, arguments=arguments, places=places, kwargs=sample.kwargs):
            def of_tensors(*tensors):
                given = dict(zip(places, tensors, strict=True))
                return first(function(*(given.get(k, argument) for k, argument in enumerate(arguments)), **kwargs))

            return of_tensors

        yield bind(OURS[name]), bind(op.op), [arguments[k] for k in places], arguments


def terms_of(name, arguments, dy):
    """What `check` needs to know of the sums inside."""
    if "norm" not in name:
        return gelu_terms(arguments[0], dy)
    x, normalized_shape, weight = (*arguments[:2], arguments[2] if len(arguments) > 2 else None)
    eps = arguments[4] if len(arguments) > 4 else 1e-5
    size = size_of_norm(x.detach(), weight, dy, len(normalized_shape), eps)
    columns = [
        size[key] for key, given in (("dweight", arguments[2:3]), ("dbias", arguments[3:4])) if is_floating(*given or [None])
    ]
    return {"y0": size["y"], "d0": size["dx"], **{f"d{k}": term for k, term in enumerate(columns, 1)}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_samples(name, dtype):
    count = 0
    for ours, twin, tensors, arguments in samples(name, dtype):
        dy = torch.randn_like(tensors[0]).detach()
        check(ours, twin, tensors, (dy,), terms_of(name, arguments, dy))
        count += 1
    assert count >= 6


@pytest.mark.parametrize("name", OPS)
def test_samples_gradcheck(name):
    for ours, _, tensors, _ in samples(name, torch.float64):
        leaves = [t.detach().requires_grad_() for t in tensors]
        assert gradcheck(ours, leaves)
        assert gradgradcheck(ours, leaves)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.error_inputs_func is not None])
def test_error_inputs(name):
    count = 0
    for error in OPS[name].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type) as caught:
            OURS[name](sample.input, *sample.args, **sample.kwargs)
        assert re.search(error.error_regex, str(caught.value))
        count += 1
    assert count


def module_cases(name, dtype):
    """(ours, twin, x, reference(module, x) or None) for each of module_db's inputs; both modules in one state."""
    info = MODULE_INFOS[name]
    for given in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
        construct, factory = given.constructor_input, {"dtype": dtype} if "Norm" in name else {}
        ours, twin = (cls(*construct.args, **construct.kwargs, **factory) for cls in (MODULES[name], info.module_cls))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.copy_(torch.randn_like(parameter))
        assert ours.load_state_dict(twin.state_dict()) == ([], [])
        yield ours, twin, given.forward_input.args[0].detach(), given.reference_fn


def functional(module):
    """The module as a function of its input and its parameters."""
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *values: torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULE_INFOS)
def test_modules(name, dtype):
    count = 0
    for ours, twin, x, reference in module_cases(name, dtype):
        dy, tensors = torch.randn_like(x), [x, *twin.parameters()]
        wide = copy.deepcopy(twin).double()
        runs = (ours, None), (twin, None), (wide, torch.float64)
        results = [differentiate(functional(module), tensors, (dy,), cast) for module, cast in runs]
        arguments = [x] if name == "nn.GELU" else [x, twin.normalized_shape, twin.weight, twin.bias, twin.eps]
        check_results(*results, terms_of(name.lower(), arguments, dy))
        if reference is not None:
            expected = reference(twin, x).detach()
            compare("reference", ours(x).detach(), expected, reference(wide, x.double()).detach(), gelu_terms(x, dy)["y0"])
        count += 1
    assert count >= 3


@pytest.mark.parametrize("name", MODULE_INFOS)
def test_modules_gradcheck(name):
    for ours, _, x, _ in module_cases(name, torch.float64):
        leaves = [x.requires_grad_(), *(p.detach().requires_grad_() for p in ours.parameters())]
        assert gradcheck(functional(ours), leaves)
        assert gradgradcheck(functional(ours), leaves, fast_mode=True)


@pytest.mark.parametrize("name", MODULE_INFOS)
def test_modules_are_their_twins(name):
    """State, text and type are the twin's: what test_modules of PyTorch asks of every module of its own."""
    for ours, twin, _, _ in module_cases(name, torch.float32):
        assert isinstance(ours, type(twin))
        assert list(ours.state_dict()) == list(twin.state_dict())
        assert repr(ours) == repr(twin)
        assert repr(copy.deepcopy(ours)) == repr(twin)
