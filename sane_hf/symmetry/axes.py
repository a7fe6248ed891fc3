"""Axes as expressions: the algebra underneath finding permutation groups.

Every axis of every tensor of a network is a node. Operations tie nodes together (`unify`), split them into factors
(`product`) or pieces (`concatenation`), or forbid their permutation (`pin`). What is left free at the end is a group.
Whatever does not fit together is pinned: a mistake costs a symmetry, never correctness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_COUNTER = itertools.count()


class AxisNode:
    """One axis, or one factor or piece of an axis.

    Attributes:
        size: Number of positions on the axis.
        parts: Factors (outer to inner) or pieces (in order) that make up the axis; empty for a plain axis.
        kind: "" for a plain axis, "product" or "sum" where `parts` define it.
        reason: Why the axis must not be permuted; "" while it may be.
    """

    __slots__ = ("kind", "number", "parent", "parts", "reason", "size")

    def __init__(self, size: int, kind: str = "", parts: Sequence[AxisNode] = (), reason: str = ""):
        self.size = size
        self.kind = kind
        self.parts = tuple(parts)
        self.reason = reason
        self.parent: AxisNode | None = None
        self.number = next(_COUNTER)


def find(node: AxisNode) -> AxisNode:
    """Returns the representative of all nodes unified with `node`."""
    while node.parent is not None:
        if node.parent.parent is not None:
            node.parent = node.parent.parent
        node = node.parent
    return node


def pinned(size: int, reason: str) -> AxisNode:
    """Returns a new axis that must not be permuted."""
    return AxisNode(size, reason=reason or "pinned")


def pin(node: AxisNode, reason: str) -> None:
    """Forbids the permutation of an axis and of everything it is made of."""
    node = find(node)
    if not node.reason:
        node.reason = reason or "pinned"
    for part in node.parts:
        if not find(part).reason:
            pin(part, reason)


def is_pinned(node: AxisNode) -> bool:
    """Returns whether no part of the axis may be permuted."""
    node = find(node)
    return bool(node.reason) or (bool(node.parts) and all(is_pinned(part) for part in node.parts))


def product(factors: Sequence[AxisNode]) -> AxisNode:
    """Returns the axis that runs over all combinations of `factors`, outer to inner, as a flatten makes it."""
    kept = [factor for factor in factors if factor.size != 1]
    if len(kept) == 1:
        return kept[0]
    size = math.prod(factor.size for factor in factors)
    if all(is_pinned(factor) for factor in kept):
        return pinned(size, find(kept[0]).reason if kept else "a single position")
    return AxisNode(size, "product", kept)


def concatenation(pieces: Sequence[AxisNode]) -> AxisNode:
    """Returns the axis that lays `pieces` end to end, as a concatenation makes it."""
    kept = [piece for piece in pieces if piece.size != 0]
    if len(kept) == 1:
        return kept[0]
    size = sum(piece.size for piece in kept)
    if all(is_pinned(piece) for piece in kept):
        return pinned(size, find(kept[0]).reason if kept else "no positions")
    return AxisNode(size, "sum", kept)


def unify(first: AxisNode, second: AxisNode, where: str) -> AxisNode:
    """States that two axes are permuted alike; where that cannot be, both are pinned.

    Args:
        first: An axis.
        second: An axis of the same size.
        where: The operation that ties them, for the recorded reason.

    Returns:
        The representative of the unified axes.
    """
    first, second = find(first), find(second)
    if first is second:
        return first
    if first.size != second.size:
        pin(first, f"{where}: sizes {first.size} and {second.size} do not match")
        pin(second, f"{where}: sizes {first.size} and {second.size} do not match")
        return first
    if first.reason or second.reason:
        pin(first, second.reason)
        pin(second, first.reason)
        return first
    if not first.kind and not second.kind:
        old, new = sorted((first, second), key=lambda node: node.number)
        new.parent = old
        return old
    if not first.kind or not second.kind:
        plain, made = (first, second) if not first.kind else (second, first)
        plain.parent = made
        return made
    same = first.kind == second.kind and [p.size for p in first.parts] == [p.size for p in second.parts]
    if not same:
        reason = f"{where}: the axis of size {first.size} is divided in two ways that do not align"
        pin(first, reason)
        pin(second, reason)
        return first
    second.parent = first
    for mine, other in zip(first.parts, second.parts, strict=True):
        unify(mine, other, where)
    return first


def leaves(node: AxisNode) -> list[AxisNode]:
    """Returns the free plain axes that an axis is made of, outer to inner."""
    node = find(node)
    if node.reason or node.size == 1:
        return []
    if not node.kind:
        return [node]
    return [leaf for part in node.parts for leaf in leaves(part)]


def express(node: AxisNode, names: dict[AxisNode, str]) -> str | dict | None:
    """Writes an axis as plain data: None, a group's name, or a product or sum of those and of pinned sizes.

    Args:
        node: The axis.
        names: Name of the group of each free plain axis.

    Returns:
        The expression as `sane_hf.modeling.permutation_sane.PermutationGroups.axes` holds it.
    """
    node = find(node)
    if not leaves(node):
        return None
    if not node.kind:
        return names[node]
    parts = [express(part, names) for part in node.parts]
    return {node.kind: [part.size if made is None else made for part, made in zip(node.parts, parts, strict=True)]}


def first_reason(node: AxisNode) -> str:
    """Returns why an axis is pinned ("" where it is free)."""
    node = find(node)
    if node.reason or not node.parts:
        return node.reason
    return next((reason for reason in map(first_reason, node.parts) if reason), "")
