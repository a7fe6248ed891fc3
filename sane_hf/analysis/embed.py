"""Embed networks: weights in, one vector per network out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sane_hf.analysis.readouts import READOUTS, Readout
from sane_hf.checkpoints import load_checkpoint
from sane_hf.modeling.layout_sane import TokenLayout, tokens_from_flat
from sane_hf.modeling.modeling_sane import SaneModel, SanePreTrainedModel
from sane_hf.modeling.tokenization_sane import WeightTokenizer
from sane_hf.modeling.windows_sane import plan_windows
from sane_hf.symmetry import align_many

logger = logging.getLogger(__name__)

StateDict = Mapping[str, Tensor]
Source = StateDict | str | PathLike | Sequence[StateDict | str | PathLike]


def embed(
    source: Source,
    model: SanePreTrainedModel | str | PathLike,
    tokenizer: WeightTokenizer | None = None,
    readout: str = "layer_mean_std",
    *,
    align: bool = True,
    window: int | None = None,
    halo: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Embed networks.

    Args:
        source: one network or a list: state dicts, or paths that `load_checkpoint` reads.
        model: a SANE model, or a folder or Hub id of one.
        tokenizer: the model's tokenizer; read from the model's folder if absent.
        readout: "mean" (one size for all architectures), "layer_mean" or "layer_mean_std" (one size per architecture).
        align: bring each network into canonical form first, where the tokenizer knows permutation groups and a
            reference for its architecture; where it does not, this is logged and the weights are taken as they are.
        window: tokens kept per window; whole networks if absent.
        halo: tokens of context on either side of a window.
        batch_size: windows encoded at once. The result does not depend on it.
        progress: show a progress bar.

    Returns:
        (B, F) float32 on the CPU, one row per network in the order given; for a single network (1, F).

    Raises:
        ValueError: for an unknown readout, an empty list, a model without tokenizer, networks that do not fit the
            tokenizer, or architectures whose embeddings differ in size.
        CheckpointError: for a file that cannot be read.

    Example:
        >>> from sane_hf import SaneConfig
        >>> tokenizer = WeightTokenizer(token_size=4)
        >>> model = SaneModel(SaneConfig(token_size=4, latent_size=3, hidden_size=8, num_attention_heads=2))
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Linear(5, 1)).state_dict()
        >>> embed([network, network], model, tokenizer).shape
        torch.Size([2, 12])
    """
    model, tokenizer = _load(model, tokenizer)
    networks = [source] if isinstance(source, Mapping | str | PathLike) else list(source)
    if not networks:
        raise ValueError("there is no network to embed: the list is empty")
    state_dicts = [network if isinstance(network, Mapping) else load_checkpoint(network) for network in networks]
    by_layout: dict[str, tuple[TokenLayout, list[int]]] = {}
    for position, state_dict in enumerate(state_dicts):
        layout = tokenizer.layout(state_dict)
        by_layout.setdefault(layout.fingerprint, (layout, []))[1].append(position)
    rows: list[Tensor] = [torch.empty(0)] * len(networks)
    for layout, members in by_layout.values():
        flat = layout.flatten_many([state_dicts[member] for member in members])
        _check_finite(flat, layout, [networks[member] for member in members])
        if align:
            flat = _aligned(flat, layout, tokenizer)
        embedded = embed_flat(
            flat, layout, model, tokenizer, readout, window=window, halo=halo, batch_size=batch_size, progress=progress
        )
        for member, row in zip(members, embedded, strict=True):
            rows[member] = row
    sizes = sorted({len(row) for row in rows})
    if len(sizes) > 1:
        raise ValueError(
            f"readout={readout!r} gives embeddings of {sizes[0]} and {sizes[-1]} numbers for these architectures: "
            'embed one architecture at a time, or use readout="mean"'
        )
    return torch.stack(rows)


def embed_flat(
    flat: Tensor,
    layout: TokenLayout,
    model: SanePreTrainedModel,
    tokenizer: WeightTokenizer,
    readout: str | Readout = "layer_mean_std",
    *,
    window: int | None = None,
    halo: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Embed the flat weights of networks of one architecture, taken as they are: the fast path for zoos.

    Args:
        flat: (B, N) float, in layout order, aligned if they should be.
        layout: their layout.
        model: the SANE model.
        tokenizer: its tokenizer, which gives the normalisation.
        readout: a name of `READOUTS`, or such a function.
        window: tokens kept per window; whole networks if absent.
        halo: tokens of context on either side of a window.
        batch_size: windows encoded at once.
        progress: show a progress bar.

    Returns:
        (B, F) float32 on the CPU.

    Raises:
        ValueError: for an unknown readout.
    """
    read = _readout(readout)
    layers = layout.layer_of_token()
    embedded: list[Tensor] = []
    networks = max(1, batch_size // max(1, layout.num_tokens // (window or layout.num_tokens)))
    for start in tqdm(range(0, len(flat), networks), desc="embed", unit="batch", disable=not progress):
        latents = encode_flat(flat[start : start + networks], layout, model, tokenizer, window, halo, batch_size)
        real = torch.ones(latents.shape[:2], dtype=torch.bool)
        embedded.append(read(latents, real, layers.expand(latents.shape[:2])))
    return torch.cat(embedded)


@torch.inference_mode()
def encode_flat(
    flat: Tensor,
    layout: TokenLayout,
    model: SanePreTrainedModel,
    tokenizer: WeightTokenizer,
    window: int | None = None,
    halo: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Latents of the flat weights of networks of one architecture, window by window where a window is given.

    Args:
        flat: (B, N) float, in layout order.
        layout: their layout.
        model: the SANE model; left in the mode (training or not) in which it came.
        tokenizer: its tokenizer, which gives the normalisation.
        window: tokens kept per window; whole networks if absent.
        halo: tokens of context on either side of a window.
        batch_size: windows encoded at once.

    Returns:
        (B, T, Z) float32 on the CPU.
    """
    base = base_model(model)
    plan = plan_windows(layout.num_tokens, window or layout.num_tokens, halo)
    latents = torch.empty(len(flat), layout.num_tokens, base.config.latent_size)
    was_training = base.training
    base.eval()
    for first, last, keep, stop in plan:
        mask = layout.mask(first, last - first).to(base.device)
        positions = layout.positions(first, last - first).to(base.device)
        for start in range(0, len(flat), batch_size):
            part = flat[start : start + batch_size].float()
            tokens = tokenizer.normalize(tokens_from_flat(part, layout, first, last - first), layout, first)
            tokens = tokens.to(base.device)
            size = len(part)
            encoded = base.encode(tokens, mask.expand(size, -1, -1), positions.expand(size, -1, -1))
            latents[start : start + size, keep:stop] = encoded[:, keep - first : stop - first].float().cpu()
    base.train(was_training)
    return latents


def base_model(model: SanePreTrainedModel) -> SaneModel:
    """The encoder and decoder inside a model with heads, or the model itself."""
    return model if isinstance(model, SaneModel) else getattr(model, model.base_model_prefix)


def _load(
    model: SanePreTrainedModel | str | PathLike, tokenizer: WeightTokenizer | None
) -> tuple[SaneModel, WeightTokenizer]:
    if not isinstance(model, str | PathLike):
        if tokenizer is None:
            raise ValueError("a model given as an object needs its tokenizer too: pass tokenizer=..., or a folder")
        return base_model(model), tokenizer
    loaded: Any = SaneModel.from_pretrained(model)
    return loaded, tokenizer or WeightTokenizer.from_pretrained(model)


def _readout(readout: str | Readout) -> Readout:
    if callable(readout):
        return readout
    if readout not in READOUTS:
        raise ValueError(f"readout={readout!r} is unknown: choose one of {', '.join(READOUTS)}")
    return READOUTS[readout]


def _aligned(flat: Tensor, layout: TokenLayout, tokenizer: WeightTokenizer) -> Tensor:
    groups, reference = tokenizer.groups.get(layout.fingerprint), tokenizer.references.get(layout.fingerprint)
    if groups is None or reference is None:
        logger.warning(
            "embedding weights as they are: the tokenizer knows no permutation groups and reference for this "
            "architecture, so permuted copies of a network get other embeddings"
        )
        return flat
    return align_many(flat, reference, layout, groups).flat


def _check_finite(flat: Tensor, layout: TokenLayout, networks: Sequence) -> None:
    finite = torch.isfinite(flat)
    if finite.all():
        return
    network, column = (int(value) for value in (~finite).nonzero()[0])
    tensor = next(name for name, (start, stop) in layout.slices.items() if start <= column < stop)
    name = networks[network] if isinstance(networks[network], str | PathLike) else f"network {network}"
    count = int((~finite[network]).sum())
    raise ValueError(f"{name}: tensor {tensor!r} has non-finite values ({count} in the network): leave it out")
