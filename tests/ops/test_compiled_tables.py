"""Tables that several graphs of torch.compile write: a write of statistics is no change of what a backward needs."""

import pytest
import torch
from cases import make_case
from checks import differentiate, tuple_of, used
from torch import nn

import gradkernels as gk
from gradkernels.ops import OPS

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_two_graphs_and_their_backwards(op, backend, fresh_compiler):
    """All forwards come first; another graph writes into other rows of the table in between."""
    case = make_case(op, 3, 5)
    table, ports = gk.new_stats(2 * len(case.ports)), len(case.ports)
    compiled = [
        torch.compile(used(case.function, rows), backend=backend, fullgraph=True) for rows in (table[:ports], table[ports:])
    ]
    leaves = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in case.inputs]
    outputs = [tuple_of(function(*leaves)) for function in (*compiled, *compiled)]
    for out in outputs:
        torch.autograd.backward(out, case.dys)
    alone = gk.new_stats(ports)
    for _ in range(2):
        differentiate(used(case.function, alone), case.inputs, case.dys)
    torch.testing.assert_close(table, torch.cat([alone, alone]), rtol=1e-5, atol=0)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), gk.Residual(nn.Linear(8, 8)), nn.Linear(8, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [True, False])
def test_watched(whole, backend, fresh_compiler):
    """Two forwards before a backward, a step between the two, pause, resume and close; one graph, or one a block."""
    net, plain, x = model(), model(), torch.randn(4, 8)
    watch = gk.watch(net)
    if whole:
        net = torch.compile(net, backend=backend)
    else:
        for block in net:
            block.compile(backend=backend)
    watch.resume()

    def backward():
        (net(x).sum() + net(2 * x).sum()).backward()

    backward()
    watch.step()
    measured = {(record.site, record.port): record.observation_count for record in watch.records()}
    assert set(measured.values()) == {2}
    loss = net(x).sum()
    watch.step()
    assert not watch.records()
    loss.backward()
    watch.step()
    assert {(record.site, record.port): record.observation_count for record in watch.records()} == dict.fromkeys(measured, 1)
    watch.pause()
    backward()
    watch.step()
    assert not watch.records()
    watch.resume()
    backward()
    watch.close()
    backward()
    watch.step()
    assert {record.observation_count for record in watch.records()} == {2}
    (plain(x).sum() + plain(2 * x).sum()).backward()
    net.zero_grad()
    backward()
    for own, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
