"""New networks: samplers of latents, what is simple instead, selection, and how new a sample is.

A sampler is one file with one function of the signature of `kde_shared_anchor.sample`, and one line in `SAMPLERS`;
the contract test runs over the table.
"""

from collections.abc import Callable

from torch import Tensor

from sane_hf.generation import interpolation, kde_independent, kde_shared_anchor
from sane_hf.generation.bandwidth import BANDWIDTH_RULES, scott, silverman
from sane_hf.generation.baselines import average_at_distance, isotropic_noise, shaped_noise, weight_average
from sane_hf.generation.comparison import Outcome, compare_at_distance, outcome
from sane_hf.generation.novelty import independent_distance, nearest_distance, pairwise_distance
from sane_hf.generation.selection import select_best
from sane_hf.generation.tolerance import behavior_tolerance

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "kde_shared_anchor": kde_shared_anchor.sample,
    "kde_independent": kde_independent.sample,
    "interpolation": interpolation.sample,
}

__all__ = [
    "BANDWIDTH_RULES",
    "SAMPLERS",
    "Outcome",
    "average_at_distance",
    "behavior_tolerance",
    "compare_at_distance",
    "independent_distance",
    "isotropic_noise",
    "nearest_distance",
    "outcome",
    "pairwise_distance",
    "scott",
    "select_best",
    "shaped_noise",
    "silverman",
    "weight_average",
]
