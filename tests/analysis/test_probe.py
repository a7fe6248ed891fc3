"""Probes choose on validation, score on test, are fair to every feature set, and refuse what would lie."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from sane_hf.analysis import kendall_tau, metadata_features, probe, r2
from sane_hf.analysis.ridge import ALPHAS, fit_ridge

SPLIT = np.repeat(["train", "validation", "test"], [120, 40, 40])


def data(features, targets=2, noise=0.5, rows=200, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)) * 10.0 ** rng.uniform(-3, 3, features) + rng.normal(size=features)
    y = ((x - x.mean(0)) / x.std(0)) @ rng.normal(size=(features, targets)) / features**0.5
    return x, y + noise * rng.normal(size=y.shape)


@pytest.mark.parametrize("features", [6, 300], ids=["more rows", "more features"])
def test_ridge_is_scikit_learns_at_the_strength_best_on_validation(features):
    x, y = data(features)
    train, validation = SPLIT == "train", SPLIT == "validation"
    fitted = fit_ridge(x[train], y[train], x[validation], y[validation])
    scaler = StandardScaler().fit(x[train])
    for target in range(2):
        candidates = [Ridge(alpha=alpha).fit(scaler.transform(x[train]), y[train, target]) for alpha in ALPHAS]
        errors = [
            np.square(c.predict(scaler.transform(x[validation])) - y[validation, target]).mean() for c in candidates
        ]
        assert fitted.alphas[target] == ALPHAS[np.argmin(errors)]
        expected = candidates[int(np.argmin(errors))].predict(scaler.transform(x))
        np.testing.assert_allclose(fitted.predict(x)[:, target], expected, atol=1e-6)


def test_ridge_ignores_constant_features():
    x, y = data(4)
    x = np.concatenate([x, np.full((200, 1), 0.1)], axis=1)
    fitted = fit_ridge(x[:120], y[:120], x[120:160], y[120:160])
    assert np.isfinite(fitted.predict(x)).all()
    np.testing.assert_allclose(fitted.coefficients[4], 0, atol=1e-12)


def test_scores_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    truth, predicted = rng.normal(size=50), rng.normal(size=50)
    assert r2(truth, predicted) == pytest.approx(1 - np.mean((truth - predicted) ** 2) / np.var(truth))
    assert kendall_tau(truth, predicted) == pytest.approx(kendalltau(truth, predicted).statistic)
    assert kendall_tau(truth, np.ones(50)) == 0


@pytest.mark.parametrize("learner", ["ridge", "trees"])
def test_finds_what_is_there_and_nothing_in_noise(learner):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 3))
    split = np.repeat(["train", "validation", "test"], [600, 150, 150])
    scores = probe(
        {"told": x, "noise": rng.normal(size=(900, 3))}, {"y": np.sin(x[:, 0])}, split, np.arange(900), learner
    )
    assert scores["y"]["told"]["r2"] > 0.8
    assert scores["y"]["told"]["tau"] > 0.7
    assert scores["y"]["noise"]["r2"] < 0.1


@pytest.mark.parametrize("learner", ["ridge", "trees"])
def test_test_rows_change_nothing_but_the_score(learner):
    """Targets of the test rows must not reach the fit: shuffling them cannot raise the score above chance."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(600, 3))
    split = np.repeat(["train", "validation", "test"], 200)
    y = x[:, 0].copy()
    y[split == "test"] = rng.permutation(y[split == "test"])
    assert probe({"x": x}, {"y": y}, split, np.arange(600), learner)["y"]["x"]["r2"] < 0


def test_a_target_sees_its_own_features_only():
    x, y = data(3)
    scores = probe({"own": {"a": x, "b": np.zeros((200, 1))}}, {"a": y[:, 0], "b": y[:, 1]}, SPLIT, np.arange(200))
    assert scores["a"]["own"]["r2"] > 0.5
    assert abs(scores["b"]["own"]["r2"]) < 0.1


def test_a_model_in_two_splits_is_named():
    x, y = data(3)
    models = np.array([f"m{i}" for i in range(200)])
    models[150] = "m7"
    with pytest.raises(ValueError, match="model_id m7 is in the splits train and validation.*leak"):
        probe({"x": x}, {"y": y[:, 0]}, SPLIT, models)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(split=np.where(SPLIT == "test", "validation", SPLIT)), "no test row"),
        (lambda d: d.update(split=np.where(SPLIT == "test", "holdout", SPLIT)), "holdout"),
        (lambda d: d.update(model_ids=np.arange(199)), "199"),
        (lambda d: d.update(learner="forest"), "ridge, trees"),
        (lambda d: d.update(targets={"y": np.r_[np.nan, np.zeros(199)]}), "target 'y'.*row 0"),
        (lambda d: d.update(targets={"y": np.ones(200)}), "equal"),
        (lambda d: d.update(features={"x": np.full((200, 2), np.inf)}), "features 'x'.*200 rows"),
        (lambda d: d.update(features={"x": np.zeros((100, 2))}), "features 'x' has 100 rows"),
    ],
)
def test_bad_input(change, message):
    x, y = data(3)
    arguments = {"features": {"x": x}, "targets": {"y": y[:, 0]}, "split": SPLIT, "model_ids": np.arange(200)}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        probe(**arguments)


def test_metadata_knows_the_mean_of_each_epoch():
    epochs = [0, 5, 25] * 4
    rates = np.logspace(-4, -2, 24)[:12].tolist()
    features = metadata_features({"epoch": epochs, "learning_rate": rates, "flag": [True] * 12})
    assert features.shape == (12, 3 + 12)  # few values: one column for each; constant: none
    long = metadata_features({"learning_rate": np.logspace(-4, -2, 30).tolist()})
    np.testing.assert_allclose(long[:, 1], np.log(long[:, 0]))
    assert metadata_features({"seed": [1, 1]}).tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="learning_rate"):
        metadata_features({"epoch": [0, 1], "learning_rate": [0.1]})
