"""Zoos: populations of trained networks as Hugging Face datasets.

`load_zoo`, `zoo_info`, `reference_weights` and `weight_matrix` read one, `ZooWriter` writes one,
`sane_hf.zoos.population` trains one, `load_images` gives the images that it is trained on.
"""

from __future__ import annotations

from .images import ImageSplit, ImageSplits, load_images
from .loading import check_splits, load_zoo, reference_weights, weight_matrix, zoo_info
from .matrix import ZooMatrix, deal_splits, load_matrix
from .schema import SCHEMA, SPLITS, content_hash
from .writing import ZooWriter

__all__ = [
    "SCHEMA",
    "SPLITS",
    "ImageSplit",
    "ImageSplits",
    "ZooMatrix",
    "ZooWriter",
    "check_splits",
    "content_hash",
    "deal_splits",
    "load_images",
    "load_matrix",
    "load_zoo",
    "reference_weights",
    "weight_matrix",
    "zoo_info",
]
