"""A training step of the demo's transformer: forward, backward, clip, AdamW, with and without telemetry, and rivals'.

Rivals on the plain model: the norm of each parameter's gradient after backward, and a full backward hook on every module
that takes the norm of what comes in; both read to the host once a step, in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import gradkernels as gk
from benchmarks import harness
from gradkernels.demo.models import CONTEXT, PLAIN, CharacterTransformer, cross_entropy

BATCH, VOCABULARY = 16, 128


class Trainer:
    """One model with its optimizer; a call is one step, `after()` the variant's own work at its end."""

    def __init__(self, model: nn.Module, after: Callable[[nn.Module, torch.Tensor], object] | None = None) -> None:
        self.model, self.after = model, after
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.batches = [torch.randint(VOCABULARY, (BATCH, CONTEXT + 1)) for _ in range(8)]

    def __call__(self, index: int) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(self.model, self.batches[index % 8])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.after is not None:
            self.after(self.model, loss)
        return loss


def plain(initial: nn.Module) -> nn.Module:
    """The same weights in plain PyTorch layers."""
    model = CharacterTransformer(VOCABULARY, PLAIN)
    model.load_state_dict(initial.state_dict())
    return model


def fused(initial: nn.Module) -> nn.Module:
    """The same weights in fused layers."""
    model = CharacterTransformer(VOCABULARY)
    model.load_state_dict(initial.state_dict())
    return model


def hooked(initial: nn.Module) -> tuple[nn.Module, Callable]:
    """The plain model with a full backward hook on every module, and the step's end that reads the norms."""
    model, norms = plain(initial), []
    for module in model.modules():
        if module is not model:
            module.register_full_backward_hook(lambda module, dx, dy: norms.append(dy[0].norm()))

    def after(model: nn.Module, loss: torch.Tensor) -> list[float]:
        values = torch.stack(norms).tolist()
        norms.clear()
        return values

    return model, after


def parameter_norms(model: nn.Module, loss: torch.Tensor) -> list[float]:
    """The norm of every parameter's gradient, read in one copy."""
    return torch.stack(torch._foreach_norm([parameter.grad for parameter in model.parameters()])).tolist()


def trainers() -> dict[str, Trainer]:
    """Every variant, all from the same weights."""
    torch.manual_seed(0)
    initial = CharacterTransformer(VOCABULARY, PLAIN)
    watched = fused(initial)
    watch = gk.watch(watched)
    hooked_model, read_hooks = hooked(initial)
    return {
        "eager": Trainer(plain(initial)),
        "telemetry off": Trainer(fused(initial)),
        "telemetry on": Trainer(watched, lambda model, loss: watch.step(loss)),
        "eager + parameter norms": Trainer(plain(initial), parameter_norms),
        "eager + hooks": Trainer(hooked_model, read_hooks),
        "eager again": Trainer(plain(initial)),
    }


def lines() -> Iterator[dict]:
    """One result line a variant; the correctness gate is the first step's loss, which must be eager's to 1e-5."""
    variants = trainers()
    for trainer in variants.values():
        trainer.batches = variants["eager"].batches
    losses = {name: trainer(0).item() for name, trainer in variants.items()}
    failed = [name for name, loss in losses.items() if abs(loss - losses["eager"]) > 1e-5 * losses["eager"]]
    times = harness.time_rounds({name: trainer for name, trainer in variants.items() if name not in failed})
    what = {"op": "training step", "direction": "step", "dtype": "float32", "shape": [BATCH, CONTEXT]}
    for name in variants:
        line = {**what, "implementation": name}
        if name in failed:
            yield {**line, "failed": "correctness gate"}
            continue
        line["ratio_to_eager"] = harness.ratio(times[name], times["eager"])
        if name == "telemetry on":
            line["ratio_to_telemetry_off"] = harness.ratio(times[name], times["telemetry off"])
        yield line
