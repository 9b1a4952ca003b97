"""What every fused module shares: its ports, statistics that no copy carries, and how other programs see it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame

NAMESPACE = "torch.nn"  # what torch.fx takes a module's home for: it does not look into what lives there


class Hook:
    """A forward hook of a Watch; in a copy or a pickle of its module it does nothing, for what it serves is the original's.

    function: what runs. traced: what torch.compile puts into a graph in its place, where the module is part of one. A program
    of torch.export is a copy too.
    """

    def __init__(self, function: Callable, traced: Callable | None = None) -> None:
        self.function, self.traced = function, traced

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.function(*args)
        elif self.traced is not None and not torch.compiler.is_exporting():
            self.traced(*args)

    def __reduce__(self) -> tuple:
        return Hook, (_nothing,)

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks a hook for first."""
        raise AttributeError("torch.jit.script cannot compile the hooks of a watched model: close() the Watch, or script first")


def _nothing(*args: Any) -> None:
    pass


# Where torch.compile was told to compile a single module, it would take the module's hooks for programs of their own, in which
# the output is an input and what is done to its gradient gets lost. They run as they are; in a graph of more they are traced.
_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
eval_frame.set_code_exec_strategy(Hook.__call__.__code__, _SKIP)


def hooks_of(module: nn.Module) -> list[Hook]:
    """The hooks of a Watch on a module."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, Hook) and hook.function is not _nothing]


def remove_hooks(module: nn.Module) -> None:
    """Takes the hooks of any Watch off a module, copied ones too."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
            del hooks[key]
            for more in (
                module._forward_hooks_with_kwargs,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                more.pop(key, None)


class FusedModule(nn.Module):
    """A module with a `stats` attribute, for the ports named in PORTS; one that starts so for each of `suffixes`.

    TWIN: the torch.nn layer that computes the same of the same attributes, or None. For torch.fx a fused module is a leaf, as
    its twin is; torch.jit.script takes the twin in its place.
    """

    PORTS: tuple[str, ...] = ()
    TWIN: type[nn.Module] | None = None
    stats: torch.Tensor | None = None
    on_forward: Callable[[torch.Tensor], None] | None = None  # what a Watch is told of a forward, before it runs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)  # not that of __new__
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __new__(cls, *args: Any, **kwargs: Any) -> FusedModule:
        module = super().__new__(cls)
        module.__dict__["__module__"] = NAMESPACE
        return module

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows "stats" in the names of the module's statistics."""
        return ("",)

    def __getstate__(self) -> dict:
        own = {"on_forward", *self.stats_names()}
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def stats_names(self) -> list[str]:
        """The names of all attributes that hold statistics."""
        return [f"{kind}{suffix}" for kind in ("stats", "time_stats") for suffix in self.suffixes]

    def table(self, name: str = "stats") -> torch.Tensor | None:
        """Where a forward has its backward measure; None in a program of torch.export or torch.jit.trace, which is a copy."""
        return None if torch.compiler.is_exporting() or torch.jit.is_tracing() else getattr(self, name, None)

    def enter(self, x: torch.Tensor) -> None:
        """What every forward begins with."""
        if self.on_forward is not None and not torch.compiler.is_compiling():
            self.on_forward(x)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles, and leaves in the model: the twin, with the same parameters.

        Raises NotImplementedError where there is none, RuntimeError while the module measures.
        """
        name = type(self).__name__
        if self.TWIN is None:
            raise NotImplementedError(f"torch.jit.script: {name} has no twin in torch.nn that could be scripted in its place")
        if any(self.__dict__.get(stats) is not None for stats in self.stats_names()):
            twin = f"{self.TWIN.__module__.partition('.modules.')[0]}.{self.TWIN.__name__}"
            raise RuntimeError(
                f"torch.jit.script would put {twin} in the place of a {name} that measures: close() the Watch first"
            )
        twin = copy.copy(self)
        twin.__class__ = self.TWIN
        del twin.__dict__["__module__"]
        return twin
