"""How far each number may move before the networks act otherwise: the shape of a kernel that respects behaviour."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sane_hf.generation.draws import spread

FLOOR = 0.01  # of the median information: keeps numbers without effect from taking all of the noise


def behavior_tolerance(
    anchors: Tensor, answers: Callable[[Tensor], Tensor], generator: torch.Generator, probes: int = 8
) -> Tensor:
    """Tolerance of what networks answer to changes of each latent number (or weight), as a kernel's scale.

    A step z moves the answers p by a Kullback-Leibler divergence of about `z F z / 2`, F the Fisher information. The
    tolerance is `1 / sqrt(F)` of each number, F averaged over anchors and estimated with random signs. Images are
    needed, labels are not.

    Args:
        anchors: (A, *shape) float, latents or weights; what never varies among them has no tolerance.
        answers: function of such a batch to log probabilities (A, m, classes) on m images, differentiable.
        generator: source of the random signs.
        probes: estimates averaged.

    Returns:
        (*shape), scaled to the norm of the anchors' standard deviation, so that a bandwidth means the same.

    Raises:
        ValueError: the answers do not depend on the anchors.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> only_first = lambda z: torch.stack([z[:, :1], -z[:, :1]], -1).log_softmax(-1)
        >>> scale = behavior_tolerance(anchors, only_first, torch.Generator().manual_seed(0))
        >>> bool(scale[1] > 5 * scale[0])
        True
    """
    information = torch.zeros_like(anchors[0])
    for _ in range(probes):
        moved = anchors.detach().clone().requires_grad_()
        log_probabilities = answers(moved)
        signs = torch.randint(0, 2, log_probabilities.shape, generator=generator, device=generator.device) * 2.0 - 1
        weight = (log_probabilities.detach() / 2).exp() * signs.to(anchors)
        (gradient,) = torch.autograd.grad((log_probabilities * weight).sum(), moved)
        information += gradient.square().mean(0) / (probes * log_probabilities.shape[1])
    deviation = spread(anchors)
    used = deviation > 0
    if not information[used].any():
        raise ValueError(
            "the answers do not depend on the anchors: check that the function runs the networks it is given"
        )
    median = information[used & (information > 0)].median()
    tolerance = torch.where(used, (information / median + FLOOR).rsqrt(), 0.0)
    return tolerance * (deviation.norm() / tolerance.norm())
