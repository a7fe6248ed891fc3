"""Permutation symmetries of networks: found (`find_permutation_groups`), proven (`verify`), removed (`align`)."""

from sane_hf.modeling.permutation_sane import PermutationGroups, permute
from sane_hf.symmetry.align import Alignment, Alignments, align, align_many, align_zoo
from sane_hf.symmetry.certificate import Verification, verify
from sane_hf.symmetry.tracing import find_permutation_groups

__all__ = [
    "Alignment",
    "Alignments",
    "PermutationGroups",
    "Verification",
    "align",
    "align_many",
    "align_zoo",
    "find_permutation_groups",
    "permute",
    "verify",
]
