"""The pipeline `weight-feature-extraction`: networks in, one embedding for each out. It travels with the model."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.pipelines.base import ChunkPipeline
from transformers.pipelines.pt_utils import PipelineChunkIterator, PipelineIterator, PipelinePackIterator

from .blocks_sane import layer_means
from .layout_sane import TokenLayout
from .windows_sane import plan_windows

logger = logging.getLogger(__name__)

StateDict = Mapping[str, Tensor]

READOUTS = ("mean", "layer_mean")


class WeightFeatureExtractionPipeline(ChunkPipeline):
    """Embeds networks from their weights.

    Networks are read window by window and only sums over tokens are kept, so that memory does not grow with a
    network's length. Weights are taken as they are: see [`WeightFeatureExtractionPipeline.canonical`].

    Args:
        readout (`str`): `"mean"`: mean of the latents of all tokens, one size for all networks (the paper).
            `"layer_mean"`: mean for each layer, one after the other; one size per architecture.
        window (`int`, *optional*): Tokens kept of each window. If not given, the model's `window_size` without the
            halo, and whole networks where that is not set.
        halo (`int`): Tokens of context on either side of a window, 0 if not given.
        batch_size (`int`): Windows, of the same network or of several, that are encoded together.
        kwargs: Arguments of every transformers pipeline: `model`, `tokenizer`, `device`, ...

    Example:

    ```python
    >>> import torch
    >>> from transformers import pipeline
    >>> from sane_hf import SaneConfig, SaneModel, WeightTokenizer
    >>> model = SaneModel(SaneConfig(token_size=4, latent_size=3, hidden_size=8, num_attention_heads=2))
    >>> tokenizer = WeightTokenizer(token_size=4)
    >>> embed = WeightFeatureExtractionPipeline(model, tokenizer, device="cpu")
    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Linear(5, 1)).state_dict()
    >>> embed(network).shape, [row.shape for row in embed([network, network], readout="layer_mean", batch_size=2)]
    (torch.Size([3]), [torch.Size([6]), torch.Size([6])])

    ```
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Embed one network or several.

        Args:
            inputs (`Mapping[str, Tensor]`, `str`, `os.PathLike`, or a list, dataset or generator of them): State
                dicts, or paths of safetensors files, which are mapped and not read as a whole.
            kwargs: `readout`, `window`, `halo` and `batch_size` as for the class, for this call.

        Returns:
            `Tensor` of shape `(F,)`, float32 on the CPU; a list of them for a list, an iterator for what is lazy. The
            results do not depend on the batch size.

        Raises:
            `ValueError`: On an empty list, an unknown readout, a file that is no safetensors file, a network that does
                not fit the tokenizer, has weights that are not finite, or is too large for the model's positions.
        """
        if isinstance(inputs, Sequence) and not isinstance(inputs, str):
            inputs = list(inputs)
            if not inputs:
                raise ValueError("There is no network to embed: the list is empty.")
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(
        self, readout: str | None = None, window: int | None = None, halo: int | None = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(f"{next(iter(unknown))!r} is no argument of this pipeline: use readout, window, halo.")
        if readout is not None and readout not in READOUTS:
            raise ValueError(f"readout={readout!r} is unknown: choose one of {', '.join(map(repr, READOUTS))}.")
        windows = {name: value for name, value in (("window", window), ("halo", halo)) if value is not None}
        return windows, {}, {} if readout is None else {"readout": readout}

    def read(self, network: StateDict | str | os.PathLike) -> StateDict:
        """The state dict of a network: itself, or what a safetensors file holds, mapped.

        Raises:
            `ValueError`: If it is neither.
        """
        if isinstance(network, Mapping):
            return network
        if not isinstance(network, str | os.PathLike):
            raise ValueError(f"A {type(network).__name__} is no network: pass a state dict or a path.")
        try:
            with safe_open(os.fspath(network), "pt") as file:
                names = list(file.keys())
                order = json.loads((file.metadata() or {}).get("sane_hf.order", "[]"))
                names = order if sorted(order) == sorted(names) else sorted(names, key=_natural)
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{os.fspath(network)} cannot be read as a safetensors file: {error}. sane_hf.embed of the package "
                "sane-hf reads other checkpoints too; or pass the state dict."
            ) from error

    def canonical(self, weights: StateDict, layout: TokenLayout) -> StateDict:
        """The weights in the form in which they are embedded; here, as they are.

        Networks whose hidden units are permuted compute the same function, yet get other embeddings, unless each is
        aligned to a reference first. That is solved in the package sane-hf alone, where `sane_hf.embed` does it; this
        warns once.

        Args:
            weights (`Mapping[str, Tensor]`): The network.
            layout (`TokenLayout`): Its layout.

        Returns:
            `Mapping[str, Tensor]`: A network that computes the same.
        """
        if not self._warned:
            self._warned = True
            known = layout.fingerprint in self.tokenizer.groups and layout.fingerprint in self.tokenizer.references
            way_out = (
                "sane_hf.embed of the package sane-hf aligns networks to the reference that is stored with this model"
                if known
                else "this model's tokenizer stores no reference for this architecture to which they could be aligned"
            )
            logger.warning(
                "Networks are embedded without alignment: copies of a network with permuted units compute the same "
                "function, but get different embeddings, and probes trained on aligned networks lose accuracy; "
                f"{way_out}."
            )
        return weights

    _warned = False

    def preprocess(  # type: ignore[override]
        self, network: StateDict | str | os.PathLike, window: int | None = None, halo: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Tokenise a network window by window: tokens `(1, T, D)`, and which of them are kept `(1, T)`."""
        weights = self.read(network)
        layout = self.tokenizer.layout(weights)
        self._check_size(layout)
        weights = self.canonical(weights, layout)
        if window is None and self.model.config.window_size is not None:
            window = max(1, self.model.config.window_size - 2 * halo)
        plan = plan_windows(layout.num_tokens, layout.num_tokens if window is None else window, halo)
        for start, stop, keep, keep_stop in plan:
            tokens = dict(self.tokenizer(weights, start=start, length=stop - start))
            index = torch.arange(start, stop)[None]
            kept = (index >= keep) & (index < keep_stop)
            yield {**tokens, "kept": kept, "is_last": torch.tensor([keep_stop == layout.num_tokens])}

    def _check_size(self, layout: TokenLayout) -> None:
        config = self.model.config
        if layout.token_size != config.token_size:
            raise ValueError(
                f"The tokenizer makes tokens of {layout.token_size} weights, the model reads {config.token_size}: "
                "load both from the same folder."
            )
        rows = max(layer.rows for layer in layout.layers)
        for what, count, size in zip(
            ("tokens", "layers", "rows in a layer"),
            (layout.num_tokens, len(layout.layers), rows),
            config.max_positions,
            strict=False,  # models with two position tables do not know rows
        ):
            if count > size:
                raise ValueError(
                    f"The network has {count} {what}; this model knows positions for {size} (its max_positions are "
                    f"{list(config.max_positions)}). It needs a model trained with larger ones."
                )

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        # As in the base class, but padded as weight tokens are; a text tokenizer's padding is of no use here.
        chunks = PipelineChunkIterator(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(chunks, num_workers=min(num_workers, 1), batch_size=batch_size, collate_fn=_collate)
        packed = PipelinePackIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(packed, self.postprocess, postprocess_params)

    def _forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        model = getattr(self.model, self.model.base_model_prefix, self.model)
        training = model.training
        latents = model.eval().encode(
            inputs["tokens"].to(model.dtype), inputs["mask"], inputs["positions"], inputs["attention_mask"]
        )
        model.train(training)
        layers = inputs["positions"][..., 1]
        means, count = layer_means(latents.float(), layers, inputs["kept"].float(), model.config.max_positions[1])
        return {"means": means, "count": count, "is_last": inputs["is_last"]}

    def postprocess(  # type: ignore[override]
        self, windows: list[dict[str, Tensor]], readout: str = "mean"
    ) -> Tensor:
        """Join the windows of a network: `(F,)`."""
        count = torch.stack([window["count"][0] for window in windows])[..., None]  # (W, L, 1)
        total = (torch.stack([window["means"][0] for window in windows]) * count).sum(0)  # (L, Z)
        count = count.sum(0)
        if readout == "mean":
            return total.sum(0) / count.sum()
        present = count[:, 0] > 0
        return (total[present] / count[present]).flatten()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and tokenizer, with which the pipeline's code travels.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            kwargs: Passed to both.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory, **kwargs)


def _natural(name: str) -> list[list[tuple[int, str]]]:
    """Sort key under which `layer2` stands before `layer10`."""
    parts = [re.split(r"([0-9]+)", part) for part in name.split(".")]
    return [
        [(len(piece.lstrip("0")), piece.lstrip("0")) if i % 2 else (0, piece) for i, piece in enumerate(part)]
        for part in parts
    ]


def _collate(windows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of windows, padded to the longest."""
    length = max(window["tokens"].shape[1] for window in windows)
    batch = {}
    for name, first in windows[0].items():
        parts = [window[name] for window in windows]
        if first.ndim > 1:
            padded = first.new_zeros(len(parts), length, *first.shape[2:])
            for row, part in zip(padded, parts, strict=True):
                row[: part.shape[1]] = part[0]
        else:
            padded = torch.cat(parts)
        batch[name] = padded
    return batch


__all__ = ["WeightFeatureExtractionPipeline"]
