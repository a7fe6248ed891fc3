"""Kernel density estimate with one anchor for all tokens of a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from sane_hf.generation.draws import check_sampling, choose, kernel_scale, normal_


def sample(
    anchors: Tensor, num_samples: int, bandwidth: float, generator: torch.Generator, scale: Tensor | None = None
) -> Tensor:
    """Draws latents near one anchor each: the anchor's whole sequence plus noise on every latent number.

    A Gaussian kernel density estimate of the joint latent, standardised in each dimension. The released code of SANE
    comes down to this choice of anchor: its fixed seed makes every token take the same one (and, unlike here, the same
    noise vector).

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
        >>> anchors = torch.tensor([[[0.0], [0.0]], [[1.0], [1.0]]])
        >>> sample(anchors, 3, 0.0, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2, 1])
    """
    check_sampling(anchors, num_samples, bandwidth)
    deviation = kernel_scale(anchors, bandwidth, scale)
    chosen = choose(len(anchors), (num_samples,), generator, anchors.device)
    samples = anchors.new_empty(num_samples, *anchors.shape[1:])
    for out, anchor in zip(samples, chosen.tolist(), strict=True):
        normal_(out, generator).mul_(deviation).add_(anchors[anchor])
    return samples
