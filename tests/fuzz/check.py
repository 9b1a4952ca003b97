"""What must hold for every example, whatever the op. An Example has

op: the name in gradkernels.ops.OPS        threads: how many it runs on
tensors() -> {name: tensor or None}        run(tensors, stats) -> {name: tensor}, forward and backward
ports(tensors, results) -> {port: gradient}        compare(tensors, results): raises where a result is wrong
"""

import math
import sys
from typing import Any

import numpy as np
import torch

from fuzz.tensors import BITS
from gradkernels.ops import OPS
from gradkernels.telemetry import FIELDS, merge_slots, record_of

COUNTS = ("numel", "observation_count", "abs_max", "nonfinite_count", "zero_count")


def check(example: Any) -> None:
    """Runs an example with statistics, again, and without them, and asserts everything about it."""
    torch.set_num_threads(example.threads)
    tensors = example.tensors()
    before = {name: memory_of(tensor) for name, tensor in tensors.items()}
    tables = [new_table(example.op) for _ in range(2)]
    results, again = (example.run(tensors, table[1:-1]) for table in tables)
    plain = example.run(tensors, None)
    for name, tensor in tensors.items():
        assert torch.equal(memory_of(tensor), before[name]), f"{name}: the op wrote into its input, or beside it"
    check_same_bits(results, again, "a second run")
    check_same_bits(plain, results, "a run without statistics")
    check_same_bits({"stats": tables[0]}, {"stats": tables[1]}, "a second run")
    for table in tables:
        assert torch.equal(table[[0, -1]], new_table(example.op)[[0, -1]]), "stats: the op wrote beside its rows"
    with np.errstate(all="ignore"):
        check_statistics(tables[0][1:-1], OPS[example.op].PORTS, example.ports(tensors, results))
        example.compare(tensors, results)


def new_table(op: str) -> torch.Tensor:
    """An empty statistics tensor with a row more before and behind, which nobody may touch."""
    table = torch.zeros(len(OPS[op].PORTS) + 2, 1, len(FIELDS), dtype=torch.float64)
    table[0] = table[-1] = 7.0
    return table


def memory_of(tensor: torch.Tensor | None) -> torch.Tensor:
    """A copy of all the memory that a tensor lies in, guards included."""
    if tensor is None:
        return torch.empty(0, dtype=torch.uint8)
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def check_same_bits(ours: dict, others: dict, what: str) -> None:
    """Asserts that two runs give the same bits, except for those of a NaN."""
    for name, value in ours.items():
        a, b = (t.view(BITS[t.itemsize]).masked_fill(t.isnan(), 0) for t in (value, others[name]))
        assert torch.equal(a, b), f"{name}: {what} gives other bits"


def fields_of(gradient: torch.Tensor) -> dict[str, float]:
    """The fields of a gradient, from the definitions. A long double holds the square of every float64."""
    values = gradient.detach().resolve_neg().double().numpy().ravel()
    finite = np.abs(values[np.isfinite(values)])
    return {
        "numel": values.size,
        "observation_count": 1,
        "abs_max": float(finite.max(initial=0.0)),
        "nonfinite_count": values.size - finite.size,
        "zero_count": int((values == 0).sum()),
        "norm": float(np.sqrt(np.sum(np.square(finite.astype(np.longdouble))))),
    }


def check_statistics(stats: torch.Tensor, ports: tuple[str, ...], gradients: dict[str, torch.Tensor]) -> None:
    """Asserts every field of every port; a port without a gradient must be empty."""
    assert set(gradients) <= set(ports)
    for port, row in zip(ports, merge_slots(stats).tolist(), strict=True):
        if port not in gradients:
            assert not any(row), f"{port}: measured, and no gradient came"
            continue
        found, expected = record_of("", port, row), fields_of(gradients[port])
        for field in COUNTS:
            assert getattr(found, field) == expected[field], f"{port}.{field}: {getattr(found, field)}, not {expected[field]}"
        relative = 1e-12 if gradients[port].dtype is torch.float64 else 1e-5
        norms = (min(norm, sys.float_info.max) for norm in (found.norm, expected["norm"]))
        close = math.isclose(*norms, rel_tol=relative)
        assert close, f"{port}.norm: {found.norm!r}, not {expected['norm']!r}"
