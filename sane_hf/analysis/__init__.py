"""Reading networks: embed them, and probe what the embeddings tell beside simple baselines."""

from __future__ import annotations

from sane_hf.analysis.embed import embed, embed_flat, encode_flat
from sane_hf.analysis.metadata import metadata_features
from sane_hf.analysis.probe import fit_probe, held_out_predictions, kendall_tau, probe, r2, score
from sane_hf.analysis.readouts import READOUTS
from sane_hf.analysis.statistics import weight_statistics, weight_statistics_names

__all__ = [
    "READOUTS",
    "embed",
    "embed_flat",
    "encode_flat",
    "fit_probe",
    "held_out_predictions",
    "kendall_tau",
    "metadata_features",
    "probe",
    "r2",
    "score",
    "weight_statistics",
    "weight_statistics_names",
]
