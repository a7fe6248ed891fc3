"""Many networks at once do what each does alone."""

import dataclasses

import pytest
import torch
from torch import nn

from sane_hf.architectures import ARCHITECTURES, build
from sane_hf.members import count, epoch_draws, evaluate, forward, stack, train, unstack
from sane_hf.members.convolution import member_convolution
from sane_hf.members.program import program

MIXED = [{"activation": "tanh"}, {"activation": "relu", "dropout": 0.3}, {"activation": "tanh", "dropout": 0.5}]


def networks(architecture, configs, dtype=torch.float32):
    return [build(architecture, config).eval().to(dtype) for config in configs]


def inputs(architecture, number, dtype=torch.float32):
    declared = ARCHITECTURES[architecture]
    config = declared.config()
    images = torch.randn(number, *declared.input_shape(config), dtype=dtype)
    return images, torch.randint(declared.num_classes(config), (number,))


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request):
    return request.param


def test_stacking_and_back():
    dicts = [{"a": torch.randn(2, 3), "b": torch.randn(())} for _ in range(4)]
    stacked = stack(dicts)
    assert count(stacked) == 4
    for one, other in zip(dicts, unstack(stacked), strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("dicts", "message"),
    [
        ([], "at least one network"),
        ([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], "network 1.*'a' exists only in network 0"),
        ([{"a": torch.zeros(1)}, {"a": torch.zeros(2)}], r"network 1: tensor 'a' has shape \(2,\)"),
    ],
)
def test_networks_that_differ_do_not_stack(dicts, message):
    with pytest.raises(ValueError, match=message):
        stack(dicts)


@pytest.mark.parametrize("own_images", [False, True])
@pytest.mark.parametrize("architecture_name", sorted(ARCHITECTURES))
def test_logits_and_gradients_equal_those_of_each_network_alone(architecture_name, own_images):
    configs = MIXED if architecture_name == "cnn_small" else [None] * 3
    alone = networks(architecture_name, configs)
    images, _ = inputs(architecture_name, 7)
    batches = [torch.randn_like(images) if own_images else images for _ in alone]
    stacked = {name: tensor.requires_grad_() for name, tensor in stack([one.state_dict() for one in alone]).items()}
    logits = forward(architecture_name, configs, stacked, torch.stack(batches) if own_images else images)
    weighting = torch.randn_like(logits)
    gradients = torch.autograd.grad((logits * weighting).sum(), list(stacked.values()))
    for member, network in enumerate(alone):
        expected = network(batches[member])
        torch.testing.assert_close(logits[member], expected, rtol=0, atol=1e-5)
        wanted = torch.autograd.grad((expected * weighting[member]).sum(), list(network.parameters()))
        for name, gradient, want in zip(stacked, gradients, wanted, strict=True):
            torch.testing.assert_close(gradient[member], want, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (0, 0)), ((2, 1), (1, 0)), ((3, 2), (2, 1))])
def test_convolution_equals_pytorchs_with_gradients(stride, padding):
    images = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64, requires_grad=True)  # (M, C, H, W, B)
    weight = torch.randn(2, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    outputs = member_convolution(images, weight, bias, stride, padding)
    for member in range(2):
        batch = images[member].movedim(-1, 0)
        expected = nn.functional.conv2d(batch, weight[member], bias[member], stride, padding)
        torch.testing.assert_close(outputs[member].movedim(-1, 0), expected)

    def run(*tensors):
        return member_convolution(*tensors, stride, padding)

    assert torch.autograd.gradcheck(run, (images, weight, bias))


class Masked(nn.Module):
    """Dropout whose mask is set from outside."""

    factor = 1.0

    def forward(self, hidden):
        return hidden * self.factor


def train_alone(network, images, labels, epochs, rate, decay, seed, dropout, batch_size, dropouts):
    """A plain loop with torch.optim.Adam over the batches and masks that the population draws."""
    masks = {layer: Masked() for layer in dropouts}
    for layer, mask in masks.items():
        network.set_submodule(layer, mask)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, weight_decay=decay)
    for epoch in range(1, epochs + 1):
        order, keep = epoch_draws(seed, epoch, len(images), dropouts, dropout)
        for start in range(0, len(images), batch_size):
            index = order[start : start + batch_size]
            for layer, mask in masks.items():
                if keep:
                    mask.factor = keep[layer][start : start + batch_size].to(images) / (1 - dropout)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize("members_at_once", [32, 1])
def test_training_follows_the_trajectory_of_each_network_alone(architecture, members_at_once):
    configs = MIXED if architecture == "cnn_small" else [None] * 3
    alone = networks(architecture, configs, torch.float64)
    images, labels = inputs(architecture, 50, torch.float64)
    rates, decays, seeds = [1e-3, 1e-2, 3e-3], [0.0, 1e-2, 1e-1], [5, 6, 7]
    start = stack([network.state_dict() for network in alone])
    before = {name: tensor.clone() for name, tensor in start.items()}
    trained = train(
        architecture,
        configs,
        start,
        images,
        labels,
        epochs=3,
        learning_rate=torch.tensor(rates),
        weight_decay=torch.tensor(decays),
        batch_size=16,
        seeds=seeds,
        members_at_once=members_at_once,
    )
    assert all(torch.equal(before[name], start[name]) for name in start)
    declared = ARCHITECTURES[architecture]
    dropouts = program(architecture, declared.config_json()).dropouts
    for member, network in enumerate(alone):
        dropout = getattr(declared.config(configs[member]), "dropout", 0.0)
        # learning rates and decays are kept in the dtype of the weights, from float32 tensors
        rate, decay = float(torch.tensor(rates)[member]), float(torch.tensor(decays)[member])
        expected = train_alone(network, images, labels, 3, rate, decay, seeds[member], dropout, 16, dropouts)
        for name, tensor in expected.items():
            torch.testing.assert_close(trained[name][member], tensor, rtol=0, atol=1e-9, msg=name)
            assert not torch.equal(trained[name][member], before[name][member])


def test_epochs_are_reported_per_group_and_seeds_matter():
    images, labels = inputs("cnn_small", 32)
    same = build("cnn_small").state_dict()
    seen = []
    trained = train(
        "cnn_small",
        MIXED,
        stack([same] * 3),
        images,
        labels,
        epochs=2,
        seeds=[1, 1, 2],
        on_epoch=lambda epoch, index, weights: seen.append((epoch, index.tolist(), count(weights))),
    )
    assert seen == [(1, [0, 2], 2), (2, [0, 2], 2), (1, [1], 1), (2, [1], 1)]
    assert not torch.equal(trained["fc2.weight"][0], trained["fc2.weight"][2])


def test_training_learns():
    labels = torch.arange(200) % 2
    images = torch.randn(200, 1, 8, 8) + labels[:, None, None, None]
    start = stack([build("cnn_small").state_dict() for _ in range(2)])
    before = evaluate("cnn_small", None, start, images, labels)
    after = evaluate("cnn_small", None, train("cnn_small", None, start, images, labels, 10, 1e-2), images, labels)
    assert (after["loss"] < 0.3 * before["loss"]).all()
    assert (after["accuracy"] > 0.9).all()


def test_evaluation_equals_each_network_alone_whatever_the_batches():
    alone = networks("cnn_small", MIXED)
    images, labels = inputs("cnn_small", 45)
    stacked = stack([network.state_dict() for network in alone])
    for batch_size, members_at_once in ((32, 32), (7, 1), (100, 2)):
        found = evaluate("cnn_small", MIXED, stacked, images, labels, batch_size, members_at_once)
        for member, network in enumerate(alone):
            logits = network(images)
            assert found["accuracy"][member].item() == pytest.approx(
                (logits.argmax(1) == labels).float().mean().item()
            )
            loss = nn.functional.cross_entropy(logits, labels).item()
            assert found["loss"][member].item() == pytest.approx(loss, rel=1e-5)


def test_a_broken_network_does_not_spoil_the_others():
    alone = networks("cnn_small", [None, None])
    images, labels = inputs("cnn_small", 20)
    stacked = stack([network.state_dict() for network in alone])
    whole = evaluate("cnn_small", None, stacked, images, labels)
    stacked["fc1.weight"][0, 0, 0] = float("nan")
    found = evaluate("cnn_small", None, stacked, images, labels)
    assert found["accuracy"][0] == 0
    assert found["loss"][0].isnan()
    assert found["loss"][1] == whole["loss"][1]


def test_wrong_calls_say_what_is_wrong():
    images, labels = inputs("cnn_small", 4)
    stacked = stack([build("cnn_small").state_dict() for _ in range(2)])
    missing = {name: tensor for name, tensor in stacked.items() if name != "fc2.bias"}
    with pytest.raises(ValueError, match="'fc2.bias' of architecture 'cnn_small' is missing"):
        forward("cnn_small", None, missing, images)
    with pytest.raises(ValueError, match="'fc3.bias' does not belong"):
        forward("cnn_small", None, stacked | {"fc3.bias": torch.zeros(2, 1)}, images)
    with pytest.raises(ValueError, match=r"'fc2.bias' .* must have shape \(networks, 10\)"):
        forward("cnn_small", None, stacked | {"fc2.bias": torch.zeros(2, 9)}, images)
    with pytest.raises(ValueError, match="'fc2.bias' stacks 3 networks"):
        forward("cnn_small", None, stacked | {"fc2.bias": torch.zeros(3, 10)}, images)
    with pytest.raises(ValueError, match="2 networks, but 3 configurations"):
        forward("cnn_small", MIXED, stacked, images)
    with pytest.raises(ValueError, match=r"images must be .*found \(8, 8\)"):
        forward("cnn_small", None, stacked, images[0, 0])
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        evaluate("cnn_small", None, stacked, images, labels[:3])
    with pytest.raises(ValueError, match="2 networks, but 1 seeds"):
        train("cnn_small", None, stacked, images, labels, 1, seeds=[0])
    with pytest.raises(ValueError, match=r"learning_rate must be one number or one per network \(2,\)"):
        train("cnn_small", None, stacked, images, labels, 1, torch.ones(3))
    with pytest.raises(ValueError, match="epochs must be at least 0"):
        train("cnn_small", None, stacked, images, labels, -1)


def test_a_layer_without_a_rule_is_named(monkeypatch):
    class Odd(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.pool = nn.MaxPool2d(2)

        def forward(self, images):
            return self.pool(images)

    odd = dataclasses.replace(ARCHITECTURES["cnn_small"], name="odd", module=Odd)
    monkeypatch.setitem(ARCHITECTURES, "odd", odd)
    with pytest.raises(ValueError, match="'odd': layer 'pool' .MaxPool2d. has no rule"):
        program("odd", odd.config_json())
