"""Find the permutation groups of a network by following its axes through the operations it executes."""

from __future__ import annotations

import copy
import logging
import operator
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from sane_hf.modeling.permutation_sane import PermutationGroups
from sane_hf.symmetry.axes import AxisNode, express, find, first_reason, leaves, pin, pinned
from sane_hf.symmetry.certificate import Verification, verify
from sane_hf.symmetry.modules import MODULES
from sane_hf.symmetry.operations import FUNCTIONS, METHODS, Context, NotUnderstood, Value, tensors_in

logger = logging.getLogger(__name__)

_METADATA = {"size", "dim", "ndim", "numel", "shape", "dtype", "device", "is_floating_point", "item", "__len__"}
_TRACE_ERRORS = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
)
_WAY_OUT = (
    "Move the data-dependent part out of `forward`, or write the groups by hand as a PermutationGroups and check them "
    "with sane_hf.symmetry.verify."
)


def find_permutation_groups(model: nn.Module, example_inputs: Any) -> PermutationGroups:
    """Finds which hidden units of a network may change places without changing its function.

    The network is traced with `torch.fx`; each operation says how the axes of its operands belong together. What has
    no rule is pinned, with the reason in `PermutationGroups.pinned`. The result is certified by `verify` before it is
    returned: a group that fails is pinned and the rest is certified again.

    Args:
        model: The network. It is copied, not changed; eval mode is assumed.
        example_inputs: A tensor, a tuple or list of tensors (positional), or a mapping of names to tensors, with the
            shapes and dtypes of real inputs; values do not matter.

    Returns:
        The groups, as data: sizes by group name, one expression per axis of each permutable tensor, reasons for the
        pinned axes. Groups are named after the tensor that they leave (``conv1`` for ``conv1.weight``).

    Raises:
        ValueError: The network cannot be traced or run on the example inputs, or lies on the meta device.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        >>> groups = find_permutation_groups(network, torch.zeros(4, 3))
        >>> groups.sizes
        {'0': 5}
        >>> groups.axes["2.weight"]
        (None, '0')
    """
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError(
            f"{type(model).__name__} lies on the meta device, where its groups cannot be certified. Build it with "
            "real weights (any values will do), for example with `model.to_empty(device='cpu')` and an initialisation."
        )
    model = copy.deepcopy(model).eval()
    # certificate.py runs in double precision; axes do not depend on precision, so tracing keeps the network's own.
    propagation = _Propagation(model, _trace(model))
    propagation.follow(_positional(propagation.graph_module, example_inputs))
    while True:
        groups, nodes = propagation.groups()
        if not groups.sizes:
            return groups
        certificate: Verification = verify(model, groups, example_inputs)
        if certificate:
            return groups
        for name, reason in certificate.failed.items():
            logger.warning("group %s of %s is pinned: %s", name, type(model).__name__, reason)
            pin(nodes[name], f"not certified: {reason}")


class _Tracer(fx.Tracer):
    """Remembers which submodule was being traced, so that an error can name it."""

    place = ""

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        before, self.place = self.place, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.place = before
        return result


def _trace(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        with torch.no_grad():
            return fx.GraphModule(model, tracer.trace(model))
    except _TRACE_ERRORS as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        line = f", line {frames[-1].lineno} of {frames[-1].filename}: {frames[-1].line}" if frames else ""
        place = f"submodule {tracer.place!r}" if tracer.place else "the top module"
        raise ValueError(
            f"{type(model).__name__} cannot be traced at {place}{line} ({type(error).__name__}: {error}). {_WAY_OUT}"
        ) from error


def _positional(graph: fx.GraphModule, example_inputs: Any) -> list[Any]:
    """Orders named inputs as the graph's placeholders; unnamed ones are taken as they come."""
    if isinstance(example_inputs, Mapping):
        given = dict(example_inputs)
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        unknown = sorted(set(given) - {node.target for node in places})
        missing = [node.target for node in places if node.target not in given and not node.args]
        if unknown or missing:
            raise ValueError(
                f"example_inputs must name the arguments of forward ({', '.join(n.target for n in places)}): "
                f"unknown {unknown}, missing {missing}."
            )
        return [given[node.target] if node.target in given else node.args[0] for node in places]
    return list(example_inputs) if isinstance(example_inputs, (tuple, list)) else [example_inputs]


def _storage_key(tensor: torch.Tensor) -> tuple:
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return (tensor.untyped_storage().data_ptr(), *view) if tensor.numel() else (id(tensor), *view)


class _Propagation(fx.Interpreter):
    """Runs the graph on the example inputs and carries, beside every tensor, the nodes of its axes."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule):
        super().__init__(graph, garbage_collect_values=False)
        self.model = model
        self.graph_module = graph
        self.values: dict[fx.Node, Any] = {}  # result of each node, tensors replaced by Value
        self.state = dict(model.state_dict(keep_vars=True))
        self.parameters = {id(parameter) for parameter in model.parameters()}
        self.used: dict[tuple, list[AxisNode]] = {}  # axes by storage, so that tied weights share them
        self.known = {_storage_key(tensor) for tensor in self.state.values()}
        views: dict[int, set[tuple]] = {}
        for tensor in self.state.values():
            views.setdefault(tensor.untyped_storage().data_ptr(), set()).add(_storage_key(tensor))
        self.overlapping = {pointer for pointer, keys in views.items() if pointer and len(keys) > 1}

    def follow(self, inputs: list[Any]) -> None:
        try:
            with torch.no_grad():
                self.run(*inputs)
        except _TRACE_ERRORS as error:
            raise ValueError(
                f"{type(self.model).__name__} does not run on the example inputs "
                f"{[tuple(i.shape) if isinstance(i, torch.Tensor) else i for i in inputs]} "
                f"({type(error).__name__}: {error}). Pass inputs of the shapes and dtypes that its forward takes."
            ) from error

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n] = self._propagate(n, result)
        return result

    def parameter(self, tensor: torch.Tensor | None) -> Value | None:
        """Axes of a parameter or statistic, created at its first use."""
        if tensor is None:
            return None
        key = _storage_key(tensor)
        if key not in self.used:
            axes = [AxisNode(size) for size in tensor.shape]
            if not tensor.is_floating_point():
                axes = [pinned(size, f"dtype {tensor.dtype}") for size in tensor.shape]
            elif key not in self.known:
                axes = [pinned(size, "not in the state dict") for size in tensor.shape]
            elif key[0] in self.overlapping:
                axes = [pinned(size, "shares memory with another tensor of another shape") for size in tensor.shape]
            self.used[key] = axes
        return Value(tuple(tensor.shape), self.used[key])

    def _propagate(self, n: fx.Node, result: Any) -> Any:
        given: Any = map_arg((n.args, n.kwargs), lambda node: self.values[node])
        arguments, keywords = given
        if n.op == "placeholder":
            return _fixed(result, "an input of the network")
        if n.op == "output":
            _pin_values(arguments, "an output of the network")
            return None
        if n.op == "get_attr":
            if isinstance(result, torch.Tensor) and id(result) in self.parameters:
                return self.parameter(result)
            return _fixed(result, f"{n.target} is a constant of the network")
        if n.target is operator.getitem and not isinstance(arguments[0], Value):
            return arguments[0][arguments[1]]  # one of several results of an earlier operation, or of a shape
        name = arguments[1] if n.target is getattr else n.target
        if name in _METADATA and not isinstance(result, torch.Tensor):
            return result
        handler, module = self._handler(n)
        if module is None and not tensors_in((arguments, keywords)):
            return _fixed(result, f"{n.name} is a constant of the network")
        where = f"{n.name} ({self._describe(n, module)})"
        if module is not None:
            arguments = (module, *arguments)
        reason = f"{where} has no rule"
        if handler is not None:
            several = isinstance(result, (tuple, list))
            shapes = [tuple(tensor.shape) for tensor in result] if several else []
            shape = () if several else tuple(result.shape)
            try:
                axes = handler(Context(where, shape, shapes, self.parameter), *arguments, **keywords)
                return _checked(axes, result)
            except NotUnderstood as error:
                reason = f"{where}: {error}"
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                reason = f"{where}: arguments that its rule does not know ({error})"
        _pin_values((arguments, keywords), reason)
        if module is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                _pin_values(self.parameter(tensor), reason)
        return _fixed(result, reason)

    def _handler(self, n: fx.Node) -> tuple[Any, nn.Module | None]:
        target: Any = n.target
        if n.op == "call_function":
            return FUNCTIONS.get(target), None
        if n.op == "call_method":
            return METHODS.get(target), None
        module = self.fetch_attr(target)
        hooked = module._forward_hooks or module._forward_pre_hooks
        return (None if hooked else MODULES.get(type(module))), module

    def _describe(self, n: fx.Node, module: nn.Module | None) -> str:
        if module is not None:
            return type(module).__name__
        return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))

    def groups(self) -> tuple[PermutationGroups, dict[str, AxisNode]]:
        """Collects what is free: the groups as data, and the node of each."""
        names: dict[AxisNode, str] = {}
        keys = {_storage_key(tensor): key for key, tensor in reversed(self.state.items())}
        used = [(keys[storage], nodes) for storage, nodes in self.used.items() if storage in keys]  # in order of use
        first = [(key, nodes[:1]) for key, nodes in used]
        for key, nodes in (*first, *used):  # a group is named after the tensor that it leaves, where there is one
            for leaf in (leaf for node in nodes for leaf in leaves(node)):
                if leaf not in names:
                    names[leaf] = _fresh(key, names)
        axes, reasons = {}, {}
        for key, tensor in self.state.items():
            if _storage_key(tensor) not in self.used:
                reasons[key] = "not used when the network runs"
                continue
            nodes = self.used[_storage_key(tensor)]
            expressions = tuple(express(node, names) for node in nodes)
            if any(expression is not None for expression in expressions):
                axes[key] = expressions
            for index, (node, expression) in enumerate(zip(nodes, expressions, strict=True)):
                if expression is None and node.size > 1:
                    reasons[f"{key}[{index}]"] = first_reason(node)
        found = {names[leaf]: leaf for leaf in sorted(names, key=lambda leaf: leaf.number)}  # in order of use
        sizes = {name: leaf.size for name, leaf in found.items()}
        return PermutationGroups(sizes=sizes, axes=axes, pinned=reasons), found


def _fresh(key: str, names: dict[AxisNode, str]) -> str:
    base = key.rpartition(".")[0] or key
    name, number = base, 2
    while name in names.values():
        name, number = f"{base}.{number}", number + 1
    return name


def _checked(axes: Any, result: Any) -> Any:
    """Turns a handler's answer into values, refusing one that does not have the shape of the real result."""
    if isinstance(result, torch.Tensor):
        if [axis.size for axis in axes] != list(result.shape):
            raise NotUnderstood(f"the rule gives sizes {[a.size for a in axes]}, the result has {list(result.shape)}")
        return Value(tuple(result.shape), [find(axis) for axis in axes])
    return type(result)(_checked(part, tensor) for part, tensor in zip(axes, result, strict=True))


def _fixed(result: Any, reason: str) -> Any:
    if isinstance(result, torch.Tensor):
        return Value(tuple(result.shape), [pinned(size, reason) for size in result.shape])
    if isinstance(result, Mapping):
        return {key: _fixed(part, reason) for key, part in result.items()}
    if isinstance(result, (tuple, list)):
        return [_fixed(part, reason) for part in result]
    return result


def _pin_values(values: Any, reason: str) -> None:
    if isinstance(values, Value):
        for axis in values.axes:
            pin(axis, reason)
    elif isinstance(values, Mapping):
        _pin_values(list(values.values()), reason)
    elif isinstance(values, (tuple, list)):
        for value in values:
            _pin_values(value, reason)
