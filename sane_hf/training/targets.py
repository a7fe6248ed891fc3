"""What the self-supervised statistics head learns to predict: weight statistics per layer, behaviour per network.

None of it needs a label. Reconstruction alone leaves embeddings that are almost linear in the weights, while a
network's accuracy shows in second moments and in what the network does; these targets bring both into the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sane_hf.members import forward, stack_flat
from sane_hf.modeling import TokenLayout

LAYER_STATISTICS = 28  # for weights and for biases: seven log statistics, seven plain ones
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def layer_statistics(flat: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Log and plain statistics of every layer, weights and biases apart (after Unterthiner et al. 2020).

    Args:
        flat: (n, N) float, flat weight vectors of one architecture.
        layout: its layout.

    Returns:
        (n, L, 28) float; NaN where a layer has no bias.
    """
    statistics = torch.full((flat.shape[0], len(layout.layers), LAYER_STATISTICS), float("nan"))
    half = LAYER_STATISTICS // 2
    for number, layer in enumerate(layout.layers):
        for part, name in enumerate(name for name in (layer.name, layer.bias) if name is not None):
            statistics[:, number, part * half : (part + 1) * half] = _statistics(flat[:, slice(*layout.slices[name])])
    return statistics


def _statistics(values: torch.Tensor) -> torch.Tensor:
    """(n, m) weights to (n, 14): log deviation, asinh of mean and quantiles over it; variance, mean, quantiles."""
    std = values.std(dim=1, correction=0, keepdim=True)
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype), dim=1).T
    location = torch.cat([values.mean(dim=1, keepdim=True), quantiles], dim=1)
    # biases often start at exactly zero: the floor keeps logarithm and ratio finite
    return torch.cat([(std + 1e-4).log(), torch.asinh(location / (std + 1e-4)), std.square(), location], dim=1)


def behavior_statistics(logits: torch.Tensor) -> torch.Tensor:
    """Label-free summary of what networks answer on the same images.

    Args:
        logits: (M, n, C) float, M networks on n images.

    Returns:
        (M, 9) float: mean and standard deviation over images of entropy, confidence and margin; log scale of the
        logits; log scale of their mean over images; entropy of the mean answer.
    """
    probabilities = logits.softmax(dim=-1)
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    top = probabilities.topk(2, dim=-1).values
    margin = top[..., 0] - top[..., 1]
    per_image = torch.stack([entropy, top[..., 0], margin], dim=-1)  # (M, n, 3)
    scale = torch.stack([logits.std(dim=(1, 2)), logits.mean(dim=1).std(dim=1)], dim=-1)
    mean_entropy = torch.special.entr(probabilities.mean(dim=1)).sum(dim=-1, keepdim=True)
    return torch.cat([per_image.mean(dim=1), per_image.std(dim=1), (scale + 1e-4).log(), mean_entropy], dim=-1)


@torch.no_grad()
def zoo_logits(
    architecture: str, configs: Sequence[str], flat: torch.Tensor, layout: TokenLayout, images: torch.Tensor
):
    """Answers of every checkpoint of a zoo on the same images.

    Args:
        architecture: name in `sane_hf.architectures`.
        configs: n architecture configs (JSON), one per checkpoint.
        flat: (n, N) float, weights.
        layout: their layout.
        images: (m, C, H, W) float.

    Returns:
        (n, m, classes) float.
    """
    chunks = []
    for start in range(0, flat.shape[0], 256):
        part = slice(start, start + 256)
        chunks.append(forward(architecture, configs[part], stack_flat(flat[part], layout), images))
    return torch.cat(chunks)


@dataclass
class Standardizer:
    """Shift and scale learned on the training split; NaN stays NaN."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def fit(cls, values: torch.Tensor) -> Standardizer:
        mean = values.nanmean(dim=0)
        std = (values - mean).square().nanmean(dim=0).sqrt()
        return cls(mean, torch.where(std > 1e-6, std, 1.0))

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return (values - self.mean) / self.std
