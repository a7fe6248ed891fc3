"""Bring networks into the canonical form: permute their units so that they lie as those of a reference.

Weight matching of git re-basin (Ainsworth et al. 2022) on permutation groups as data; `matching` holds the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sane_hf.modeling.layout_sane import TokenLayout
from sane_hf.modeling.permutation_sane import PermutationGroups
from sane_hf.symmetry.matching import Matcher, Plan


@dataclass(frozen=True)
class Alignment:
    """One aligned network.

    Attributes:
        weights: State dict with units permuted; values are those of the input, bit for bit.
        permutation: For each group the index (size,) that was applied: ``new[i] = old[permutation[i]]``.
        objective: Sum over all floating tensors of the inner products with the reference, in float64.
    """

    weights: dict[str, Tensor]
    permutation: dict[str, Tensor]
    objective: float


@dataclass(frozen=True)
class Alignments:
    """A batch of aligned networks as flat vectors.

    Attributes:
        flat: Weights (B, N), permuted, in the dtype given.
        permutation: For each group the indices (B, size) that were applied.
        objective: Inner products with the reference, (B,) of float64.
    """

    flat: Tensor
    permutation: dict[str, Tensor]
    objective: Tensor


def align(
    weights: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    groups: PermutationGroups,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Alignment:
    """Permutes the units of a network so that it lies as close to a reference as weight matching gets it.

    Any permuted copy of `weights` gives the same aligned network (but for exact ties).

    Args:
        weights: State dict of the network.
        reference: State dict of the reference, of the same names and shapes.
        groups: Permutation groups of their architecture.
        restarts: Number of runs; the first starts from a match computed from the weights, the others from random
            permutations, visiting groups in random orders. The best is returned.
        generator: Source of the randomness of further runs; seed 0 when absent.

    Returns:
        The aligned network, the permutation, and the objective.

    Raises:
        ValueError: Tensors differ between the two networks or do not fit the groups, or weights are not finite.

    Example:
        >>> groups = PermutationGroups({"hidden": 3}, {"0.weight": ("hidden", None), "1.weight": (None, "hidden")})
        >>> reference = {"0.weight": torch.tensor([[1.0], [2.0], [3.0]]), "1.weight": torch.tensor([[0.1, 0.2, 0.3]])}
        >>> shuffled = groups.apply(reference, {"hidden": torch.tensor([2, 0, 1])})
        >>> align(shuffled, reference, groups).weights["1.weight"]
        tensor([[0.1000, 0.2000, 0.3000]])
    """
    _check_pair(weights, reference, groups)
    names = [name for name in groups.axes if reference[name].is_floating_point()]
    dtype = _common([reference[name] for name in names] + [weights[name] for name in names])
    plan = Plan.of(groups, {name: tuple(reference[name].shape) for name in names})
    permutation = groups.identity()
    if plan.blocks:
        matcher = Matcher(plan, {name: reference[name].detach().to(dtype) for name in names})
        tensors = {name: weights[name].detach().to(matcher.device, dtype)[None].clone() for name in names}
        found = matcher.match(tensors, _seeds(restarts, generator))
        permutation |= {name: index[0].cpu() for name, index in found.items()}
    aligned = groups.apply(weights, permutation)
    return Alignment(aligned, permutation, _inner(aligned, reference))


def align_many(
    flat: Tensor,
    reference: Tensor | Mapping[str, Tensor],
    layout: TokenLayout,
    groups: PermutationGroups,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
) -> Alignments:
    """Aligns many networks of one architecture to one reference, as `align` does each, all at once.

    Args:
        flat: Weights (B, N) in the order of the layout, floating, on any device.
        reference: Weights (N,) of the reference, or its state dict.
        layout: The layout of the flat vectors.
        groups: Permutation groups of the architecture.
        restarts: As in `align`; the best run is kept for each network on its own.
        generator: As in `align`; a network's result does not depend on the other networks of the batch.
        batch_size: Networks matched at once; bounds memory.

    Returns:
        Aligned weights, permutations and objectives.

    Raises:
        ValueError: Shapes do not fit the layout or the groups, or weights are not finite (naming network and tensor).

    Example:
        >>> groups = PermutationGroups({"hidden": 3}, {"a": ("hidden", None), "b": (None, "hidden")})
        >>> layout = TokenLayout.plan({"a": (3, 1), "b": (1, 3)}, token_size=3)
        >>> reference = torch.tensor([1.0, 2.0, 3.0, 0.1, 0.2, 0.3])
        >>> align_many(torch.tensor([[3.0, 1.0, 2.0, 0.3, 0.1, 0.2]]), reference, layout, groups).flat
        tensor([[1.0000, 2.0000, 3.0000, 0.1000, 0.2000, 0.3000]])
    """
    if isinstance(reference, Mapping):
        reference = layout.flatten(reference)
    if flat.ndim != 2 or flat.shape[1] != layout.num_weights or reference.shape != flat.shape[1:]:
        raise ValueError(
            f"align_many takes flat weights (B, {layout.num_weights}) and a reference ({layout.num_weights},) for "
            f"this layout; found {tuple(flat.shape)} and {tuple(reference.shape)}. Make them with layout.flatten_many."
        )
    groups.check(layout.shapes)
    _check_finite_flat(reference[None], layout, "the reference")
    _check_finite_flat(flat, layout, "network")
    reference = reference.detach().to(flat.device)
    dtype = _common([flat, reference])
    tensors_of = _tensors_of(layout, groups)
    plan = Plan.of(groups, {name: layout.shapes[name] for name in tensors_of(flat[:1])})
    seeds = _seeds(restarts, generator)
    aligned, target = flat.detach().clone(), reference.to(torch.float64)
    objective = torch.empty(len(flat), dtype=torch.float64, device=flat.device)
    identity = {name: index.to(flat.device) for name, index in groups.identity().items()}
    permutation = {name: index.expand(len(flat), *index.shape).clone() for name, index in identity.items()}
    matcher = (
        Matcher(plan, {n: t[0] for n, t in tensors_of(reference[None].to(dtype)).items()}) if plan.blocks else None
    )
    for start in range(0, len(flat), batch_size):
        part = slice(start, start + batch_size)
        if matcher is not None:
            work = aligned[part].to(dtype)
            for name, index in matcher.match(tensors_of(work), seeds).items():
                permutation[name][part] = index
            aligned[part] = work
        objective[part] = aligned[part].to(torch.float64) @ target
    return Alignments(aligned, permutation, objective)


def align_zoo(
    flat: Tensor,
    model_ids: Sequence[Any],
    epochs: Sequence[int],
    reference: Tensor | Mapping[str, Tensor],
    layout: TokenLayout,
    groups: PermutationGroups,
    **options: Any,
) -> Alignments:
    """Aligns the checkpoints of a zoo: all epochs of a model share the permutation of its last.

    Args:
        flat: Weights (B, N) of all checkpoints, in any order.
        model_ids: Model of each checkpoint (B).
        epochs: Epoch of each checkpoint (B).
        reference: As in `align_many`.
        layout: As in `align_many`.
        groups: As in `align_many`.
        **options: `restarts`, `generator`, `batch_size` of `align_many`.

    Returns:
        Aligned weights, permutations and objectives of all checkpoints, in the order given.

    Raises:
        ValueError: Lengths differ, or as in `align_many`.
    """
    if not len(flat) == len(model_ids) == len(epochs):
        raise ValueError(
            f"align_zoo needs one model id and one epoch per checkpoint; found {len(flat)} checkpoints, "
            f"{len(model_ids)} model ids and {len(epochs)} epochs."
        )
    last: dict[Any, int] = {}
    for row, (model, epoch) in enumerate(zip(model_ids, epochs, strict=True)):
        if model not in last or epoch > epochs[last[model]]:
            last[model] = row
    rank = {model: position for position, model in enumerate(last)}
    of_model = torch.from_numpy(np.array([rank[model] for model in model_ids], dtype=np.int64)).to(flat.device)
    rows = torch.tensor(list(last.values()), dtype=torch.int64, device=flat.device)
    matched = align_many(flat[rows], reference, layout, groups, **options)
    if isinstance(reference, Mapping):
        reference = layout.flatten(reference)
    target = reference.to(flat.device, torch.float64)
    permutation = {name: index[of_model] for name, index in matched.permutation.items()}
    index = groups.flat_index(layout, matched.permutation)
    aligned = torch.empty_like(flat)
    objective = torch.empty(len(flat), dtype=torch.float64, device=flat.device)
    for start in range(0, len(flat), 1024):
        part = slice(start, start + 1024)
        aligned[part] = flat[part].gather(1, index[of_model[part]])
        objective[part] = aligned[part].to(torch.float64) @ target
    return Alignments(aligned, permutation, objective)


def _seeds(restarts: int, generator: torch.Generator | None) -> list[int]:
    """One seed for every run after the first, so that a network's result does not depend on its neighbours."""
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 1:
        raise ValueError(f"restarts is the number of runs, an integer from 1; found {restarts!r}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randint(2**62, (restarts - 1,), generator=generator, device=generator.device).tolist()


def _tensors_of(layout: TokenLayout, groups: PermutationGroups):
    slices = {name: layout.slices[name] for name in groups.axes if name in layout.slices}

    def view(flat: Tensor) -> dict[str, Tensor]:
        return {n: flat[:, start:stop].view(-1, *layout.shapes[n]) for n, (start, stop) in slices.items()}

    return view


def _common(tensors: Sequence[Tensor]) -> torch.dtype:
    """Float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    total = 0.0
    for name, tensor in right.items():
        if tensor.is_floating_point():
            other = left[name].detach().to(tensor.device, torch.float64)
            total += (tensor.detach().to(torch.float64) * other).sum().item()
    return total


def _check_pair(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], groups: PermutationGroups) -> None:
    for found, needed, whose in ((weights, reference, "the network"), (reference, weights, "the reference")):
        missing = next((name for name in needed if name not in found), None)
        if missing is not None:
            raise ValueError(
                f"Tensor {missing!r} is missing in {whose}; alignment needs two networks of one architecture."
            )
    for name, tensor in reference.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"Tensor {name!r} has shape {tuple(weights[name].shape)}, in the reference {tuple(tensor.shape)}; "
                "alignment needs two networks of one architecture."
            )
        for side, value in (("the network", weights[name]), ("the reference", tensor)):
            if value.is_floating_point() and not torch.isfinite(value).all():
                count = int((~torch.isfinite(value)).sum())
                raise ValueError(
                    f"Tensor {name!r} of {side} has {count} values that are not finite; such a network cannot be "
                    "matched. Leave it out."
                )
    groups.check(reference)


def _check_finite_flat(flat: Tensor, layout: TokenLayout, whose: str) -> None:
    fine = torch.isfinite(flat)
    if fine.all():
        return
    row, column = (~fine).nonzero()[0].tolist()
    name = next(n for n, (start, stop) in layout.slices.items() if start <= column < stop)
    which = whose if whose == "the reference" else f"{whose} {row}"
    count = int((~fine[row]).sum())
    raise ValueError(
        f"Tensor {name!r} of {which} has values that are not finite ({count} in the network); such a network cannot "
        "be matched. Leave it out."
    )
