"""Stage: what latents tell about networks of the test split, beside what simple features tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sane_hf.analysis import held_out_predictions, metadata_features, score, weight_statistics
from sane_hf.analysis.embed import encode_flat
from sane_hf.analysis.readouts import layer_mean_std
from sane_hf.reporting.subject import Subject

TARGETS = ("test_accuracy", "epoch", "generalization_gap")
TRAINED = 5  # networks count as trained from this epoch on
HYPERPARAMETERS = ("activation", "initialization", "learning_rate", "dropout", "weight_decay")
# key in metrics.json -> (learner, trained epochs only)
PROBES = {
    "probe": ("ridge", False),
    "probe_trained": ("ridge", True),
    "probe_trees": ("trees", False),
    "probe_trees_trained": ("trees", True),
}


def embedding(subject: Subject) -> dict[str, np.ndarray]:
    """Layer-wise embedding of every checkpoint.

    Returns:
        `layers` (n, L, 2Z) float32: mean and standard deviation of the latents over the tokens of each layer.
    """
    parts = []
    layers = subject.layout.layer_of_token()
    for start in range(0, len(subject.flat), 1024):
        latents = encode_flat(subject.flat[start : start + 1024], subject.layout, subject.model, subject.tokenizer)
        real = latents.new_ones(latents.shape[:2]).bool()
        found = layer_mean_std(latents, real, layers.expand(real.shape))  # all means, then all deviations
        parts.append(found.unflatten(1, (2, -1, latents.shape[-1])).transpose(1, 2).flatten(2).numpy())
    return {"layers": np.concatenate(parts)}


def probing(subject: Subject, layer_embeddings: np.ndarray, seed: int, quick: bool = False) -> dict[str, Any]:
    """Probe every feature set with ridge and with trees, on all and on trained epochs.

    Args:
        subject: model and zoo.
        layer_embeddings: (n, L, 2Z), from `embedding`; concatenated over layers they are the latents' features.
        seed: of the trees.
        quick: leave out the trees on raw weights, which take as long as all others together.

    Returns:
        The four probes of metrics.json under `scores`; under `layers` R² of ridge on one layer's embedding alone,
        trained epochs, `{target: [R² of every layer]}`; and as arrays `ridge_TARGET` and `trees_TARGET`, predictions
        of the test rows from the latents, all epochs.
    """
    features = feature_sets(subject, layer_embeddings)
    trained = subject.epochs >= TRAINED
    result: dict[str, Any] = {"scores": {}}
    for name, (learner, trained_only) in PROBES.items():
        rows = trained if trained_only else np.ones_like(trained)
        chosen = {key: _rows(values, rows) for key, values in features.items()}
        if quick and learner == "trees":
            del chosen["raw_weights"]
        predictions, targets = _predict(subject, chosen, rows, learner, seed)
        result["scores"][name] = {
            target: {key: score(targets[target], values) for key, values in found.items()}
            for target, found in predictions.items()
        }
        if not trained_only:
            result.update({f"{learner}_{target}": predictions[target]["latents"] for target in predictions})
    by_layer = {str(layer): layer_embeddings[trained, layer] for layer in range(layer_embeddings.shape[1])}
    predictions, targets = _predict(subject, by_layer, trained, "ridge", seed)
    result["layers"] = {
        target: [score(targets[target], found[layer])["r2"] for layer in by_layer]
        for target, found in predictions.items()
    }
    return result


def feature_sets(subject: Subject, layer_embeddings: np.ndarray) -> dict[str, Any]:
    """The feature sets of metrics.json: name -> (n, F) array, or target -> array for the metadata."""
    latents = layer_embeddings.reshape(len(layer_embeddings), -1)
    logs = weight_statistics(subject.flat, subject.layout, log=True).numpy()
    columns = subject.zoo.columns
    known = {name: columns[name].tolist() for name in HYPERPARAMETERS if name in columns}
    with_epoch = metadata_features({**known, "epoch": subject.epochs.tolist()})
    # What the hyperparameters tell of the epoch is nothing, which the figure shows: it never sees the epoch itself.
    metadata = {target: metadata_features(known) if target == "epoch" else with_epoch for target in TARGETS}
    return {
        "latents": latents,
        "weight_statistics": weight_statistics(subject.flat, subject.layout).numpy(),
        "log_weight_statistics": logs,
        "latents_and_log_statistics": np.concatenate([latents, logs], axis=1),
        "raw_weights": subject.flat.numpy(),
        "metadata": metadata,
    }


def _predict(
    subject: Subject, features: Mapping[str, Any], rows: np.ndarray, learner: str, seed: int
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Predictions of the test rows among `rows`, and what is true."""
    split = subject.split[rows]
    targets = {target: subject.zoo.columns[target][rows] for target in TARGETS}
    predictions = held_out_predictions(features, targets, split, subject.model_ids[rows], learner, seed)
    return predictions, {target: values[split == "test"] for target, values in targets.items()}


def _rows(values: np.ndarray | Mapping[str, np.ndarray], rows: np.ndarray) -> Any:
    if isinstance(values, Mapping):
        shared = {id(array): array[rows] for array in values.values()}  # keeps shared arrays shared
        return {target: shared[id(array)] for target, array in values.items()}
    return values[rows]
