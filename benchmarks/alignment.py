"""Aligning small CNNs: all at once, one at a time, and textbook weight matching one at a time.

    python benchmarks/alignment.py [--models 1000] [--epochs 6] [--peer 100]

The peer is git re-basin's weight matching as published, written out for one network: groups in random order from the
identity, one linear assignment each, until a sweep changes nothing, then the permutation applied to every epoch. All
rows are timed in one run on randomly initialised networks with noise for their epochs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from sane_hf.modeling.layout_sane import TokenLayout
from sane_hf.modeling.permutation_sane import PermutationGroups
from sane_hf.symmetry import align, align_many, align_zoo, find_permutation_groups


def network() -> nn.Sequential:
    """Three convolutions and two dense layers for 28x28 images, 2,464 weights, as in the SANE papers' zoos."""
    layers: list[nn.Module] = []
    for inner, outer, kernel in ((1, 8, 5), (8, 6, 5), (6, 4, 2)):
        layers += [nn.Conv2d(inner, outer, kernel), nn.MaxPool2d(2), nn.Tanh()] if kernel == 5 else []
        layers += [nn.Conv2d(inner, outer, kernel), nn.Tanh()] if kernel == 2 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 10))


def textbook(weights: dict, reference: dict, spec: dict, sizes: dict, generator: torch.Generator) -> dict:
    """Algorithm 1 of git re-basin. `spec`: tensor -> one (group, inner positions) or None per axis."""
    permutation = {name: torch.arange(size) for name, size in sizes.items()}

    def permuted(key: str, leave: int | None) -> torch.Tensor:
        tensor = weights[key]
        for axis, place in enumerate(spec[key]):
            if place is not None and axis != leave:
                name, inner = place
                index = (permutation[name][:, None] * inner + torch.arange(inner)).flatten()
                tensor = tensor.index_select(axis, index)
        return tensor

    changed = True
    while changed:
        changed = False
        for number in torch.randperm(len(sizes), generator=generator).tolist():
            name = list(sizes)[number]
            costs = torch.zeros(sizes[name], sizes[name])
            for key, places in spec.items():
                for axis, place in enumerate(places):
                    if place is not None and place[0] == name:
                        ours = reference[key].movedim(axis, 0).reshape(sizes[name], -1)
                        costs += ours @ permuted(key, axis).movedim(axis, 0).reshape(sizes[name], -1).T
            columns = torch.from_numpy(linear_sum_assignment(costs.numpy(), maximize=True)[1])
            before = costs.gather(1, permutation[name][:, None]).sum()
            if costs.gather(1, columns[:, None]).sum() > before + 1e-6:
                permutation[name], changed = columns, True
    return permutation


def spec_of(groups: PermutationGroups) -> dict:
    """Axes as (group, positions that follow each unit), which is all that this network needs."""

    def place(axis: object) -> tuple[str, int] | None:
        if isinstance(axis, dict):
            name, *inner = axis["product"]
            return name, int(torch.tensor(inner).prod())
        return None if axis is None else (str(axis), 1)

    return {key: [place(axis) for axis in axes] for key, axes in groups.axes.items()}


def timed(function: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--peer", type=int, default=100, help="models that are aligned one at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    states = [network().state_dict() for _ in range(options.models + 1)]
    groups = find_permutation_groups(network(), torch.zeros(2, 1, 28, 28))
    layout = TokenLayout.plan(states[0], token_size=0)
    reference, *last = layout.flatten_many(states)
    flat = torch.stack(last).repeat_interleave(options.epochs, 0)
    flat += 0.1 * flat * torch.randn(flat.shape)
    models = [row // options.epochs for row in range(len(flat))]
    epochs = [row % options.epochs for row in range(len(flat))]
    few = min(options.peer, options.models)
    rows = flat[options.epochs - 1 :: options.epochs]
    spec, generator = spec_of(groups), torch.Generator().manual_seed(0)

    def one_at_a_time_as_published() -> float:
        total = 0.0
        for model in range(few):
            found = textbook(layout.unflatten(rows[model]), states[0], spec, dict(groups.sizes), generator)
            for epoch in range(options.epochs):
                groups.apply(layout.unflatten(flat[model * options.epochs + epoch]), found)
            total += (rows[model].gather(0, groups.flat_index(layout, found)).double() @ reference.double()).item()
        return total / few

    def one_at_a_time() -> float:
        total = 0.0
        for model in range(few):
            found = align(layout.unflatten(rows[model]), states[0], groups)
            for epoch in range(options.epochs):
                groups.apply(layout.unflatten(flat[model * options.epochs + epoch]), found.permutation)
            total += found.objective
        return total / few

    align_many(rows[:64], reference, layout, groups)
    published, objective = timed(one_at_a_time_as_published)
    single, single_objective = timed(one_at_a_time)
    batch, aligned = timed(lambda: align_zoo(flat, models, epochs, reference, layout, groups))
    first = align_many(rows[:few], reference, layout, groups).objective.mean().item()
    print(f"{options.models} models of {options.epochs} epochs, {layout.num_weights} weights, 1 thread")
    print(f"{'':40}{'models/s':>10}{'ratio':>8}{'objective':>11}")
    print(f"{f'weight matching as published ({few})':40}{few / published:10.0f}{1:8.1f}{objective:11.4f}")
    print(f"{f'align, one at a time ({few})':40}{few / single:10.0f}{published / single:8.1f}{single_objective:11.4f}")
    ratio = options.models / batch / (few / published)
    print(f"{'align_zoo, all at once':40}{options.models / batch:10.0f}{ratio:8.1f}{first:11.4f}")
    print(f"checkpoints/s, all at once: {len(aligned.flat) / batch:.0f}")


if __name__ == "__main__":
    main()
