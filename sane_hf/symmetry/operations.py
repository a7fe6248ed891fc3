"""What each operation of a network means for the permutation of axes.

One handler per kind of operation, in two tables, `FUNCTIONS` (callables) and `METHODS` (names of tensor methods);
`modules` has the table of module classes. A handler gets a `Context` and the operation's arguments, tensors replaced
by `Value`, ties axes together, and returns the axes of the result. An operation without a handler pins all it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from sane_hf.symmetry.axes import AxisNode, concatenation, pin, pinned, product, unify


class NotUnderstood(NotImplementedError):
    """An operation, or these arguments of it, have no rule; the caller pins what it touches."""


class Value(NamedTuple):
    """A tensor on its way through the network: its shape, and the node of each axis."""

    shape: tuple[int, ...]
    axes: list[AxisNode]


class Context(NamedTuple):
    """What a handler may know: the place, the shape of the result (or of several), and the axes of a parameter."""

    where: str
    shape: tuple[int, ...]
    shapes: list[tuple[int, ...]]
    parameter: Callable[[Any], Any]


def _axis(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def _pin_all(axes: Sequence[AxisNode], reason: str) -> None:
    for axis in axes:
        pin(axis, reason)


def tensors_in(arguments: Any) -> list[Value]:
    """Returns the tensors among arguments, however nested in tuples, lists and dicts."""
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, (list, tuple)):
        return [value for argument in arguments for value in tensors_in(argument)]
    return []


def _broadcast(values: Sequence[Value], where: str) -> list[AxisNode]:
    ndim = max(len(value.shape) for value in values)
    axes: list[AxisNode] = []
    for position in range(-ndim, 0):
        there = [value.axes[position] for value in values if len(value.shape) >= -position]
        wide = [axis for axis in there if axis.size != 1]
        axes.append(wide[0] if wide else there[0])
        for axis in wide[1:]:
            unify(wide[0], axis, where)
    return axes


def pointwise(ctx: Context, *args: Any, **kwargs: Any) -> list[AxisNode]:
    """Each element by itself, operands broadcast: their axes are permuted alike."""
    values = tensors_in((args, kwargs))
    if not values:
        raise NotUnderstood("no tensor among the arguments")
    return _broadcast(values, ctx.where)


def _dropout(ctx: Context, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> list[AxisNode]:
    if training and p:
        raise NotUnderstood("dropout that stays active in eval mode")
    return x.axes


def linear(ctx: Context, x: Value, weight: Value, bias: Value | None = None) -> list[AxisNode]:
    unify(x.axes[-1], weight.axes[1], ctx.where)
    if bias is not None:
        unify(weight.axes[0], bias.axes[0], ctx.where)
    return [*x.axes[:-1], weight.axes[0]]


def convolution(ctx: Context, x: Value, weight: Value, bias: Value | None, groups: int) -> list[AxisNode]:
    spatial = len(weight.shape) - 2
    channel = len(x.shape) - spatial - 1
    _pin_all([*x.axes[channel + 1 :], *weight.axes[2:]], f"{ctx.where}: positions of a convolution")
    inner = weight.axes[1]
    if groups == 1:
        unify(x.axes[channel], inner, ctx.where)
    else:
        # Channel c of the input is (group, c within the group); the weight has the second factor only, so the inner
        # permutation is shared by all groups, and whole groups may change places.
        group = AxisNode(groups)
        unify(x.axes[channel], product([group, inner]), ctx.where)
        unify(weight.axes[0], product([group, AxisNode(weight.shape[0] // groups)]), ctx.where)
    if bias is not None:
        unify(weight.axes[0], bias.axes[0], ctx.where)
    positions = [pinned(size, f"{ctx.where}: positions of a convolution") for size in ctx.shape[channel + 1 :]]
    return [*x.axes[:channel], weight.axes[0], *positions]


def _conv_function(ctx, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> list[AxisNode]:
    return convolution(ctx, x, weight, bias, groups)


def channel_norm(ctx: Context, x: Value, values: Sequence[Value | None], channel: int) -> list[AxisNode]:
    for value in values:
        if value is not None:
            unify(x.axes[channel], value.axes[0], ctx.where)
    return x.axes


def layer_norm(ctx, x, normalized_shape, weight=None, bias=None, eps=0.0) -> list[AxisNode]:
    for value in (weight, bias):
        if value is not None:
            for mine, other in zip(x.axes[-len(value.shape) :], value.axes, strict=True):
                unify(mine, other, ctx.where)
    return x.axes


def group_norm(ctx, x, num_groups, weight=None, bias=None, eps=0.0) -> list[AxisNode]:
    channels = x.shape[1]
    if 1 < num_groups < channels:
        unify(x.axes[1], product([AxisNode(num_groups), AxisNode(channels // num_groups)]), ctx.where)
    return channel_norm(ctx, x, (weight, bias), 1)


def pool(ctx: Context, x: Value, spatial: int) -> list[AxisNode]:
    if ctx.shapes:
        raise NotUnderstood("pooling that returns indices")
    first = len(x.shape) - spatial
    _pin_all(x.axes[first:], f"{ctx.where}: positions of a pooling")
    return [*x.axes[:first], *(pinned(size, f"{ctx.where}: positions of a pooling") for size in ctx.shape[first:])]


def reshape(ctx: Context, x: Value, *arguments: Any, **kwargs: Any) -> list[AxisNode]:
    """Regroups neighbouring axes: several into one (product), or one into several factors."""
    if any(isinstance(argument, torch.dtype) for argument in (*arguments, *kwargs.values())) or 0 in x.shape:
        raise NotUnderstood("a view as another dtype, or of an empty tensor")
    source = [axis for axis in x.axes if axis.size != 1]
    target = [size for size in ctx.shape if size != 1]
    made: list[AxisNode] = []
    i = j = 0
    while i < len(source):  # the smallest next runs of both with as many elements
        first_i, first_j, left, right = i, j, source[i].size, target[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * source[i].size, i + 1
            else:
                right, j = right * target[j], j + 1
        made.extend(_regroup(ctx, source[first_i:i], target[first_j:j]))
    rest = iter(made)
    return [pinned(1, "a single position") if size == 1 else next(rest) for size in ctx.shape]


def _regroup(ctx: Context, before: list[AxisNode], sizes: list[int]) -> list[AxisNode]:
    if len(sizes) == 1:
        return [product(before)]
    if len(before) == 1:
        factors = [AxisNode(size) for size in sizes]
        unify(before[0], product(factors), ctx.where)
        return factors
    reason = f"{ctx.where}: a reshape of {[axis.size for axis in before]} to {sizes} mixes axes"
    _pin_all(before, reason)
    return [pinned(size, reason) for size in sizes]


def _permute(ctx: Context, x: Value, *dims: Any, **kwargs: Any) -> list[AxisNode]:
    order = kwargs.get("dims", dims[0] if len(dims) == 1 else dims)
    return [x.axes[dim] for dim in order]


def _transpose(ctx: Context, x: Value, dim0: int, dim1: int) -> list[AxisNode]:
    axes = list(x.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return axes


def _reduce(ctx: Context, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> list[AxisNode]:
    """A symmetric reduction does not see the order of what it reduces; those axes stay free and end here."""
    if ctx.shapes or isinstance(dim, (bool, Value)):
        raise NotUnderstood("a reduction with these arguments")
    if set(kwargs) - {"dtype", "unbiased", "correction"}:
        raise NotUnderstood("a reduction with these arguments")
    every = range(len(x.shape)) if dim is None else ([dim] if isinstance(dim, int) else dim)
    gone = {_axis(d, len(x.shape)) for d in every}
    if keepdim:
        return [pinned(1, "a single position") if i in gone else axis for i, axis in enumerate(x.axes)]
    return [axis for i, axis in enumerate(x.axes) if i not in gone]


def _softmax(ctx: Context, x: Value, *args: Any, **kwargs: Any) -> list[AxisNode]:
    return x.axes


def _cat(ctx: Context, tensors: Sequence[Value], dim: int = 0, **kwargs: Any) -> list[AxisNode]:
    dim = _axis(kwargs.get("axis", dim), len(tensors[0].shape))
    axes = list(tensors[0].axes)
    for value in tensors[1:]:
        for position, axis in enumerate(value.axes):
            if position != dim:
                unify(axes[position], axis, ctx.where)
    axes[dim] = concatenation([value.axes[dim] for value in tensors])
    return axes


def _split(ctx: Context, x: Value, sizes: Any, dim: int = 0) -> list[list[AxisNode]]:
    dim = _axis(dim, len(x.shape))
    pieces = [AxisNode(shape[dim]) for shape in ctx.shapes]
    unify(x.axes[dim], concatenation(pieces), ctx.where)
    return [[*x.axes[:dim], piece, *x.axes[dim + 1 :]] for piece in pieces]


def _pad(ctx: Context, x: Value, pad: Sequence[int], mode: str = "constant", value: Any = None) -> list[AxisNode]:
    axes = list(x.axes)
    for position in range(len(pad) // 2):
        before, after = pad[2 * position], pad[2 * position + 1]
        dim = len(axes) - 1 - position
        if before == after == 0:
            continue
        reason = f"{ctx.where}: padding"
        if mode != "constant" or before < 0 or after < 0:
            pin(axes[dim], reason)
            axes[dim] = pinned(ctx.shape[dim], reason)
        else:
            axes[dim] = concatenation([pinned(before, reason), axes[dim], pinned(after, reason)])
    return axes


def _getitem(ctx: Context, x: Value, index: Any) -> list[AxisNode]:
    index = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is Ellipsis or isinstance(item, (int, slice))) for item in index):
        raise NotUnderstood("indexing by a tensor or a list")
    if any(isinstance(item, bool) for item in index):
        raise NotUnderstood("indexing by a truth value")
    used = sum(item is not None and item is not Ellipsis for item in index)
    fill = (slice(None),) * (len(x.shape) - used)
    place = next((i for i, item in enumerate(index) if item is Ellipsis), None)
    index = (*index, *fill) if place is None else (*index[:place], *fill, *index[place + 1 :])
    axes, source = [], iter(x.axes)
    for item in index:
        if item is None:
            axes.append(pinned(1, "a single position"))
            continue
        axis = next(source)
        if isinstance(item, int):
            pin(axis, f"{ctx.where}: one position is selected")
        elif item.indices(axis.size) == (0, axis.size, 1):
            axes.append(axis)
        else:
            pin(axis, f"{ctx.where}: a slice")
            axes.append(pinned(len(range(*item.indices(axis.size))), f"{ctx.where}: a slice"))
    return axes


def _matmul(ctx: Context, a: Value, b: Value) -> list[AxisNode]:
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise NotUnderstood("a product with a vector")
    unify(a.axes[-1], b.axes[-2], ctx.where)
    batch = [Value(value.shape[:-2], value.axes[:-2]) for value in (a, b)]
    outer = _broadcast(batch, ctx.where) if any(value.shape for value in batch) else []
    return [*outer, a.axes[-2], b.axes[-1]]


def embedding(ctx: Context, index: Value, weight: Value, padding_idx=None, max_norm=None, **kwargs) -> list[AxisNode]:
    if max_norm is not None:
        raise NotUnderstood("an embedding that renormalises its weights")
    _pin_all(index.axes, f"{ctx.where}: indices")
    pin(weight.axes[0], f"{ctx.where}: rows are looked up by number")
    return [*index.axes, weight.axes[1]]


def _functional_pools() -> dict[Callable, Callable]:
    pools = {}
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
        for spatial in (1, 2, 3):
            pools[getattr(F, f"{kind}{spatial}d")] = lambda ctx, x, *a, _n=spatial, **k: pool(ctx, x, _n)
    return pools


_UNARY = "relu relu_ tanh sigmoid silu gelu leaky_relu elu selu celu softplus hardtanh relu6 hardswish mish softsign"
_TORCH = "relu tanh sigmoid add sub mul div neg exp log sqrt rsqrt square abs pow clamp maximum minimum sin cos where"
_NAMES = "add add_ sub sub_ mul mul_ div div_ relu relu_ tanh tanh_ sigmoid sigmoid_ neg exp log sqrt rsqrt square abs"
_NAMES += " pow clamp clamp_ contiguous float double half to type clone detach"
FUNCTIONS: dict[Callable, Callable] = {
    **dict.fromkeys((getattr(F, name) for name in _UNARY.split()), pointwise),
    **dict.fromkeys((getattr(torch, name) for name in _TORCH.split()), pointwise),
    **dict.fromkeys((getattr(operator, n) for n in "add iadd sub isub mul imul truediv neg pow".split()), pointwise),
    **dict.fromkeys((F.softmax, F.log_softmax, torch.softmax, torch.log_softmax), _softmax),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), _conv_function),
    **dict.fromkeys((torch.mean, torch.sum, torch.amax, torch.amin, torch.logsumexp, torch.var, torch.std), _reduce),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze), reshape),
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, operator.matmul), _matmul),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout),
    **_functional_pools(),
    F.linear: linear,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.embedding: embedding,
    F.pad: _pad,
    torch.permute: _permute,
    torch.transpose: _transpose,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.chunk: _split,
    torch.split: _split,
    operator.getitem: _getitem,
}

METHODS: dict[str, Callable] = {
    **dict.fromkeys(_NAMES.split(), pointwise),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "logsumexp", "var", "std"), _reduce),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), reshape),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "permute": _permute,
    "transpose": _transpose,
    "chunk": _split,
    "split": _split,
}
