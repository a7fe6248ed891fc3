"""The tolerance of behaviour: what may move is what the answers do not see."""

import pytest
import torch

from sane_hf.generation import SAMPLERS, behavior_tolerance, shaped_noise


def linear_answers(inputs):
    """Networks that are one linear layer (4 classes) on fixed inputs (m, 3); weights (A, 12)."""
    return lambda weights: (inputs @ weights.view(-1, 4, 3).mT).log_softmax(-1)


@pytest.fixture
def anchors():
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def test_tolerance_is_the_inverse_root_of_the_fisher_information(anchors):
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 3.0, 0.3])
    answers = linear_answers(inputs)
    estimated = behavior_tolerance(anchors, answers, torch.Generator().manual_seed(2), probes=4000)
    p = answers(anchors).exp()  # for a softmax layer F = E[p (1 - p) x^2]
    exact = (p * (1 - p)).mT @ inputs.square() / len(inputs)
    information = exact.mean(0).flatten()
    expected = (information / information.median() + 0.01).rsqrt()
    expected *= anchors.std(0, correction=0).norm() / expected.norm()
    torch.testing.assert_close(estimated, expected, rtol=0.08, atol=0)


def test_noise_of_that_shape_changes_answers_less_at_equal_distance(anchors):
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0, 0.1])
    answers = linear_answers(inputs)
    tolerance = behavior_tolerance(anchors, answers, torch.Generator().manual_seed(2))

    def divergence(scale):
        noised = shaped_noise(anchors[:1].expand(2, -1), 300, 1.0, torch.Generator().manual_seed(3), scale)
        return torch.nn.functional.kl_div(answers(noised), answers(anchors[:1]), log_target=True, reduction="sum")

    assert divergence(tolerance) < 0.3 * divergence(torch.ones(12))


def test_what_never_varies_stays(anchors):
    latents = torch.stack([anchors, torch.zeros_like(anchors)], dim=-1)  # (A, 12, 2), the second half unused
    answers = linear_answers(torch.randn(5, 3))
    scale = behavior_tolerance(latents, lambda z: answers(z[..., 0]), torch.Generator().manual_seed(0))
    assert (scale[:, 1] == 0).all()
    samples = SAMPLERS["kde_shared_anchor"](latents, 4, 0.5, torch.Generator().manual_seed(0), scale=scale)
    assert (samples[..., 1] == 0).all()
    assert scale.norm() == pytest.approx(latents.std(0, correction=0).norm().item(), rel=1e-5)


def test_answers_that_ignore_the_networks_are_refused(anchors):
    with pytest.raises(ValueError, match="do not depend on the anchors"):
        behavior_tolerance(anchors, lambda z: torch.zeros(6, 2, 2) + 0 * z.sum(), torch.Generator().manual_seed(0))
