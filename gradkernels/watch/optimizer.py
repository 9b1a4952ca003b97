"""What the optimizer of a step does: its learning rates, and its GradScaler: what it multiplies the loss by, what it skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.amp import GradScaler

LISTENERS: WeakKeyDictionary[GradScaler, list[Callable[[], None]]] = WeakKeyDictionary()  # called before each update()
Scaling = tuple[torch.Tensor | None, torch.Tensor | None]  # the scale, and more than 0 where a gradient was not finite


class Rates:
    """The learning rates of an optimizer as its last step used them: a scheduler changes them before the Watch looks."""

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer
        self._used: list[list] = []
        used = self._used
        note = lambda optimizer, args, kwargs: used.__setitem__(slice(None), [_rates(optimizer)])  # noqa: E731
        self.hooks = [optimizer.register_step_pre_hook(note)] if optimizer is not None else []

    def take(self) -> list:
        """Those of the step that ended; where the optimizer has not stepped since the last call, as they are."""
        if self._optimizer is None:
            return []
        return self._used.pop() if self._used else _rates(self._optimizer)


def _rates(optimizer: torch.optim.Optimizer) -> list:
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]


def check_scaler(scaler: GradScaler | None) -> None:
    """Raises TypeError unless it is a scaler, or None."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"watch: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")


class LossScale:
    """What a scaler does in each step of an optimizer, whichever of `scaler.update()` and the end of the step comes first.

    scaler: None, or one that is not enabled: nothing is scaled. optimizer: None: every optimizer that the scaler steps counts.
    """

    def __init__(self, scaler: GradScaler | None, optimizer: torch.optim.Optimizer | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizer = None if optimizer is None else id(optimizer)
        self._noted: Scaling | None = None  # of a step that update() has concluded and that has not ended yet
        self._ended = False  # whether the step that the next update() concludes has ended before it
        self._others = self._own = False  # whether the scaler was seen to step other optimizers, and this one
        self.hooks: list[Any] = [] if self._scaler is None else [_Listening(self._scaler, self._before_update)]

    def take(self) -> Scaling:
        """Of the step that ends now. Nothing waits for a device. Raises ValueError for the scaler of another optimizer."""
        if self._scaler is None:
            return None, None
        scaling, self._noted = self._noted, None
        if scaling is None:
            scaling, self._ended = self._now(), bool(self._scaler._per_optimizer_states)
        if self._others and not self._own:
            raise ValueError("watch: scaler must be the one that steps optimizer, got one that has only stepped others")
        return scaling

    def _before_update(self) -> None:
        now = self._now()
        self._noted, self._ended = (None if self._ended else now), False

    def _now(self) -> Scaling:
        states, scale = self._scaler._per_optimizer_states, self._scaler._scale
        if self._optimizer is not None and states:
            self._own |= self._optimizer in states
            self._others |= any(other != self._optimizer for other in states)
        counted = [state for key, state in states.items() if self._optimizer in (None, key)]
        found = [t for state in counted for t in state["found_inf_per_device"].values()]
        found_inf = sum((t.to(found[0].device, non_blocking=True) for t in found[1:]), found[0].clone()) if found else None
        return None if scale is None else scale.clone(), found_inf


class _Listening:
    """Has `listener` called before each update() of a scaler, until `remove()`: its class has that method wrapped meanwhile."""

    def __init__(self, scaler: GradScaler, listener: Callable[[], None]) -> None:
        self._scaler, self._listener = scaler, listener
        if not LISTENERS.get(scaler):
            LISTENERS[scaler] = []
            scaler.__class__ = _listened(type(scaler))
        LISTENERS[scaler].append(listener)

    def remove(self) -> None:
        """Calls the listener no more."""
        listeners = LISTENERS.get(self._scaler, [])
        if self._listener in listeners:
            listeners.remove(self._listener)
            if not listeners:
                self._scaler.__class__ = type(self._scaler).__base__


def _new(scaler_class: type) -> GradScaler:
    return scaler_class.__new__(scaler_class)


def _listened(scaler_class: type) -> type:
    """A scaler's class that calls LISTENERS; copies and pickles are of `scaler_class` itself."""

    def update(self: GradScaler, new_scale: float | torch.Tensor | None = None) -> None:
        for listener in tuple(LISTENERS.get(self, ())):
            listener()
        scaler_class.update(self, new_scale)

    def reduce(self: GradScaler, protocol: Any) -> tuple:
        return _new, (scaler_class,), self.__getstate__()

    return type(scaler_class.__name__, (scaler_class,), {"update": update, "__reduce_ex__": reduce})
