"""The behavioural loss: decoded networks should answer as the originals do (arXiv 2503.17138).

Weights that are close need not act alike. The loss decodes to weights, runs original and decoded networks on the same
query images, all networks of the batch at once, and compares the answers. With noise on the latents it also shapes the
directions in which samples may differ from their anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sane_hf.members import forward, stack_flat
from sane_hf.modeling import TokenLayout, WeightTokenizer, flat_from_tokens


class BehaviorLoss:
    """Kullback-Leibler divergence, in nats, between the answers of original and decoded networks.

    In absolute nats, so that its weight means the same on every zoo and at every time of the training.

    Args:
        architecture: name in `sane_hf.architectures`.
        configs: architecture configs (JSON) of the training checkpoints, by index.
        layout: their layout.
        tokenizer: gives the normalisation.
        images: (m, C, H, W) float, the pool of query images; labels are not used.
        queries: images per call.
        seed: seed of the queries drawn.
    """

    def __init__(
        self,
        architecture: str,
        configs: Sequence[str],
        layout: TokenLayout,
        tokenizer: WeightTokenizer,
        images: torch.Tensor,
        queries: int,
        seed: int,
    ):
        self.architecture, self.configs, self.layout = architecture, configs, layout
        self.images, self.queries, self.seed = images, min(queries, len(images)), seed
        self.shift, self.scale = tokenizer.flat_statistics(layout)

    def __call__(self, decoded: torch.Tensor, original: torch.Tensor, index: torch.Tensor, step: int) -> torch.Tensor:
        """Mean divergence over networks and queries.

        Args:
            decoded: (B, T, D) float, decoded tokens of whole networks; the gradient flows through them.
            original: (B, T, D) float, the tokens they should act like.
            index: (B,) long, which checkpoints.
            step: number of the training step; draws the queries.

        Returns:
            Scalar.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randperm(len(self.images), generator=generator)[: self.queries]
        queries = self.images[chosen].to(decoded.device)
        configs = [self.configs[i] for i in index.tolist()]
        with torch.no_grad():
            wanted = self._answers(original, configs, queries)
        answers = self._answers(decoded, configs, queries)
        return nn.functional.kl_div(
            answers.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
        )

    def _answers(self, tokens: torch.Tensor, configs: Sequence[str], queries: torch.Tensor) -> torch.Tensor:
        """(B, m, classes) log probabilities of the networks behind normalised tokens."""
        device = tokens.device
        flat = flat_from_tokens(tokens, self.layout) * self.scale.to(device) + self.shift.to(device)
        return forward(self.architecture, configs, stack_flat(flat, self.layout), queries).log_softmax(dim=-1)
