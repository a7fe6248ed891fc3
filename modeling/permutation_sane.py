"""Permutation groups of a network as plain data, and the code that applies them.

The units of a hidden layer can be reordered without changing the function of the network, if every tensor that they
touch is reordered with them. A group names such a set of units; for every axis of every tensor an expression says how
its entries are made of groups. How groups are found is not known here: they come from a file, from
`sane_hf.symmetry`, or from hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

# None (pinned), the name of a group, {"product": [...]} or {"sum": [...]} of such and of integers (pinned pieces)
Axis = Any
Permutation = dict[str, Tensor]


@dataclass(frozen=True)
class PermutationGroups:
    """Groups of interchangeable units and where they lie in the tensors of a network.

    Args:
        sizes (`dict[str, int]`): Units of each group.
        axes (`dict[str, tuple[Axis, ...]]`): For each tensor one expression per axis. `None`: pinned, the entries keep
            their place. A name: the axis is that group. `{"product": [a, b]}`: the axis is a view of axes `a` (outer)
            and `b` (inner), as after flattening a feature map. `{"sum": [a, b]}`: `a` and `b` lie one behind the
            other, as after a concatenation. An integer in either is a pinned piece of that length.
        parents (`dict[str, tuple[str, ...]]`): Groups whose permutation is drawn separately for every unit of the
            groups named, such as the channels of every attention head. A parent must lie in the same tensors.
        pinned (`dict[str, str]`): Why axes are pinned, for the reader; not used.

    A permutation is a dict of index tensors, one of shape `(size,)` per group, `(*parent sizes, size)` for a group
    with parents, counted in the new order of the parents; each with a leading axis `n` for n permutations at once.
    Along its axis, `new[i] = old[permutation[i]]`. Groups that are not named stay as they are.

    Raises:
        `ValueError`: On an expression that names an unknown group or is none of the above.

    Example:

    Two inputs, three hidden units, one output: the hidden units can be reordered.

    ```python
    >>> import torch
    >>> from sane_hf.modeling import PermutationGroups
    >>> groups = PermutationGroups(
    ...     sizes={"hidden": 3},
    ...     axes={"0.weight": ("hidden", None), "0.bias": ("hidden",), "2.weight": (None, "hidden")},
    ... )
    >>> weights = {
    ...     "0.weight": torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]),
    ...     "0.bias": torch.tensor([1.0, 2.0, 3.0]),
    ...     "2.weight": torch.tensor([[1.0, 2.0, 3.0]]),
    ... }
    >>> groups.apply(weights, {"hidden": torch.tensor([2, 0, 1])})["2.weight"]
    tensor([[3., 1., 2.]])

    ```
    """

    sizes: dict[str, int]
    axes: dict[str, tuple[Axis, ...]]
    parents: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"Group {name!r} has size {size!r}; it must be an integer from 1.")
        for group, parents in self.parents.items():
            for name in (group, *parents):
                if name not in self.sizes:
                    raise ValueError(f"The parents of group {group!r} name {name!r}, which has no size.")
        axes = {name: tuple(self._parsed(axis, name, top=True) for axis in found) for name, found in self.axes.items()}
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "parents", {group: tuple(names) for group, names in self.parents.items() if names})
        for name, found in axes.items():
            leaves = _groups_in(found)
            for group in leaves:
                for parent in self.parents.get(group, ()):
                    if leaves.count(parent) != 1:
                        raise ValueError(
                            f"Tensor {name!r} carries group {group!r}, whose parent {parent!r} it must carry once, "
                            f"not {leaves.count(parent)} times."
                        )

    def _parsed(self, axis: Axis, name: str, top: bool = False) -> Axis:
        if axis is None and top:
            return None
        if isinstance(axis, str):
            if axis not in self.sizes:
                raise ValueError(f"Tensor {name!r} names group {axis!r}, which has no size.")
            return axis
        if isinstance(axis, int) and not isinstance(axis, bool) and axis > 0:
            return axis
        if isinstance(axis, Mapping) and len(axis) == 1 and (kind := next(iter(axis))) in ("product", "sum"):
            return {kind: tuple(self._parsed(part, name) for part in axis[kind])}
        raise ValueError(
            f"Tensor {name!r} has the axis {axis!r}; it must be None, the name of a group, "
            '{"product": [...]} or {"sum": [...]} of groups and lengths.'
        )

    def to_dict(self) -> dict:
        """The groups as plain JSON data."""
        groups = {
            name: {"size": size, **({"parents": list(self.parents[name])} if name in self.parents else {})}
            for name, size in self.sizes.items()
        }
        axes = {name: [_plain(axis) for axis in found] for name, found in self.axes.items()}
        return {"version": 1, "groups": groups, "axes": axes, "pinned": dict(self.pinned)}

    @classmethod
    def from_dict(cls, data: Mapping) -> PermutationGroups:
        """Inverse of [`PermutationGroups.to_dict`].

        Raises:
            `ValueError`: On a version that this code does not know.
        """
        if data.get("version") != 1:
            raise ValueError(
                f"Permutation groups of version {data.get('version')!r}; this code reads version 1: upgrade it."
            )
        sizes = {name: group["size"] for name, group in data["groups"].items()}
        parents = {name: tuple(group["parents"]) for name, group in data["groups"].items() if "parents" in group}
        return cls(sizes, dict(data["axes"]), parents, dict(data.get("pinned", {})))

    def check(self, state_dict: Mapping[str, Tensor | Sequence[int]]) -> None:
        """Raise a `ValueError` naming the tensor and axis that do not fit, if any.

        Args:
            state_dict (`Mapping[str, Tensor | Sequence[int]]`): Tensors, or their shapes, such as those of a
                `TokenLayout`.
        """
        for name, axes in self.axes.items():
            if name not in state_dict:
                raise ValueError(f"The permutation groups name tensor {name!r}, which the network does not have.")
            found = state_dict[name]
            shape = tuple(found.shape if isinstance(found, Tensor) else found)
            if len(shape) != len(axes):
                raise ValueError(
                    f"Tensor {name!r} has shape {shape}; the permutation groups describe {len(axes)} axes."
                )
            for number, (axis, size) in enumerate(zip(axes, shape, strict=True)):
                if axis is not None and self._length(axis) != size:
                    raise ValueError(
                        f"Axis {number} of tensor {name!r} has {size} entries; its groups {_plain(axis)!r} "
                        f"have {self._length(axis)}."
                    )

    def identity(self) -> Permutation:
        """The permutation that changes nothing."""
        return {
            name: torch.arange(size).expand(*self._parent_sizes(name), size).clone()
            for name, size in self.sizes.items()
        }

    def random(self, generator: torch.Generator | None = None, n: int | None = None) -> Permutation:
        """Uniformly drawn permutations.

        Args:
            generator (`torch.Generator`, *optional*): Source of randomness; its device is that of the result.
            n (`int`, *optional*): How many to draw; each index tensor then has a leading axis of that size.

        Returns:
            `dict[str, Tensor]`: int64, of shape `(*parent sizes, size)` or `(n, *parent sizes, size)`.
        """
        lead = () if n is None else (n,)
        device = "cpu" if generator is None else generator.device
        return {
            name: torch.rand(
                *lead, *self._parent_sizes(name), size, generator=generator, dtype=torch.float64, device=device
            ).argsort(-1)
            for name, size in self.sizes.items()
        }

    def apply(self, state_dict: Mapping[str, Tensor], permutation: Permutation) -> dict[str, Tensor]:
        """A permuted copy of a network, which computes the same function.

        Args:
            state_dict (`Mapping[str, Tensor]`): The network.
            permutation (`dict[str, Tensor]`): One permutation, see the class.

        Returns:
            `dict[str, Tensor]`: New tensors in the order of `state_dict`; those without groups are plain copies.

        Raises:
            `ValueError`: If tensors do not fit the groups, or an index tensor is not a permutation of its group.
        """
        self.check(state_dict)
        batched, prepared = self._prepared(permutation)
        if batched:
            raise ValueError("apply takes one permutation; use flat_index for several at once.")
        for name, index in prepared.items():
            if not torch.equal(
                index.sort(-1).values, torch.arange(self.sizes[name], device=index.device).expand_as(index)
            ):
                raise ValueError(f"The index of group {name!r} is not a permutation of 0 to {self.sizes[name] - 1}.")
        permuted = {}
        for name, tensor in state_dict.items():
            axes = self.axes.get(name, ())
            groups = _groups_in(axes)
            if not groups:
                permuted[name] = tensor.clone()
            elif any(group in self.parents for group in groups):
                index = self._index(self._factors(axes, tensor.shape), (), prepared)[0]
                permuted[name] = tensor.reshape(-1)[index.to(tensor.device)].view(tensor.shape)
            else:
                for number, axis in enumerate(axes):
                    if _groups_in((axis,)):
                        index = self._index(self._factors((axis,), (0,)), (), prepared)[0]
                        tensor = tensor.index_select(number, index.to(tensor.device))
                permuted[name] = tensor
        return permuted

    def flat_index(self, layout: Any, permutation: Permutation) -> Tensor:
        """The permutation of a flat vector: `permuted = flat.gather(-1, index)` (of shape `(n, N)` both).

        Args:
            layout (`TokenLayout`): Layout of the flat vector. Tensors that it copies are not permuted.
            permutation (`dict[str, Tensor]`): One permutation or n of them, see the class.

        Returns:
            `Tensor` of shape `(N,)` or `(n, N)`, int64, on the device of the permutation.

        Raises:
            `ValueError`: If the layout or an index tensor does not fit the groups.
        """
        self.check(layout.shapes)
        batched, prepared = self._prepared(permutation)
        n, device = next(((len(index), index.device) for index in prepared.values()), (1, torch.device("cpu")))
        flat = torch.empty(n, layout.num_weights, dtype=torch.int64, device=device)
        for name, (start, stop) in layout.slices.items():
            if _groups_in(self.axes.get(name, ())):
                factors = self._factors(self.axes[name], layout.shapes[name])
                torch.add(self._index(factors, (), prepared), start, out=flat[:, start:stop])
            else:
                flat[:, start:stop] = torch.arange(start, stop, device=device)
        return flat if batched else flat[0]

    def _parent_sizes(self, group: str) -> tuple[int, ...]:
        return tuple(self.sizes[parent] for parent in self.parents.get(group, ()))

    def _length(self, axis: Axis) -> int:
        if isinstance(axis, int):
            return axis
        if isinstance(axis, str):
            return self.sizes[axis]
        ((kind, parts),) = axis.items()
        return (prod if kind == "product" else sum)(self._length(part) for part in parts)

    def _prepared(self, permutation: Permutation) -> tuple[bool, Permutation]:
        """Whether there are several, and all groups with the leading axis, which is 1 where there is only one."""
        prepared: Permutation = {}
        batched, n, device = False, 1, torch.device("cpu")
        for name, index in permutation.items():
            if name not in self.sizes:
                raise ValueError(f"The permutation names group {name!r}; the groups are {', '.join(self.sizes)}.")
            shape = (*self._parent_sizes(name), self.sizes[name])
            several = index.ndim == len(shape) + 1
            if tuple(index.shape[several:]) != shape or (
                prepared and (several, len(index) if several else 1) != (batched, n)
            ):
                raise ValueError(
                    f"The index of group {name!r} has shape {tuple(index.shape)}; it must be {shape}, "
                    "or that behind the same number n for all groups."
                )
            batched, n, device = several, len(index) if several else 1, index.device
            prepared[name] = index if several else index[None]
        for name, index in self.identity().items():
            if name not in prepared:
                prepared[name] = index.to(device).expand(n, *index.shape)
        return batched, prepared

    def _factors(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """A row-major tensor is the product of its axes: all factors from outer to inner, pinned neighbours as one."""
        factors: list[Axis] = []
        for axis, size in zip(axes, shape, strict=True):
            if isinstance(axis, dict) and "product" in axis:
                parts = self._factors(axis["product"], (0,) * len(axis["product"]))
            else:
                parts = [size if axis is None else axis]
            for part in parts:
                if isinstance(part, int) and factors and isinstance(factors[-1], int):
                    factors[-1] *= part
                else:
                    factors.append(part)
        return factors

    def _index(self, factors: Sequence[Axis], outer: Sequence[Axis], permutation: Permutation) -> Tensor:
        """Old positions in the product of `factors` for every new one: (n, *one axis per outer factor, positions).

        Outer factors are those of the products around; their axes have size 1 unless a group is nested in them.
        """
        names = [*outer, *factors]
        lengths = [self._length(factor) for factor in factors]
        device = next(iter(permutation.values())).device
        total = torch.zeros((1,) * (len(names) + 1), dtype=torch.int64, device=device)
        for number, factor in enumerate(factors):
            place = len(outer) + number
            if isinstance(factor, dict):
                part = self._pieces(factor["sum"], names, permutation).movedim(-1, place + 2).squeeze(place + 1)
            else:
                shape = [1] * len(names)
                shape[place] = lengths[number]
                if isinstance(factor, int):
                    part = torch.arange(factor, device=device).view(1, *shape)
                else:
                    part = permutation[factor]
                    parents = self.parents.get(factor, ())
                    if parents:
                        places = [names.index(parent) for parent in parents]
                        order = sorted(range(len(places)), key=places.__getitem__)
                        part = part.permute(0, *(axis + 1 for axis in order), len(places) + 1)
                        for parent, where in zip(parents, places, strict=True):
                            shape[where] = self.sizes[parent]
                        if places and max(places) > place:
                            part = part.movedim(-1, 1 + sum(where < place for where in places))
                    part = part.reshape(len(part), *shape)
            total = total * lengths[number] + part
        own = total.expand(*total.shape[: len(outer) + 1], *lengths)
        return own.flatten(len(outer) + 1)

    def _pieces(self, pieces: Sequence[Axis], names: Sequence[Axis], permutation: Permutation) -> Tensor:
        """Old positions in the concatenation of `pieces`: (n, *one axis per name, positions)."""
        parts, offset = [], 0
        for piece in pieces:
            parts.append(self._index(self._factors((piece,), (0,)), names, permutation) + offset)
            offset += self._length(piece)
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)


def permute(
    weights: Mapping[str, Tensor], groups: PermutationGroups, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A randomly permuted copy of a network, which computes the same function.

    Args:
        weights (`Mapping[str, Tensor]`): State dict of the network.
        groups (`PermutationGroups`): Its permutation groups.
        generator (`torch.Generator`, *optional*): Source of randomness.

    Returns:
        `dict[str, Tensor]`: New tensors.

    Raises:
        `ValueError`: If tensors do not fit the groups.
    """
    return groups.apply(weights, groups.random(generator))


def _groups_in(axes: Sequence[Axis]) -> list[str]:
    """Names of the groups in some axes, as often as they occur."""
    found = []
    for axis in axes:
        if isinstance(axis, str):
            found.append(axis)
        elif isinstance(axis, dict):
            found += _groups_in(next(iter(axis.values())))
    return found


def _plain(axis: Axis) -> Axis:
    if isinstance(axis, dict):
        return {kind: [_plain(part) for part in parts] for kind, parts in axis.items()}
    return axis
