"""Prove, by running the network, that permutation groups leave its function unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from sane_hf.modeling.permutation_sane import PermutationGroups

TOLERANCE = 1e-9  # relative, in float64
SENSITIVITY = 1e-7  # a partial permutation must change the output by more than this, relative
CLEAR = 1e3 * SENSITIVITY  # enough not to look further
ROUNDS = 4  # fresh weights, inputs and permutations, since in one draw all units behind a ReLU may be dead


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`; true where every group holds.

    Attributes:
        error: Largest change of any output under permutations of all groups together, relative to the largest
            magnitude of that output.
        sensitivity: For each group the relative change of the output when the group's permutation is withheld from
            one of its tensors; small values prove nothing.
        failed: For each group that does not hold, why.
    """

    error: float
    sensitivity: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.failed


def verify(model: nn.Module, groups: PermutationGroups, example_inputs: Any, seed: int = 0) -> Verification:
    """Checks that permuting the groups does not change the function of a network.

    Works on a float64 copy in eval mode with random weights, scales, biases and inputs, and batch-norm statistics that
    fit these: a symmetry of such a network is one of the architecture. Two conditions per group: permuted everywhere,
    the outputs agree to 1e-9 relative; permuted everywhere but in one of its tensors, they do not (a group that
    nothing depends on proves nothing).

    Args:
        model: The network; it is copied, not changed.
        groups: The groups to check, found or written by hand.
        example_inputs: As in `find_permutation_groups`; floating values are replaced by random ones.
        seed: Seed of weights, inputs and permutations.

    Returns:
        A `Verification`, false where a group fails; `failed` says which and why.

    Raises:
        ValueError: The groups name tensors or sizes that the network does not have, or its outputs are not finite.

    Example:
        >>> from sane_hf.symmetry import find_permutation_groups
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> groups = find_permutation_groups(network, torch.zeros(4, 3))
        >>> bool(verify(network, groups, torch.zeros(4, 3)))
        True
    """
    groups.check(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).to(device="cpu", dtype=torch.float64).eval()
    error, sensitivity, failed = 0.0, dict.fromkeys(groups.sizes, 0.0), dict[str, str]()
    for _ in range(ROUNDS):
        args, kwargs = _random_inputs(example_inputs, generator)
        _randomise(model, generator)
        _calibrate_batch_norm(model, args, kwargs, generator)
        error = max(error, _round(model, groups, args, kwargs, generator, sensitivity, failed))
    for name, change in sensitivity.items():
        if name not in failed and not change > SENSITIVITY:
            failed[name] = f"withholding it from one of its tensors changes the output by {change:.1e} only"
    return Verification(error=error, sensitivity=sensitivity, failed=failed)


def _round(
    model: nn.Module,
    groups: PermutationGroups,
    args: tuple,
    kwargs: dict,
    generator: torch.Generator,
    sensitivity: dict[str, float],
    failed: dict[str, str],
) -> float:
    """Checks the groups on the weights that the model has now; adds to `sensitivity` and `failed`."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def outputs(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        model.load_state_dict(weights)
        with torch.no_grad():
            result = model(*args, **kwargs)
        return [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]

    expected = outputs(state)
    if not expected or not all(torch.isfinite(tensor).all() for tensor in expected):
        raise ValueError(
            f"{type(model).__name__} gives {'no floating' if not expected else 'non-finite'} outputs for random "
            "weights and inputs in float64, so that nothing can be verified. Choose example inputs that it can digest."
        )
    permutation, identity = _moving(groups, generator), groups.identity()
    error = _difference(expected, outputs(groups.apply(state, permutation)))
    if not error <= TOLERANCE:
        for name in groups.sizes:
            alone = _difference(expected, outputs(groups.apply(state, {**identity, name: permutation[name]})))
            if not alone <= TOLERANCE:
                failed[name] = f"permuting it changes the output by {alone:.1e} (relative)"
        if not failed:
            reason = f"permuting all groups together changes the output by {error:.1e} (relative)"
            failed.update(dict.fromkeys(groups.sizes, reason))
    for name in groups.sizes:
        if name not in failed and sensitivity[name] <= CLEAR:
            permuted = groups.apply(state, {**identity, name: permutation[name]})
            change = _withheld(groups, state, permuted, expected, outputs)
            sensitivity[name] = max(sensitivity[name], change)
    return error


def _withheld(groups, state, permuted, expected, outputs) -> float:
    """Largest change found by leaving out one tensor (aliases of one memory together), stopping at a clear one."""
    changed = [key for key in groups.axes if not torch.equal(state[key], permuted[key])]
    largest = 0.0
    for left_out in changed:
        same = {key for key in changed if torch.equal(state[key], state[left_out])}  # tied weights go together
        if len(same) == len(changed):
            continue
        partial = {key: state[key] if key in same else tensor for key, tensor in permuted.items()}
        largest = max(largest, _difference(expected, outputs(partial)))
        if largest > CLEAR:
            break
    return largest


def _moving(groups: PermutationGroups, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random permutations, none of them the identity."""
    permutation = groups.random(generator=generator)
    for name, order in permutation.items():
        if torch.equal(order, torch.arange(order.shape[-1]).expand_as(order)):
            permutation[name] = order.roll(1, -1)
    return permutation


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    worst = 0.0
    for left, right in zip(expected, found, strict=True):
        scale = left.abs().max().item() if left.numel() else 0.0
        change = (left - right).abs().max().item() if left.numel() else 0.0
        worst = max(worst, change / scale if scale else change)
        if math.isnan(change):
            return math.inf
    return worst


def _random_inputs(example_inputs: Any, generator: torch.Generator) -> tuple[tuple, dict]:
    def fresh(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value.cpu() if isinstance(value, torch.Tensor) else value

    if isinstance(example_inputs, Mapping):
        return (), {key: fresh(value) for key, value in example_inputs.items()}
    inputs = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    return tuple(fresh(value) for value in inputs), {}


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Gives every parameter random values of a useful scale, every row a scale of its own."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim < 2:
            scale = name.rpartition(".")[2] == "weight"  # of a norm: away from zero
            values = 1 + 0.3 * normal(*parameter.shape) if scale else 0.5 * normal(*parameter.shape)
        else:
            rows = torch.exp(0.3 * normal(parameter.shape[0], *[1] * (parameter.ndim - 1)))
            fan_in = max(1, parameter[0].numel())
            values = 1.4 / math.sqrt(fan_in) * rows * normal(*parameter.shape)
        parameter.copy_(values)


@torch.no_grad()
def _calibrate_batch_norm(model: nn.Module, args: tuple, kwargs: dict, generator: torch.Generator) -> None:
    """Sets the statistics of every batch norm near those of its input, so that no channel dies or drowns."""

    def calibrate(module: Any, inputs: tuple) -> None:
        if module.running_mean is None:
            return
        x = inputs[0].transpose(0, 1).flatten(1)
        spread = x.var(1, unbiased=False) + 0.1 * x.square().mean(1) + 1e-3
        noise = torch.randn(2, len(x), generator=generator, dtype=torch.float64)
        module.running_mean.copy_(x.mean(1) + 0.3 * spread.sqrt() * noise[0])
        module.running_var.copy_(spread * torch.exp(0.3 * noise[1]))

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(calibrate) for module in norms]
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
