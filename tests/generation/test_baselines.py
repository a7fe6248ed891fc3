"""Noise and averages at exact distances, selection, novelty, and the comparison made of them."""

import pytest
import torch

from sane_hf.generation import (
    average_at_distance,
    compare_at_distance,
    independent_distance,
    isotropic_noise,
    nearest_distance,
    outcome,
    pairwise_distance,
    select_best,
    shaped_noise,
    weight_average,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks(count: int = 8, width: int = 300, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=generator(seed)) * torch.linspace(0.1, 2, width)


@pytest.mark.parametrize("noise", [isotropic_noise, shaped_noise])
def test_noise_is_exactly_as_far_as_asked(noise):
    anchors = networks()
    wanted = torch.linspace(0, 5, 40)
    samples = noise(anchors, 40, wanted, generator())
    far, nearest = nearest_distance(samples, anchors)
    assert torch.allclose(far, wanted.double(), rtol=1e-5, atol=1e-6)
    assert len(nearest.unique()) == len(anchors)
    assert torch.equal(samples, noise(anchors, 40, wanted, generator()))
    assert not torch.equal(samples, noise(anchors, 40, wanted, generator(1)))
    assert noise(anchors.half(), 3, 1.0, generator()).dtype == torch.float16


def test_shaped_noise_follows_the_spread_of_the_anchors_and_isotropic_does_not():
    anchors = networks(30)
    spread = anchors.std(0)
    for noise, expected in ((shaped_noise, spread), (isotropic_noise, torch.ones_like(spread))):
        samples = noise(anchors, 3000, 1.0, generator())
        change = samples - anchors[nearest_distance(samples, anchors)[1]]
        assert torch.corrcoef(torch.stack([change.std(0), expected]))[0, 1] > 0.95 or expected.std() == 0
        if expected.std() == 0:
            assert change.std(0).std() / change.std(0).mean() < 0.05


def test_averages_reach_the_distance_or_say_how_far_they_got():
    anchors = networks(10)
    unit = independent_distance(anchors, range(10)).item()
    wanted = torch.tensor([0.0, 0.1, 0.3, 0.45, 0.55, 0.6, 3.0]) * unit
    samples, reached = average_at_distance(anchors, 7, wanted, generator())
    far, _ = nearest_distance(samples, anchors)
    assert torch.allclose(far, reached, rtol=1e-5, atol=1e-5)
    assert torch.allclose(reached[:6], wanted[:6].double(), rtol=1e-6, atol=1e-5)
    assert 0.6 * unit < reached[6] < 0.72 * unit
    basis = torch.linalg.lstsq(anchors.T.double(), samples.T.double()).solution
    assert torch.allclose(basis.sum(0), torch.ones(7, dtype=torch.float64), atol=1e-4)  # averages: shares sum to one
    assert (basis > -1e-4).all()
    assert ((basis > 1e-3).sum(0)[:4] <= 2).all()  # of two anchors as long as two will do


def test_two_anchors_reach_half_their_distance():
    anchors = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    samples, reached = average_at_distance(anchors, 5, 9.0, generator())
    assert torch.allclose(samples, torch.tensor([2.0, 0.0]).expand(5, 2))
    assert torch.allclose(reached, torch.full((5,), 2.0, dtype=torch.float64))


def test_weight_averages_lie_inside_their_anchors():
    anchors = torch.eye(6)
    for k in (2, 3, 6):
        samples = weight_average(anchors, 200, k, generator())
        assert torch.allclose(samples.sum(1), torch.ones(200), atol=1e-6)
        assert (samples >= 0).all()
        assert ((samples > 0).sum(1) == k).all()
        assert samples.mean(0).std() < 0.05
    with pytest.raises(ValueError, match="k must be between 2 and the number of anchors, 6; found 7"):
        weight_average(anchors, 1, 7, generator())


@pytest.mark.parametrize("function", [isotropic_noise, shaped_noise, average_at_distance])
def test_bad_arguments_are_named(function):
    anchors = networks(3)
    with pytest.raises(ValueError, match="anchor"):
        function(anchors[:0], 1, 1.0, generator())
    with pytest.raises(ValueError, match="finite numbers from 0"):
        function(anchors, 1, -1.0, generator())
    with pytest.raises(ValueError, match=r"one per sample, \(3,\)"):
        function(anchors, 3, torch.ones(2), generator())
    with pytest.raises(ValueError, match="anchor 1 has values that are not finite"):
        function(anchors.index_fill(0, torch.tensor(1), float("nan")), 3, 1.0, generator())
    if function is not isotropic_noise:
        with pytest.raises(ValueError, match="two"):
            function(anchors[:1], 1, 1.0, generator())


def test_distances_are_exact_even_between_near_copies_of_large_networks():
    others = networks(5, 1000) + 1000
    samples = others[[2, 4, 0]].clone()
    samples[1, 7] += 0.0009765625  # one bit of float32 at this size, far below the error of a float32 product
    far, nearest = nearest_distance(samples, others)
    assert far.tolist() == [0.0, pytest.approx((samples[1, 7] - others[4, 7]).item()), 0.0]
    assert nearest.tolist() == [2, 4, 0]


def test_distances_do_not_depend_on_chunks(monkeypatch):
    samples, others = networks(6, 50), networks(9, 50, seed=4)
    models = [0, 0, 1, 1, 1, 2, 3, 3, 4]
    plain = torch.cdist(samples.double(), others.double())
    between = torch.cdist(others.double(), others.double())
    apart = torch.tensor(models)[:, None] != torch.tensor(models)
    for chunk in (2**24, 100, 7):
        monkeypatch.setattr("sane_hf.generation.novelty._CHUNK", chunk)
        far, nearest = nearest_distance(samples, others)
        assert torch.allclose(far, plain.amin(1))
        assert torch.equal(nearest, plain.argmin(1))
        assert torch.allclose(independent_distance(others, models), between[apart].mean())
        assert torch.allclose(pairwise_distance(others), between[~torch.eye(9, dtype=torch.bool)].mean())


def test_novelty_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(3, 4\)"):
        nearest_distance(torch.zeros(2, 5), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="M from 1"):
        nearest_distance(torch.zeros(2, 5), torch.zeros(0, 5))
    with pytest.raises(ValueError, match="one model"):
        independent_distance(torch.zeros(3, 5), ["a", "a", "a"])
    with pytest.raises(ValueError, match="found 2 for 3 networks"):
        independent_distance(torch.zeros(3, 5), ["a", "b"])
    with pytest.raises(ValueError, match="two samples"):
        pairwise_distance(torch.zeros(1, 5))


def test_selection_is_stable_and_puts_broken_networks_last():
    scores = torch.tensor([0.5, float("nan"), 0.9, 0.5, 0.9])
    assert select_best(scores, 4).tolist() == [2, 4, 0, 3]
    with pytest.raises(ValueError, match="between 1 and the number of samples, 5; found 6"):
        select_best(scores, 6)


def test_selection_looks_at_validation_only():
    flat = torch.arange(6.0)[:, None]
    found = outcome(flat, flat[:, 0] / 10, validation=lambda x: -x[:, 0], test=lambda x: x[:, 0] / 10, keep=2)
    assert found.kept.tolist() == [0, 1]
    assert found.accuracy == pytest.approx(0.05)
    assert found.median == pytest.approx(0.2)
    assert found.distance == pytest.approx(0.05)


def test_the_comparison_is_at_equal_distance_with_equal_selection():
    anchors = networks(6)
    unit = independent_distance(anchors, range(6))
    distances = torch.linspace(0.1, 0.45, 30, dtype=torch.float64) * unit
    seen = []

    def validation(flat):
        seen.append(flat)
        return -flat[:, 0].abs()

    found = compare_at_distance(anchors, distances, validation, lambda flat: flat[:, 0], 5, generator())
    assert set(found) == {"noise", "shaped_noise", "average"}
    for flat, peer in zip(seen, found.values(), strict=True):
        far, _ = nearest_distance(flat, anchors)
        assert torch.allclose(far, distances, rtol=1e-4)
        best = select_best(-flat[:, 0].abs(), 5)
        assert torch.equal(peer.kept, best)
        assert peer.accuracy == pytest.approx(flat[best, 0].double().mean().item())
        assert peer.distance == pytest.approx(distances[best].mean().item(), rel=1e-5)
