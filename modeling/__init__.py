"""The code that travels with a checkpoint: configuration, model, weight tokenizer, token layout, permutation groups.

Flat on purpose: files import each other only as `from .file_sane import Name`, which is what `save_pretrained` copies.
"""

from .configuration_sane import SaneConfig
from .layout_sane import TokenLayout, flat_from_tokens, tokens_from_flat
from .losses_sane import explained_variance, masked_mse, nt_xent
from .modeling_sane import SaneForPreTraining, SaneForPreTrainingOutput, SaneModel, SaneModelOutput
from .permutation_sane import PermutationGroups, permute
from .tokenization_sane import WeightTokenizer
from .windows_sane import merge_windows, plan_windows, split_windows

__all__ = [
    "PermutationGroups",
    "SaneConfig",
    "SaneForPreTraining",
    "SaneForPreTrainingOutput",
    "SaneModel",
    "SaneModelOutput",
    "TokenLayout",
    "WeightTokenizer",
    "explained_variance",
    "flat_from_tokens",
    "masked_mse",
    "merge_windows",
    "nt_xent",
    "permute",
    "plan_windows",
    "split_windows",
    "tokens_from_flat",
]
