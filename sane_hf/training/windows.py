"""The data path of training: a zoo's weights in, batches of token windows out, nothing written to disk.

Indices are drawn first (checkpoint, permutation, window, noise), then the whole batch is gathered at once. The zoo is
kept as one matrix of flat weights, which is also what the permutations act on.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from sane_hf.modeling import PermutationGroups, TokenLayout, WeightTokenizer

from .arguments import ViewArguments


class ZooWindows(Dataset):
    """Windows of the checkpoints of one architecture, every sample with its own permutation, window and noise.

    What is drawn depends on the seed, the epoch and the batch's indices alone, so that a resumed run sees what an
    uninterrupted one would.

    Args:
        flat: (n, N) float32, aligned flat weights.
        layout: their layout.
        tokenizer: gives the normalisation.
        groups: permutation groups of the architecture; needed where views are permuted.
        views: how a checkpoint is varied.
        statistics: (n, L, S) float, standardised targets of the statistics head, invariant to permutation.
        behavior: (n, K) float, likewise per network.
        seed: seed of everything drawn.

    Raises:
        ValueError: views are permuted but there are no groups, or a window is longer than the network.
    """

    def __init__(
        self,
        flat: torch.Tensor,
        layout: TokenLayout,
        tokenizer: WeightTokenizer,
        groups: PermutationGroups | None = None,
        views: ViewArguments | None = None,
        statistics: torch.Tensor | None = None,
        behavior: torch.Tensor | None = None,
        seed: int = 0,
    ):
        self.views = views or ViewArguments(permuted=0.0, noise=0.0)
        if (self.views.permuted or self.views.second_view) and groups is None:
            raise ValueError(
                "views.permuted > 0 needs the architecture's permutation groups, which this zoo does not carry: "
                "find them with sane_hf.symmetry.find_permutation_groups, or set views.permuted: 0"
            )
        if self.views.window is not None and self.views.window > layout.num_tokens:
            raise ValueError(
                f"views.window={self.views.window} is longer than the network's {layout.num_tokens} tokens: "
                "choose a shorter one, or leave it out for whole networks"
            )
        shift, scale = tokenizer.flat_statistics(layout)
        self.normalized = (flat - shift) / scale
        self.layout, self.groups, self.seed, self.epoch = layout, groups, seed, 0
        self.statistics, self.behavior = statistics, behavior
        self._gather, self._mask, self._positions = layout.gather_index(), layout.mask(), layout.positions()

    def __len__(self) -> int:
        return self.normalized.shape[0]

    def set_epoch(self, epoch: int):
        """Draw other permutations, windows and noise from here on; `SaneTrainer` calls it at every epoch's begin."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """One batch, gathered at once.

        Returns:
            `tokens` (B, T, D), the encoder's input; `labels` (B, T, D), the same without noise (with a second view
            both views' (2B, T, D)); `mask` (B, T, D); `positions` (B, T, 3); `index` (B,), which checkpoint; where
            there are targets `statistics` (B, L, S) and `behavior` (B, K); with a second view `second_tokens`
            (B, T, D).
        """
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, *indices)) % (1 << 63))
        index = torch.tensor(indices)
        canonical = self.normalized[index]
        window = self._draw_windows(len(indices), generator)  # (B, T) token numbers
        batch = {
            "mask": self._mask[window],
            "positions": self._positions[window],
            "index": index,
        }
        permuted = self._permute(canonical, generator)
        if self.views.second_view:
            first, second = self._tokens(canonical, window), self._tokens(permuted, window)
            batch["second_tokens"] = self._noised(second, generator)
            batch["labels"] = torch.cat([first, second])
        else:
            first = batch["labels"] = self._tokens(permuted, window)
        batch["tokens"] = self._noised(first, generator)
        if self.statistics is not None:
            batch["statistics"] = self.statistics[index]
        if self.behavior is not None:
            batch["behavior"] = self.behavior[index]
        return batch

    def _draw_windows(self, count: int, generator: torch.Generator) -> torch.Tensor:
        length = self.views.window or self.layout.num_tokens
        starts = torch.randint(self.layout.num_tokens - length + 1, (count, 1), generator=generator)
        return starts + torch.arange(length)

    def _permute(self, flat: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Fresh permutations for a share of the batch: its last rows, since the order of a batch is random itself."""
        share = 1.0 if self.views.second_view else self.views.permuted
        count = round(share * flat.shape[0])
        if count == 0:
            return flat
        permutation = self.groups.random(generator, n=count)
        moved = flat[-count:].gather(1, self.groups.flat_index(self.layout, permutation))
        return torch.cat([flat[:-count], moved])

    def _tokens(self, flat: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """(B, N) flat weights to (B, T, D) tokens; the gather index points padding at a zero behind the weights."""
        index = self._gather[window].flatten(1)  # (B, T * D)
        padded = torch.nn.functional.pad(flat, (0, 1))
        return padded.gather(1, index).view(*window.shape, -1)

    def _noised(self, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if not self.views.noise:
            return tokens
        return tokens * (1 + self.views.noise * torch.randn(tokens.shape, generator=generator))


def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`ZooWindows` hands out whole batches already."""
    return batch
