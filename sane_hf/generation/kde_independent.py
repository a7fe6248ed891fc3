"""Kernel density estimate per token: every token draws its own anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from sane_hf.generation.draws import check_sampling, choose, kernel_scale, normal_


def sample(
    anchors: Tensor, num_samples: int, bandwidth: float, generator: torch.Generator, scale: Tensor | None = None
) -> Tensor:
    """Draws latents token by token: each token comes from an anchor of its own, plus noise.

    What section 3.4 of the SANE paper says: one kernel density estimate per position of the sequence, sampled
    independently. A sample mixes as many anchors as it has tokens.

    Args:
        anchors: Latents (A, T, Z), floating, on any device.
        num_samples: Number of samples S.
        bandwidth: Width of the kernel, relative to the scale of each latent number.
        generator: Source of all randomness.
        scale: Spread of the latents, broadcast to (T, Z); the standard deviation over the anchors when absent.

    Returns:
        Latents (S, T, Z), of the dtype and device of the anchors.

    Raises:
        ValueError: No anchor, one anchor without a scale, values that are not finite, a negative number.

    Example:
        >>> anchors = torch.arange(3.0).view(3, 1, 1).expand(3, 8, 1)
        >>> tokens = sample(anchors, 1, 0.0, torch.Generator().manual_seed(0)).flatten()
        >>> tokens.unique().tolist()  # all three anchors in one sample
        [0.0, 1.0, 2.0]
    """
    check_sampling(anchors, num_samples, bandwidth)
    deviation = kernel_scale(anchors, bandwidth, scale)
    tokens = torch.arange(anchors.shape[1], device=anchors.device)
    chosen = choose(len(anchors), (num_samples, len(tokens)), generator, anchors.device)
    samples = anchors.new_empty(num_samples, *anchors.shape[1:])
    for out, anchor in zip(samples, chosen, strict=True):
        normal_(out, generator).mul_(deviation).add_(anchors[anchor, tokens])
    return samples
