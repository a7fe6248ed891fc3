"""Permutation groups found in networks, against what must come out, and against the function of the network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sane_hf.symmetry import find_permutation_groups, permute, verify


class Block(nn.Module):
    """A residual block; the shortcut is the identity, a strided convolution, or slicing and zero padding."""

    def __init__(self, inner: int, outer: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.missing = outer - inner
        projects = shortcut == "convolution" and self.missing
        self.shortcut = nn.Conv2d(inner, outer, 1, stride) if projects else None

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.missing:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        y += x
        return torch.relu(y)


class ResNet(nn.Module):
    def __init__(self, shortcut: str = "convolution", widths=(4, 6)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.first = nn.Sequential(*(Block(widths[0], widths[0], 1, shortcut) for _ in range(2)))
        self.second = nn.Sequential(Block(widths[0], widths[1], 2, shortcut), Block(widths[1], widths[1], 1, shortcut))
        self.head = nn.Linear(widths[1], 5)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.second(self.first(self.stem(x))), 1)
        return self.head(x.view(x.size(0), -1))


def same_function(network: nn.Module, groups, inputs: torch.Tensor) -> bool:
    """The network as it is, not the certificate's random one, computes the same after `permute`."""
    network = network.double().eval()
    expected = network(inputs.double())
    network.load_state_dict(permute(network.state_dict(), groups, torch.Generator().manual_seed(1)))
    return torch.allclose(network(inputs.double()), expected, rtol=1e-10, atol=1e-10)


def test_the_small_cnn_has_one_group_per_hidden_layer_and_flattening_makes_a_product():
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 20)
    )
    network.append(nn.Linear(20, 10))
    groups = find_permutation_groups(network, torch.randn(2, 1, 8, 8))
    assert groups.sizes == {"0": 8, "2": 4, "6": 20}
    assert groups.axes["6.weight"] == ("6", {"product": ("2", 4, 4)})
    assert groups.axes["7.weight"] == (None, "6")
    assert "7.bias" not in groups.axes
    assert groups.pinned["7.bias[0]"] == "an output of the network"
    assert same_function(network, groups, torch.randn(3, 1, 8, 8))


def test_residual_additions_unite_groups():
    network = ResNet("convolution")
    groups = find_permutation_groups(network, torch.randn(2, 3, 8, 8))
    assert sorted(groups.sizes.values()) == [4, 4, 4, 6, 6, 6]  # two streams, and the inside of each of four blocks
    assert (
        groups.axes["first.0.conv2.weight"][0] == groups.axes["first.1.conv1.weight"][1] == groups.axes["stem.bias"][0]
    )
    assert groups.axes["second.0.norm2.running_var"] == groups.axes["second.0.shortcut.bias"]
    assert same_function(network, groups, torch.randn(2, 3, 8, 8))


def test_zero_padded_shortcuts_make_a_sum():
    network = ResNet("padding", widths=(4, 8))
    groups = find_permutation_groups(network, torch.randn(2, 3, 8, 8))
    assert groups.axes["head.weight"] == (None, {"sum": (2, groups.axes["stem.bias"][0], 2)})
    assert same_function(network, groups, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("network", "shape", "free"),
    [
        pytest.param(lambda: [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)], (3, 5, 5), 1.0),
        pytest.param(lambda: [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)], (3, 5, 5), 1.0),
        pytest.param(lambda: [nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)], (3, 5, 5), 1.0),
        pytest.param(lambda: [nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True), nn.Conv1d(8, 2, 1)], (3, 9), 1.0),
        pytest.param(lambda: [nn.Linear(3, 8), nn.LayerNorm(8), nn.PReLU(8), nn.Linear(8, 2)], (3,), 1.0),
        pytest.param(lambda: [nn.Linear(3, 8), nn.RMSNorm(8), nn.GELU(), nn.Linear(8, 2)], (3,), 1.0),
        pytest.param(lambda: [nn.Linear(3, 8), nn.Unflatten(1, (4, 2)), nn.Linear(2, 5), nn.Flatten()], (3,), 0.0),
        pytest.param(lambda: [nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)], (3,), 0.0),  # no rule: pinned
        pytest.param(lambda: [nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)], (3,), 1.0),
        pytest.param(lambda: [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)], (3, 6, 6), 1.0),
    ],
    ids="depthwise grouped group_norm instance_norm layer_norm rms_norm per_head glu softmax pooling".split(),
)
def test_layers(network, shape, free):
    network = nn.Sequential(*network())
    inputs = torch.randn(3, *shape)
    groups = find_permutation_groups(network, inputs)
    assert same_function(network, groups, inputs)
    weight = "0.weight"
    if free:
        assert weight in groups.axes
    elif not groups.axes:
        assert groups.pinned["0.weight[0]"]
    else:
        assert network[2].weight is not None


class Branches(nn.Module):
    """Concatenation, splitting, squeeze and excitation, a product with a raw parameter, and an unused one."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 5, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.mix = nn.Parameter(torch.randn(8, 6))
        self.unused = nn.Parameter(torch.randn(4))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], dim=1)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = x.flatten(2).permute(0, 2, 1).sum(dim=1) @ self.mix
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def test_branches_splits_and_raw_parameters():
    network = Branches()
    groups = find_permutation_groups(network, torch.randn(2, 2, 4, 4))
    assert groups.sizes == {"left": 3, "right": 5, "squeeze": 2, "mix": 6, "up": 4}
    assert groups.axes["mix"] == ({"sum": ("left", "right")}, "mix")
    assert groups.axes["up.weight"] == ({"sum": ("up", "up")}, "mix")
    assert groups.pinned["unused"] == "not used when the network runs"
    assert same_function(network, groups, torch.randn(2, 2, 4, 4))


def test_tied_weights_share_their_groups():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.second.weight = self.first.weight
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.second(torch.tanh(self.first(self.embed(x)))))

    network = Tied()
    groups = find_permutation_groups(network, torch.randint(7, (2, 3)))
    assert len(groups.sizes) == 1  # W feeds itself: its rows and columns are the same units, and the embedding's too
    assert groups.axes["head.weight"] == groups.axes["embed.weight"] == (None, next(iter(groups.sizes)))


@settings(max_examples=15, deadline=None)
@given(
    widths=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    norms=st.lists(st.sampled_from(["batch", "group", "none"]), min_size=3, max_size=3),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_cnn_keeps_its_function(widths, norms, residual, seed):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, before = nn.ModuleList(), 2
            for width, kind in zip(widths, norms, strict=False):
                norm = {"batch": nn.BatchNorm2d(width), "group": nn.GroupNorm(1, width), "none": nn.Identity()}[kind]
                self.layers.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=1), norm, nn.Tanh()))
                before = width
            self.head = nn.Linear(before * 16, 3)

        def forward(self, x):
            for layer, before, width in zip(self.layers, [2, *widths], widths, strict=False):
                x = x + layer(x) if residual and before == width else layer(x)
            return self.head(torch.flatten(x, 1))

    torch.manual_seed(seed)
    network = Random()
    inputs = torch.randn(2, 2, 4, 4)
    groups = find_permutation_groups(network, inputs)
    assert verify(network, groups, inputs)
    assert same_function(network, groups, inputs)
    streams = 2 in widths and residual and widths[0] == 2  # then the first layer is tied to the pinned input
    assert groups.sizes or streams


def test_result_is_repeatable_plain_data_and_the_model_is_left_alone():
    network = ResNet()
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = find_permutation_groups(network, torch.zeros(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    again = find_permutation_groups(network, {"x": torch.zeros(2, 3, 8, 8)})
    assert type(first).from_dict(first.to_dict()) == first == again


def test_control_flow_on_values_is_refused_with_the_place():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), Deciding())

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(ValueError, match=r"cannot be traced at submodule 'inner\.1'.*if x\.sum\(\) > 0.*verify"):
        find_permutation_groups(Branching(), torch.zeros(2, 3))


class Deciding(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


def test_wrong_inputs_and_meta_networks_are_refused():
    with pytest.raises(ValueError, match=r"does not run on the example inputs \[\(2, 5\)\]"):
        find_permutation_groups(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"missing \['x'\]"):
        find_permutation_groups(ResNet(), {"y": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(ValueError, match="meta"):
        find_permutation_groups(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
