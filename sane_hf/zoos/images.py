"""Image sets that populations are trained on, split for training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DIGITS_SPLITS = {"train": 1000, "validation": 300, "test": 497}
_SPLIT_SEED = 0  # fixed: every zoo of digits has the same test images, whatever its own seed


@dataclass(frozen=True)
class ImageSplit:
    """Images (n, C, H, W) float32, standardised, and labels (n,) long."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSplits:
    """An image set: what networks are trained on, chosen by, and judged by."""

    name: str
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit

    def items(self) -> list[tuple[str, ImageSplit]]:
        """Return the three splits with their names."""
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


def load_images(name: str) -> ImageSplits:
    """Load an image set.

    `"digits"` is scikit-learn's: 1,797 handwritten digits of 8x8 pixels, split once and for all into 1,000 for
    training, 300 for validation and 497 for test. Pixels are scaled to [0, 1], then standardised with the mean and
    standard deviation of the training images.

    Args:
        name: `"digits"`.

    Returns:
        The three splits: images (n, 1, 8, 8) float32, labels (n,) long.

    Raises:
        ValueError: an unknown name.
        ImportError: scikit-learn is not installed.

    Example:
        >>> digits = load_images("digits")
        >>> {split: tuple(images.images.shape) for split, images in digits.items()}
        {'train': (1000, 1, 8, 8), 'validation': (300, 1, 8, 8), 'test': (497, 1, 8, 8)}
    """
    if name != "digits":
        raise ValueError(f"image set {name!r} is unknown; known is 'digits'")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "the digits come with scikit-learn: pip install 'sane-hf[analysis]'"
        raise ModuleNotFoundError(message, name="sklearn") from error
    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float()[:, None] / 16
    labels = torch.from_numpy(digits.target[order]).long()
    train = images[: DIGITS_SPLITS["train"]]
    images = (images - train.mean()) / train.std()
    sizes = list(DIGITS_SPLITS.values())
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    return ImageSplits(name, *(ImageSplit(part, classes) for part, classes in parts))
