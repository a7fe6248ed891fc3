"""Stage: new networks from the latents of good ones, beside noise, averaging and training from scratch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sane_hf.analysis.embed import encode_flat
from sane_hf.generation import (
    SAMPLERS,
    behavior_tolerance,
    compare_at_distance,
    independent_distance,
    nearest_distance,
    outcome,
)
from sane_hf.members import forward, train
from sane_hf.modeling import flat_from_tokens
from sane_hf.reporting.subject import Subject, decode_latents
from sane_hf.zoos.hyperparameters import initialize

# The kernel of the sweep: one anchor a sample, noise shaped by what behaviour tolerates.
SAMPLER = "kde_tolerant"
BANDWIDTHS = (0.1, 0.2, 0.3, 0.5, 0.7)  # distances of about .1 to .6 between independent networks
# For comparison: the same with noise shaped by the anchors' spread, as the paper's code has it; and one point each.
OTHERS = (
    *(("kde_shared_anchor", bandwidth) for bandwidth in BANDWIDTHS),
    ("kde_independent", 0.1),
    ("interpolation", 0.5),
)
TOLERANCE_IMAGES = 256  # unlabelled training images
QUICK_BANDWIDTHS = (0.1, 0.5)
DRAWN, KEPT = 50, 10
LEARNING_RATE, BATCH_SIZE = 1e-3, 32


def generation(subject: Subject, seed: int, quick: bool = False) -> dict[str, Any]:
    """Sample over the sweep of bandwidths, and measure everything with the same draws and the same selection.

    Args:
        subject: model and zoo.
        seed: of all draws.
        quick: two bandwidths.

    Returns:
        `points` (the sweep) and `others` (other samplers), each a dict of what stands in metrics.json and
        `isotropic_noise_accuracy`, `shaped_noise_accuracy`, `average_distance`, `median_accuracy` (all that were
        drawn), `tolerant_noise_accuracy` (noise on weights shaped by the weights' own tolerance); `noise_accuracy` is
        the better of the first two kinds of noise. `scratch`; `independent_distance`, the unit
        of all distances; and `curves` for the plot.
    """
    bench = _Bench(subject, seed)
    bandwidths = QUICK_BANDWIDTHS if quick else BANDWIDTHS
    points = [bench.point(SAMPLER, bandwidth) for bandwidth in bandwidths]
    return {
        "points": points,
        "others": [bench.point(*other) for other in OTHERS],
        "scratch": bench.scratch(),
        "independent_distance": bench.unit,
    }


class _Bench:
    """Everything that samples are measured with. Weights are in units of the layers' deviations here."""

    def __init__(self, subject: Subject, seed: int):
        self.subject, self.seed = subject, seed
        self.anchors = subject.normalize(subject.flat[torch.from_numpy(subject.anchors)])
        self.configs = subject.configs(subject.anchors)
        self.latents = self._encode(subject.anchors)
        generator = torch.Generator().manual_seed(seed)
        self.latent_tolerance = behavior_tolerance(self.latents, self._decoded_answers, generator)
        self.weight_tolerance = behavior_tolerance(self.anchors, self._answers, generator)
        train_rows = subject.rows("train")
        self.train = subject.normalize(subject.flat[torch.from_numpy(train_rows)])
        self.decoded = torch.cat(
            [self._decode(self._encode(rows)) for rows in np.array_split(train_rows, -(-len(train_rows) // 1024))]
        )
        last = subject.last_rows("train")
        networks = subject.normalize(subject.flat[torch.from_numpy(last)])
        self.unit = float(independent_distance(networks, subject.model_ids[last].tolist()))

    def point(self, sampler: str, bandwidth: float) -> dict[str, Any]:
        """Draw, select, compare and fine-tune at one bandwidth."""
        generator = torch.Generator().manual_seed(self.seed)
        samples = self._decode(self._sample(sampler, bandwidth, generator))
        distances, _ = nearest_distance(samples, self.decoded)
        found = outcome(samples, distances, self.validation, self.test, KEPT)
        peers = compare_at_distance(
            self.anchors, distances, self.validation, self.test, KEPT, generator, self.weight_tolerance
        )
        kept = samples[found.kept]
        to_train, _ = nearest_distance(kept, self.train)
        noise = {name: peers[name].accuracy for name in ("noise", "shaped_noise")}
        return {
            "sampler": sampler,
            "bandwidth": bandwidth,
            "accuracy_epoch_0": found.accuracy,
            "accuracy_epoch_1": self.fine_tuned(kept, self.configs_of(kept)),
            "distance_to_decoded": found.distance / self.unit,
            "distance_to_train": float(to_train.mean()) / self.unit,
            "noise_accuracy": max(noise.values()),
            "average_accuracy": peers["average"].accuracy,
            "isotropic_noise_accuracy": noise["noise"],
            "shaped_noise_accuracy": noise["shaped_noise"],
            "tolerant_noise_accuracy": peers["tolerant_noise"].accuracy,
            "average_distance": peers["average"].distance / self.unit,
            "median_accuracy": found.median,
        }

    def scratch(self) -> dict[str, float]:
        """Fresh networks of the anchors' configurations, drawn and selected as samples are."""
        configs = [self.configs[index % len(self.configs)] for index in range(DRAWN)]
        architecture = self.subject.zoo.architecture
        fresh = [
            initialize(architecture, self.subject.config(config), "kaiming_uniform", self.seed * DRAWN + index)
            for index, config in enumerate(configs)
        ]
        flat = self.subject.layout.flatten_many(fresh)
        order = np.argsort(-self.subject.accuracy(flat, configs, "validation"), kind="stable")[:KEPT]
        chosen, kept = flat[torch.from_numpy(order)], [configs[index] for index in order]
        return {
            "accuracy_epoch_0": float(self.subject.accuracy(chosen, kept).mean()),
            "accuracy_epoch_1": self.fine_tuned(self.subject.normalize(chosen), kept),
        }

    def fine_tuned(self, normalized: Tensor, configs: list[str]) -> float:
        """Mean test accuracy after one epoch: Adam, learning rate 1e-3, batch 32."""
        subject, images = self.subject, self.subject.images.train
        networks = subject.stacked(subject.denormalize(normalized))
        seeds = [self.seed * DRAWN + index for index in range(len(normalized))]
        trained = train(
            subject.zoo.architecture,
            configs,
            networks,
            images.images,
            images.labels,
            epochs=1,
            learning_rate=LEARNING_RATE,
            batch_size=BATCH_SIZE,
            seeds=seeds,
        )
        return float(subject.accuracy(trained, configs).mean())

    def configs_of(self, normalized: Tensor) -> list[str]:
        """A new network gets the configuration (dropout in training) of the nearest anchor."""
        return [self.configs[index] for index in nearest_distance(normalized, self.anchors)[1].tolist()]

    def validation(self, normalized: Tensor) -> Tensor:
        """Accuracies (S,) on the validation images."""
        return self._accuracy(normalized, "validation")

    def test(self, normalized: Tensor) -> Tensor:
        """Accuracies (S,) on the test images."""
        return self._accuracy(normalized, "test")

    def _accuracy(self, normalized: Tensor, split: str) -> Tensor:
        # Anchors share all of their configuration that matters in evaluation.
        configs = [self.configs[0]] * len(normalized)
        return torch.from_numpy(self.subject.accuracy(self.subject.denormalize(normalized), configs, split))

    def _sample(self, sampler: str, bandwidth: float, generator: torch.Generator) -> Tensor:
        if sampler != SAMPLER:
            return SAMPLERS[sampler](self.latents, DRAWN, bandwidth, generator)
        scale = self.latent_tolerance
        return SAMPLERS["kde_shared_anchor"](self.latents, DRAWN, bandwidth, generator, scale=scale)

    def _decoded_answers(self, latents: Tensor) -> Tensor:
        """Log probabilities (A, m, classes) of networks decoded from latents, differentiable."""
        subject = self.subject
        positions = subject.layout.positions().expand(len(latents), -1, -1)
        return self._answers(flat_from_tokens(subject.model.decode(latents, positions), subject.layout))

    def _answers(self, normalized: Tensor) -> Tensor:
        """Log probabilities (A, m, classes) of the anchors' kind of network, differentiable."""
        subject, images = self.subject, self.subject.images.train.images[:TOLERANCE_IMAGES]
        networks = subject.stacked(subject.denormalize(normalized))
        return forward(subject.zoo.architecture, self.configs, networks, images).log_softmax(dim=-1)

    def _encode(self, rows: np.ndarray) -> Tensor:
        subject = self.subject
        return encode_flat(subject.flat[torch.from_numpy(rows)], subject.layout, subject.model, subject.tokenizer)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.subject.normalize(decode_latents(self.subject, latents))
