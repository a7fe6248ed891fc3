"""Windows with halo: a sequence longer than the model's context, cut into overlapping windows and put together again.

Each window holds `window` tokens of its own content and, where there are any, `halo` tokens of context on either side
(SANE, section 3.3). At an end of the sequence the context of the missing side is taken from the other, so that all
windows of a sequence have the same length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# first token, one past the last, and the same for the tokens kept of it; all counted in the whole sequence
Window = tuple[int, int, int, int]


def plan_windows(num_tokens: int, window: int, halo: int = 0) -> list[Window]:
    """Windows that together keep every token of a sequence exactly once, in order.

    Args:
        num_tokens (`int`): Length of the sequence, any from 1.
        window (`int`): Tokens kept of each window, from 1; the last keeps what is left.
        halo (`int`): Tokens of context on either side.

    Returns:
        `list[tuple[int, int, int, int]]`: `(start, stop, keep_start, keep_stop)` of each window, counted in the whole
        sequence. All have `stop - start = min(num_tokens, window + 2 * halo)`.

    Raises:
        `ValueError`: On a length or window below 1, or a negative halo.

    Example:

    ```python
    >>> from sane_hf.modeling import plan_windows
    >>> plan_windows(10, window=4, halo=1)
    [(0, 6, 0, 4), (3, 9, 4, 8), (4, 10, 8, 10)]
    >>> plan_windows(3, window=4, halo=1)
    [(0, 3, 0, 3)]

    ```
    """
    for name, value, least in (("num_tokens", num_tokens, 1), ("window", window, 1), ("halo", halo, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    length = min(num_tokens, window + 2 * halo)
    plan = []
    for keep_start in range(0, num_tokens, window):
        start = min(max(keep_start - halo, 0), num_tokens - length)
        plan.append((start, start + length, keep_start, min(keep_start + window, num_tokens)))
    return plan


def split_windows(sequence: Tensor, plan: Sequence[Window]) -> Tensor:
    """Cut sequences `(B, T, ...)` into the windows of a plan: `(B, W, L, ...)`."""
    return torch.stack([sequence[:, start:stop] for start, stop, _, _ in plan], 1)


def merge_windows(windows: Tensor, plan: Sequence[Window]) -> Tensor:
    """Put the kept tokens of all windows together, the inverse of [`split_windows`]. Differentiable.

    Args:
        windows (`Tensor` of shape `(B, W, L, ...)`): The windows of the plan, in its order.
        plan (`Sequence[Window]`): From [`plan_windows`].

    Returns:
        `Tensor` of shape `(B, T, ...)`.

    Raises:
        `ValueError`: If number or length of the windows are not those of the plan.
    """
    length = plan[0][1] - plan[0][0]
    if windows.shape[1:3] != (len(plan), length):
        raise ValueError(f"windows have shape {tuple(windows.shape)}; the plan needs (B, {len(plan)}, {length}, ...).")
    kept = [windows[:, i, keep - start : stop - start] for i, (start, _, keep, stop) in enumerate(plan)]
    return torch.cat(kept, 1)
