"""Train many networks at once, each with its own data order, dropout masks, learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sane_hf.architectures import get_architecture

from .forward import Configs, config_list, groups
from .program import Program
from .stacking import count

BETAS, EPSILON = (0.9, 0.999), 1e-8

# Called with (epoch, indices of the networks (m,), their weights) for each group of networks trained together.
OnEpoch = Callable[[int, Tensor, dict[str, Tensor]], None]


def epoch_draws(
    seed: int, epoch: int, images: int, dropouts: dict[str, int], rate: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw what is random in one epoch of one network: the order of the images, and what dropout keeps.

    The stream depends on nothing but the arguments, so a network trained alone meets the same batches and masks as in
    a population.

    Args:
        seed: of the network, at least 0.
        epoch: counted from 1.
        images: number of training images.
        dropouts: features of one sample at each dropout layer, in the order of the layers.
        rate: share of features dropped.

    Returns:
        `order` (images,) long; and for each dropout layer a bool (images, features), true where kept, row i for
        image `order[i]` (empty when `rate` is 0).

    Example:
        >>> order, keep = epoch_draws(seed=1, epoch=1, images=4, dropouts={"dropout1": 36}, rate=0.5)
        >>> sorted(order.tolist()), keep["dropout1"].shape
        ([0, 1, 2, 3], torch.Size([4, 36]))
    """
    stream = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(stream.permutation(images))
    keep = {}
    if rate > 0:
        for layer, features in dropouts.items():
            keep[layer] = torch.from_numpy(stream.random((images, features), dtype=np.float32) >= rate)
    return order, keep


def train(
    architecture: str,
    configs: Configs,
    stacked: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    epochs: int,
    learning_rate: float | Tensor = 1e-3,
    *,
    weight_decay: float | Tensor = 0.0,
    batch_size: int = 32,
    seeds: Sequence[int] | None = None,
    members_at_once: int = 32,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Tensor]:
    """Train M networks with Adam on cross-entropy, all at once.

    Each network follows the trajectory it would follow alone under `torch.optim.Adam(lr, weight_decay=...)`: the
    weight decay is the L2 kind, added to the gradient; betas 0.9 and 0.999, epsilon 1e-8; the learning rate is
    constant. The last batch of an epoch may be smaller.

    Args:
        architecture: name of the architecture of all networks.
        configs: one configuration for all, or a list of M; `dropout` is taken from them.
        stacked: weights to start from, each tensor (M, *shape); left unchanged.
        images: (n, C, H, W), the training images of all networks.
        labels: (n,) integer classes.
        epochs: passes over the images; 0 returns a copy.
        learning_rate: one, or one per network (M,).
        weight_decay: one, or one per network (M,).
        batch_size: images in a batch.
        seeds: M seeds of data order and dropout (see `epoch_draws`); None means 0, 1, 2, ...
        members_at_once: networks trained at once; 32 keeps their activations in a CPU's cache.
        on_epoch: called after each epoch for each group of networks trained together, with the epoch (from 1), the
            indices of the networks and their weights, which it must not change.

    Returns:
        The trained weights, stacked like the input.

    Raises:
        ValueError: as `forward`; or seeds, learning rates or weight decays that are not one per network.
    """
    members = count(stacked)
    if images.ndim != 4 or len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            "training needs images (n, channels, height, width) and as many labels, at least one, found "
            f"{tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if epochs < 0 or batch_size < 1 or members_at_once < 1:
        raise ValueError(
            f"epochs must be at least 0, batch_size and members_at_once at least 1, found {epochs}, {batch_size}, "
            f"{members_at_once}"
        )
    reference = next(iter(stacked.values()))
    rates = _per_member("learning_rate", learning_rate, members, reference)
    decays = _per_member("weight_decay", weight_decay, members, reference)
    seeds = range(members) if seeds is None else seeds
    if len(seeds) != members:
        raise ValueError(f"there are {members} networks, but {len(seeds)} seeds")
    declared = get_architecture(architecture)
    dropout = [getattr(declared.config(config), "dropout", 0.0) for config in config_list(configs, members)]
    images, labels = images.to(reference), labels.to(reference.device)
    results = {name: tensor.detach().clone() for name, tensor in stacked.items()}
    for part, group in groups(architecture, configs, stacked):
        for index in group.split(members_at_once):
            chosen = index.tolist()
            run = _Run(part, {name: tensor[index] for name, tensor in results.items()}, rates[index], decays[index])
            for epoch in range(1, epochs + 1):
                draws = [
                    epoch_draws(seeds[member], epoch, len(images), part.dropouts, dropout[member]) for member in chosen
                ]
                run.epoch(images, labels, draws, [dropout[member] for member in chosen], batch_size)
                if on_epoch is not None:
                    on_epoch(epoch, index, run.weights())
            for name, tensor in run.weights().items():
                results[name][index] = tensor
    return results


class _Run:
    """The state of networks trained together: flat weights (m, N) and Adam's moments of the same shape."""

    def __init__(self, part: Program, weights: dict[str, Tensor], rates: Tensor, decays: Tensor) -> None:
        self.part = part
        self.shapes = {name: tensor.shape for name, tensor in weights.items()}
        self.sizes = [tensor[0].numel() for tensor in weights.values()]
        self.flat = torch.cat([tensor.flatten(1) for tensor in weights.values()], dim=1)
        self.rates, self.decays = rates[:, None], decays[:, None]
        self.decaying = bool((decays != 0).any())
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps = 0

    def weights(self) -> dict[str, Tensor]:
        """Views of the flat weights."""
        return self._named(self.flat)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split(self.sizes, dim=1)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        draws: list[tuple[Tensor, dict[str, Tensor]]],
        dropout: list[float],
        batch_size: int,
    ) -> None:
        """Pass once over the images, every network in its own order."""
        members, device = len(draws), self.flat.device
        order = torch.stack([order for order, _ in draws]).to(device)
        keep = self._keep_factors(draws, dropout, len(images))
        for start in range(0, len(images), batch_size):
            index = order[:, start : start + batch_size]
            batch = images.flatten(1).index_select(0, index.flatten()).view(members, index.shape[1], -1)
            batch = batch.transpose(1, 2).reshape(members, *images.shape[1:], -1)  # batch innermost
            factors = {layer: factor[:, :, start : start + batch_size] for layer, factor in keep.items()}
            self._step(batch, labels[index], factors)

    def _keep_factors(
        self, draws: list[tuple[Tensor, dict[str, Tensor]]], dropout: list[float], images: int
    ) -> dict[str, Tensor]:
        """Return for each dropout layer (m, features, images): 0 where dropped, else 1 / (1 - rate)."""
        factors = {}
        if any(dropout):
            for layer, features in self.part.dropouts.items():
                factor = self.flat.new_ones(len(draws), features, images)
                for member, ((_, keep), rate) in enumerate(zip(draws, dropout, strict=True)):
                    if rate > 0:
                        factor[member] = keep[layer].to(self.flat).t() / (1 - rate)
                factors[layer] = factor
        return factors

    def _step(self, batch: Tensor, labels: Tensor, keep: dict[str, Tensor]) -> None:
        """One step of Adam on one batch (m, C, H, W, b) with labels (m, b)."""
        flat = self.flat.requires_grad_()
        logits = self.part(self._named(flat), batch, keep)  # (m, classes, b)
        wanted = logits.gather(1, labels[:, None]).squeeze(1)
        loss = (logits.logsumexp(1) - wanted).mean(1).sum()  # the networks share no weight: a sum keeps them apart
        (gradient,) = torch.autograd.grad(loss, flat)
        self.flat = flat.detach()
        self.steps += 1
        if self.decaying:
            gradient.addcmul_(self.flat, self.decays)
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        correction = 1 - BETAS[0] ** self.steps, (1 - BETAS[1] ** self.steps) ** 0.5
        denominator = self.square.sqrt().div_(correction[1]).add_(EPSILON)
        self.flat.sub_(self.mean.div(denominator).mul_(self.rates / correction[0]))


def _per_member(name: str, value: float | Tensor, members: int, like: Tensor) -> Tensor:
    values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if values.ndim == 0:
        return values.expand(members)
    if values.shape != (members,):
        raise ValueError(f"{name} must be one number or one per network ({members},), found {tuple(values.shape)}")
    return values
