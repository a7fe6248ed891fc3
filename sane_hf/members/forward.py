"""Run many member networks at once: logits, accuracy and loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .program import Program, program, without_dropout
from .stacking import count

Configs = Mapping[str, Any] | str | None | Sequence[Mapping[str, Any] | str | None]


def forward(architecture: str, configs: Configs, stacked: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits of M networks, in evaluation mode, differentiable with respect to their weights.

    Args:
        architecture: name of the one architecture of all networks.
        configs: one configuration for all, or a list of M (mapping or JSON text); networks of equal configuration
            run together.
        stacked: their weights, each tensor (M, *shape), floating (see `stack`).
        images: (B, C, H, W), the same for all networks, or (M, B, C, H, W), each network its own.

    Returns:
        Logits (M, B, classes), of the dtype of the weights.

    Raises:
        ValueError: unknown architecture, a missing or extra tensor, a wrong shape, or too many or few configurations.

    Example:
        >>> from sane_hf.architectures import build
        >>> from sane_hf.members import stack
        >>> networks = stack([build("cnn_small").state_dict() for _ in range(3)])
        >>> forward("cnn_small", None, networks, torch.zeros(5, 1, 8, 8)).shape
        torch.Size([3, 5, 10])
    """
    members = count(stacked)
    dtype = next(iter(stacked.values())).dtype
    own = _check_images(images, members)
    images = images.to(dtype).movedim(-4, -1).contiguous()  # batch innermost
    if not own:
        images = images.expand(members, *images.shape)
    parts = list(groups(architecture, configs, stacked))
    if len(parts) == 1:
        return parts[0][0](stacked, images).transpose(1, 2)
    logits, order = [], []
    for part, index in parts:
        chosen = {name: tensor.index_select(0, index) for name, tensor in stacked.items()}
        logits.append(part(chosen, images.index_select(0, index) if own else images[: len(index)]))
        order.append(index)
    return torch.cat(logits).index_select(0, torch.cat(order).argsort()).transpose(1, 2)


@torch.no_grad()
def evaluate(
    architecture: str,
    configs: Configs,
    stacked: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    batch_size: int = 32,
    members_at_once: int = 32,
) -> dict[str, Tensor]:
    """Measure accuracy and loss of M networks on the same images.

    Args:
        architecture: name of the architecture of all networks.
        configs: one configuration for all, or a list of M.
        stacked: their weights, each tensor (M, *shape).
        images: (n, C, H, W).
        labels: (n,) integer classes.
        batch_size: images run at once; memory grows with `batch_size * members_at_once`.
        members_at_once: networks run at once.

    Returns:
        `accuracy` (M,), a fraction of 1, and `loss` (M,), mean cross-entropy in nats; float32, on the device of the
        weights. A network with non-finite logits counts as wrong on those images and has a non-finite loss.

    Raises:
        ValueError: as `forward`; no images; or a number of labels that is not the number of images.
    """
    members = count(stacked)
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"evaluation needs as many labels as images and at least one, found {len(images)} images and "
            f"{len(labels)} labels"
        )
    _check_images(images, members, shared_only=True)
    reference = next(iter(stacked.values()))
    images = images.to(reference)
    labels = labels.to(reference.device)
    correct = torch.zeros(members, dtype=torch.float64, device=reference.device)
    loss = torch.zeros_like(correct)
    batches = [
        (images[start : start + batch_size].movedim(0, -1).contiguous(), labels[start : start + batch_size])
        for start in range(0, len(images), batch_size)
    ]
    for part, group in groups(architecture, configs, stacked):
        for index in group.split(members_at_once):
            chosen = {name: tensor.index_select(0, index) for name, tensor in stacked.items()}
            for batch, target in batches:
                logits = part(chosen, batch.expand(len(index), *batch.shape))  # (m, classes, b)
                finite = logits.isfinite().all(1)
                correct[index] += ((logits.argmax(1) == target) & finite).sum(1)
                wanted = logits.gather(1, target.expand(len(index), 1, -1)).squeeze(1)
                loss[index] += (logits.logsumexp(1) - wanted).sum(1, dtype=torch.float64)
    return {"accuracy": (correct / len(images)).float(), "loss": (loss / len(images)).float()}


def groups(architecture: str, configs: Configs, stacked: dict[str, Tensor]) -> Iterator[tuple[Program, Tensor]]:
    """Yield the program of each distinct configuration and the indices (long) of the networks that share it.

    Dropout does not count as a difference.
    """
    members = count(stacked)
    configs = config_list(configs, members)
    found: dict[str, list[int]] = {}
    seen: dict[str, str] = {}
    for index, config in enumerate(configs):
        key = config if isinstance(config, str) else repr(config)
        if key not in seen:
            seen[key] = without_dropout(architecture, config)
        found.setdefault(seen[key], []).append(index)
    device = next(iter(stacked.values())).device
    for config, indices in found.items():
        part = program(architecture, config)
        _check_weights(architecture, part, stacked)
        yield part, torch.tensor(indices, device=device)


def config_list(configs: Configs, members: int) -> list[Mapping[str, Any] | str | None]:
    """Return one configuration per network.

    Raises:
        ValueError: a list whose length is not the number of networks.
    """
    if configs is None or isinstance(configs, str | Mapping):
        return [configs] * members
    if len(configs) != members:
        raise ValueError(f"there are {members} networks, but {len(configs)} configurations")
    return list(configs)


def _check_images(images: Tensor, members: int, shared_only: bool = False) -> bool:
    """Return whether every network has its own images."""
    if images.ndim == 4:
        return False
    if images.ndim == 5 and len(images) == members and not shared_only:
        return True
    own = "" if shared_only else f" or ({members}, images, channels, height, width)"
    raise ValueError(f"images must be (images, channels, height, width){own}, found {tuple(images.shape)}")


def _check_weights(architecture: str, part: Program, stacked: dict[str, Tensor]) -> None:
    for name in part.shapes:
        if name not in stacked:
            raise ValueError(f"tensor {name!r} of architecture {architecture!r} is missing from the weights")
    for name, tensor in stacked.items():
        if name not in part.shapes:
            raise ValueError(f"tensor {name!r} does not belong to architecture {architecture!r}: {list(part.shapes)}")
        if tuple(tensor.shape[1:]) != part.shapes[name]:
            raise ValueError(
                f"tensor {name!r} of architecture {architecture!r} must have shape (networks, "
                f"{', '.join(map(str, part.shapes[name]))}), found {tuple(tensor.shape)}"
            )
