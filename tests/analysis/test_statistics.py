"""Weight statistics are those of the real weights, by name, whatever the token size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sane_hf.analysis import weight_statistics, weight_statistics_names
from sane_hf.architectures import build
from sane_hf.modeling import TokenLayout


@pytest.fixture(scope="module")
def networks():
    return [build("cnn_small").state_dict() for _ in range(5)]


@pytest.mark.parametrize("token_size", [7, 64, 201])
def test_equal_to_numpy_on_each_tensor(networks, token_size):
    layout = TokenLayout.plan(networks[0], token_size)
    names = weight_statistics_names(layout)
    features = weight_statistics(layout.flatten_many(networks), layout)
    assert features.shape == (5, 70) == (5, len(names))
    for row, network in enumerate(networks):
        for tensor, values in network.items():
            values = values.double().numpy()
            expected = [values.mean(), values.var(), *np.percentile(values, [0, 25, 50, 75, 100])]
            start = names.index(f"{tensor}/mean")
            np.testing.assert_allclose(features[row, start : start + 7], expected, atol=1e-6)


def test_log_form(networks):
    layout = TokenLayout.plan(networks[0], 64)
    flat = layout.flatten_many(networks)
    names = weight_statistics_names(layout, log=True)
    logs = dict(zip(names, weight_statistics(flat, layout, log=True)[0].tolist(), strict=True))
    weight = networks[0]["fc1.weight"].double()
    assert logs["fc1.weight/log_variance"] == pytest.approx(weight.var(correction=0).log().item(), abs=1e-4)
    ratio = weight.max() / weight.std(correction=0)
    assert logs["fc1.weight/asinh_quantile_100"] == pytest.approx(ratio.asinh().item(), abs=1e-4)


def test_does_not_depend_on_permutation_or_on_the_other_networks(networks):
    layout = TokenLayout.plan(networks[0], 64)
    network = dict(networks[0])
    network["fc2.weight"] = network["fc2.weight"].flip(0)
    flat = layout.flatten_many([network, *networks])
    features = weight_statistics(flat, layout)
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-7)
    torch.testing.assert_close(weight_statistics(flat[2:3], layout)[0], features[2], rtol=0, atol=0)


def test_constant_and_single_weights_stay_finite():
    layout = TokenLayout.plan({"a.weight": (1, 1), "a.bias": (1,), "scale": ()}, 4)
    for log in (False, True):
        assert weight_statistics(torch.zeros(2, 3), layout, log=log).isfinite().all()


def test_flat_weights_of_another_architecture_are_refused(networks):
    layout = TokenLayout.plan(networks[0], 64)
    with pytest.raises(ValueError, match="1568"):
        weight_statistics(torch.zeros(2, 7), layout)
