"""What every fused module shares: its ports, and statistics that no copy carries."""

from __future__ import annotations

import torch
from torch import nn


class _Measuring(nn.Module):
    """A module with a `stats` attribute, for the ports named in PORTS; one that starts so for each suffix of `parts`."""

    PORTS: tuple[str, ...] = ()
    stats: torch.Tensor | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """What follows "stats" in the names of the module's statistics."""
        return ("",)

    def __getstate__(self) -> dict:
        own = set(self.stats_names())
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def stats_names(self) -> list[str]:
        """The names of all attributes that hold statistics."""
        return [f"{kind}{part}" for kind in ("stats", "time_stats") for part in self.parts]
