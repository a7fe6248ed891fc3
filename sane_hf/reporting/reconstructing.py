"""Stage: what is left of networks after encoding and decoding, by compression, beside noise of equal error."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sane_hf.analysis.embed import encode_flat
from sane_hf.reporting.probing import TRAINED
from sane_hf.reporting.subject import Subject, decode_latents

BUDGETS = (0.25, 0.5, 1.0)  # latents per weight


def reconstruction(subject: Subject, seed: int, test_limit: int | None = None) -> dict[str, Any]:
    """Decode the test split and the anchors, and run what comes out on the test images.

    Args:
        subject: model and zoo.
        seed: of the noise.
        test_limit: networks of the test split at most, spread evenly; all if absent.

    Returns:
        A point as of `_measure` for the model as it is under `full`, and one for each budget under `curve`; under
        `epochs`, by epoch, test accuracy of the test split's networks before (`original`) and after (`decoded`).
    """
    rows = subject.rows("test")
    if test_limit is not None and len(rows) > test_limit:
        rows = rows[np.linspace(0, len(rows) - 1, test_limit).astype(int)]
    test = _Group(subject, rows)
    trained = subject.epochs[rows] >= TRAINED
    anchors = _Group(subject, subject.anchors)
    full, decoded = _measure(subject, test, anchors, trained, None, seed)
    epochs = {}
    accuracy = subject.accuracy(decoded, test.configs)
    for epoch in np.unique(subject.epochs[rows]):
        at = subject.epochs[rows] == epoch
        epochs[str(epoch)] = {"original": float(test.accuracy[at].mean()), "decoded": float(accuracy[at].mean())}
    curve = [_measure(subject, test, anchors, trained, budget, seed)[0] for budget in BUDGETS]
    return {"full": full, "curve": curve, "epochs": epochs}


class _Group:
    """Networks that are decoded together: weights, latents, and accuracy before."""

    def __init__(self, subject: Subject, rows: np.ndarray):
        self.flat = subject.flat[torch.from_numpy(rows)]
        self.configs = subject.configs(rows)
        self.accuracy = subject.accuracy(self.flat, self.configs)
        self.latents = encode_flat(self.flat, subject.layout, subject.model, subject.tokenizer)


def _measure(
    subject: Subject, test: _Group, anchors: _Group, trained: np.ndarray, budget: float | None, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Figures at one compression, and the decoded weights of the test split.

    `r2` is over real weights in units of each layer's standard deviation against their common mean, `r2_raw` the same
    without these units, both on the test split, all epochs. Accuracies are means of test accuracies: of the anchors,
    and (`test_...`) of the trained epochs of the test split.
    """
    generator = torch.Generator().manual_seed(seed)
    decoded_test = decode_latents(subject, _kept(subject, test.latents, budget))
    decoded_anchors = decode_latents(subject, _kept(subject, anchors.latents, budget))
    chosen = torch.from_numpy(trained)
    point = {
        "latents_per_weight": latents_per_weight(subject, budget),
        "r2": _r2(subject.normalize(test.flat), subject.normalize(decoded_test)),
        "r2_raw": _r2(test.flat, decoded_test),
        "r2_trained": _r2(subject.normalize(test.flat[chosen]), subject.normalize(decoded_test[chosen])),
        "anchor_accuracy": float(anchors.accuracy.mean()),
        "test_accuracy": float(test.accuracy[trained].mean()),
    }
    for prefix, group, decoded, only in (
        ("", anchors, decoded_anchors, np.ones(len(anchors.flat), bool)),
        ("test_", test, decoded_test, trained),
    ):
        of = torch.from_numpy(only)
        configs = [config for config, keep in zip(group.configs, only, strict=True) if keep]
        noised = with_noise_of_equal_error(subject, group.flat[of], decoded[of], generator)
        point[f"{prefix}decoded_accuracy"] = float(subject.accuracy(decoded[of], configs).mean())
        point[f"{prefix}noise_accuracy_at_same_error"] = float(subject.accuracy(noised, configs).mean())
    return point, decoded_test


def latents_per_weight(subject: Subject, budget: float | None = None) -> float:
    """Numbers that the latent sequence holds per weight of the network.

    Args:
        subject: the model and its zoo.
        budget: as given to `SaneModel.keep_latents`; the model's own if absent.

    Returns:
        Latents that are kept, over weights. A token keeps at least one latent.
    """
    size = subject.model.config.latent_size
    budgets = [limit for limit in (budget, subject.model.config.latents_per_weight) if limit is not None]
    kept = torch.full((subject.layout.num_tokens,), float(size))
    for limit in budgets:
        kept = torch.minimum(kept, (subject.layout.mask().sum(dim=1) * limit).ceil())
    return float(kept.sum() / subject.layout.num_weights)


def with_noise_of_equal_error(subject: Subject, flat: Tensor, decoded: Tensor, generator: torch.Generator) -> Tensor:
    """Networks with Gaussian noise of the length of their reconstruction error, in units of the layers' deviations.

    Args:
        subject: gives the units.
        flat: (M, N) float, the networks.
        decoded: (M, N) float, the same, decoded.
        generator: source of the noise.

    Returns:
        (M, N) float32.
    """
    normalized = subject.normalize(flat)
    length = (subject.normalize(decoded) - normalized).norm(dim=1, keepdim=True)
    noise = torch.randn(flat.shape, generator=generator)
    return subject.denormalize(normalized + noise * length / noise.norm(dim=1, keepdim=True))


def _kept(subject: Subject, latents: Tensor, budget: float | None) -> Tensor:
    if budget is None:
        return latents
    return subject.model.keep_latents(latents, subject.layout.mask()[None].expand(len(latents), -1, -1), budget)


def _r2(true: Tensor, predicted: Tensor) -> float:
    true = true.double()
    return float(1 - (true - predicted).square().sum() / (true - true.mean()).square().sum())
