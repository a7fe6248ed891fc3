"""How far networks are from others: Euclidean distances of flat weights, exact where they are small.

Compare aligned networks only; unaligned ones are far apart for no reason. Distances are raw; divide by
`independent_distance` to have them relative to independently trained networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**24  # float64 numbers of one operand in memory at once, 128 MiB


def nearest_distance(samples: Tensor, networks: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of every sample to the nearest of a set of networks.

    Args:
        samples: Flat weights (S, N).
        networks: Flat weights (M, N), M from 1.

    Returns:
        Distances (S,) of float64, and which network is the nearest (S,) of int64. The distance is computed from the
        difference of the two, so that a copy has distance 0.

    Raises:
        ValueError: No network, or widths that differ.

    Example:
        >>> nearest_distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[9.0, 9.0], [0.0, 0.0]]))
        (tensor([5.], dtype=torch.float64), tensor([1]))
    """
    _check(samples, networks)
    best = torch.full((len(samples),), float("inf"), dtype=torch.float64, device=samples.device)
    which = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    step = max(1, _CHUNK // max(1, networks.shape[1]))
    for start in range(0, len(networks), step):
        squared = _squared(samples, networks[start : start + step])
        least, index = squared.min(1)
        closer = least < best
        best = torch.where(closer, least, best)
        which = torch.where(closer, index + start, which)
    return torch.stack([_exact(s, networks[i]) for s, i in zip(samples, which.tolist(), strict=True)]), which


def pairwise_distance(samples: Tensor) -> Tensor:
    """Mean distance between two different samples: their diversity.

    Args:
        samples: Flat weights (S, N), S from 2.

    Returns:
        A scalar of float64.

    Raises:
        ValueError: Fewer than two samples.
    """
    _check(samples, samples)
    if len(samples) < 2:
        raise ValueError("diversity needs at least two samples; one was given.")
    return independent_distance(samples, range(len(samples)))


def independent_distance(networks: Tensor, model_ids: Sequence[Any]) -> Tensor:
    """Mean distance between networks of different models: the unit in which distances are given.

    Args:
        networks: Aligned flat weights (M, N), such as the last checkpoint of every training model.
        model_ids: Model of each; pairs of one model do not count.

    Returns:
        A scalar of float64.

    Raises:
        ValueError: Lengths differ, or all networks belong to one model.

    Example:
        >>> independent_distance(torch.tensor([[0.0], [1.0], [4.0]]), ["a", "a", "b"])  # mean of 4 and 3
        tensor(3.5000, dtype=torch.float64)
    """
    if len(model_ids) != len(networks):
        raise ValueError(f"one model id per network is needed; found {len(model_ids)} for {len(networks)} networks.")
    _check(networks, networks)
    _, numbers = np.unique(np.array([str(model) for model in model_ids]), return_inverse=True)
    model = torch.from_numpy(numbers.reshape(-1)).to(networks.device)
    total = torch.zeros((), dtype=torch.float64, device=networks.device)
    pairs, step = 0, max(1, _CHUNK // max(1, networks.shape[1], len(networks)))
    for start in range(0, len(networks), step):
        rows = slice(start, start + step)
        other = model[rows, None] != model[None, :]
        total += _squared(networks[rows], networks).clamp_min(0).sqrt()[other].sum()
        pairs += int(other.sum())
    if pairs == 0:
        raise ValueError("all networks belong to one model; the distance of independent ones needs two models.")
    return total / pairs


def _squared(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances (L, R) in float64, by a matrix product over chunks of the weights."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    step = max(1, _CHUNK // max(1, len(left), len(right)))
    for start in range(0, left.shape[1], step):
        a = left[:, start : start + step].to(torch.float64)
        b = right[:, start : start + step].to(torch.float64)
        centre = b.mean(0)  # distances do not change, and the numbers that cancel get smaller
        a, b = a - centre, b - centre
        total += a.square().sum(1)[:, None] + b.square().sum(1)
        total.addmm_(a, b.T, alpha=-2)
    return total


def _exact(left: Tensor, right: Tensor) -> Tensor:
    return (left.to(torch.float64) - right.to(torch.float64)).norm()


def _check(samples: Tensor, networks: Tensor) -> None:
    if samples.ndim != 2 or networks.ndim != 2 or samples.shape[1] != networks.shape[1] or not len(networks):
        raise ValueError(
            f"distances need flat weights (S, N) and (M, N) of one architecture, M from 1; found "
            f"{tuple(samples.shape)} and {tuple(networks.shape)}."
        )
