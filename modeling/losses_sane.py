"""Losses of SANE that need nothing but tensors: masked reconstruction, NT-Xent, and the R² that is reported."""

from __future__ import annotations

import torch
from torch import nn


def masked_mse(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error over real weights; padding neither counts nor dilutes, whatever is there (paper, eq. 2).

    Args:
        prediction: (B, T, D) float.
        target: (B, T, D) float.
        mask: (B, T, D) bool, true where a weight is.

    Returns:
        Scalar.

    Example:
        >>> mask = torch.tensor([[[True, False]]])
        >>> masked_mse(torch.tensor([[[1.0, 9.0]]]), torch.tensor([[[3.0, 0.0]]]), mask).item()
        4.0
    """
    difference = (prediction - target).masked_fill(~mask, 0.0)  # before the square: its gradient at NaN is NaN
    return difference.square().sum() / mask.sum().clamp(min=1)


def explained_variance(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """R² over real weights against their common mean, `1 - SSE / SST`; padding never counts.

    Args:
        prediction: (B, T, D) float.
        target: (B, T, D) float.
        mask: (B, T, D) bool, true where a weight is.

    Returns:
        Scalar; 0 for a predictor that knows the mean alone.
    """
    count = mask.sum().clamp(min=1)
    mean = target.masked_fill(~mask, 0.0).sum() / count
    total = (target - mean).masked_fill(~mask, 0.0).square().sum()
    error = (prediction - target).masked_fill(~mask, 0.0).square().sum()
    return 1 - error / total.clamp(min=torch.finfo(total.dtype).tiny)


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy between two views (paper, eq. 3; Chen et al. 2020).

    One product of normalised vectors gives all similarities: O(N² C) multiplications and N² memory, against the
    N² x C tensor of a broadcast cosine.

    Args:
        first: (N, C) float, projections of the first view.
        second: (N, C) float, projections of the second view, row by row the same networks.
        temperature: positive float.

    Returns:
        Scalar, mean over the 2N rows.

    Raises:
        ValueError: with fewer than two networks there is no negative.

    Example:
        >>> views = torch.eye(4)
        >>> bool(nt_xent(views, views, 0.1) < nt_xent(views, views.flip(0), 0.1))
        True
    """
    if first.shape[0] < 2:
        raise ValueError(f"contrast needs at least two networks in a batch, found {first.shape[0]}: set gamma=0")
    views = torch.cat([first, second])
    # bfloat16 knows a similarity to 0.4 %, which the temperature then multiplies
    views = views.to(torch.promote_types(views.dtype, torch.float32))
    with torch.autocast(views.device.type, enabled=False):
        # eps as in torch's cosine similarity, so that a projection that is all zero stays finite
        views = nn.functional.normalize(views, dim=-1, eps=1e-8)
        rows = torch.arange(views.shape[0], device=views.device)
        similarity = (views @ views.T / temperature).masked_fill(rows[:, None] == rows, float("-inf"))
        return nn.functional.cross_entropy(similarity, rows.roll(first.shape[0]))


__all__ = ["explained_variance", "masked_mse", "nt_xent"]
