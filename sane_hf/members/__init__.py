"""Run many member networks of one architecture at once: forward, evaluate, train.

Serves the populations of `sane_hf.zoos`, the behavioural loss, and the evaluation of generated networks.
"""

from __future__ import annotations

from .forward import evaluate, forward
from .stacking import count, stack, stack_flat, unstack
from .training import epoch_draws, train

__all__ = ["count", "epoch_draws", "evaluate", "forward", "stack", "stack_flat", "train", "unstack"]
