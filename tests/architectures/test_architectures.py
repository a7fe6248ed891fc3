"""The contract of every architecture: build it, write its configuration, find its symmetry."""

import json

import pytest
import torch

from sane_hf.architectures import ARCHITECTURES, build, get_architecture
from sane_hf.zoos.info import describe_architecture


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request):
    return ARCHITECTURES[request.param]


def test_it_maps_its_inputs_to_its_classes(architecture):
    config = architecture.config()
    network = architecture.build().eval()
    logits = network(torch.randn(3, *architecture.input_shape(config)))
    assert logits.shape == (3, architecture.num_classes(config))
    assert logits.std() > 0


def test_its_configuration_survives_json(architecture):
    text = architecture.config_json()
    assert architecture.config(text) == architecture.config(json.loads(text)) == architecture.config()
    names = list(architecture.build().state_dict())
    assert list(architecture.build(text).state_dict()) == names


def test_a_wrong_configuration_is_refused(architecture):
    with pytest.raises(ValueError, match=rf"'{architecture.name}' has no field 'widht'"):
        build(architecture.name, {"widht": 3})
    with pytest.raises(ValueError, match="not JSON"):
        build(architecture.name, "{")
    with pytest.raises(ValueError, match="mapping"):
        build(architecture.name, ["tanh"])


def test_its_description_permutes_every_hidden_layer(architecture):
    description = describe_architecture(architecture.name)
    state_dict = architecture.build().state_dict()
    assert [name for name, _ in description["shapes"]] == list(state_dict)
    assert all(tuple(shape) == state_dict[name].shape for name, shape in description["shapes"])
    json.dumps(description)
    # every weight but the first has a free axis, and its inputs move with the layer before
    axes = description["permutation_groups"]["axes"]
    weights = [name for name, shape in description["shapes"] if len(shape) > 1]
    assert all(name in axes for name in weights)


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match="'cnn_huge' is unknown; known are .*cnn_small"):
        get_architecture("cnn_huge")


@pytest.mark.parametrize(("field", "value"), [("activation", "gelu"), ("dropout", 1.0), ("dropout", -0.1)])
def test_cnn_small_refuses_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"'cnn_small': {field}"):
        build("cnn_small", {field: value})
