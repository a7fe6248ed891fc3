"""The dataset card of a zoo, filled from what was written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from .schema import DESCRIPTIONS, SCHEMA

_BINS = np.linspace(0, 1, 21)  # histogram bins of 5 points
_BAR = 40  # characters of the longest bar
_PERCENTILES = (5, 25, 50, 75, 95)


def render_zoo_card(info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], licence: str) -> str:
    """Render README.md: YAML that names the data files of each split, and a description for people.

    Args:
        info: the content of `zoo.json`.
        rows: properties of every checkpoint, by column, without the weights.
        licence: identifier for the YAML.

    Returns:
        The card's text.
    """
    template = resources.files("sane_hf.model_cards").joinpath("zoo_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    epochs = sorted({row["epoch"] for row in rows})
    hyperparameters = ("activation", "initialization", "dropout", "weight_decay")
    return environment.from_string(template).render(
        info=info,
        licence=licence,
        size=_size_category(len(rows)),
        rows=len(rows),
        models=len({row["model_id"] for row in rows}),
        epochs=epochs,
        columns=[(field.name, str(field.type), DESCRIPTIONS[field.name]) for field in SCHEMA],
        percentiles=_PERCENTILES,
        accuracies=[(epoch, _percentiles(rows, epoch)) for epoch in epochs],
        histogram=_histogram([row["test_accuracy"] for row in rows if row["epoch"] == epochs[-1]]),
        counts=[(name, _counts(rows, name)) for name in hyperparameters],
        build=json.dumps(info["build"], indent=2),
    )


def _size_category(rows: int) -> str:
    """The Hub's size categories."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for bound, name in bounds if rows < bound), "1M<n<10M")


def _percentiles(rows: Sequence[Mapping[str, Any]], epoch: int) -> list[float] | None:
    values = [row["test_accuracy"] for row in rows if row["epoch"] == epoch and row["test_accuracy"] is not None]
    return np.percentile(values, _PERCENTILES).tolist() if values else None


def _histogram(accuracies: Sequence[float | None]) -> list[tuple[str, int, str]]:
    """Rows of (bin, count, bar), from the first to the last bin that holds anything."""
    counts, _ = np.histogram([value for value in accuracies if value is not None], bins=_BINS)
    held = np.flatnonzero(counts)
    if not len(held):
        return []
    rows = []
    for index in range(held[0], held[-1] + 1):
        label = f"{100 * _BINS[index]:3.0f}-{100 * _BINS[index + 1]:3.0f} %"
        rows.append((label, int(counts[index]), "#" * round(_BAR * counts[index] / counts.max())))
    return rows


def _counts(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[Any, int]]:
    """How many models have each value of a hyperparameter; empty where it is null."""
    values = {row["model_id"]: row[name] for row in rows if row[name] is not None}
    return sorted(Counter(values.values()).items())
