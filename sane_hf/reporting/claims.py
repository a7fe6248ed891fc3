"""What the project set out to reach, each held against the figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_LOST = 0.05  # accuracy that decoding may cost
MOST_LATENTS = 1.005  # latents per weight; the half per cent is for rounding
EQUAL_DISTANCE = 0.97  # share of the samples' distance that averages must reach to be compared with them
LEAST_SAMPLED = 0.90  # accuracy of samples at the smallest bandwidth
NAMES = {"test_accuracy": "accuracy", "epoch": "epoch", "generalization_gap": "gap"}


@dataclass(frozen=True)
class Claim:
    """A goal, whether this run reached it, and the figures that say so."""

    goal: str
    reached: bool
    figures: str


def check_claims(
    metrics: Mapping[str, Any], points: Sequence[Mapping[str, Any]], held_out: Mapping[str, float]
) -> list[Claim]:
    """Hold every goal against the figures.

    Args:
        metrics: content of metrics.json.
        points: its samples, with `average_distance`, how far averages got.
        held_out: `original` and `decoded`, mean accuracy of networks of the test split before and after decoding.

    Returns:
        The claims, in the order of the report.

    Example:
        >>> figures = {"latents": {"r2": 0.5}, "weight_statistics": {"r2": 0.3}}
        >>> probe = {target: figures for target in NAMES}
        >>> metrics = {"probe": probe, "probe_trained": probe, "scratch": {"accuracy_epoch_1": 0.4},
        ...            "reconstruction": dict(latents_per_weight=1.0, anchor_accuracy=0.97, decoded_accuracy=0.95)}
        >>> point = {"sampler": "kde", "bandwidth": 0.1, "accuracy_epoch_0": 0.95, "accuracy_epoch_1": 0.97,
        ...          "distance_to_decoded": 0.1, "noise_accuracy": 0.96, "average_accuracy": 0.8,
        ...          "average_distance": 0.1}
        >>> [claim.reached for claim in check_claims(metrics, [point], {"original": 0.8, "decoded": 0.7})]
        [True, True, False, True, False, True, True]
    """
    return [
        *(_probe_claim(metrics[key], epochs) for key, epochs in (("probe", "all"), ("probe_trained", "trained"))),
        _decoding_claim(metrics["reconstruction"], held_out),
        *_sampling_claims(points, metrics["scratch"]),
    ]


def _probe_claim(scores: Mapping[str, Any], epochs: str) -> Claim:
    pairs = {
        name: (scores[target]["latents"]["r2"], scores[target]["weight_statistics"]["r2"])
        for target, name in NAMES.items()
    }
    return Claim(
        f"Latents alone predict better than plain weight statistics, ridge, {epochs} epochs (R²)",
        all(latents > statistics for latents, statistics in pairs.values()),
        ", ".join(f"{name} {latents:.2f} against {plain:.2f}" for name, (latents, plain) in pairs.items()),
    )


def _decoding_claim(reconstruction: Mapping[str, float], held_out: Mapping[str, float]) -> Claim:
    anchors, decoded = reconstruction["anchor_accuracy"], reconstruction["decoded_accuracy"]
    before, after, ratio = held_out["original"], held_out["decoded"], reconstruction["latents_per_weight"]
    return Claim(
        f"Decoded networks lose at most {100 * MOST_LOST:.0f} points at no more than one latent per weight",
        anchors - decoded <= MOST_LOST and before - after <= MOST_LOST and ratio <= MOST_LATENTS,
        f"anchors {percent(anchors)} to {percent(decoded)}, test split {percent(before)} to {percent(after)}, "
        f"{ratio:.2f} latents per weight",
    )


def _sampling_claims(points: Sequence[Mapping[str, Any]], scratch: Mapping[str, float]) -> list[Claim]:
    """The goals are about the first sampler of the list."""
    points = [point for point in points if point["sampler"] == points[0]["sampler"]]
    first = min(points, key=lambda point: point["bandwidth"])
    claims = [
        Claim(
            f"Samples reach {percent(LEAST_SAMPLED, 0)} without training at the smallest bandwidth",
            first["accuracy_epoch_0"] >= LEAST_SAMPLED,
            f"{percent(first['accuracy_epoch_0'])} at bandwidth {first['bandwidth']:g}",
        )
    ]
    reachable = [point for point in points if averages_reach(point)]
    beyond = [f"{point['bandwidth']:g}" for point in points if not averages_reach(point)]
    for name, key, chosen in (("noise", "noise_accuracy", points), ("averaging", "average_accuracy", reachable)):
        margins = [point["accuracy_epoch_0"] - point[key] for point in chosen]
        lost = sum(not margin > 0 for margin in margins)  # a margin that is not a number is lost
        figures = "no average gets that far"
        if chosen:
            least = chosen[min(range(len(chosen)), key=margins.__getitem__)]
            figures = f"behind at {lost} of {len(chosen)} bandwidths, most" if lost else "least ahead"
            figures += (
                f" at {least['bandwidth']:g}: {percent(least['accuracy_epoch_0'])} against {percent(least[key])}"
            )
            if len(chosen) < len(points):
                figures += f"; no average gets as far as the samples of {', '.join(beyond)}"
        claims.append(
            Claim(
                f"Samples are better than {name} at equal distance, at every bandwidth",
                bool(chosen) and not lost,
                figures,
            )
        )
    behind = [point for point in points if point["accuracy_epoch_1"] <= scratch["accuracy_epoch_1"]]
    worst = min(points, key=lambda point: point["accuracy_epoch_1"])
    claims.append(
        Claim(
            "Samples are ahead of training from scratch after one epoch, at every bandwidth",
            not behind,
            f"at least {percent(worst['accuracy_epoch_1'])} against {percent(scratch['accuracy_epoch_1'])}",
        )
    )
    return claims


def averages_reach(point: Mapping[str, Any]) -> bool:
    """Whether averages of anchors get as far from the anchors as the samples of this point.

    Example:
        >>> averages_reach({"average_distance": 0.62, "distance_to_decoded": 0.91})
        False
    """
    return point["average_distance"] >= EQUAL_DISTANCE * point["distance_to_decoded"]


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction of 1 as text in per cent.

    Example:
        >>> percent(0.9731)
        '97.3 %'
    """
    return f"{100 * fraction:.{digits}f} %"
