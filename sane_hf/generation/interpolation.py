"""Points on the straight line between two anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from sane_hf.generation.draws import check_sampling, choose_distinct


def sample(
    anchors: Tensor, num_samples: int, bandwidth: float, generator: torch.Generator, scale: Tensor | None = None
) -> Tensor:
    """Draws pairs of different anchors and goes a fraction of the way from the first to the second.

    Args:
        anchors: Latents (A, T, Z) of at least two anchors, floating, on any device.
        num_samples: Number of samples S.
        bandwidth: The fraction of the way, from 0 (the first anchor) to 1 (the second); .5 is farthest from both.
        generator: Source of all randomness.
        scale: Not needed; the distance of the two anchors is the scale.

    Returns:
        Latents (S, T, Z), of the dtype and device of the anchors.

    Raises:
        ValueError: Fewer than two anchors, values that are not finite, a fraction outside 0 to 1.

    Example:
        >>> anchors = torch.tensor([[[0.0, 0.0]], [[1.0, 4.0]]])
        >>> sample(anchors, 1, 0.5, torch.Generator().manual_seed(0))
        tensor([[[0.5000, 2.0000]]])
    """
    check_sampling(anchors, num_samples, bandwidth)
    if len(anchors) < 2:
        raise ValueError("interpolation needs two anchors; one was given.")
    if bandwidth > 1:
        raise ValueError(f"bandwidth is the fraction of the way between two anchors, 0 to 1; found {bandwidth!r}.")
    pairs = choose_distinct(len(anchors), num_samples, 2, generator, anchors.device)
    samples = anchors.new_empty(num_samples, *anchors.shape[1:])
    for out, (first, second) in zip(samples, pairs.tolist(), strict=True):
        torch.lerp(anchors[first], anchors[second], bandwidth, out=out)
    return samples
