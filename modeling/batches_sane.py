"""Batches of networks of several architectures: grouped, padded to the longest, taken apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layout_sane import TokenLayout
from .rows_sane import layer_rows


def check_mapping(number: int, weights: object) -> None:
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"Network {number} is {type(weights).__name__}, not a state dict. Pass model.state_dict(), or a list of "
            "such."
        )


def grouped(layouts: Sequence[TokenLayout]) -> list[tuple[TokenLayout, list[int]]]:
    """The layouts, each with the members of the batch that have it."""
    members: dict[int, list[int]] = {}
    for number, layout in enumerate(layouts):
        members.setdefault(id(layout), []).append(number)
    return [(layouts[numbers[0]], numbers) for numbers in members.values()]


def padded(
    parts: Sequence[dict[str, Tensor]], groups: Sequence[tuple[TokenLayout, list[int]]], size: int
) -> dict[str, Tensor]:
    """One batch, padded to the longest, of the parts of each architecture."""
    length = max(part["tokens"].shape[1] for part in parts)
    padded = {name: tensor.new_zeros(size, length, *tensor.shape[2:]) for name, tensor in parts[0].items()}
    for part, (_, members) in zip(parts, groups, strict=True):
        for name, tensor in part.items():
            padded[name][members, : tensor.shape[1]] = tensor.to(padded[name].device)
    return padded


def unpack(
    tokens: Tensor, layout: TokenLayout, references: Sequence[Mapping[str, Tensor] | None]
) -> list[dict[str, Tensor]]:
    """The tokenised tensors of each network, each in memory of its own, in the dtype of the reference."""
    networks: list[dict[str, Tensor]] = [{} for _ in references]
    for layer in layout.layers:
        rows = layer_rows(tokens, layer)
        pieces = {layer.name: rows[:, :, : layer.columns]}
        if layer.bias is not None:
            pieces[layer.bias] = rows[:, :, layer.columns]
        for name, piece in pieces.items():
            for network, one, reference in zip(networks, piece, references, strict=True):
                dtype = tokens.dtype if reference is None else reference[name].dtype
                copy = one.to(dtype, copy=True, memory_format=torch.contiguous_format)
                network[name] = copy.view(layout.shapes[name])
    return networks
