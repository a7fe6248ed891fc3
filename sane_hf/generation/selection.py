"""Keep the best of several samples."""

from __future__ import annotations

import torch
from torch import Tensor


def select_best(scores: Tensor, keep: int) -> Tensor:
    """Picks the samples of the highest score (the SUB variant of the SANE paper, scores being validation accuracies).

    Args:
        scores: One score per sample (S,); a score that is not a number comes last.
        keep: How many to keep.

    Returns:
        Indices (keep,) of int64, best first; of equal scores the first sample wins.

    Raises:
        ValueError: `keep` is not between 1 and the number of samples.

    Example:
        >>> select_best(torch.tensor([0.3, 0.9, 0.9, 0.1]), 2)
        tensor([1, 2])
    """
    if scores.ndim != 1:
        raise ValueError(f"scores must be one number per sample, (S,); found shape {tuple(scores.shape)}.")
    if not 1 <= keep <= len(scores):
        raise ValueError(f"keep must be between 1 and the number of samples, {len(scores)}; found {keep}.")
    ranked = torch.nan_to_num(scores.to(torch.float64), nan=-float("inf"))
    return ranked.argsort(descending=True, stable=True)[:keep]
