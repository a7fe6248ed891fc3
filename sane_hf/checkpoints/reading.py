"""Read any checkpoint: a file, an index of shards or a folder; its content decides what it is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .content import refuse_kind, sniff
from .files import open_regular
from .header import LIMITS, HeaderLimits
from .pickles import load_pickle, refuse_unless_allowed
from .sharded import find_in_folder, load_sharded
from .views import load_safetensors


def load_checkpoint(
    path: str | os.PathLike[str],
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    device: str | torch.device = "cpu",
    entry: str | None = None,
    limits: HeaderLimits = LIMITS,
) -> dict[str, torch.Tensor]:
    """Read the state dict of a checkpoint that a stranger may have made.

    Args:
        path: A safetensors file, a file of torch.save, an index of shards (``*.index.json``), or a folder with one
            of them. The content decides, never the suffix, and nothing falls back from safetensors to a pickle.
        allow_pickle: Also read files of torch.save, tensors only (``weights_only=True``).
        allow_nonfinite: Do not refuse NaN and infinity; then the data of a mapped file are read only when used.
        device: Where the tensors are put. On the CPU they are views of the mapped file, copied where written to.
        entry: Which entry of a pickled nest of dicts to read, such as ``"ema"``; None finds the only one.
        limits: Limits of safetensors headers.

    Returns:
        Tensors by name; dtypes and shapes as stored, tied names one tensor. Order: as saved by `save_checkpoint`, or
        as in the pickle, or else natural (``layer2`` before ``layer10``). The prefixes ``module.`` and
        ``_orig_mod.`` are stripped where every name has them.

    Raises:
        CheckpointError: Whatever is wrong, with a code, the tensor if one is to blame, and the way out.

    Example:
        >>> import tempfile
        >>> from sane_hf.checkpoints import save_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint({"fc.weight": torch.ones(1, 2), "fc.bias": torch.zeros(1)}, f"{folder}/a.safetensors")
        ...     load_checkpoint(folder)
        {'fc.weight': tensor([[1., 1.]]), 'fc.bias': tensor([0.])}
    """
    target = Path(path)
    if os.path.isdir(target):
        target = find_in_folder(target)

    def load(file: Path) -> dict[str, torch.Tensor]:
        with open_regular(file) as opened:
            head = opened.read(512)
            size = os.fstat(opened.fileno()).st_size
        kind = sniff(head, size)
        if kind == "safetensors":
            return load_safetensors(file, allow_nonfinite, device, limits, strip=file == target)
        if kind in ("zip", "legacy", "pickle"):
            refuse_unless_allowed(file, kind, allow_pickle)
            return load_pickle(file, allow_nonfinite, device, entry, strip=file == target)
        if kind == "json" and file == target and b'"' in head:
            return load_sharded(file, load, allow_pickle, limits)
        refuse_kind(kind, head, size, file)

    return load(target)
