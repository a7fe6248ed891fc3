"""Readouts: one vector per network from its sequence of latents.

A readout takes latents (B, T, Z), the mask of real tokens (B, T) and each token's layer (B, T), and gives (B, F). To
add one, write the function and its line in `READOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Readout = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean(latents: Tensor, attention_mask: Tensor, layers: Tensor) -> Tensor:
    """Mean over the real tokens (the paper's readout): (B, Z), for any architecture.

    Args:
        latents: (B, T, Z) float.
        attention_mask: (B, T) bool, false on padded tokens.
        layers: (B, T) long, the layer of each token (not used).

    Returns:
        (B, Z).

    Example:
        >>> z = torch.tensor([[[1.0], [3.0], [99.0]]])
        >>> mean(z, torch.tensor([[True, True, False]]), torch.tensor([[0, 1, 0]]))
        tensor([[2.]])
    """
    weights = attention_mask.to(latents.dtype)[..., None]
    return (latents * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def layer_mean(latents: Tensor, attention_mask: Tensor, layers: Tensor) -> Tensor:
    """Mean over the tokens of every layer, concatenated in layer order: (B, L * Z), one size per architecture.

    Args:
        latents: (B, T, Z) float.
        attention_mask: (B, T) bool, false on padded tokens.
        layers: (B, T) long, the layer of each token.

    Returns:
        (B, L * Z).

    Raises:
        ValueError: if the networks of the batch have different layers.

    Example:
        >>> z = torch.tensor([[[1.0], [3.0], [5.0]]])
        >>> layer_mean(z, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 0, 1]]))
        tensor([[2., 5.]])
    """
    return per_layer_mean(latents, attention_mask, layers).flatten(1)


def layer_mean_std(latents: Tensor, attention_mask: Tensor, layers: Tensor) -> Tensor:
    """Mean and standard deviation over the tokens of every layer, concatenated: (B, 2 * L * Z).

    Args:
        latents: (B, T, Z) float.
        attention_mask: (B, T) bool, false on padded tokens.
        layers: (B, T) long, the layer of each token.

    Returns:
        (B, 2 * L * Z), all means before all deviations.

    Raises:
        ValueError: if the networks of the batch have different layers.

    Example:
        >>> z = torch.tensor([[[1.0], [3.0], [5.0]]])
        >>> layer_mean_std(z, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 0, 1]]))
        tensor([[2., 5., 1., 0.]])
    """
    means = per_layer_mean(latents, attention_mask, layers)
    centred = latents - means.gather(1, _layer_index(attention_mask, layers)[..., None].expand_as(latents))
    variances = per_layer_mean(centred.square(), attention_mask, layers)
    return torch.cat([means.flatten(1), variances.sqrt().flatten(1)], dim=1)


def per_layer_mean(latents: Tensor, attention_mask: Tensor, layers: Tensor) -> Tensor:
    """The layer-wise embedding: mean over the tokens of every layer, (B, L, Z).

    Args:
        latents: (B, T, Z) float.
        attention_mask: (B, T) bool, false on padded tokens.
        layers: (B, T) long, the layer of each token.

    Returns:
        (B, L, Z), layers in the order of their numbers.

    Raises:
        ValueError: if the networks of the batch have different layers.

    Example:
        >>> z = torch.tensor([[[1.0], [3.0], [5.0]]])
        >>> per_layer_mean(z, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 0, 7]])).shape
        torch.Size([1, 2, 1])
    """
    index = _layer_index(attention_mask, layers)
    weights = attention_mask.to(latents.dtype)
    count = int(index.max()) + 1
    sums = latents.new_zeros(len(latents), count, latents.shape[-1])
    sums.scatter_add_(1, index[..., None].expand_as(latents), latents * weights[..., None])
    tokens = latents.new_zeros(len(latents), count).scatter_add_(1, index, weights)
    if (tokens == 0).any():
        raise ValueError(
            "the networks of this batch have different layers, so their per-layer embeddings differ in size: "
            'embed one architecture at a time, or use readout="mean"'
        )
    return sums / tokens[..., None]


def _layer_index(attention_mask: Tensor, layers: Tensor) -> Tensor:
    """(B, T) layer numbers renumbered to 0..L-1; padded tokens, which weigh nothing, point at layer 0."""
    present = layers[attention_mask].unique()
    index = torch.searchsorted(present, layers.contiguous())
    return index.masked_fill(~attention_mask, 0)


READOUTS: dict[str, Readout] = {"mean": mean, "layer_mean": layer_mean, "layer_mean_std": layer_mean_std}
