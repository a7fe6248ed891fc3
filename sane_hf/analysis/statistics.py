"""Weight statistics per layer: the baseline that an embedding has to beat (Unterthiner et al. 2020).

Computed on real weights only: the original's LayerQuintiles counts the zeros of padded tokens, which ties the figures
to the token size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sane_hf.modeling.layout_sane import TokenLayout

QUANTILES = (0, 25, 50, 75, 100)
STATISTICS = ("mean", "variance", *(f"quantile_{quantile}" for quantile in QUANTILES))
EPSILON = 1e-8  # variance below which weights count as constant, in squared units of a weight
BLOCK = 1 << 24  # weights sorted at once


def weight_statistics(flat: Tensor, layout: TokenLayout, log: bool = False) -> Tensor:
    """Mean, variance and quantiles 0/25/50/75/100 of the weights and of the biases of every layer.

    Args:
        flat: (B, N) float, flat weights of B networks of one architecture, in layout order.
        layout: the layout of that architecture.
        log: give log variance, and asinh(value / standard deviation) for mean and quantiles. Linear probes dislike
            raw variances, which span decades; this form keeps every number near 1.

    Returns:
        (B, F) float32 with F = 7 * number of tensors, named by `weight_statistics_names`.

    Raises:
        ValueError: if `flat` does not fit the layout.

    Example:
        >>> layout = TokenLayout.plan({"fc.weight": (1, 4), "fc.bias": (1,)}, token_size=5)
        >>> weight_statistics(torch.tensor([[0.0, 1.0, 2.0, 5.0, 7.0]]), layout)[0, :7].tolist()
        [2.0, 3.5, 0.0, 0.75, 1.5, 2.75, 5.0]
    """
    if flat.ndim != 2 or flat.shape[1] != layout.num_weights:
        raise ValueError(
            f"flat weights have shape {tuple(flat.shape)} where the layout needs (networks, {layout.num_weights})"
        )
    weights = flat.detach().cpu().numpy()
    tensors = list(_tensors(layout))
    features = np.empty((len(weights), len(STATISTICS) * len(tensors)), np.float32)
    for number, (_, columns) in enumerate(tensors):
        into = features[:, number * len(STATISTICS) : (number + 1) * len(STATISTICS)]
        size = columns.stop - columns.start
        step = max(1, BLOCK // size)
        for start in range(0, len(weights), step):
            block = slice(start, start + step)
            into[block] = _statistics(weights[block, columns], log)
    return torch.from_numpy(features)


def weight_statistics_names(layout: TokenLayout, log: bool = False) -> list[str]:
    """Names of the columns of `weight_statistics`, such as "conv1.weight/variance".

    Args:
        layout: the layout of the architecture.
        log: as given to `weight_statistics`.

    Returns:
        F names.

    Example:
        >>> layout = TokenLayout.plan({"fc.weight": (1, 4), "fc.bias": (1,)}, token_size=5)
        >>> weight_statistics_names(layout)[:2], weight_statistics_names(layout, log=True)[7:9]
        (['fc.weight/mean', 'fc.weight/variance'], ['fc.bias/asinh_mean', 'fc.bias/log_variance'])
    """
    names = [("log_" if name == "variance" else "asinh_") + name for name in STATISTICS] if log else STATISTICS
    return [f"{tensor}/{name}" for tensor, _ in _tensors(layout) for name in names]


def _tensors(layout: TokenLayout) -> Iterator[tuple[str, slice]]:
    """Every tokenised tensor that holds weights, and where it lies in the flat vector."""
    return ((name, slice(start, stop)) for name, (start, stop) in layout.slices.items() if stop > start)


def _statistics(values: np.ndarray, log: bool) -> np.ndarray:
    """(B, n) weights to (B, 7) statistics."""
    values = np.sort(values.astype(np.float32, copy=False), axis=1)  # sorted once for all quantiles
    mean = values.mean(axis=1, dtype=np.float64)
    variance = values.var(axis=1, dtype=np.float64)
    # Linear interpolation between neighbours, as numpy.quantile.
    place = np.asarray(QUANTILES) / 100 * (values.shape[1] - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, values.shape[1] - 1)
    quantiles = values[:, below] + (values[:, above] - values[:, below]) * (place - below)
    location = np.concatenate([mean[:, None], quantiles], axis=1)
    if log:
        location = np.arcsinh(location / np.sqrt(variance + EPSILON)[:, None])
        variance = np.log(variance + EPSILON)
    return np.concatenate([location[:, :1], variance[:, None], location[:, 1:]], axis=1)
