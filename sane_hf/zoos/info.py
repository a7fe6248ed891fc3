"""What holds for a whole zoo: the content of `zoo.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sane_hf.architectures import get_architecture
from sane_hf.symmetry import find_permutation_groups


def describe_architecture(name: str, config: Mapping[str, Any] | str | None = None) -> dict[str, Any]:
    """Describe an architecture for `zoo.json`.

    Args:
        name: of the architecture.
        config: one configuration; all configurations of a zoo's architecture share shapes and permutation groups.

    Returns:
        `config`, `shapes` (a list of [tensor name, shape] in the order of the network), and `permutation_groups` (see
        `PermutationGroups.to_dict`), certified on the module.
    """
    declared = get_architecture(name)
    module = declared.build(config).eval()
    shape = declared.input_shape(declared.config(config))
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return {
        "config": declared.config_json(config),
        "shapes": [[key, list(tensor.shape)] for key, tensor in module.state_dict().items()],
        "permutation_groups": find_permutation_groups(module, images).to_dict(),
    }
