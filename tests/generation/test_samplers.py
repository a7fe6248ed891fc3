"""One contract for every sampler of the table, and what tells each from the others."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.neighbors import KernelDensity

from sane_hf.generation import BANDWIDTH_RULES, SAMPLERS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(anchors: int = 5, tokens: int = 6, size: int = 3) -> torch.Tensor:
    return torch.randn(anchors, tokens, size, generator=generator(7)) * torch.tensor([0.1, 1.0, 20.0])[:size]


@pytest.mark.parametrize("name", SAMPLERS)
class TestContract:
    def test_shape_dtype_and_inputs_left_alone(self, name):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            anchors = latents().to(dtype)
            before = anchors.clone()
            samples = SAMPLERS[name](anchors, 4, 0.3, generator())
            assert samples.shape == (4, 6, 3)
            assert samples.dtype == dtype
            assert torch.isfinite(samples).all()
            assert torch.equal(anchors, before)
        assert SAMPLERS[name](latents(), 0, 0.3, generator()).shape == (0, 6, 3)

    def test_the_generator_decides_everything(self, name):
        state = torch.get_rng_state()
        first, again, other = (SAMPLERS[name](latents(), 4, 0.3, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)
        shared = generator(1)
        SAMPLERS[name](latents(), 4, 0.3, shared)
        assert not torch.equal(SAMPLERS[name](latents(), 4, 0.3, shared), first)  # further draws are new

    def test_samples_differ_from_each_other(self, name):
        samples = SAMPLERS[name](latents(), 8, 0.3, generator()).flatten(1)
        assert (torch.cdist(samples, samples) + torch.eye(8)).min() > 0 or name == "interpolation"

    def test_every_token_is_an_anchors_at_bandwidth_zero(self, name):
        anchors = latents()
        samples = SAMPLERS[name](anchors, 10, 0.0, generator())
        same = (samples[:, None] == anchors[None]).all(-1)  # sample, anchor, token
        assert same.any(1).all()

    def test_distance_grows_with_bandwidth(self, name):
        anchors = latents(tokens=60)
        far = []
        for bandwidth in (0.01, 0.1, 0.4):
            tokens = SAMPLERS[name](anchors, 20, bandwidth, generator()).transpose(0, 1)
            far.append(torch.cdist(tokens, anchors.transpose(0, 1)).amin(2).mean().item())
        assert far == sorted(far)
        assert far[0] < far[2] / 5

    def test_bandwidth_is_relative_to_the_scale_of_the_latents(self, name):
        anchors = latents()
        stretched = SAMPLERS[name](anchors * 8, 4, 0.3, generator())
        assert torch.allclose(stretched, SAMPLERS[name](anchors, 4, 0.3, generator()) * 8, rtol=1e-5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"anchors": torch.zeros(0, 6, 3)}, "at least one anchor"),
            ({"anchors": torch.zeros(6, 3)}, r"\(A, T, Z\); found torch.float32 of shape \(6, 3\)"),
            ({"anchors": torch.zeros(2, 6, 3, dtype=torch.int64)}, "must be floating"),
            ({"anchors": torch.tensor([[[0.0]], [[float("inf")]]])}, "anchor 1 has values that are not finite"),
            ({"num_samples": -1}, "num_samples must be an integer from 0; found -1"),
            ({"num_samples": 2.5}, "num_samples"),
            ({"bandwidth": -0.1}, "bandwidth must be a finite number from 0; found -0.1"),
            ({"bandwidth": float("nan")}, "bandwidth"),
        ],
    )
    def test_bad_arguments_are_named(self, name, change, message):
        arguments = {"anchors": latents(), "num_samples": 2, "bandwidth": 0.1, "generator": generator()} | change
        with pytest.raises(ValueError, match=message):
            SAMPLERS[name](**arguments)


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Kolmogorov-Smirnov on every coordinate and on random directions; a false alarm in 1 of 10,000 seeds."""
    directions = np.random.default_rng(0).normal(size=(ours.shape[1], 8))
    ours, theirs = np.hstack([ours, ours @ directions]), np.hstack([theirs, theirs @ directions])
    return all(ks_2samp(a, b).pvalue > 1e-4 / ours.shape[1] for a, b in zip(ours.T, theirs.T, strict=True))


def sklearn_kde(points: np.ndarray, bandwidth: float, count: int, seed: int) -> np.ndarray:
    """Scikit-learn's estimate on standardised points, back in their own units."""
    spread = points.std(0)
    kde = KernelDensity(bandwidth=bandwidth).fit(points / spread)
    return kde.sample(count, random_state=seed) * spread


def test_shared_anchor_is_the_kernel_density_estimate_of_the_joint_latent():
    anchors = latents(anchors=4, tokens=2)
    ours = SAMPLERS["kde_shared_anchor"](anchors, 4000, 0.3, generator()).flatten(1).numpy()
    assert same_distribution(ours, sklearn_kde(anchors.flatten(1).numpy(), 0.3, 4000, 1))
    assert not same_distribution(ours, sklearn_kde(anchors.flatten(1).numpy(), 0.6, 4000, 1))
    independent = SAMPLERS["kde_independent"](anchors, 4000, 0.3, generator()).flatten(1).numpy()
    assert not same_distribution(independent, sklearn_kde(anchors.flatten(1).numpy(), 0.3, 4000, 1))


def test_independent_is_a_kernel_density_estimate_per_token():
    anchors = latents(anchors=4, tokens=2)
    ours = SAMPLERS["kde_independent"](anchors, 4000, 0.3, generator()).numpy()
    theirs = [sklearn_kde(anchors[:, token].numpy(), 0.3, 4000, token) for token in range(2)]
    assert same_distribution(ours.reshape(4000, -1), np.hstack(theirs))


def test_anchors_per_sample_tell_the_samplers_apart():
    anchors = torch.arange(5.0)[:, None, None].expand(5, 40, 2)

    def distinct(name: str) -> list[int]:
        tokens = SAMPLERS[name](anchors, 20, 0.01, generator())[..., 0]
        return [len(row.round().unique()) for row in tokens]

    assert set(distinct("kde_shared_anchor")) == {1}
    assert set(distinct("kde_independent")) == {5}
    between = SAMPLERS["interpolation"](anchors, 20, 0.5, generator())
    assert (between == between[:, :1, :1]).all()  # all tokens at the same place of the same line
    assert (torch.cdist(between[:, 0], anchors[:, 0]).amin(1) <= 2 * 2**0.5).all()


@pytest.mark.parametrize("name", ["kde_shared_anchor", "kde_independent"])
def test_the_kernel_is_as_wide_as_bandwidth_times_the_spread(name):
    anchors = latents() + 1e6 * torch.arange(5.0, dtype=torch.float64)[:, None, None]  # which anchor is plain to see
    spread = latents().std((0, 1))
    samples = SAMPLERS[name](anchors, 4000, 0.25, generator(), scale=spread)
    which = (samples / 1e6).round().long().clamp(0, 4)
    noise = samples - anchors.gather(0, which)
    assert torch.allclose(noise.std((0, 1)).float(), 0.25 * spread, rtol=0.02)
    assert torch.allclose(noise.mean((0, 1)).float() / spread, torch.zeros(3), atol=0.01)
    assert (which.flatten().bincount() / which.numel() - 0.2).abs().max() < 0.03


def test_noise_of_the_shared_sampler_is_new_on_every_token():
    anchors = torch.zeros(2, 500, 1)
    noise = SAMPLERS["kde_shared_anchor"](anchors, 2, 1.0, generator(), scale=torch.ones(1))[..., 0]
    assert len(noise.unique()) == noise.numel()
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.2


def test_one_anchor_needs_a_scale():
    for name in ("kde_shared_anchor", "kde_independent"):
        with pytest.raises(ValueError, match="one anchor has none: pass more anchors, bandwidth=0, or scale="):
            SAMPLERS[name](latents(1), 3, 0.1, generator())
        noise = SAMPLERS[name](latents(1), 2000, 0.5, generator(), scale=torch.tensor([1.0, 2.0, 4.0])) - latents(1)
        assert torch.allclose(noise.std((0, 1)), torch.tensor([0.5, 1.0, 2.0]), rtol=0.05)
    with pytest.raises(ValueError, match="two anchors"):
        SAMPLERS["interpolation"](latents(1), 3, 0.1, generator())
    with pytest.raises(ValueError, match="fraction of the way"):
        SAMPLERS["interpolation"](latents(), 3, 1.5, generator())


@pytest.mark.parametrize("rule", BANDWIDTH_RULES)
def test_rules_equal_scikit_learn(rule):
    points = np.random.default_rng(0).normal(size=(20, 4))
    fitted = KernelDensity(bandwidth=rule).fit(points)
    assert BANDWIDTH_RULES[rule](20, 4) == pytest.approx(fitted.bandwidth_)
    with pytest.raises(ValueError, match="at least one anchor"):
        BANDWIDTH_RULES[rule](0, 4)
