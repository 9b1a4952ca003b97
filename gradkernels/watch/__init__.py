"""`gk.watch`: attaches to a model, ends steps, hands out the history. It holds no rule and draws nothing."""

from gradkernels.watch.coverage import Coverage
from gradkernels.watch.watch import Watch, watch

__all__ = ["Coverage", "Watch", "watch"]
