"""The columns of a zoo: one row per checkpoint, all properties nullable, weights as safetensors bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pyarrow as pa

SPLITS = ("train", "validation", "test")
SPLIT_SHARES = (0.70, 0.15, 0.15)  # of the models

SCHEMA = pa.schema(
    [
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("architecture", pa.string(), nullable=False),
        pa.field("architecture_config", pa.string(), nullable=False),  # JSON
        pa.field("weights", pa.large_binary(), nullable=False),  # safetensors
        pa.field("train_accuracy", pa.float32()),  # fractions of 1
        pa.field("validation_accuracy", pa.float32()),
        pa.field("test_accuracy", pa.float32()),
        pa.field("train_loss", pa.float32()),  # mean cross-entropy, nats
        pa.field("validation_loss", pa.float32()),
        pa.field("test_loss", pa.float32()),
        pa.field("generalization_gap", pa.float32()),  # train accuracy - test accuracy
        pa.field("activation", pa.string()),
        pa.field("initialization", pa.string()),
        pa.field("learning_rate", pa.float64()),
        pa.field("dropout", pa.float64()),
        pa.field("weight_decay", pa.float64()),
        pa.field("seed", pa.int64()),
        pa.field("sha256", pa.string(), nullable=False),  # of the weights' bytes
    ]
)

DESCRIPTIONS = {
    "model_id": "one trained network; all its epochs lie in the same split",
    "epoch": "epochs of training behind this checkpoint, 0 = as initialised",
    "architecture": "name of the architecture",
    "architecture_config": "its configuration, JSON",
    "weights": "the state dict as safetensors bytes",
    "train_accuracy": "share of the training images classified rightly",
    "validation_accuracy": "the same on the validation images",
    "test_accuracy": "the same on the test images",
    "train_loss": "mean cross-entropy on the training images, nats",
    "validation_loss": "the same on the validation images",
    "test_loss": "the same on the test images",
    "generalization_gap": "train_accuracy - test_accuracy",
    "activation": "hyperparameter: activation function",
    "initialization": "hyperparameter: distribution of the initial weights",
    "learning_rate": "hyperparameter: of Adam, constant",
    "dropout": "hyperparameter: rate before each dense layer",
    "weight_decay": "hyperparameter: L2, added to the gradient",
    "seed": "hyperparameter: initial weights, data order and dropout masks",
    "sha256": "of the weights' bytes",
}


def content_hash(rows: Iterable[tuple[str, int, str]]) -> str:
    """Return one hash of what a zoo holds, whatever its order, shards and compression.

    Args:
        rows: (model_id, epoch, sha256 of the weights' bytes) of every checkpoint.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> content_hash([("a", 0, "x"), ("a", 1, "y")]) == content_hash([("a", 1, "y"), ("a", 0, "x")])
        True
    """
    digest = hashlib.sha256()
    for model_id, epoch, weights in sorted(rows):
        digest.update(f"{model_id}\t{epoch}\t{weights}\n".encode())
    return digest.hexdigest()
