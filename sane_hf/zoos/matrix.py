"""A zoo as a matrix of flat, aligned weights: what training, probing and sampling work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sane_hf.modeling import PermutationGroups, TokenLayout
from sane_hf.symmetry import align_zoo

from .loading import load_zoo, weight_matrix, zoo_info
from .schema import SPLIT_SHARES, SPLITS
from .writing import choose_reference


@dataclass(frozen=True)
class ZooMatrix:
    """Checkpoints of one architecture.

    Attributes:
        name: of the zoo.
        architecture: name in `sane_hf.architectures`.
        layout: token layout (its order of weights is that of `flat`; its token size does not matter here).
        groups: permutation groups of the architecture.
        flat: (n, N) float32, weights, aligned to the reference where `load_matrix` was asked to.
        reference: (N,) float32, the canonical reference.
        columns: the zoo's other columns by name, (n,) arrays; `model_id`, `epoch` and `split` are always there.
    """

    name: str
    architecture: str
    layout: TokenLayout
    groups: PermutationGroups
    flat: torch.Tensor
    reference: torch.Tensor
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.flat.shape[0]

    @property
    def configs(self) -> list[str]:
        """Architecture config (JSON) of every checkpoint."""
        return self.columns["architecture_config"].tolist()

    def state_dict(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """One flat vector of weights (N,) as a state dict of views."""
        return {
            name: flat[slice(*self.layout.slices[name])].view(self.layout.shapes[name]) for name in self.layout.keys
        }

    def take(self, rows: np.ndarray | Sequence[int]) -> ZooMatrix:
        """Some checkpoints: (n,) bool, or row numbers."""
        rows = np.asarray(rows)
        rows = rows.nonzero()[0] if rows.dtype == bool else rows.astype(np.int64)
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, flat=self.flat[torch.from_numpy(rows)], columns=columns)

    def of_split(self, split: str) -> ZooMatrix:
        """The checkpoints of one split."""
        return self.take(self.columns["split"] == split)


def load_matrix(name_or_path: str, split_seed: int | None = None, align: bool = True) -> ZooMatrix:
    """Read a zoo of one architecture.

    Args:
        name_or_path: folder or Hub id of a zoo.
        split_seed: deals the models to train, validation and test anew (70/15/15); none keeps the zoo's own splits.
        align: align every model to the zoo's canonical reference; all its epochs share the permutation of its last.

    Raises:
        ValueError: an empty zoo, one of several architectures, or one without permutation groups or reference.
    """
    info = zoo_info(name_or_path)
    if len(info["architectures"]) != 1:
        raise ValueError(
            f"{name_or_path}: holds {sorted(info['architectures'])}, one architecture is needed: filter the zoo first"
        )
    ((architecture, description),) = info["architectures"].items()
    shapes = {name: tuple(shape) for name, shape in description["shapes"]}
    layout = TokenLayout.plan(shapes, token_size=0)
    if "permutation_groups" not in description:
        raise ValueError(
            f"{name_or_path}: zoo.json has no permutation groups for {architecture}: find them with "
            "sane_hf.symmetry.find_permutation_groups and write the zoo anew"
        )
    groups = PermutationGroups.from_dict(description["permutation_groups"])
    flat, columns = [], []
    for split, dataset in load_zoo(name_or_path).items():
        if len(dataset) == 0:
            continue
        flat.append(weight_matrix(dataset, layout))
        table = dataset.remove_columns("weights").with_format("numpy")[:]
        columns.append({**table, "split": np.full(len(dataset), split)})
    if not flat:
        raise ValueError(f"{name_or_path}: the zoo is empty: build it anew, or check the name")
    joined = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    if split_seed is not None:
        joined["split"] = deal_splits(joined["model_id"], split_seed)
    weights = torch.cat(flat)
    chosen = info["reference"]
    if split_seed is not None:  # by the zoo's own rule, or a model of another split could be the reference
        names = ("model_id", "epoch", "split", "validation_accuracy")
        chosen = choose_reference(
            dict(zip(names, row, strict=True)) for row in zip(*(joined[n].tolist() for n in names), strict=True)
        )
    reference = weights[_reference_row(name_or_path, chosen, joined)]
    if align:
        weights = align_zoo(
            weights, joined["model_id"].tolist(), joined["epoch"].tolist(), reference, layout, groups
        ).flat
    return ZooMatrix(info["name"], architecture, layout, groups, weights, reference, joined)


def deal_splits(model_ids: np.ndarray, seed: int) -> np.ndarray:
    """Deal models, with all their checkpoints, to train, validation and test.

    Args:
        model_ids: (n,) model of each checkpoint.
        seed: another seed deals otherwise.

    Returns:
        (n,) array of split names, 70/15/15 of the models.

    Example:
        >>> deal_splits(np.array(["a", "a", "b"]), seed=0).tolist()
        ['train', 'train', 'train']
    """
    models = np.unique(model_ids)
    order = np.random.default_rng(seed).permutation(models)
    bounds = np.ceil(np.cumsum(SPLIT_SHARES[:-1]) * len(models) - 1e-9).astype(int)
    of_model = {model: split for split, part in zip(SPLITS, np.split(order, bounds), strict=True) for model in part}
    return np.array([of_model[model] for model in model_ids])


def _reference_row(zoo: str, wanted: dict | None, columns: dict[str, np.ndarray]) -> int:
    if wanted is None:
        raise ValueError(
            f"{zoo}: names no canonical reference, since its models have no validation accuracy: build the zoo with "
            "validation accuracies"
        )
    rows = (columns["model_id"] == wanted["model_id"]) & (columns["epoch"] == wanted["epoch"])
    if not rows.any():
        raise ValueError(f"{zoo}: the canonical reference {wanted} that zoo.json names is not among the rows")
    return int(rows.nonzero()[0][0])
