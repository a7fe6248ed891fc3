"""Weight matching, the engine: coordinate ascent over permutation groups, for many networks at once.

Git re-basin (Ainsworth et al. 2022, algorithm 1): for one group after the other, with all others held, the best
permutation is a linear assignment between its units; repeat until nothing changes. Here one plan per architecture
cuts every tensor into blocks whose dimensions are each one group or pinned, and the cost matrices of all networks of a
batch come from one matrix product per block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from sane_hf.modeling.permutation_sane import PermutationGroups

# One step of a path from a tensor to a block: split a dimension into factors, or take a piece of it.
_Step = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True)
class Block:
    """A part of a tensor whose dimensions are each a group or pinned.

    Attributes:
        name: The tensor.
        steps: How the block is viewed in the tensor (no copy).
        factors: Group name, or None where pinned, of each dimension of the block.
    """

    name: str
    steps: tuple[_Step, ...]
    factors: tuple[str | None, ...]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the block inside a tensor with one leading batch dimension."""
        for kind, dim, numbers in self.steps:
            if kind == "split":
                tensor = tensor.unflatten(dim + 1, numbers)
            else:
                tensor = tensor.narrow(dim + 1, *numbers)
        return tensor


@dataclass(frozen=True)
class Plan:
    """Everything about an architecture that matching needs, made once.

    Attributes:
        sizes: Number of units of each group, in visiting order.
        blocks: All blocks that carry a group.
        places: For each group the blocks it is in, as (index of the block, dimension).
        neighbours: For each group the groups whose best permutation depends on it.
        twice: Groups that occur twice in one block, where a step must be checked for improvement.
    """

    sizes: dict[str, int]
    blocks: tuple[Block, ...]
    places: dict[str, tuple[tuple[int, int], ...]]
    neighbours: dict[str, frozenset[str]] = field(default_factory=dict)
    twice: frozenset[str] = frozenset()

    @classmethod
    def of(cls, groups: PermutationGroups, shapes: dict[str, tuple[int, ...]]) -> Plan:
        """Plans the matching of an architecture.

        Args:
            groups: Its permutation groups.
            shapes: Shape of each tensor that counts; tensors of `groups` that are missing here are left out.
        """
        if groups.parents:
            raise ValueError(
                "Weight matching does not handle groups that are drawn separately for every unit of another group: "
                f"{', '.join(groups.parents)}. Leave them out of the groups (None or a length in their place)."
            )
        blocks = []
        for name, axes in groups.axes.items():
            if name in shapes:
                blocks += [block for block in _blocks(name, axes, shapes[name], groups.sizes) if any(block.factors)]
        places: dict[str, list[tuple[int, int]]] = {name: [] for name in groups.sizes}
        neighbours: dict[str, set[str]] = {name: set() for name in groups.sizes}
        twice = set()
        for index, block in enumerate(blocks):
            present = [factor for factor in block.factors if factor]
            for dim, factor in enumerate(block.factors):
                if factor:
                    places[factor].append((index, dim))
                    neighbours[factor].update(other for other in present if other != factor)
            twice |= {factor for factor in present if present.count(factor) > 1}
        for name in twice:
            neighbours[name].add(name)
        return cls(
            sizes={name: size for name, size in groups.sizes.items() if places[name]},
            blocks=tuple(blocks),
            places={name: tuple(where) for name, where in places.items()},
            neighbours={name: frozenset(others) for name, others in neighbours.items()},
            twice=frozenset(twice),
        )


def _blocks(name: str, axes: Sequence, shape: tuple[int, ...], sizes: dict[str, int]) -> list[Block]:
    dims = [(axis, length) for axis, length in zip(axes, shape, strict=True)]
    return [Block(name, steps, factors) for steps, factors in _expand_all(dims, 0, sizes)]


def _expand_all(parts: list[tuple], first: int, sizes: dict[str, int]) -> list[tuple[tuple, tuple]]:
    """Expands neighbouring dimensions, last to first, so that those before a split keep their numbers."""
    done: list[tuple[tuple, tuple]] = [((), ())]
    for dim in reversed(range(len(parts))):
        expression, length = parts[dim]
        made = _expand(expression, length, first + dim, sizes)
        done = [(steps + more, factors + later) for steps, later in done for more, factors in made]
    return done


def _expand(expression: Any, length: int, dim: int, sizes: dict[str, int]) -> list[tuple[tuple, tuple]]:
    if expression is None or isinstance(expression, int):
        return [((), (None,))]
    if isinstance(expression, str):
        return [((), (expression,))]
    (kind, parts), *_ = expression.items()
    lengths = tuple(_length(part, sizes) for part in parts)
    if kind == "product":
        split = (("split", dim, lengths),)
        inner = _expand_all(list(zip(parts, lengths, strict=True)), dim, sizes)
        return [(split + steps, factors) for steps, factors in inner]
    pieces, offset = [], 0
    for part, size in zip(parts, lengths, strict=True):
        piece = (("piece", dim, (offset, size)),)
        pieces += [(piece + steps, factors) for steps, factors in _expand(part, size, dim, sizes)]
        offset += size
    return pieces


def _length(expression: Any, sizes: dict[str, int]) -> int:
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return sizes[expression]
    (kind, parts), *_ = expression.items()
    lengths = [_length(part, sizes) for part in parts]
    return math.prod(lengths) if kind == "product" else sum(lengths)


@dataclass(frozen=True)
class _Run:
    """Where a run has led: the permuted networks, their permutations, their objectives (B,)."""

    tensors: dict[str, torch.Tensor]
    permutation: dict[str, torch.Tensor]
    value: torch.Tensor

    def copy(self) -> _Run:
        """Returns a run that does not change with this one."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        permutation = {name: index.clone() for name, index in self.permutation.items()}
        return _Run(tensors, permutation, self.value.clone())

    def or_better(self, other: _Run) -> _Run:
        """Takes the other run's networks where their objective is higher."""
        better = (other.value > self.value).nonzero()[:, 0]
        for mine, theirs in ((self.tensors, other.tensors), (self.permutation, other.permutation)):
            for name in mine:
                mine[name][better] = theirs[name][better]
        self.value[better] = other.value[better]
        return self


class Matcher:
    """Matches batches of networks to one reference.

    Args:
        plan: The plan of their architecture.
        reference: Tensors of the reference by name, float32 or float64, without a batch dimension.
    """

    def __init__(self, plan: Plan, reference: dict[str, torch.Tensor]):
        self.plan = plan
        self.targets = [block.view(reference[block.name][None])[0] for block in plan.blocks]
        self.device = self.targets[0].device
        self.rows = {
            (name, index, dim): _rows(self.targets[index], dim)
            for name, where in plan.places.items()
            for index, dim in where
        }
        squares = sum(target.double().square().sum().item() for target in self.targets)
        self.scale = math.sqrt(squares)

    def match(self, tensors: dict[str, torch.Tensor], seeds: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """Permutes a batch of networks, in place, towards the reference.

        One run goes twice from a first match that does not depend on the order in which the units come, built from
        the inputs onwards and from the outputs backwards: on trained networks the second usually ends higher. Every
        seed adds a run from random permutations, visiting groups in random orders. The best of all is kept, for each
        network on its own.

        Args:
            tensors: Networks, name -> (B, *shape), float32 or float64; permuted in place.
            seeds: One seed per further run; all networks share its draws.

        Returns:
            Permutations, name -> (B, size) of int64, from the networks as given to as they are left.
        """
        names = list(self.plan.sizes)
        copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(2)]
        best = self._from_start(copies[0], names).or_better(self._from_start(copies[1], names[::-1]))
        first = best.copy() if seeds else best
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            best = best.or_better(self._from_shuffle(first, generator))
        for name, tensor in tensors.items():
            tensor.copy_(best.tensors[name])
        return best.permutation

    def _from_start(self, tensors: dict[str, torch.Tensor], order: list[str]) -> _Run:
        views = [block.view(tensors[block.name]) for block in self.plan.blocks]
        permutation = self._start(views, order)
        self._descend(views, permutation, None)
        return _Run(tensors, permutation, self._value(views))

    def _from_shuffle(self, first: _Run, generator: torch.Generator) -> _Run:
        tensors = {name: tensor.clone() for name, tensor in first.tensors.items()}
        views = [block.view(tensors[block.name]) for block in self.plan.blocks]
        everything, permutation = torch.arange(len(views[0]), device=self.device), {}
        for name, size in self.plan.sizes.items():
            shuffle = torch.randperm(size, generator=generator).to(self.device).repeat(len(everything), 1)
            self._permute(views, name, everything, shuffle)
            permutation[name] = first.permutation[name].gather(1, shuffle)
        self._descend(views, permutation, generator)
        return _Run(tensors, permutation, self._value(views))

    def _start(self, views: list[torch.Tensor], order: list[str]) -> dict[str, torch.Tensor]:
        """Permutes each network to a first match that depends on the network only up to permutation.

        Group after group; where a block's other groups are not matched yet, weights are compared sorted along them,
        which bounds from above what the match can become.
        """
        everything = torch.arange(len(views[0]), device=self.device)
        start: dict[str, torch.Tensor] = {}
        for name in order:
            costs = torch.zeros((), device=self.device)
            for index, dim in self.plan.places[name]:
                factors = self.plan.blocks[index].factors
                unknown = [d for d, f in enumerate(factors) if f and d != dim and f not in start]
                wanted = _sorted_rows(self.targets[index][None], dim, unknown)[0]
                costs = costs + torch.matmul(wanted, _sorted_rows(views[index], dim, unknown).transpose(1, 2))
            start[name] = assign(costs)
            self._permute(views, name, everything, start[name])
        return start

    def _descend(self, views, total: dict[str, torch.Tensor], generator: torch.Generator | None) -> None:
        """Improves one group after the other until none can be; in the plan's order, or a random one per sweep."""
        names = list(self.plan.sizes)
        # A step counts only where it gains more than rounding can feign, so that no two equal optima alternate.
        norms = torch.stack([view.flatten(1).double().square().sum(1) for view in views]).sum(0)
        least = 64 * torch.finfo(views[0].dtype).eps * self.scale * norms.sqrt()
        waiting = {name: torch.ones(len(norms), dtype=torch.bool, device=self.device) for name in names}
        while any(flags.any() for flags in waiting.values()):
            order = names
            if generator is not None:
                order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
            for name in order:
                which = waiting[name].nonzero()[:, 0]
                waiting[name][:] = False
                if len(which) == 0:
                    continue
                changed, step = self._step(views, name, which, least)
                total[name][changed] = total[name][changed].gather(1, step)
                for other in self.plan.neighbours[name]:
                    waiting[other][changed] = True

    def _value(self, views: list[torch.Tensor]) -> torch.Tensor:
        parts = [(view * target).flatten(1).double().sum(1) for view, target in zip(views, self.targets, strict=True)]
        return torch.stack(parts).sum(0)

    def _step(self, views, name, which, least) -> tuple[torch.Tensor, torch.Tensor]:
        """Improves one group of the networks `which`: those that changed, and the permutation of each."""
        costs = self._costs(views, name, which)
        solution = assign(costs)
        here = costs.diagonal(dim1=1, dim2=2).sum(1)
        gain = costs.gather(2, solution[:, :, None])[:, :, 0].sum(1) - here
        better = gain > least[which]
        changed, solution = which[better], solution[better]
        if not len(changed):
            return changed, solution
        if name in self.plan.twice:
            before = self._objective(views, name, changed)
            self._permute(views, name, changed, solution)
            worse = self._objective(views, name, changed) - before <= least[changed]
            self._permute(views, name, changed[worse], solution[worse].argsort(1))
            return changed[~worse], solution[~worse]
        self._permute(views, name, changed, solution)
        return changed, solution

    def _costs(self, views: list[torch.Tensor], name: str, which: torch.Tensor) -> torch.Tensor:
        """Gain of putting unit j where the reference has unit i: (b, size, size)."""
        size, costs = self.plan.sizes[name], torch.zeros((), device=self.device)
        for index, dim in self.plan.places[name]:
            chosen = views[index] if len(which) == len(views[index]) else views[index][which]
            units = chosen.movedim(dim + 1, 1).reshape(len(which), size, -1)
            costs = costs + torch.matmul(self.rows[name, index, dim], units.transpose(1, 2))
        return costs

    def _objective(self, views: list[torch.Tensor], name: str, which: torch.Tensor) -> torch.Tensor:
        indices = {index for index, _ in self.plan.places[name]}
        parts = [(views[i][which] * self.targets[i]).flatten(1).double().sum(1) for i in indices]
        return torch.stack(parts).sum(0)

    def _permute(self, views: list[torch.Tensor], name: str, which: torch.Tensor, order: torch.Tensor) -> None:
        if not len(which):
            return
        for index, dim in self.plan.places[name]:
            view = views[index]
            if len(view) == 1:
                view.copy_(view.index_select(dim + 1, order[0]))
                continue
            shape = [1] * view.ndim
            shape[0], shape[dim + 1] = order.shape
            chosen = view[which]
            view[which] = chosen.gather(dim + 1, order.view(shape).expand_as(chosen))


def _rows(block: torch.Tensor, dim: int) -> torch.Tensor:
    return block.movedim(dim, 0).reshape(block.shape[dim], -1).contiguous()


def _sorted_rows(view: torch.Tensor, dim: int, unknown: list[int]) -> torch.Tensor:
    """Units of dimension `dim` as rows, (B, size, rest), values sorted along the dimensions `unknown`."""
    known = [d for d in range(view.ndim - 1) if d != dim and d not in unknown]
    rows = view.permute(0, *(d + 1 for d in (dim, *known, *unknown)))
    if unknown:
        rows = _sort(rows.flatten(2 + len(known)))
    return rows.reshape(*rows.shape[:2], -1)


def _sort(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cpu":  # many short rows: numpy sorts them several times faster
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def assign(costs: torch.Tensor) -> torch.Tensor:
    """Solves a batch of assignment problems for the largest total.

    Args:
        costs: Values (B, n, n), float32 or float64.

    Returns:
        For each row its column, (B, n) of int64. Where the best column of every row is another one, that is the
        answer; only the others go through `scipy.optimize.linear_sum_assignment`.
    """
    best = costs.argmax(2)
    taken = torch.zeros_like(best).scatter_(1, best, 1)
    hard = (taken.sum(1) < best.shape[1]).nonzero()[:, 0]
    if len(hard):
        matrices = costs[hard].cpu().numpy()
        answers = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in matrices]
        best[hard] = torch.from_numpy(np.stack(answers)).to(best.device)
    return best
