"""Samples against what is simple, at equal distance and with equal selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sane_hf.generation.baselines import average_at_distance, isotropic_noise, shaped_noise
from sane_hf.generation.selection import select_best

Accuracy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a set of networks is worth after keeping the best by validation accuracy.

    Attributes:
        accuracy: Mean test accuracy of the kept networks, a fraction of 1.
        median: Median test accuracy of all networks.
        distance: Mean distance of the kept networks, in the unit of the distances given.
        kept: Indices of the kept networks (keep,), best first.
    """

    accuracy: float
    median: float
    distance: float
    kept: Tensor


def outcome(flat: Tensor, distances: Tensor, validation: Accuracy, test: Accuracy, keep: int) -> Outcome:
    """Evaluates networks and keeps the best by validation accuracy.

    Args:
        flat: Flat weights (S, N).
        distances: Distance of each (S,), for the record.
        validation: Function of flat weights (S, N) to validation accuracies (S,), fractions of 1.
        test: The same on test images; never used to select.
        keep: How many to keep.

    Returns:
        The outcome.

    Raises:
        ValueError: `keep` is not between 1 and S.
    """
    kept = select_best(validation(flat), keep).cpu()
    accuracies = test(flat).double().cpu()
    distance = distances.double().cpu()[kept].mean().item()
    return Outcome(accuracies[kept].mean().item(), accuracies.median().item(), distance, kept)


def compare_at_distance(
    anchors: Tensor,
    distances: Tensor,
    validation: Accuracy,
    test: Accuracy,
    keep: int,
    generator: torch.Generator,
    tolerance: Tensor | None = None,
) -> dict[str, Outcome]:
    """What noise and averaging reach at the distances of given samples, with the same number of draws and selection.

    Each sample has a peer of each kind at exactly its own distance; only averages beyond their largest distance are
    nearer (see `average_at_distance`; their `distance` shows it).

    Args:
        anchors: Aligned flat weights (A, N) of the networks that the samples were drawn from.
        distances: Euclidean distance of each sample to the nearest network (S,), as `nearest_distance` gives it.
        validation: Function of flat weights (S, N) to validation accuracies (S,), fractions of 1.
        test: The same on test images.
        keep: How many of the S peers to keep, as of the samples.
        generator: Source of all randomness.
        tolerance: (N,) tolerance of each weight (`behavior_tolerance`), where noise of that shape is wanted as well.

    Returns:
        Outcomes by name: ``noise`` (isotropic), ``shaped_noise`` (by the spread of the anchors), ``average``, and
        ``tolerant_noise`` where a tolerance is given.

    Raises:
        ValueError: As in the functions of `baselines`.

    Example:
        >>> anchors = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
        >>> near_first = lambda flat: 1 / (1 + torch.cdist(flat, anchors).amin(1))  # stands for an accuracy
        >>> found = compare_at_distance(
        ...     anchors, torch.full((5,), 1.5), near_first, near_first, 2, torch.Generator().manual_seed(1)
        ... )
        >>> {name: round(peer.accuracy, 3) for name, peer in found.items()}
        {'noise': 0.4, 'shaped_noise': 0.4, 'average': 0.4}
    """
    count = len(distances)
    averages, reached = average_at_distance(anchors, count, distances, generator)
    found = {
        "noise": outcome(isotropic_noise(anchors, count, distances, generator), distances, validation, test, keep),
        "shaped_noise": outcome(shaped_noise(anchors, count, distances, generator), distances, validation, test, keep),
        "average": outcome(averages, reached, validation, test, keep),
    }
    if tolerance is not None:
        tolerant = shaped_noise(anchors, count, distances, generator, tolerance)
        found["tolerant_noise"] = outcome(tolerant, distances, validation, test, keep)
    return found
