"""Weight matching: against the original on its fixture, and by its properties on small real networks."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from sane_hf.modeling.layout_sane import TokenLayout
from sane_hf.modeling.permutation_sane import PermutationGroups
from sane_hf.symmetry import align, align_many, align_zoo, find_permutation_groups, permute
from sane_hf.symmetry.matching import assign


def small_cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 10))


@pytest.fixture(scope="module")
def groups() -> PermutationGroups:
    return find_permutation_groups(small_cnn(), torch.randn(2, 1, 8, 8))


@pytest.fixture(scope="module")
def zoo() -> list[dict]:
    return [small_cnn(seed).state_dict() for seed in range(12)]


def inner(left: dict, right: dict) -> float:
    return sum((left[k].double() * right[k].double()).sum().item() for k in left if left[k].is_floating_point())


def identical(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def original(shared) -> tuple[dict, dict, PermutationGroups, dict]:
    """The original's random pair of CNNs, its groups, and what it reached."""
    tensors = load_file(shared / "fixtures" / "wm_cnn_random_pair.safetensors")
    facts = json.loads((shared / "fixtures" / "wm_cnn_random_pair.json").read_text())
    first = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("a.")}
    second = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("b.")}
    axes = {}
    for key, spec in facts["spec"].items():
        axes[key] = (*spec, *[None] * (first[key].ndim - len(spec)))
    axes["module_list.9.weight"] = ("P_bg3", {"product": ["P_bg2", 9]})  # after flattening 4 channels of 3x3
    sizes = {name: len(order) for name, order in facts["perm"].items()}
    return first, second, PermutationGroups(sizes, axes), facts


def test_one_run_beats_the_mean_of_the_original_and_ten_its_best(original):
    reference, weights, groups, facts = original
    assert inner(reference, weights) == pytest.approx(facts["objective_identity"])
    one = align(weights, reference, groups)
    assert one.objective >= 146
    assert one.objective == pytest.approx(inner(reference, one.weights))
    assert inner(reference, groups.apply(weights, one.permutation)) == pytest.approx(one.objective)
    ten = align(weights, reference, groups, restarts=10)
    assert ten.objective >= max(148.1, one.objective)
    for seed in range(3):
        assert align(weights, reference, groups, 10, torch.Generator().manual_seed(seed)).objective >= 148.1


def test_a_permuted_copy_is_recovered_exactly(original, zoo, groups):
    reference, _, theirs, _ = original
    generator = torch.Generator().manual_seed(0)
    for weights, found in [(reference, theirs), *((weights, groups) for weights in zoo)]:
        copy = permute(weights, found, generator)
        assert not identical(copy, weights)
        result = align(copy, weights, found)
        assert identical(result.weights, weights)
        assert result.objective == pytest.approx(inner(weights, weights))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), restarts=st.sampled_from([1, 3]))
def test_aligning_a_permuted_network_gives_the_same(zoo, groups, seed, restarts):
    weights = permute(zoo[1], groups, torch.Generator().manual_seed(seed))
    straight, detour = align(zoo[1], zoo[0], groups, restarts), align(weights, zoo[0], groups, restarts)
    assert identical(straight.weights, detour.weights)
    assert straight.objective == detour.objective


def test_alignment_keeps_the_function_the_values_and_the_dtype(zoo, groups):
    images = torch.randn(5, 1, 8, 8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = {k: t.to(dtype) if t.is_floating_point() else t for k, t in zoo[2].items()}
        result = align(weights, zoo[0], groups)
        assert all(tensor.dtype == weights[key].dtype for key, tensor in result.weights.items())
        assert all(
            torch.equal(tensor.flatten().sort().values, weights[key].flatten().sort().values)
            for key, tensor in result.weights.items()
        )
        if dtype is torch.float64:
            network = small_cnn().double().eval()
            network.load_state_dict(weights)
            expected = network(images.double())
            network.load_state_dict(result.weights)
            assert torch.allclose(network(images.double()), expected, rtol=1e-10)


def test_no_single_change_improves_the_result(zoo, groups):
    """Converged: from the result, every transposition of two units of any group lowers the objective."""
    result = align(zoo[3], zoo[0], groups)
    for name, size in groups.sizes.items():
        for left in range(size):
            for right in range(left):
                order = torch.arange(size)
                order[left], order[right] = right, left
                changed = groups.apply(result.weights, {name: order})
                assert inner(zoo[0], changed) <= result.objective + 1e-4


def test_many_at_once_equal_one_at_a_time(zoo, groups):
    layout = TokenLayout.plan(zoo[0], token_size=64)
    flat = layout.flatten_many(zoo)
    for restarts in (1, 3):
        many = align_many(flat, zoo[0], layout, groups, restarts=restarts, batch_size=5)
        for row, weights in enumerate(zoo):
            one = align(weights, zoo[0], groups, restarts=restarts)
            assert torch.equal(many.flat[row], layout.flatten(one.weights))
            assert many.objective[row].item() == pytest.approx(one.objective, rel=1e-6)
            assert all(torch.equal(many.permutation[name][row], one.permutation[name]) for name in groups.sizes)
    index = groups.flat_index(layout, many.permutation)
    assert torch.equal(flat.gather(1, index), many.flat)


def test_epochs_of_a_model_share_the_permutation_of_its_last(zoo, groups):
    layout = TokenLayout.plan(zoo[0], token_size=64)
    last = layout.flatten_many(zoo[:4])
    early = last + 0.3 * torch.randn_like(last)
    flat = torch.stack([early[1], last[0], last[1], early[0], last[3], early[2], last[2]])
    models, epochs = ["b", "a", "b", "a", "d", "c", "c"], [3, 25, 25, 0, 1, 2, 25]
    result = align_zoo(flat, models, epochs, zoo[0], layout, groups)
    alone = align_many(last, zoo[0], layout, groups)
    for row, model in enumerate(models):
        order = {name: index["abcd".index(model)] for name, index in alone.permutation.items()}
        expected = flat[row].gather(0, groups.flat_index(layout, order))
        assert torch.equal(result.flat[row], expected)
        assert all(torch.equal(result.permutation[name][row], order[name]) for name in order)
    assert torch.allclose(result.objective, result.flat.double() @ layout.flatten(zoo[0]).double())


class Recurrent(nn.Module):
    """The hidden units on both sides of one matrix, where an assignment alone may lower the objective."""

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(3, 7), nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x):
        h = torch.tanh(self.enter(x))
        for _ in range(2):
            h = torch.tanh(self.again(h) + h)
        return self.leave(h)


def test_groups_on_both_axes_of_a_matrix():
    torch.manual_seed(0)
    pairs = [(Recurrent().state_dict(), Recurrent().state_dict()) for _ in range(5)]
    groups = find_permutation_groups(Recurrent(), torch.randn(2, 3))
    assert groups.axes["again.weight"] == ("enter", "enter")
    for reference, weights in pairs:
        result = align(weights, reference, groups)
        assert result.objective > inner(reference, weights)
        copy = permute(reference, groups, torch.Generator().manual_seed(1))
        assert identical(align(copy, reference, groups, restarts=5).weights, reference)


def test_concatenated_and_padded_axes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.out = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(11, 2)

        def forward(self, x):
            x = torch.tanh(torch.cat([self.left(x), self.right(x)], -1))
            return self.out(nn.functional.pad(x, (1, 1)))

    torch.manual_seed(0)
    reference = Two().state_dict()
    groups = find_permutation_groups(Two(), torch.randn(2, 3))
    assert groups.axes["out.weight"] == (None, {"sum": (1, {"sum": ("left", "right")}, 1)})
    copy = permute(reference, groups, torch.Generator().manual_seed(1))
    assert identical(align(copy, reference, groups).weights, reference)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_assignment_is_the_best_permutation(size, seed):
    import itertools

    costs = torch.randn(8, size, size, generator=torch.Generator().manual_seed(seed))
    found = assign(costs).unsqueeze(2)
    best = [
        max(sum(c[i, p[i]].item() for i in range(size)) for p in itertools.permutations(range(size))) for c in costs
    ]
    assert torch.allclose(costs.gather(2, found).sum((1, 2)), torch.tensor(best), atol=1e-5)


def test_bad_input(zoo, groups):
    layout = TokenLayout.plan(zoo[0], token_size=64)
    broken = {**zoo[1], "0.weight": zoo[1]["0.weight"].clone().index_fill_(0, torch.tensor(2), float("nan"))}
    with pytest.raises(ValueError, match=r"'0.weight' of the network has 9 values that are not finite"):
        align(broken, zoo[0], groups)
    with pytest.raises(ValueError, match=r"'0.weight' of network 1 "):
        align_many(layout.flatten_many([zoo[0], broken]), zoo[0], layout, groups)
    with pytest.raises(ValueError, match=r"'9.bias' is missing in the network"):
        align({key: tensor for key, tensor in zoo[1].items() if key != "9.bias"}, zoo[0], groups)
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(4,\), in the reference \(8,\)"):
        align({**zoo[1], "0.bias": torch.zeros(4)}, zoo[0], groups)
    with pytest.raises(ValueError, match="restarts"):
        align(zoo[1], zoo[0], groups, restarts=0)
    with pytest.raises(ValueError, match=r"flat weights \(B, "):
        align_many(torch.zeros(2, 3), zoo[0], layout, groups)
    with pytest.raises(ValueError, match="one epoch per checkpoint"):
        align_zoo(layout.flatten_many(zoo), ["a"], [1], zoo[0], layout, groups)
