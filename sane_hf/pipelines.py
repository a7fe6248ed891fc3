"""The embedding pipeline with what needs the package: any checkpoint that it reads, and alignment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import cast

from torch import Tensor

from sane_hf.checkpoints import load_checkpoint
from sane_hf.modeling.layout_sane import TokenLayout
from sane_hf.modeling.pipeline_sane import WeightFeatureExtractionPipeline as Travelling
from sane_hf.symmetry import align_many


class WeightFeatureExtractionPipeline(Travelling):
    """As the pipeline that travels with a model, but every network is first aligned to the stored reference."""

    def read(self, network: Mapping[str, Tensor] | str | os.PathLike) -> Mapping[str, Tensor]:
        """The state dict of a network: itself, or what `load_checkpoint` reads from its path."""
        return network if isinstance(network, Mapping) else load_checkpoint(network)

    def canonical(self, weights: Mapping[str, Tensor], layout: TokenLayout) -> Mapping[str, Tensor]:
        """The network in canonical form, where the tokenizer knows groups and reference of its architecture."""
        groups, reference = (
            known.get(layout.fingerprint) for known in (self.tokenizer.groups, self.tokenizer.references)
        )
        if groups is None or reference is None:
            return super().canonical(weights, layout)
        flat = align_many(layout.flatten(weights)[None], reference, layout, groups).flat[0]
        return cast(dict[str, Tensor], layout.unflatten(flat, weights))
