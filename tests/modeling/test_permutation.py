"""Permutation groups as data: the function of the network does not change, whatever is drawn."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from sane_hf.modeling import PermutationGroups, TokenLayout, permute


class Residual(nn.Module):
    """A residual CNN with batch norm, whose last feature map is flattened into the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1)
        self.outer = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6 * 2 * 2, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.norm(self.stem(images)).relu()
        stream = stream + self.outer(self.inner(stream).tanh())
        return self.head(nn.functional.max_pool2d(stream, 3).flatten(1))


RESIDUAL = PermutationGroups(
    sizes={"stream": 6, "inner": 4},
    axes={
        "stem.weight": ("stream", None, None, None),
        "norm.weight": ("stream",),
        "norm.bias": ("stream",),
        "norm.running_mean": ("stream",),
        "norm.running_var": ("stream",),
        "inner.weight": ("inner", "stream", None, None),
        "inner.bias": ("inner",),
        "outer.weight": ("stream", "inner", None, None),
        "outer.bias": ("stream",),
        "head.weight": (None, {"product": ["stream", 2, 2]}),
    },
    pinned={"head.weight": "axis 0: output of the network"},
)


class Heads(nn.Module):
    """Units in groups (a grouped convolution of size 1), concatenated with the raw input: nested groups and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 12, 1)
        self.grouped = nn.Conv1d(12, 6, 1, groups=3)
        self.last = nn.Conv1d(6 + 4, 2, 1)

    def forward(self, signal: Tensor) -> Tensor:
        hidden = self.grouped(self.first(signal).relu()).relu()
        return self.last(torch.cat([hidden, signal], 1))


HEADS = PermutationGroups(
    sizes={"group": 3, "into": 4, "out": 2},
    axes={
        "first.weight": ({"product": ["group", "into"]}, None, None),
        "first.bias": ({"product": ["group", "into"]},),
        "grouped.weight": ({"product": ["group", "out"]}, "into", None),
        "grouped.bias": ({"product": ["group", "out"]},),
        "last.weight": (None, {"sum": [{"product": ["group", "out"]}, 4]}, None),
    },
    parents={"into": ("group",), "out": ("group",)},
)


def small_cnn() -> tuple[nn.Module, PermutationGroups, Tensor]:
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 7), nn.Linear(7, 3)
    )
    axes = {
        "0.weight": ("a", None, None, None),
        "0.bias": ("a",),
        "2.weight": ("b", "a", None, None),
        "2.bias": ("b",),
        "5.weight": ("c", {"product": ["b", 16]}),
        "5.bias": ("c",),
        "6.weight": (None, "c"),
    }
    return module, PermutationGroups({"a": 8, "b": 6, "c": 7}, axes), torch.randn(4, 1, 8, 8)


def mlp() -> tuple[nn.Module, PermutationGroups, Tensor]:
    module = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 11), nn.ReLU(), nn.Linear(11, 2))
    axes = {
        "0.weight": ("a", None),
        "0.bias": ("a",),
        "2.weight": ("b", "a"),
        "2.bias": ("b",),
        "4.weight": (None, "b"),
    }
    return module, PermutationGroups({"a": 9, "b": 11}, axes), torch.randn(4, 5)


def residual() -> tuple[nn.Module, PermutationGroups, Tensor]:
    module = Residual()
    for tensor in (module.norm.weight, module.norm.bias, module.norm.running_mean, module.norm.running_var):
        tensor.data.uniform_(0.5, 2)
    return module, RESIDUAL, torch.randn(4, 3, 8, 8)


def heads() -> tuple[nn.Module, PermutationGroups, Tensor]:
    return Heads(), HEADS, torch.randn(3, 4, 5)


NETWORKS = [small_cnn, mlp, residual, heads]


@pytest.mark.parametrize("make", NETWORKS)
def test_permuting_leaves_the_function_unchanged(make) -> None:
    module, groups, inputs = make()
    module, inputs = module.double().eval(), inputs.double()
    weights = module.state_dict()
    groups.check(weights)
    permuted = permute(weights, groups, torch.Generator().manual_seed(2))
    assert list(permuted) == list(weights)
    outputs = torch.func.functional_call(module, permuted, inputs)
    assert torch.allclose(outputs, module(inputs), rtol=0, atol=1e-12)
    for name in groups.axes:
        assert not torch.equal(permuted[name], weights[name]), name
    for name, tensor in permuted.items():
        assert tensor.data_ptr() != weights[name].data_ptr()
    same = groups.apply(weights, groups.identity())
    assert all(torch.equal(same[name], weights[name]) for name in weights)


@pytest.mark.parametrize("make", NETWORKS)
def test_one_wrong_group_changes_the_function(make) -> None:
    """The test above can fail: permuting one tensor alone is noticed."""
    module, groups, inputs = make()
    module, inputs = module.double().eval(), inputs.double()
    weights = module.state_dict()
    name = next(iter(groups.axes))
    permuted = permute(weights, groups, torch.Generator().manual_seed(2))
    outputs = torch.func.functional_call(module, {**weights, name: permuted[name]}, inputs)
    assert not torch.allclose(outputs, module(inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("rows", ["cut", "equal"])
def test_flat_index_equals_apply_for_many_permutations(make, rows: str) -> None:
    module, groups, _ = make()
    weights = module.state_dict()
    layout = TokenLayout.plan(weights, 5, rows)
    permutations = groups.random(torch.Generator().manual_seed(0), n=7)
    index = groups.flat_index(layout, permutations)
    assert index.shape == (7, layout.num_weights)
    permuted = layout.flatten(weights).expand(7, -1).gather(-1, index)
    for number in range(7):
        one = {name: drawn[number] for name, drawn in permutations.items()}
        assert torch.equal(permuted[number], layout.flatten(groups.apply(weights, one)))
        assert torch.equal(groups.flat_index(layout, one), index[number])


def test_permutations_are_uniform_seeded_and_differ() -> None:
    groups = PermutationGroups({"a": 3}, {"w": ("a",)})
    drawn = groups.random(torch.Generator().manual_seed(0), n=6000)["a"]
    assert torch.equal(drawn, groups.random(torch.Generator().manual_seed(0), n=6000)["a"])
    _, counts = torch.unique(drawn, dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 150  # five standard deviations
    assert HEADS.random(n=4)["into"].shape == (4, 3, 4)
    assert HEADS.random()["into"].shape == (3, 4)


def test_nested_permutations_wherever_the_parent_lies() -> None:
    """Against loops: the child is drawn per new index of its parent, be it before, behind or around it."""
    groups = PermutationGroups(
        sizes={"h": 3, "d": 2, "e": 4},
        axes={
            "around": ({"product": ["h", {"sum": ["d", 2, "d"]}]}, "e"),
            "behind": ("d", None, "h"),
            "sum": ({"sum": ["e", {"product": ["e", 2]}, 1]}, None),
        },
        parents={"d": ["h"]},
    )
    weights = {"around": torch.randn(18, 4), "behind": torch.randn(2, 5, 3), "sum": torch.randn(13, 2)}
    drawn = groups.random(torch.Generator().manual_seed(3))
    permuted = groups.apply(weights, drawn)
    h_of, d_of, e_of = (drawn[name].tolist() for name in "hde")
    for h in range(3):
        for d in range(2):
            new, old = h * 6 + d, h_of[h] * 6 + d_of[h][d]
            assert torch.equal(permuted["around"][new], weights["around"][old][drawn["e"]])
            assert torch.equal(permuted["around"][new + 4], weights["around"][old + 4][drawn["e"]])
            pinned = weights["around"][h_of[h] * 6 + 2 + d]
            assert torch.equal(permuted["around"][h * 6 + 2 + d], pinned[drawn["e"]])
            assert torch.equal(permuted["behind"][d, :, h], weights["behind"][d_of[h][d], :, h_of[h]])
    for e in range(4):
        assert torch.equal(permuted["sum"][e], weights["sum"][e_of[e]])
        assert torch.equal(permuted["sum"][4 + 2 * e], weights["sum"][4 + 2 * e_of[e]])
    assert torch.equal(permuted["sum"][12], weights["sum"][12])


def test_json_round_trip() -> None:
    for groups in (RESIDUAL, HEADS):
        data = json.loads(json.dumps(groups.to_dict()))
        assert PermutationGroups.from_dict(data) == groups
    assert HEADS.to_dict()["groups"]["into"] == {"size": 4, "parents": ["group"]}
    with pytest.raises(ValueError, match="version 2"):
        PermutationGroups.from_dict({**HEADS.to_dict(), "version": 2})


def test_bad_groups_and_permutations_are_named() -> None:
    for axes, message in (
        ({"w": ("b",)}, "'w' names group 'b'"),
        ({"w": ({"product": ["a", None]},)}, "'w' has the axis None"),
        ({"w": ({"power": ["a"]},)}, "'w' has the axis {'power'"),
        ({"w": (-1,)}, "'w' has the axis -1"),
    ):
        with pytest.raises(ValueError, match=message):
            PermutationGroups({"a": 2}, axes)
    with pytest.raises(ValueError, match="'a' has size 0"):
        PermutationGroups({"a": 0}, {})
    with pytest.raises(ValueError, match="'w' carries group 'a', whose parent 'b' it must carry once, not 0 times"):
        PermutationGroups({"a": 2, "b": 2}, {"w": ("a",)}, parents={"a": ("b",)})
    groups = PermutationGroups({"a": 2}, {"w": (None, "a")})
    weights = {"w": torch.randn(3, 2)}
    for bad, message in (
        ({}, "name tensor 'w', which the network does not have"),
        ({"w": torch.randn(2)}, "'w' has shape .*describe 2 axes"),
        ({"w": torch.randn(2, 3)}, "Axis 1 of tensor 'w' has 3 entries; its groups 'a' have 2"),
    ):
        with pytest.raises(ValueError, match=message):
            groups.apply(bad, groups.random())
    for bad, message in (
        ({"b": torch.tensor([0, 1])}, "names group 'b'"),
        ({"a": torch.tensor([0, 1, 2])}, r"'a' has shape \(3,\); it must be \(2,\)"),
        ({"a": torch.tensor([1, 1])}, "'a' is not a permutation of 0 to 1"),
        ({"a": torch.tensor([[0, 1]])}, "one permutation"),
    ):
        with pytest.raises(ValueError, match=message):
            groups.apply(weights, bad)
