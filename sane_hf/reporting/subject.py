"""What a report is about: a trained model, and the zoo that it was trained on, in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from sane_hf.members import evaluate, stack_flat
from sane_hf.modeling import TokenLayout, WeightTokenizer, flat_from_tokens
from sane_hf.modeling.modeling_sane import SaneForPreTraining, SaneModel
from sane_hf.reporting.stages import hash_files
from sane_hf.zoos import SPLITS, ImageSplits, load_images, zoo_info
from sane_hf.zoos.matrix import ZooMatrix, load_matrix

ANCHORS = 20


@dataclass(frozen=True)
class Subject:
    """A model and its zoo.

    Attributes:
        model: encoder and decoder, in evaluation mode.
        tokenizer: its tokenizer.
        layout: the tokenizer's layout of the zoo's architecture.
        zoo: its checkpoints, aligned, with the splits that the model was trained with.
        images: what the networks of the zoo classify.
        source: folder or Hub id of the zoo.
        content: hashes of model and zoo, which decide whether kept results still hold.
    """

    model: SaneModel
    tokenizer: WeightTokenizer
    layout: TokenLayout
    zoo: ZooMatrix
    images: ImageSplits
    source: str
    content: dict[str, str]

    @property
    def flat(self) -> Tensor:
        """(n, N) float32 aligned weights."""
        return self.zoo.flat

    @property
    def split(self) -> np.ndarray:
        """(n,) "train", "validation" or "test"."""
        return self.zoo.columns["split"]

    @property
    def model_ids(self) -> np.ndarray:
        """(n,) the model of each checkpoint."""
        return self.zoo.columns["model_id"]

    @property
    def epochs(self) -> np.ndarray:
        """(n,) the epoch of each checkpoint."""
        return self.zoo.columns["epoch"]

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Shift and scale (N,) of every weight: distances and errors are measured on `(flat - shift) / scale`."""
        return self.tokenizer.flat_statistics(self.layout)

    @cached_property
    def anchors(self) -> np.ndarray:
        """Rows of the 20 best models of the train split, best first, at their last epoch.

        The best by validation accuracy, and the 19 next ones that compute the same function of their weights: averages
        of networks with different activations would fail for no other reason.
        """
        last = self.last_rows("train")
        order = last[np.lexsort((self.model_ids[last], -self.zoo.columns["validation_accuracy"][last]))]
        function = [self._function(row) for row in order]
        return order[[index for index, found in enumerate(function) if found == function[0]][:ANCHORS]]

    def rows(self, split: str, from_epoch: int = 0) -> np.ndarray:
        """Row numbers of a split, from an epoch on."""
        return np.flatnonzero((self.split == split) & (self.epochs >= from_epoch))

    def last_rows(self, split: str) -> np.ndarray:
        """Row of every model of a split at its last epoch."""
        rows = self.rows(split)
        order = rows[np.lexsort((-self.epochs[rows], self.model_ids[rows]))]
        return order[np.unique(self.model_ids[order], return_index=True)[1]]

    def normalize(self, flat: Tensor) -> Tensor:
        """Weights in units of their layer's standard deviation, as the model sees them."""
        shift, scale = self.statistics
        return (flat - shift) / scale

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        shift, scale = self.statistics
        return normalized * scale + shift

    def configs(self, rows: np.ndarray) -> list[str]:
        """Architecture configs of some checkpoints."""
        return self.zoo.columns["architecture_config"][rows].tolist()

    def stacked(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat weights (M, N) as stacked tensors, each (M, *shape)."""
        return stack_flat(flat, self.layout)

    def accuracy(self, networks: Tensor | dict[str, Tensor], configs: list[str], split: str = "test") -> np.ndarray:
        """Accuracy on a split of the images, (M,) float64, of networks given as flat weights (M, N) or stacked."""
        part = getattr(self.images, split)
        stacked = self.stacked(networks) if isinstance(networks, Tensor) else networks
        measured = evaluate(self.zoo.architecture, configs, stacked, part.images, part.labels)
        return measured["accuracy"].double().numpy()

    def config(self, text: str) -> dict[str, Any]:
        """An architecture config as a mapping."""
        return json.loads(text)

    def _function(self, row: int) -> str:
        """What a checkpoint's configuration says beside the dropout rate, which has no part in evaluation."""
        config = self.config(self.zoo.columns["architecture_config"][row])
        return json.dumps({key: value for key, value in config.items() if key != "dropout"}, sort_keys=True)


def load_subject(run_dir: str | Path, zoo: str | None = None) -> Subject:
    """Load a finished training run and the zoo that its recipe names.

    Args:
        run_dir: output folder of a training run.
        zoo: folder or Hub id of the zoo, where it is no longer where the recipe says.

    Returns:
        Model and zoo.

    Raises:
        ValueError: if the folder holds no finished run, the zoo has an empty split or names no images, or the
            tokenizer was fitted on another architecture.
    """
    folder = Path(run_dir)
    needed = ("recipe.yaml", "config.json", "model.safetensors", "tokenizer_config.json", "training.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: no finished training run, {missing[0]} is missing: run train.py first")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    source = zoo or recipe["zoo"]
    matrix = load_matrix(source, recipe.get("split_seed"))
    info = zoo_info(source)
    for split in SPLITS:
        if split not in matrix.columns["split"]:
            raise ValueError(f"{source}: its {split} split is empty, and a report needs all of {', '.join(SPLITS)}")
    if "images" not in info["build"]:
        raise ValueError(f"{source}: its zoo.json names no images, and a report runs networks on them")
    model = SaneForPreTraining.from_pretrained(folder).sane.eval()
    tokenizer = WeightTokenizer.from_pretrained(folder)
    layout = tokenizer.layouts.get(matrix.layout.fingerprint)
    if layout is None or layout.keys != matrix.layout.keys:
        raise ValueError(f"{folder}: its tokenizer was fitted on another architecture than that of {source}")
    content = {
        "model": hash_files(folder / name for name in needed[1:4]),
        "zoo": info["content_hash"],
        "split_seed": str(recipe.get("split_seed")),
    }
    return Subject(model, tokenizer, layout, matrix, load_images(info["build"]["images"]), str(source), content)


@torch.inference_mode()
def decode_latents(subject: Subject, latents: Tensor, batch_size: int = 256) -> Tensor:
    """Decode the latents of whole networks.

    Args:
        subject: the model and its zoo.
        latents: (B, T, Z) float.
        batch_size: networks decoded at once.

    Returns:
        (B, N) float32, flat weights on the scale of the zoo.
    """
    positions = subject.layout.positions()
    parts = []
    for part in latents.split(batch_size):
        tokens = subject.model.decode(part, positions.expand(len(part), -1, -1))
        parts.append(flat_from_tokens(subject.tokenizer.denormalize(tokens, subject.layout), subject.layout))
    return torch.cat(parts)
