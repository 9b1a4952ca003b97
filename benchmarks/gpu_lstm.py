"""The LSTM on a GPU against nn.LSTM as PyTorch dispatches it (cuDNN), forward alone and with backward to x and all weights.

The part of `make gpu` that benchmarks/gpu.py runs after the other ops. A case is timed once its correctness gate is passed:
outputs and gradients no further from float64 than twice nn.LSTM's. float32 is taken with TF32 on both sides and on neither.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import gradkernels as gk

GATE_STEPS = 48  # at most, of the sequences that correctness is checked on
ALLOWED_ERROR = 2.0  # multiple of nn.LSTM's own error against float64
Step = Callable[[int], object]


@dataclass(frozen=True)
class Case:
    """A batch of B sequences of T steps, D = H inputs each; packed: their lengths fall evenly from T to a quarter of it."""

    B: int
    T: int
    H: int
    dtype: torch.dtype = torch.bfloat16
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    tf32: bool = False

    @property
    def op(self) -> str:
        """The op's name in result lines: what is special about the case."""
        words = {"2 layers": self.layers == 2, "bidirectional": self.bidirectional, "packed": self.packed, "TF32": self.tf32}
        return " ".join(["lstm", *(word for word, there in words.items() if there)])


CASES = (  # where nn.LSTM is slow first; (16, 1024, 768) in float16 is cuDNN's own persistent kernel
    Case(16, 1024, 768),
    Case(16, 1024, 768, torch.float16),
    Case(16, 1024, 256),
    Case(64, 512, 512),
    Case(16, 1024, 128),
    Case(64, 512, 512, packed=True),
    Case(16, 1024, 256, layers=2),
    Case(16, 1024, 256, bidirectional=True),
    Case(64, 256, 512, layers=2),
    Case(64, 256, 512, bidirectional=True),
    Case(64, 256, 200),
    Case(64, 256, 300),
    Case(64, 256, 650),
    Case(16, 1024, 256, torch.float16),
    Case(64, 256, 650, torch.float16),
    Case(64, 256, 512, torch.float16, layers=2),
    Case(64, 512, 512, torch.float16, packed=True),
    Case(16, 1024, 256, torch.float32),
    Case(16, 1024, 256, torch.float32, tf32=True),
    Case(64, 256, 650, torch.float32, tf32=True),
    Case(64, 512, 512, torch.float32, packed=True, tf32=True),
)
TINY = tuple(
    Case(3, 5, 20, dtype, layers, bidirectional, packed)
    for dtype, layers, bidirectional, packed in (
        (torch.bfloat16, 1, False, False),
        (torch.float32, 2, True, True),
    )
)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 for float32 products and for cuDNN, or for neither."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def module_of(case: Case, device: torch.device) -> nn.LSTM:
    """nn.LSTM of the case's layers, in its dtype."""
    torch.manual_seed(0)
    return nn.LSTM(case.H, case.H, case.layers, bidirectional=case.bidirectional, device=device, dtype=case.dtype)


def input_of(case: Case, T: int, device: torch.device) -> torch.Tensor | PackedSequence:
    """Random x, padded or packed, of T steps."""
    x = torch.randn(T, case.B, case.H, device=device).to(case.dtype)
    if not case.packed:
        return x.requires_grad_()
    lengths = torch.linspace(T, max(1, T // 4), case.B, device="cpu").long()
    sizes = (lengths > torch.arange(T, device="cpu")[:, None]).sum(1)
    return PackedSequence(x.reshape(-1, case.H)[: int(sizes.sum())].clone().requires_grad_(), sizes)


def data(value: torch.Tensor | PackedSequence) -> torch.Tensor:
    """The tensor itself, or that of a packed sequence."""
    return value.data if isinstance(value, PackedSequence) else value


def measuring(module: nn.Module, T: int) -> nn.Module:
    """The gk.LSTM with statistics for each layer and direction."""
    device = module.weight_ih_l0.device
    for part in module.parts:
        setattr(module, f"stats{part}", gk.new_stats(len(module.PORTS), device))
        setattr(module, f"time_stats{part}", gk.new_time_stats(T, device))
    return module


def forward_backward(module: nn.Module, x: torch.Tensor | PackedSequence, dy: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of x and of all weights."""
    y = data(module(x)[0])
    return [y.detach(), *torch.autograd.grad(y, [data(x), *module.parameters()], dy)]


def is_wrong(module: nn.Module, plain: nn.LSTM, case: Case, device: torch.device) -> bool:
    """Whether an output or gradient is further from float64 than ALLOWED_ERROR times nn.LSTM's, and a rounding."""
    x = input_of(case, min(case.T, GATE_STEPS), device)
    wide = data(x).detach().double().requires_grad_()
    wide_x = PackedSequence(wide, x.batch_sizes) if case.packed else wide
    dy = torch.randn_like(data(plain(x)[0]))
    exact = forward_backward(copy.deepcopy(plain).double(), wide_x, dy.double())
    rounding = torch.finfo(case.dtype).eps
    for ours, eager, truth in zip(forward_backward(module, x, dy), forward_backward(plain, x, dy), exact, strict=True):
        error, eager_error = ((t.double() - truth).abs().max() for t in (ours, eager))
        if not error <= ALLOWED_ERROR * eager_error + rounding * truth.abs().max():
            return True
    return False


def steps_of(variants: dict[str, nn.Module], x: torch.Tensor | PackedSequence, backward: bool) -> dict[str, Step]:
    """One step a variant: the forward alone, or forward and backward."""
    dy = torch.randn_like(data(next(iter(variants.values()))(x)[0]))

    def step_of(module: nn.Module) -> Step:
        def forward(index: int) -> None:
            with torch.no_grad():
                module(x)

        def both(index: int) -> None:
            forward_backward(module, x, dy)

        return both if backward else forward

    return {name: step_of(module) for name, module in variants.items()}


def lines_of(case: Case, device: torch.device, interleaved: Callable, in_graphs: Callable) -> Iterator[dict]:
    """A line for every direction, way of launching and variant; ours alone are captured in a CUDA graph."""
    plain = module_of(case, device)
    ours = {name: gk.convert(copy.deepcopy(plain)) for name in ("telemetry off", "telemetry on")}
    measuring(ours["telemetry on"], case.T)
    about = {"op": case.op, "dtype": str(case.dtype).removeprefix("torch."), "shape": [case.B, case.T, case.H]}
    wrong = [name for name, module in ours.items() if is_wrong(module, plain, case, device)]
    for name in wrong:
        yield {**about, "implementation": name, "failed": "correctness gate"}
    variants = {"eager": plain, **{name: module for name, module in ours.items() if name not in wrong}}
    x = input_of(case, case.T, device)
    for backward in (False, True):
        steps = steps_of(variants, x, backward)
        if device.type == "cuda" and not case.packed:  # the sizes of packed steps come from the host
            captured = {f"{name}, graph": in_graphs(steps[name], 1) for name in variants if name != "eager"}
            steps.update(captured)
        times = interleaved(steps, device)
        for name, own in times.items():
            base = name.replace(" on", " off")
            ratio = lambda other, own=own, times=times: statistics.median(  # noqa: E731
                mine / its for mine, its in zip(own, times[other], strict=True)
            )
            yield {
                **about,
                "implementation": name.removesuffix(", graph"),
                "direction": "forward+backward" if backward else "forward",
                "launched": "graph" if name.endswith("graph") else "call",
                "microseconds": round(1e6 * statistics.median(own), 2),
                "ratio_to_eager": round(ratio("eager"), 3),
                **({"ratio_to_telemetry_off": round(ratio(base), 4)} if base != name and base in times else {}),
            }


def lines(device: torch.device, interleaved: Callable, in_graphs: Callable) -> Iterator[dict]:
    """All lines of all cases; tiny ones where the device is the CPU. `interleaved` and `in_graphs` as in gpu.py."""
    for case in CASES if device.type == "cuda" else TINY:
        with tf32(case.tf32):
            yield from lines_of(case, device, interleaved, in_graphs)
