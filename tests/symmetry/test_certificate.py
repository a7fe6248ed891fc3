"""The certificate must refuse groups that change the function, and groups that prove nothing."""

import pytest
import torch
from torch import nn

from sane_hf.modeling.permutation_sane import PermutationGroups
from sane_hf.symmetry import find_permutation_groups, tracing, verify


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


RIGHT = {
    "0.weight": ("a", None),
    "0.bias": ("a",),
    "2.weight": ("b", "a"),
    "2.bias": ("b",),
    "4.weight": (None, "b"),
}


def test_right_groups_pass_with_their_figures():
    result = verify(network(), PermutationGroups({"a": 6, "b": 4}, RIGHT), torch.zeros(2, 3))
    assert result
    assert result.error < 1e-12
    assert set(result.sensitivity) == {"a", "b"}
    assert min(result.sensitivity.values()) > 1e-3


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"0.bias": (None,)}, "a"),
        ({"2.bias": ("b",), "4.weight": (None, None)}, "b"),
        ({"2.weight": ("b", {"product": [2, "c"]}), "0.weight": ("a", None)}, "a"),
    ],
)
def test_wrong_groups_are_named(change, wrong):
    sizes = {"a": 6, "b": 4} | ({"c": 3} if "c" in str(change) else {})
    result = verify(network(), PermutationGroups(sizes, RIGHT | change), torch.zeros(2, 3))
    assert not result
    assert wrong in result.failed
    assert "changes the output" in result.failed[wrong]


def test_a_group_that_nothing_depends_on_proves_nothing():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 5)

        def forward(self, x):
            return self.used(x)

    groups = PermutationGroups({"idle": 5}, {"idle.weight": ("idle", None), "idle.bias": ("idle",)})
    result = verify(Idle(), groups, torch.zeros(2, 3))
    assert not result
    assert result.error == 0
    assert "only" in result.failed["idle"]


def test_a_wrong_rule_costs_the_group_not_correctness(monkeypatch):
    """As if someone had listed the flip as pointwise."""
    monkeypatch.setitem(tracing.FUNCTIONS, torch.flip, lambda ctx, x, dims: x.axes)

    class Flips(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)])

        def forward(self, x):
            x = torch.flip(torch.tanh(self.layers[0](x)), (1,))
            return self.layers[2](torch.tanh(self.layers[1](x)))

    groups = find_permutation_groups(Flips(), torch.zeros(2, 3))
    assert groups.sizes == {"layers.1": 5}
    assert groups.pinned["layers.0.bias[0]"].startswith("not certified: permuting it changes the output")


def test_groups_of_another_network_are_refused():
    with pytest.raises(ValueError, match="'9.weight'"):
        verify(network(), PermutationGroups({"a": 6}, {"9.weight": ("a", None)}), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Axis 0 of tensor '0.weight'"):
        verify(network(), PermutationGroups({"a": 5}, {"0.weight": ("a", None)}), torch.zeros(2, 3))


def test_networks_without_finite_outputs_are_refused():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.log(-x.abs())

    with pytest.raises(ValueError, match="non-finite outputs"):
        verify(Broken(), PermutationGroups({}, {}), torch.zeros(2, 3))
