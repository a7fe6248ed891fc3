"""What the embedding looks like: a map in two dimensions, and every layer's way through training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sane_hf.reporting.subject import Subject


def embedding_map(subject: Subject, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project the test split on the two main components of the train split.

    Args:
        subject: gives the splits.
        features: (n, F) embeddings of the zoo.

    Returns:
        (test rows, 2) coordinates, and the (2,) shares of the train split's variance.
    """
    train = features[subject.rows("train")].astype(np.float64)
    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale[scale == 0] = 1
    squares, vectors = np.linalg.eigh(np.cov((train - mean) / scale, rowvar=False))
    main = vectors[:, [-1, -2]]
    return (features[subject.rows("test")] - mean) / scale @ main, squares[[-1, -2]] / squares.sum()


@dataclass(frozen=True)
class LayerMoves:
    """How far the embedding of each layer moves in training.

    Attributes:
        layers: (L,) names.
        epochs: (E,) saved epochs that all networks have.
        distances: (3, E, L) quartiles over the networks of the test split.
    """

    layers: list[str]
    epochs: np.ndarray
    distances: np.ndarray


def layer_moves(subject: Subject, layer_embeddings: np.ndarray) -> LayerMoves:
    """Measure every layer's distance to its own embedding at the first epoch.

    Args:
        subject: gives epochs and splits.
        layer_embeddings: (n, L, Z) layer-wise embeddings.

    Returns:
        Quartiles over test networks, in units of the mean distance between two of them at that layer, last epoch.
    """
    rows = subject.rows("test")
    epochs = np.unique(subject.epochs[rows]).tolist()
    models = np.unique(subject.model_ids[rows]).tolist()
    keys = zip(subject.model_ids[rows].tolist(), subject.epochs[rows].tolist(), strict=True)
    place = dict(zip(keys, rows.tolist(), strict=True))
    whole = [model for model in models if all((model, epoch) in place for epoch in epochs)]
    index = np.array([[place[model, epoch] for epoch in epochs] for model in whole])  # (M, E)
    trajectories = layer_embeddings[index].astype(np.float64)  # (M, E, L, Z)
    moved = np.linalg.norm(trajectories - trajectories[:, :1], axis=-1)  # (M, E, L)
    last = trajectories[:, -1]
    apart = np.linalg.norm(last[:, None] - last[None], axis=-1).sum(axis=(0, 1)) / max(1, len(last) * (len(last) - 1))
    distances = np.quantile(moved / np.where(apart > 0, apart, 1), [0.25, 0.5, 0.75], axis=0)
    names = [layer.name.removesuffix(".weight") for layer in subject.layout.layers]
    return LayerMoves(names, np.array(epochs), distances)
