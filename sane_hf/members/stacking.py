"""Between a list of state dicts and one stack: every tensor with a leading axis over the member networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sane_hf.modeling import TokenLayout


def stack(state_dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack networks of one architecture.

    Args:
        state_dicts: M state dicts with the same names and shapes.

    Returns:
        One dict, each tensor of shape (M, *shape), names in the order of the first state dict.

    Raises:
        ValueError: no network at all, or one whose names or shapes differ, naming the network and the tensor.

    Example:
        >>> stack([{"weight": torch.zeros(2, 3)}, {"weight": torch.ones(2, 3)}])["weight"].shape
        torch.Size([2, 2, 3])
    """
    if not state_dicts:
        raise ValueError("stack needs at least one network, found none")
    first = state_dicts[0]
    for index, state_dict in enumerate(state_dicts[1:], start=1):
        different = sorted(set(first) ^ set(state_dict))
        if different:
            owner = "network 0" if different[0] in first else f"network {index}"
            raise ValueError(
                f"cannot stack network {index} with network 0: tensor {different[0]!r} exists only in {owner}"
            )
        for name, tensor in first.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"cannot stack network {index}: tensor {name!r} has shape {tuple(state_dict[name].shape)}, "
                    f"network 0 has {tuple(tensor.shape)}"
                )
    return {name: torch.stack([state_dict[name] for state_dict in state_dicts]) for name in first}


def unstack(stacked: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Take a stack apart again: M state dicts whose tensors are views of the stack.

    Example:
        >>> [network["weight"].item() for network in unstack({"weight": torch.tensor([1.0, 2.0])})]
        [1.0, 2.0]
    """
    return [{name: tensor[index] for name, tensor in stacked.items()} for index in range(count(stacked))]


def count(stacked: dict[str, Tensor]) -> int:
    """Return M, the number of networks in a stack.

    Raises:
        ValueError: an empty stack, or tensors that disagree about M, naming one.
    """
    if not stacked:
        raise ValueError("the stack holds no tensor")
    first, number = next((name, len(tensor)) for name, tensor in stacked.items())
    for name, tensor in stacked.items():
        if len(tensor) != number:
            raise ValueError(f"tensor {name!r} stacks {len(tensor)} networks, {first!r} stacks {number}")
    return number


def stack_flat(flat: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """Take flat weights apart into stacked tensors.

    Args:
        flat: (M, N), flat weights of M networks in the order of the layout.
        layout: the layout of their architecture.

    Returns:
        Tensors (M, *shape) by name, views of `flat`; gradients flow through them.
    """
    return {name: flat[:, i:j].view(len(flat), *layout.shapes[name]) for name, (i, j) in layout.slices.items()}
