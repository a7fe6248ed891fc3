"""What a generator has to beat: noise on weights and averages of weights, on flat weights of aligned anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from sane_hf.generation.draws import check_sampling, choose, choose_distinct, normal_, spread


def isotropic_noise(anchors: Tensor, num_samples: int, distance: float | Tensor, generator: torch.Generator) -> Tensor:
    """Anchors plus noise in a uniformly random direction, exactly as far as asked.

    Args:
        anchors: Flat weights (A, N).
        num_samples: Number of samples S; each starts from an anchor drawn with replacement.
        distance: Euclidean distance from the anchor, one number or one per sample (S,).
        generator: Source of all randomness.

    Returns:
        Flat weights (S, N), of the dtype and device of the anchors.

    Raises:
        ValueError: No anchor, values that are not finite, negative distances.

    Example:
        >>> anchors = torch.zeros(1, 100)
        >>> round(isotropic_noise(anchors, 1, 2.5, torch.Generator().manual_seed(0)).norm().item(), 5)
        2.5
    """
    check_sampling(anchors, num_samples, 0.0, ndim=2)
    return _noise(anchors, num_samples, distance, generator, None)


def shaped_noise(
    anchors: Tensor,
    num_samples: int,
    distance: float | Tensor,
    generator: torch.Generator,
    scale: Tensor | None = None,
) -> Tensor:
    """Anchors plus noise as strong on each weight as the anchors differ there, exactly as far as asked.

    Args:
        anchors: Aligned flat weights (A, N), at least two.
        num_samples: As in `isotropic_noise`.
        distance: As in `isotropic_noise`.
        generator: As in `isotropic_noise`.
        scale: (N,) another shape of the noise, such as the tolerance of each weight.

    Returns:
        Flat weights (S, N).

    Raises:
        ValueError: As in `isotropic_noise`, or anchors that do not differ, which shape no noise.
    """
    check_sampling(anchors, num_samples, 0.0, ndim=2)
    scale = spread(anchors) if scale is None else scale
    if not scale.any():
        raise ValueError("shaped noise follows how the anchors differ: pass at least two different anchors.")
    return _noise(anchors, num_samples, distance, generator, scale)


def _noise(
    anchors: Tensor,
    num_samples: int,
    distance: float | Tensor,
    generator: torch.Generator,
    scale: Tensor | None,
) -> Tensor:
    distances = _distances(distance, num_samples, anchors.device)
    chosen = choose(len(anchors), (num_samples,), generator, anchors.device)
    noise = normal_(anchors.new_empty(num_samples, anchors.shape[1]), generator)
    if scale is not None:
        noise *= scale
    length = noise.to(torch.float64).norm(dim=1)
    noise *= (distances / length).to(noise.dtype)[:, None]
    return noise.add_(anchors[chosen])


def weight_average(anchors: Tensor, num_samples: int, k: int, generator: torch.Generator) -> Tensor:
    """Averages of k different anchors with random weights.

    Args:
        anchors: Aligned flat weights (A, N).
        num_samples: Number of samples S.
        k: Anchors per average, from 2 to A; their weights are uniform on the simplex.
        generator: Source of all randomness.

    Returns:
        Flat weights (S, N), of the dtype and device of the anchors.

    Raises:
        ValueError: `k` is not between 2 and the number of anchors, or anchors are not finite.

    Example:
        >>> anchors = torch.eye(3)
        >>> round(weight_average(anchors, 1, 3, torch.Generator().manual_seed(0)).sum().item(), 5)
        1.0
    """
    check_sampling(anchors, num_samples, 0.0, ndim=2)
    if not 2 <= k <= len(anchors):
        raise ValueError(f"k must be between 2 and the number of anchors, {len(anchors)}; found {k}.")
    chosen = choose_distinct(len(anchors), num_samples, k, generator, anchors.device)
    draws = torch.rand(num_samples, k, generator=generator, device=generator.device, dtype=torch.float64)
    shares = -(1 - draws).log()  # exponential; normalised they are uniform on the simplex
    shares = (shares / shares.sum(1, keepdim=True)).to(anchors.device)
    mixture = torch.zeros(num_samples, len(anchors), dtype=torch.float64, device=anchors.device)
    return (mixture.scatter_(1, chosen, shares) @ anchors.to(torch.float64)).to(anchors.dtype)


def average_at_distance(
    anchors: Tensor, num_samples: int, distance: float | Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Averages of anchors that are exactly as far from the nearest anchor as asked, where that can be.

    Each sample goes from one anchor towards the mean of k, as far as it takes; k is the smallest that reaches, over a
    random order of the anchors. Between two anchors one gets no farther than half their distance, with k equally
    distant ones sqrt((k-1)/(2k)) of it: .5, .58, .61, ... and never beyond .71. A sample that cannot reach its
    distance is put as far as it gets, which favours averaging in a comparison.

    Args:
        anchors: Aligned flat weights (A, N), at least two.
        num_samples: Number of samples S.
        distance: Euclidean distance from the nearest of all anchors, one number or one per sample (S,).
        generator: Source of all randomness.

    Returns:
        Flat weights (S, N), and the distances that were reached (S,) of float64.

    Raises:
        ValueError: Fewer than two anchors, anchors that are not finite, negative distances.

    Example:
        >>> anchors = 2 * torch.eye(4)  # sqrt(8) = 2.83 apart
        >>> flat, reached = average_at_distance(anchors, 2, torch.tensor([1.0, 9.0]), torch.Generator().manual_seed(0))
        >>> [round(distance, 3) for distance in reached.tolist()]
        [1.0, 1.732]
        >>> flat[1]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check_sampling(anchors, num_samples, 0.0, ndim=2)
    count = len(anchors)
    if count < 2:
        raise ValueError("averaging needs two anchors; one was given.")
    wanted = _distances(distance, num_samples, anchors.device)
    centred = anchors.to(torch.float64)
    centred = centred - centred.mean(0)
    gram = centred @ centred.T
    order = choose_distinct(count, num_samples, count, generator, anchors.device)
    place = order.argsort(1)  # position of every anchor in the order of each sample
    start = torch.nn.functional.one_hot(order[:, 0], count).to(torch.float64)
    shares, reached = start.clone(), torch.zeros_like(wanted)
    for k in range(2, count + 1):
        short = (reached < wanted * (1 - 1e-9)).nonzero()[:, 0]
        if not len(short):
            break
        goal = (place[short] < k).to(torch.float64) / k
        share, far = _walk(gram, start[short], goal, wanted[short])
        farther = far > reached[short]
        shares[short[farther]] = share[farther]
        reached[short[farther]] = far[farther]
    return (shares @ anchors.to(torch.float64)).to(anchors.dtype), reached


def _walk(gram: Tensor, start: Tensor, goal: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Goes from one mixture of anchors towards another until the nearest anchor is `wanted` away, or farthest."""
    steps = torch.linspace(0, 1, 65, dtype=torch.float64, device=gram.device)
    path = torch.lerp(start[:, None], goal[:, None], steps[:, None])  # (S, steps, A)
    far = _nearest_anchor(gram, path)
    over = far >= wanted[:, None]
    farthest = far.argmax(1)
    stop = torch.where(over.any(1), over.to(torch.int64).argmax(1), farthest)
    high, low = steps[stop], steps[(stop - 1).clamp_min(0)]
    for _ in range(60):  # bisection down to the last bit, where the wanted distance lies between two steps
        middle = (low + high) / 2
        beyond = _nearest_anchor(gram, torch.lerp(start, goal, middle[:, None])) >= wanted
        high, low = torch.where(beyond, middle, high), torch.where(beyond, low, middle)
    share = torch.lerp(start, goal, torch.where(over.any(1), high, steps[farthest])[:, None])
    return share, _nearest_anchor(gram, share)


def _nearest_anchor(gram: Tensor, shares: Tensor) -> Tensor:
    """Distance of mixtures (..., A) to the nearest anchor, from the inner products of the anchors."""
    towards = shares @ gram
    own = (towards * shares).sum(-1, keepdim=True)
    return (own - 2 * towards + gram.diagonal()).clamp_min(0).amin(-1).sqrt()


def _distances(distance: float | Tensor, num_samples: int, device: torch.device) -> Tensor:
    distances = torch.as_tensor(distance, dtype=torch.float64, device=device)
    if distances.ndim > 1 or (distances.ndim == 1 and len(distances) != num_samples):
        raise ValueError(
            f"distance must be one number or one per sample, ({num_samples},); found shape {tuple(distances.shape)}."
        )
    if not (torch.isfinite(distances) & (distances >= 0)).all():
        raise ValueError("distances must be finite numbers from 0.")
    return distances.expand(num_samples)
