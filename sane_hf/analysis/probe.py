"""Probes: how well do features of networks predict what the networks are worth, on models never seen in fitting?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from scipy.stats import kendalltau

from sane_hf.analysis.ridge import fit_ridge
from sane_hf.analysis.trees import fit_trees

SPLITS = ("train", "validation", "test")
Features = np.ndarray | Mapping[str, np.ndarray]  # one array for all targets, or one for each


class FittedProbe(Protocol):
    """What a learner returns."""

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, F) features to (n, K) predictions."""


# A learner takes (train features, train targets, validation features, validation targets, seed).
LEARNERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], FittedProbe]] = {
    "ridge": lambda x, y, x_validation, y_validation, seed: fit_ridge(x, y, x_validation, y_validation),
    "trees": fit_trees,
}


def check_split(split: Sequence[str] | np.ndarray, model_ids: Sequence | np.ndarray) -> np.ndarray:
    """Check that every model lies in exactly one split and that no split is empty.

    Args:
        split: (n,) of "train", "validation" or "test".
        model_ids: (n,) the model that each row is a checkpoint of.

    Returns:
        The split as an array of strings.

    Raises:
        ValueError: for an unknown or an empty split, and for a model in two splits, named.

    Example:
        >>> check_split(["train", "validation", "test"], ["a", "b", "c"]).tolist()
        ['train', 'validation', 'test']
    """
    split, model_ids = np.asarray(split), np.asarray(model_ids)
    if split.shape != model_ids.shape:
        raise ValueError(f"split has {split.shape[0]} rows and model_ids {model_ids.shape[0]}: one of each per row")
    unknown = sorted(set(split.tolist()) - set(SPLITS))
    if unknown:
        raise ValueError(f"split has the value {unknown[0]!r}: only {', '.join(SPLITS)} are known")
    for name in SPLITS:
        if not (split == name).any():
            raise ValueError(f"split has no {name} row: a probe needs rows in {', '.join(SPLITS)}")
    # One (model, split) pair per model, or some model is in two splits.
    models, codes = np.unique(model_ids, return_inverse=True)
    pairs = np.unique(np.stack([codes, np.searchsorted(sorted(SPLITS), split)]), axis=1)[0]
    leaking = np.flatnonzero(np.bincount(pairs) > 1)
    if leaking.size:
        where = " and ".join(sorted(set(split[codes == leaking[0]].tolist())))
        others = f" (and {leaking.size - 1} other models)" if leaking.size > 1 else ""
        raise ValueError(
            f"model_id {models[leaking[0]]} is in the splits {where}{others}: checkpoints of one model leak into the "
            "score. Split by model_id"
        )
    return split


def r2(targets: np.ndarray, predictions: np.ndarray) -> float:
    """1 - mean squared error / variance of the targets.

    Args:
        targets: (n,) true values.
        predictions: (n,) predicted values.

    Returns:
        The coefficient of determination; 1 is perfect, 0 is the mean of the targets.

    Raises:
        ValueError: if all targets are equal.

    Example:
        >>> r2(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 1.0]))
        0.5
    """
    variance = np.var(targets, dtype=np.float64)
    if not variance > 0:
        raise ValueError(f"all {len(targets)} targets equal {targets[0]}: R² needs targets that vary")
    return float(1 - np.square(np.asarray(targets, np.float64) - predictions).mean() / variance)


def kendall_tau(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Kendall's tau-b, how alike two rankings are; 0 where the predictions are all equal and rank nothing.

    Args:
        targets: (n,) true values.
        predictions: (n,) predicted values.

    Returns:
        From -1 (reversed) to 1 (the same ranking).

    Example:
        >>> round(kendall_tau(np.array([1, 2, 3, 4]), np.array([1.0, 2.0, 4.0, 3.0])), 4)
        0.6667
    """
    if np.ptp(predictions) == 0:
        return 0.0
    return float(kendalltau(targets, predictions).statistic)


def fit_probe(
    features: np.ndarray, targets: np.ndarray, split: np.ndarray, learner: str = "ridge", seed: int = 0
) -> FittedProbe:
    """Fit one learner on the train rows; the validation rows choose its strength (ridge) or length (trees).

    Args:
        features: (n, F).
        targets: (n, K) or (n,).
        split: (n,) of "train", "validation", "test"; the test rows are not touched.
        learner: "ridge" or "trees".
        seed: of the trees.

    Returns:
        The fitted probe, with `predict(features) -> (m, K)`.

    Raises:
        ValueError: for an unknown learner.

    Example:
        >>> x = np.arange(12.0)[:, None]
        >>> where = np.array(["train"] * 8 + ["validation"] * 2 + ["test"] * 2)
        >>> fit_probe(x, 3 * x[:, 0], where).predict(x[10:]).round(2).ravel().tolist()
        [30.0, 33.0]
    """
    if learner not in LEARNERS:
        raise ValueError(f"learner={learner!r} is unknown: choose one of {', '.join(LEARNERS)}")
    targets = np.asarray(targets, np.float64).reshape(len(targets), -1)
    train, validation = split == "train", split == "validation"
    return LEARNERS[learner](features[train], targets[train], features[validation], targets[validation], seed)


def held_out_predictions(
    features: Mapping[str, Features],
    targets: Mapping[str, np.ndarray],
    split: Sequence[str] | np.ndarray,
    model_ids: Sequence | np.ndarray,
    learner: str = "ridge",
    seed: int = 0,
) -> dict[str, dict[str, np.ndarray]]:
    """Fit a probe for every feature set and target, and predict the test rows. Arguments and errors as of `probe`.

    Returns:
        `{target: {features: (test rows,) float64}}`.
    """
    split = check_split(split, model_ids)
    columns = {name: np.asarray(values, np.float64) for name, values in targets.items()}
    for name, values in columns.items():
        _check_rows(f"target {name!r}", values, len(split))
    test = split == "test"
    predictions: dict[str, dict[str, np.ndarray]] = {name: {} for name in columns}
    for feature_name, given in features.items():
        per_target = given if isinstance(given, Mapping) else dict.fromkeys(columns, given)
        # Targets that share their features are fitted together.
        groups: dict[int, list[str]] = {}
        for target in columns:
            groups.setdefault(id(per_target[target]), []).append(target)
        for names in groups.values():
            matrix = np.asarray(per_target[names[0]])
            _check_rows(f"features {feature_name!r}", matrix, len(split))
            stacked = np.stack([columns[name] for name in names], axis=1)
            predicted = fit_probe(matrix, stacked, split, learner, seed).predict(matrix[test])
            for column, name in enumerate(names):
                predictions[name][feature_name] = predicted[:, column]
    return predictions


def score(targets: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """R² and Kendall's tau, as `probe` gives them.

    Example:
        >>> score(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0]))
        {'r2': 1.0, 'tau': 1.0}
    """
    return {"r2": r2(targets, predictions), "tau": kendall_tau(targets, predictions)}


def probe(
    features: Mapping[str, Features],
    targets: Mapping[str, np.ndarray],
    split: Sequence[str] | np.ndarray,
    model_ids: Sequence | np.ndarray,
    learner: str = "ridge",
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """Score every feature set on every target, on the test rows, with the same learner for all of them.

    Args:
        features: name -> (n, F) array. A feature set that would contain a target (metadata knows the epoch) is a
            mapping target -> (n, F) array instead.
        targets: name -> (n,) array.
        split: (n,) of "train", "validation" or "test".
        model_ids: (n,) the model that each row is a checkpoint of; no model may be in two splits.
        learner: "ridge" (strength chosen on validation) or "trees" (boosted, stopped on validation).
        seed: of the trees.

    Returns:
        `{target: {features: {"r2": ..., "tau": ...}}}`, R² = 1 - MSE / variance and Kendall's tau on the test rows.

    Raises:
        ValueError: for a leaking split (naming the model), an unknown learner, features or targets of another length
            or with non-finite values (naming them), and targets that do not vary.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(60, 2))
        >>> split = np.repeat(["train", "validation", "test"], 20)
        >>> scores = probe({"both": x, "noise": x[:, 1:]}, {"y": x[:, 0]}, split, np.arange(60))
        >>> scores["y"]["both"]["r2"] > 0.99 > scores["y"]["noise"]["r2"]
        True
    """
    predictions = held_out_predictions(features, targets, split, model_ids, learner, seed)
    test = np.asarray(split) == "test"
    return {
        target: {name: score(np.asarray(targets[target], np.float64)[test], values) for name, values in found.items()}
        for target, found in predictions.items()
    }


def _check_rows(what: str, values: np.ndarray, rows: int) -> None:
    if len(values) != rows:
        raise ValueError(f"{what} has {len(values)} rows where split has {rows}")
    finite = np.isfinite(values).reshape(rows, -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{what} has {rows - finite.sum()} rows with non-finite values, the first is row {finite.argmin()}: "
            "leave these rows out"
        )
