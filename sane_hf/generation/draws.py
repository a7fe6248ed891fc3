"""Random draws that all samplers share, and the checks of their arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_sampling(anchors: Tensor, num_samples: int, bandwidth: float, ndim: int = 3) -> None:
    """Raises a ValueError naming the argument that a sampler cannot work with."""
    shape = "(A, T, Z)" if ndim == 3 else "(A, N)"
    if anchors.ndim != ndim or not anchors.is_floating_point():
        raise ValueError(f"anchors must be floating, {shape}; found {anchors.dtype} of shape {tuple(anchors.shape)}.")
    if len(anchors) == 0:
        raise ValueError("anchors is empty; a sampler needs at least one anchor to start from.")
    # The sum is cheap and finite unless a value is not (or the sum overflows); only then is each value looked at.
    if not torch.isfinite(anchors.sum()) and not torch.isfinite(anchors).all():
        bad = int((~torch.isfinite(anchors)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"anchor {bad} has values that are not finite; leave it out.")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0:
        raise ValueError(f"num_samples must be an integer from 0; found {num_samples!r}.")
    if not (math.isfinite(bandwidth) and bandwidth >= 0):
        raise ValueError(f"bandwidth must be a finite number from 0; found {bandwidth!r}.")


def kernel_scale(anchors: Tensor, bandwidth: float, scale: Tensor | None) -> Tensor:
    """Standard deviation of the kernel on every latent number.

    Args:
        anchors: Latents (A, T, Z).
        bandwidth: Width of the kernel relative to the scale.
        scale: Spread of the latents, broadcast to (T, Z); that of the anchors when absent.

    Returns:
        `bandwidth` times the scale, (T, Z).

    Raises:
        ValueError: A single anchor, which has no spread, without a scale.
    """
    if scale is None:
        if len(anchors) == 1 and bandwidth > 0:
            raise ValueError(
                "the kernel is as wide as bandwidth times the spread of the anchors, and one anchor has none: pass "
                "more anchors, bandwidth=0, or scale= (such as the standard deviation of the training latents)."
            )
        scale = spread(anchors)
    return (bandwidth * scale.to(anchors)).expand(anchors.shape[1:])


def spread(anchors: Tensor) -> Tensor:
    """Standard deviation over the first axis (of the anchors at hand, so not corrected for their number).

    Anchor by anchor, which on large tensors is ten times faster than `Tensor.std` over an outer axis.
    """
    wide = torch.promote_types(anchors.dtype, torch.float32)
    mean, squares = anchors.mean(0, dtype=wide), torch.zeros(anchors.shape[1:], dtype=wide, device=anchors.device)
    for anchor in anchors:
        difference = anchor - mean
        squares.addcmul_(difference, difference)
    return squares.div_(len(anchors)).sqrt_().to(anchors.dtype)


def choose(high: int, size: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform integers below `high`, drawn on the generator's device."""
    return torch.randint(high, size, generator=generator, device=generator.device).to(device)


def choose_distinct(high: int, rows: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Rows of `count` different integers below `high`, uniform: (rows, count)."""
    draws = torch.rand(rows, high, generator=generator, device=generator.device, dtype=torch.float64)
    return draws.argsort(1)[:, :count].to(device)


def normal_(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fills a tensor with standard normal numbers, drawn on the generator's device."""
    if out.device == generator.device:
        return out.normal_(generator=generator)
    draws = torch.randn(out.shape, generator=generator, device=generator.device, dtype=out.dtype)
    return out.copy_(draws)
