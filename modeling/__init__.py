"""The code that travels with a checkpoint: configuration, model, weight tokenizer, token layout, permutation groups.

Flat on purpose: files import each other only as `from .file_sane import Name`, which is what `save_pretrained` copies.
"""

from .layout_sane import TokenLayout, flat_from_tokens, tokens_from_flat
from .permutation_sane import PermutationGroups, permute
from .tokenization_sane import WeightTokenizer
from .windows_sane import merge_windows, plan_windows, split_windows

__all__ = [
    "PermutationGroups",
    "TokenLayout",
    "WeightTokenizer",
    "flat_from_tokens",
    "merge_windows",
    "permute",
    "plan_windows",
    "split_windows",
    "tokens_from_flat",
]
