"""The memory of a long run: the same after 20,000 steps as after its history is full."""

import pytest
from processes import run

STEPS, WARM = 20_000, 3_000
PROGRAM = """
import os, sys, torch
from torch import nn
import gradkernels as gk

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(*[nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2)], nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
watch = gk.watch(model, optimizer, run_dir=sys.argv[1] or None)
x, pages = torch.randn(4, 8), []
for step in range(1, {steps} + 1):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    watch.step(loss)
    if step >= {warm} and step % 500 == 0:
        pages.append(int(open("/proc/self/statm").read().split()[1]))
assert len(watch.history) == 1024
print(*pages)
"""


@pytest.mark.slow
@pytest.mark.parametrize("run_dir", [False, True], ids=["in memory", "with a file"])
def test_memory_is_constant(tmp_path, run_dir):
    pages = [int(word) for word in run("-c", PROGRAM.format(steps=STEPS, warm=WARM), str(tmp_path) if run_dir else "").split()]
    assert len(pages) == (STEPS - WARM) // 500 + 1
    assert max(pages) <= 1.01 * pages[0]
