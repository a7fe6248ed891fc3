"""Read a zoo: the dataset with its weights decoded, what `zoo.json` says, and all weights as one matrix."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from sane_hf.checkpoints import from_bytes, read_header
from sane_hf.modeling.layout_sane import TokenLayout

from .schema import SCHEMA
from .writing import ZOO_VERSION

_BATCH_BYTES = 64 * 2**20  # of weights read at once by `weight_matrix`
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def load_zoo(name_or_path: str | os.PathLike[str], split: str | None = None) -> Dataset | DatasetDict:
    """Load a zoo with plain `datasets`; `weights` becomes a state dict when a row is read.

    Filtering and selecting on the other columns reads no weights. `dataset.with_format(None)` gives the bytes.

    Args:
        name_or_path: folder of a zoo, or a dataset repository on the Hub.
        split: "train", "validation" or "test"; None means all.

    Returns:
        The split, or a `DatasetDict` of all.

    Raises:
        ValueError: no zoo there, an unknown split, a column missing, a zoo without a checkpoint, or (all splits) a
            model in two splits, naming it.
    """
    try:
        found = datasets.load_dataset(_source(name_or_path))
    except OSError as error:
        raise _not_found(name_or_path, error) from error
    if split is not None and split not in found:
        raise ValueError(f"the zoo {name_or_path} has no split {split!r}; it has {list(found)}")
    check_splits(found, name_or_path)
    for part in found.values():
        part.set_transform(_decode)
    return found if split is None else found[split]


def zoo_info(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a zoo's `zoo.json`.

    Args:
        name_or_path: as `load_zoo`.

    Returns:
        `architectures` (configuration, shapes, permutation groups by architecture), `reference` (`model_id` and
        `epoch`), `splits`, `content_hash`, `build`.

    Raises:
        ValueError: no zoo there, or one of a newer format.
    """
    source = _source(name_or_path)
    if Path(source).is_dir():
        path = Path(source) / "zoo.json"
    else:
        try:
            path = Path(huggingface_hub.hf_hub_download(source, "zoo.json", repo_type="dataset"))
        except OSError as error:
            raise _not_found(name_or_path, error) from error
    info = json.loads(path.read_text(encoding="utf-8"))
    if info["version"] > ZOO_VERSION:
        raise ValueError(
            f"{path} has format version {info['version']}, this sane-hf reads up to {ZOO_VERSION}; upgrade sane-hf"
        )
    return info


def reference_weights(name_or_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of a zoo's canonical reference.

    Raises:
        ValueError: no zoo there, or it names no reference, or one that is not in its train split.
    """
    reference = zoo_info(name_or_path)["reference"]
    if reference is None:
        raise ValueError(f"the zoo {name_or_path} names no reference: its models have no validation accuracy")
    train = load_zoo(name_or_path, "train")
    keys = train.select_columns(["model_id", "epoch"]).with_format("arrow")[:]
    wanted = (reference["model_id"], reference["epoch"])
    pairs = zip(keys["model_id"].to_pylist(), keys["epoch"].to_pylist(), strict=True)
    index = next((row for row, pair in enumerate(pairs) if pair == wanted), None)
    if index is None:
        raise ValueError(f"the zoo {name_or_path} has no checkpoint {wanted} in its train split, its reference")
    return train[index]["weights"]


def check_splits(splits: Mapping[str, Dataset], name: str | os.PathLike[str]) -> None:
    """Check that a zoo is one: columns, at least one checkpoint, no model in two splits.

    Raises:
        ValueError: naming the zoo and the column or model.
    """
    if not any(len(part) for part in splits.values()):
        raise ValueError(f"the zoo {name} is empty: it holds no checkpoint")
    owner: dict[str, str] = {}
    for split, part in splits.items():
        missing = [field.name for field in SCHEMA if not field.nullable and field.name not in part.column_names]
        if missing:
            raise ValueError(f"{name} is no zoo: its split {split!r} lacks the column {missing[0]!r}")
        for model_id in part.with_format("arrow").unique("model_id"):
            other = owner.setdefault(model_id, split)
            if other != split:
                raise ValueError(
                    f"the zoo {name} leaks: model {model_id!r} lies in the splits {other!r} and {split!r}; "
                    "all checkpoints of a model belong to one split"
                )


def weight_matrix(dataset: Dataset, layout: TokenLayout) -> Tensor:
    """Read the weights of all rows into one matrix.

    Rows whose safetensors headers are equal, as they are within one architecture, are read together; no tensor of
    Python's is made per row.

    Args:
        dataset: rows of one architecture, such as a split of `load_zoo`.
        layout: of that architecture.

    Returns:
        (rows, N) float32, each row the flat vector of `layout.flatten`.

    Raises:
        ValueError: a row whose tensors are not those of the layout, naming the row and the tensor.
        CheckpointError: a row that is not well-formed safetensors.
    """
    matrix = np.empty((len(dataset), layout.num_weights), np.float32)
    batch_rows = max(1, _BATCH_BYTES // max(1, 4 * layout.num_weights))
    row = 0
    for table in dataset.select_columns(["weights"]).with_format("arrow").iter(batch_rows):
        for chunk in table.column("weights").chunks:
            _read_chunk(chunk.cast(pa.large_binary()), matrix[row : row + len(chunk)], layout, row)
            row += len(chunk)
    return torch.from_numpy(matrix)


def _source(name_or_path: str | os.PathLike[str]) -> str:
    """Return the folder of a local zoo, or the repository id."""
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "zoo.json").is_file():
            raise ValueError(f"{path} is no zoo: it has no zoo.json")
        return str(path)
    name = os.fspath(name_or_path)
    # what lies in a folder that exists here was meant to be here, and is not looked for on the Hub
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or ("/" in name and path.parent.is_dir()):
        raise ValueError(f"there is no zoo at {name}; the scripts in datasets_scripts/ build zoos")
    return name


def _not_found(name_or_path: str | os.PathLike[str], error: OSError) -> ValueError:
    return ValueError(
        f"there is no folder {name_or_path} here, and no such dataset could be read from the Hub ({error}); "
        "the scripts in datasets_scripts/ build zoos"
    )


def _decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Turn the bytes of a batch into state dicts."""
    if "weights" in batch:
        names = batch.get("model_id", ["<weights>"] * len(batch["weights"]))
        batch["weights"] = [
            from_bytes(weights, str(name)) for weights, name in zip(batch["weights"], names, strict=True)
        ]
    return batch


def _read_chunk(chunk: pa.LargeBinaryArray, out: np.ndarray, layout: TokenLayout, first_row: int) -> None:
    """Read the rows of one Arrow array into `out` (rows, N)."""
    _, offsets, data = chunk.buffers()
    bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    content = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    start = 0
    while start < len(chunk):
        length = bounds[start + 1] - bounds[start]
        header = read_header(content[bounds[start] : bounds[start + 1]].data, f"row {first_row + start}")
        # as many following rows as have the same length and the same header
        different = np.flatnonzero(np.diff(bounds[start:]) != length)
        stop = start + int(different[0]) if len(different) else len(chunk)
        rows = content[bounds[start] : bounds[stop]].reshape(stop - start, length)
        same = (rows[:, : header.data_start] == rows[0, : header.data_start]).all(1)
        stop = start + (int(np.argmin(same)) if not same.all() else len(same))
        _check_tensors({name: info.shape for name, info in header.tensors.items()}, layout, first_row + start)
        for name, (begin, end) in layout.slices.items():
            info = header.tensors[name]
            block = rows[: stop - start, header.data_start + info.start : header.data_start + info.end]
            if info.dtype not in _DTYPES:
                raise ValueError(
                    f"row {first_row + start}: tensor {name!r} has dtype {info.dtype}, needed is one of "
                    f"{list(_DTYPES)}"
                )
            out[start:stop, begin:end] = _values(block, info.dtype)
        start = stop


def _values(block: np.ndarray, dtype: str) -> np.ndarray:
    """View bytes (rows, n * size) as numbers (rows, n)."""
    values = block.view(_DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], layout: TokenLayout, row: int) -> None:
    for name, shape in layout.shapes.items():
        if name not in shapes:
            raise ValueError(f"row {row}: tensor {name!r} of the layout is missing; its tensors are {list(shapes)}")
        if tuple(shapes[name]) != tuple(shape):
            raise ValueError(f"row {row}: tensor {name!r} has shape {shapes[name]}, the layout needs {shape}")
    extra = [name for name in shapes if name not in layout.shapes]
    if extra:
        raise ValueError(f"row {row}: tensor {extra[0]!r} is not part of the layout, which is of another architecture")
