"""Statistics of the weights of each layer over the networks of a training split, gathered in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layout_sane import TokenLayout

# A layer whose spread is below this fraction of its mean is constant as far as float32 can tell: it is only shifted.
_LEAST_SPREAD = 1e-6


class LayerStatistics:
    """Running statistics of each layer of one architecture. Padding has no part in them.

    All sums are float64 and are merged by Chan's formula, so that the result does not depend on how the networks come
    in chunks.

    Args:
        num_layers (`int`): Layers of the layout (L).
    """

    def __init__(self, num_layers: int):
        self.count = 0  # networks
        self.mean = torch.zeros(num_layers, dtype=torch.float64)  # mean over networks of the layer's mean weight
        self.between = torch.zeros(num_layers, dtype=torch.float64)  # squared deviations of those means, summed
        self.within = torch.zeros(num_layers, dtype=torch.float64)  # mean over networks of the layer's variance
        self.square = torch.zeros(num_layers, dtype=torch.float64)  # mean over networks of its squared l2 norm
        self.low = torch.full((num_layers,), torch.inf, dtype=torch.float64)
        self.high = torch.full((num_layers,), -torch.inf, dtype=torch.float64)

    def update(self, flat: Tensor, layout: TokenLayout) -> LayerStatistics:
        """Add networks: flat vectors of shape `(B, N)`. Returns itself."""
        batch = LayerStatistics(len(layout.layers))
        batch.count = len(flat)
        for layer in layout.layers:
            if not layer.num_weights:
                continue
            weights = flat[:, layer.flat_start : layer.flat_stop].double()
            index, size = layer.index, layer.num_weights
            mean = weights.mean(1)
            variance = weights.var(1) if size > 1 else torch.zeros_like(mean)
            batch.mean[index] = mean.mean()
            batch.between[index] = (mean - mean.mean()).square().sum()
            batch.within[index] = variance.mean()
            batch.square[index] = weights.square().sum(1).mean()
            batch.low[index], batch.high[index] = weights.aminmax()
        return self.merge(batch)

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Add the networks that another has seen. Returns itself."""
        count = self.count + other.count
        if not count:
            return self
        share = other.count / count
        step = other.mean - self.mean
        self.between += other.between + step.square() * (self.count * share)
        self.mean += step * share
        self.within += (other.within - self.within) * share
        self.square += (other.square - self.square) * share
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.count = count
        return self

    def shift_and_scale(self, normalization: str) -> Tensor:
        """What to subtract from the weights of each layer, and what to divide them by then.

        Args:
            normalization (`str`): `"standardize"`: the mean of the layer and the root of its mean variance within a
                network (across networks where it is constant within, as a layer of one weight is). `"minmax"`: maps
                the range of the layer to [-1, 1]. `"l2"`: divides by the root mean square of the layer's l2 norm.

        Returns:
            `Tensor` of shape `(2, L)`, float64. The scale of a layer without spread is 1, never 0.
        """
        if normalization == "standardize":
            shift, scale = self.mean, self.within.sqrt()
            between = (self.between / max(self.count - 1, 1)).sqrt()
            scale = torch.where(scale > _LEAST_SPREAD * shift.abs(), scale, between)
        elif normalization == "minmax":
            shift, scale = (self.high + self.low) / 2, (self.high - self.low) / 2
        else:
            shift, scale = torch.zeros_like(self.square), self.square.sqrt()
        spread = torch.isfinite(scale) & (scale > _LEAST_SPREAD * shift.abs())  # infinite: a layer without weights
        return torch.stack([torch.nan_to_num(shift), torch.where(spread, scale, 1.0)])


class LayerNormalizer:
    """Base of [`WeightTokenizer`]: normalises tokens and flat vectors with the statistics of their layers."""

    normalization: str
    statistics: dict[str, Tensor]

    def shift_and_scale(self, layout: TokenLayout) -> Tensor:
        """What to subtract from the weights of each layer, and what to divide them by then.

        Returns:
            `Tensor` of shape `(2, L)`, float64.

        Raises:
            `ValueError`: If `fit` has not seen the architecture.
        """
        if self.normalization == "none":
            return torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(1, len(layout.layers))
        found = self.statistics.get(layout.fingerprint)
        if found is None or found.shape[1] != len(layout.layers):
            raise ValueError(
                f"There are no {self.normalization!r} statistics for layer {layout.layers[0].name!r} and the "
                f"{len(layout.layers) - 1} others of this architecture: fit has "
                f"{'not seen it' if self.statistics else 'not been called'}. Call fit on the networks of the training "
                "split, of every architecture to be used, or use normalization='none'."
            )
        return found

    def normalize(self, tokens: Tensor, layout: TokenLayout, start: int = 0) -> Tensor:
        """Normalise tokens with the statistics of their layers. Differentiable; padding becomes 0.

        Args:
            tokens (`Tensor` of shape `(B, T, D)`): Tokens that hold weights.
            layout (`TokenLayout`): Their architecture.
            start (`int`): The token of the network that comes first.

        Returns:
            `Tensor` of shape `(B, T, D)`; `tokens` itself if `normalization` is `"none"`.

        Raises:
            `ValueError`: If `fit` has not seen the architecture.
        """
        if self.normalization == "none":
            return tokens
        shift, scale = self._of_tokens(layout, start, tokens)
        return torch.where(layout.mask(start, tokens.shape[1]).to(tokens.device), (tokens - shift) / scale, 0)

    def denormalize(self, tokens: Tensor, layout: TokenLayout, start: int = 0) -> Tensor:
        """Inverse of [`LayerNormalizer.normalize`], up to rounding. Differentiable; padding becomes 0."""
        if self.normalization == "none":
            return tokens
        shift, scale = self._of_tokens(layout, start, tokens)
        return torch.where(layout.mask(start, tokens.shape[1]).to(tokens.device), tokens * scale + shift, 0)

    def flat_statistics(self, layout: TokenLayout, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Shift and scale of every weight, to normalise flat vectors: `(flat - shift) / scale`.

        Args:
            layout (`TokenLayout`): The architecture.
            dtype (`torch.dtype`): Of the result.

        Returns:
            `tuple[Tensor, Tensor]`, both of shape `(N,)`; zeros and ones if `normalization` is `"none"`.

        Raises:
            `ValueError`: If `fit` has not seen the architecture.
        """
        sizes = torch.tensor([layer.num_weights for layer in layout.layers])
        shift, scale = self.shift_and_scale(layout).to(dtype).repeat_interleave(sizes, 1)
        return shift, scale

    def _of_tokens(self, layout: TokenLayout, start: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        layers = layout.layer_of_token(start, tokens.shape[1])
        shift, scale = self.shift_and_scale(layout)[:, layers, None].to(tokens)
        return shift, scale


def gather(
    waiting: Sequence[tuple[int, Mapping[str, Tensor]]], layout: TokenLayout, statistics: LayerStatistics
) -> None:
    """Add networks to the statistics of their architecture."""
    if waiting:
        with torch.no_grad():
            flat = layout.flatten_many([weights for _, weights in waiting])
        check_finite(flat.sum(), layout, waiting)
        statistics.update(flat, layout)


def check_finite(
    total: Tensor,
    layout: TokenLayout,
    networks: Sequence[tuple[int, Mapping[str, Tensor]]],
    start: int | None = None,
    length: int | None = None,
) -> None:
    """Raise a `ValueError` that names the first weight of a window that is not finite, if the sum of all is not."""
    if torch.isfinite(total):
        return  # the sum of finite numbers may overflow, too: only then are the tensors searched
    first, last = layout.window(start, length)
    for number, weights in networks:
        for layer in layout.layers_between(first, last):
            for name in (layer.name, layer.bias):
                if name is None or not (bad := ~torch.isfinite(weights[name])).any():
                    continue
                index = tuple(bad.nonzero()[0].tolist())
                raise ValueError(
                    f"Tensor {name!r} of network {number} has {int(bad.sum())} of {bad.numel()} weights that are not "
                    f"finite, the first at {index}: {weights[name][index].item()}. Leave this network out."
                )
