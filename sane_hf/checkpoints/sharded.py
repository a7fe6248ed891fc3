"""Checkpoints of several files: an index that names its shards, and folders.

The index is text from a stranger: the paths in it are checked before any shard is opened, by the rules of both
systems of paths, as huggingface_hub does (`serialization/_torch.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import NoReturn

import torch

from .checks import refuse_quantised
from .errors import CheckpointError, quote, quote_all
from .files import open_regular
from .header import LIMITS, HeaderLimits
from .header_reading import read_header
from .names import is_unicode, natural_sort, strip_wrappers
from .strict_json import parse_json

_INDEX_BYTES = 10 << 20
_AGAIN = "download the whole folder again"

Loader = Callable[[Path], dict[str, torch.Tensor]]


def find_in_folder(folder: Path) -> Path:
    """Find the one checkpoint of a folder.

    Order: ``model.safetensors``, ``model.safetensors.index.json``, a single index or file of safetensors,
    ``pytorch_model.bin``, ``pytorch_model.bin.index.json``, a single ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file.

    Args:
        folder: The folder.

    Returns:
        Path of the file or index; its content decides how it is read.

    Raises:
        CheckpointError: E_NOT_FOUND if there is none, E_AMBIGUOUS if there are several, E_QUANTISED if
            ``config.json`` says that the weights are quantised.
    """
    _refuse_quantised_config(folder)
    for suffix, usual in ((".safetensors", "model"), (".bin", "pytorch_model")):
        for name in (f"{usual}{suffix}", f"{usual}{suffix}.index.json"):
            if os.path.exists(folder / name):
                return folder / name
        found = sorted(folder.glob(f"*{suffix}.index.json"))
        if not found:
            found = sorted(folder.glob(f"*{suffix}"))
            if suffix == ".bin":
                found += [path for ending in ("pt", "pth", "ckpt") for path in sorted(folder.glob(f"*.{ending}"))]
        if len(found) > 1:
            names = quote_all([path.name for path in found], 20)
            fix = "give the path of one of them"
            raise CheckpointError("E_AMBIGUOUS", folder, None, f"several checkpoints: {names}", "one", fix)
        if found:
            return found[0]
    expected = "model.safetensors, an index with its shards, or one other checkpoint"
    raise CheckpointError("E_NOT_FOUND", folder, None, "a folder without checkpoint", expected, "check the path")


def _refuse_quantised_config(folder: Path) -> None:
    config = folder / "config.json"
    try:
        with open_regular(config) as file:
            values = json.loads(file.read(_INDEX_BYTES))
    except (ValueError, RecursionError):
        return  # not there or damaged: the weights do not need it
    quantisation = values.get("quantization_config") if isinstance(values, dict) else None
    if quantisation:
        method = quantisation.get("quant_method", "") if isinstance(quantisation, dict) else ""
        refuse_quantised(None, f"config.json with a quantization_config ({quote(method)})", folder)


def load_sharded(
    index: Path, load: Loader, allow_pickle: bool = False, limits: HeaderLimits = LIMITS
) -> dict[str, torch.Tensor]:
    """Read all shards that an index names.

    Args:
        index: Path of the ``*.index.json``.
        load: Reads one shard, leaving the names as they are.
        allow_pickle: Whether shards may be pickles (their names need not end in ``.safetensors`` then).
        limits: Limits of safetensors headers.

    Returns:
        Tensors by name, in natural order.

    Raises:
        CheckpointError: E_INDEX, E_DUPLICATE_KEY, E_SHARD_PATH (before any shard is opened), E_SHARD_MISSING
            (all of them at once), E_SHARD_KEYS, E_SHARD_SIZE, and whatever is wrong with a shard.
    """
    weight_map, total = _read_index(index)
    # transformers' pickles have an index of their own kind; safetensors never names pickles
    suffix = ".bin" if allow_pickle and index.name.endswith(".bin.index.json") else ".safetensors"
    shards = _shard_paths(index, weight_map, suffix)
    missing = [name for name, path in shards.items() if not os.path.isfile(path)]
    if missing:
        found = f"{len(missing)} of {len(shards)} shards are not there: {quote_all(missing)}"
        raise CheckpointError("E_SHARD_MISSING", index, None, found, "all shards beside the index", _AGAIN)
    if suffix == ".safetensors":
        headers = {name: read_header(path, limits=limits) for name, path in shards.items()}
        _check_keys(index, weight_map, {name: set(header.tensors) for name, header in headers.items()})
        _check_total(index, total, sum(header.data_bytes for header in headers.values()))
    loaded = {name: load(path) for name, path in shards.items()}
    if suffix == ".bin":
        _check_keys(index, weight_map, {name: set(tensors) for name, tensors in loaded.items()})
    merged = {name: tensor for tensors in loaded.values() for name, tensor in tensors.items()}
    return strip_wrappers({name: merged[name] for name in natural_sort(merged)}, index)


def _refuse_index(index: Path, found: str, expected: str) -> NoReturn:
    fix = "write the index again with the software that split the checkpoint"
    raise CheckpointError("E_INDEX", index, None, found, expected, fix) from None


def _read_index(index: Path) -> tuple[dict[str, str], int | None]:
    with open_regular(index) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _INDEX_BYTES:
            _refuse_index(index, f"an index of {size} bytes", f"at most {_INDEX_BYTES}")
        raw = file.read(size)
    content = parse_json(raw, index, "E_INDEX")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse_index(index, "JSON without a weight_map", '{"weight_map": {tensor: shard}}')
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            _refuse_index(index, f"for tensor {quote(name)} the shard {quote(shard)}", "the name of a file")
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and type(total) not in (int, float):
        _refuse_index(index, f"total_size {quote(total)}", "a number of bytes")
    return weight_map, None if total is None else int(total)


def _shard_paths(index: Path, weight_map: dict[str, str], suffix: str) -> dict[str, Path]:
    folder = os.path.realpath(index.parent)
    allowed = [folder]
    repository, snapshots = os.path.split(os.path.dirname(folder))
    if snapshots == "snapshots":  # the Hub's cache: files are links into blobs/ of the same repository
        allowed.append(os.path.join(repository, "blobs"))
    paths = {}
    for shard in dict.fromkeys(weight_map.values()):
        pure = PureWindowsPath(shard)  # understands both systems' separators, drives and roots
        wrong = not pure.name or pure.drive or pure.root or ".." in pure.parts
        if wrong or "\0" in shard or not is_unicode(shard):
            _refuse_path(index, shard, "leads out of the folder" if wrong else "is no name of a file")
        if pure.suffix != suffix:
            _refuse_path(index, shard, f"does not end in {suffix}")
        path = index.parent.joinpath(*pure.parts)
        if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in allowed):
            _refuse_path(index, shard, "is a link that leads out of the folder")
        paths[shard] = path
    return paths


def _refuse_path(index: Path, shard: str, what: str) -> NoReturn:
    fix = "put the shards into the folder of their index"
    found = f"the shard {quote(shard)} {what}; nothing was opened"
    raise CheckpointError("E_SHARD_PATH", index, None, found, "files beside the index", fix)


def _check_keys(index: Path, weight_map: dict[str, str], stored: dict[str, set[str]]) -> None:
    place: dict[str, str] = {}
    for shard, names in stored.items():
        for name in sorted(names):
            if name in place:
                _refuse_key(index, name, f"in two shards, {quote(place[name])} and {quote(shard)}")
            place[name] = shard
            if name not in weight_map:
                _refuse_key(index, name, f"in shard {quote(shard)}, but not in the index")
    for name, shard in weight_map.items():
        if place.get(name) != shard:
            where = f"in shard {quote(place[name])}" if name in place else "in no shard"
            _refuse_key(index, name, f"{where}, but by the index in {quote(shard)}")


def _refuse_key(index: Path, name: str, found: str) -> NoReturn:
    raise CheckpointError("E_SHARD_KEYS", index, name, found, "index and shards that agree", _AGAIN)


def _check_total(index: Path, total: int | None, stored: int) -> None:
    if total is not None and total != stored:
        found = f"the shards hold {stored} bytes of tensors"
        fix = f"{_AGAIN}; where its writer miscounted, remove total_size from the index"
        raise CheckpointError("E_SHARD_SIZE", index, None, found, f"{total} by the index's total_size", fix)
