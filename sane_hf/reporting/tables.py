"""The tables of a report, in Markdown for the page and by rich for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from sane_hf.reporting.claims import Claim, averages_reach, percent

FEATURE_NAMES = {
    "latents": "**latents**",
    "weight_statistics": "weight statistics",
    "log_weight_statistics": "log weight statistics",
    "latents_and_log_statistics": "latents and log statistics",
    "raw_weights": "raw weights, aligned",
    "metadata": "no weights: epoch and hyperparameters",
}
TARGET_NAMES = {"test_accuracy": "test accuracy", "epoch": "epoch", "generalization_gap": "generalisation gap"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers aligned to the right of a first column of names.

    Example:
        >>> print(markdown_table(["name", "value"], [["a", "1"]]))
        | name | value |
        |:--|--:|
        | a | 1 |
    """
    rule = "|:--|" + "--:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def probe_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One probe of metrics.json: a row per feature set, R² and Kendall's tau of every target."""
    targets = [target for target in TARGET_NAMES if target in scores]
    features = [name for name in FEATURE_NAMES if name in scores[targets[0]]]
    rows = [[FEATURE_NAMES[name], *(_r2_tau(scores[target][name]) for target in targets)] for name in features]
    return markdown_table(["features", *(f"{TARGET_NAMES[target]}, R² (τ)" for target in targets)], rows)


def generation_table(points: Sequence[Mapping[str, Any]]) -> str:
    """The samples, and beside each what noise and averaging give at the same distance."""
    header = [
        "sampler, bandwidth",
        "epoch 0",
        "epoch 1",
        "to nearest decoded",
        "to nearest train network",
        "noise",
        "shaped noise",
        "tolerant noise",
        "averaging",
    ]
    rows = [
        [
            f"{point['sampler']}, {point['bandwidth']:g}",
            f"**{percent(point['accuracy_epoch_0'])}**",
            percent(point["accuracy_epoch_1"]),
            f"{point['distance_to_decoded']:.2f}",
            f"{point['distance_to_train']:.2f}",
            percent(point["isotropic_noise_accuracy"]),
            percent(point["shaped_noise_accuracy"]),
            percent(point["tolerant_noise_accuracy"]),
            percent(point["average_accuracy"]) + _reached(point),
        ]
        for point in points
    ]
    return markdown_table(header, rows)


def reconstruction_table(points: Sequence[Mapping[str, float]]) -> str:
    """The compressions."""
    header = ["latents per weight", "R²", "anchors", "noise of equal error", "test split", "noise of equal error"]
    rows = [
        [
            f"{point['latents_per_weight']:.2f}",
            f"{point['r2']:.3f}",
            f"{percent(point['decoded_accuracy'])} of {percent(point['anchor_accuracy'])}",
            percent(point["noise_accuracy_at_same_error"]),
            f"{percent(point['test_decoded_accuracy'])} of {percent(point['test_accuracy'])}",
            percent(point["test_noise_accuracy_at_same_error"]),
        ]
        for point in points
    ]
    return markdown_table(header, rows)


def figures_table(metrics: Mapping[str, Any]) -> str:
    """The few figures of a card."""
    reconstruction, scratch = metrics["reconstruction"], metrics["scratch"]
    sample = min(metrics["generation"], key=lambda point: point["bandwidth"])
    before, after = percent(reconstruction["anchor_accuracy"]), percent(reconstruction["decoded_accuracy"])
    rows = [
        ["explained variance of the weights (R²)", f"{reconstruction['r2']:.3f}"],
        ["latents per weight", f"{reconstruction['latents_per_weight']:.2f}"],
        ["test accuracy of the anchors, before and after decoding", f"{before}, {after}"],
        [
            f"sampled networks at bandwidth {sample['bandwidth']:g}, no training (from scratch)",
            f"{percent(sample['accuracy_epoch_0'])} ({percent(scratch['accuracy_epoch_0'])})",
        ],
        [
            "the same after one epoch (from scratch)",
            f"{percent(sample['accuracy_epoch_1'])} ({percent(scratch['accuracy_epoch_1'])})",
        ],
    ]
    return markdown_table(["weights and new networks", ""], rows)


def claims_table(claims: Sequence[Claim]) -> str:
    """The goals."""
    rows = [[claim.goal, "reached" if claim.reached else "**not reached**", claim.figures] for claim in claims]
    return markdown_table(["goal", "", "figures"], rows)


def terminal_table(claims: Sequence[Claim], run_dir: str) -> Table:
    """The goals, short, for the end of `make run`."""
    table = Table(title=f"What {run_dir} reaches", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("goal", ratio=3)
    table.add_column("")
    table.add_column("figures", ratio=4)
    for claim in claims:
        table.add_row(claim.goal, "[green]yes[/]" if claim.reached else "[red]no[/]", claim.figures)
    return table


def _r2_tau(scores: Mapping[str, float]) -> str:
    return f"{scores['r2']:.3f} ({scores['tau']:.2f})"


def _reached(point: Mapping[str, Any]) -> str:
    """Averages get only so far: say where that is less than asked for."""
    return "" if averages_reach(point) else f" (at {point['average_distance']:.2f})"
