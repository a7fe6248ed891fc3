"""Write state dicts as safetensors, deterministically: the same tensors give the same bytes.

The library orders metadata by chance, so that equal checkpoints would differ in their bytes and hashes; the header
is therefore written here. Tensors of large numbers come first, as the library does it, so that all are aligned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import torch

from .atomic import atomic_file, write_error
from .checks import check_quantised, refuse_quantised
from .errors import CheckpointError, quote
from .header import LIMITS
from .names import ORDER_KEY, TIED_KEY, natural_sort, tied_groups, wrapper_prefix
from .views import TORCH_DTYPES

_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def to_bytes(state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Write a state dict as the bytes of a safetensors file.

    Args:
        state_dict: Tensors by name, any shapes and devices. Tied tensors are stored once. Their order is noted
            where it is not the natural one.
        metadata: Texts by name to store beside them.

    Returns:
        The bytes; the same state dict always gives the same.

    Raises:
        CheckpointError: E_NO_TENSORS, E_NAME, E_DTYPE, E_META, E_SPARSE, E_QUANTISED, E_STRUCTURE, E_METADATA or
            E_HEADER_SIZE.

    Example:
        >>> to_bytes({"w": torch.zeros(2)})[8:].decode()[:85]
        '{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    """
    header, order = _header(state_dict, metadata, "<bytes>")
    return b"".join([header, *_data(state_dict, order)])


def save_checkpoint(
    state_dict: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict to a safetensors file, whole or not at all.

    The content is that of `to_bytes`, written tensor by tensor to a sibling, forced to disk and renamed. Read it
    with `load_checkpoint`, or with any reader of safetensors.

    Args:
        state_dict: Tensors by name.
        path: The file; folders above it are made.
        metadata: Texts by name to store beside them.

    Raises:
        CheckpointError: As `to_bytes`; E_WRITE, and what was there before is unchanged.

    Example:
        >>> import tempfile
        >>> from sane_hf.checkpoints import load_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint({"w": torch.ones(2)}, f"{folder}/model.safetensors")
        ...     load_checkpoint(f"{folder}/model.safetensors")
        {'w': tensor([1., 1.])}
    """
    header, order = _header(state_dict, metadata, path)
    with atomic_file(path) as file:
        try:
            file.write(header)
            for piece in _data(state_dict, order):
                file.write(piece)
            file.flush()
        except OSError as error:
            raise write_error(path, error) from error


def _header(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None, path: str | os.PathLike[str]
) -> tuple[bytes, list[str]]:
    if not state_dict:
        raise CheckpointError("E_NO_TENSORS", path, None, "an empty state dict", "at least one tensor", "")
    for name, tensor in state_dict.items():
        _check_tensor(name, tensor, path)
    check_quantised({name: _CODES[tensor.dtype] for name, tensor in state_dict.items()}, path)
    aliases = {name: group[0] for group in tied_groups(state_dict) for name in group[1:]}
    stored = [name for name in state_dict if name not in aliases]
    stored.sort(key=lambda name: -state_dict[name].dtype.itemsize)
    notes = {"format": "pt"} | dict(metadata or {})
    notes.pop(ORDER_KEY, None)
    notes.pop(TIED_KEY, None)
    order = list(state_dict)
    if order != natural_sort(order) or wrapper_prefix(order):
        notes[ORDER_KEY] = json.dumps(order, separators=(",", ":"))
    if aliases:
        notes[TIED_KEY] = json.dumps(aliases, separators=(",", ":"))
    for key, value in notes.items():
        if not isinstance(key, str) or not isinstance(value, str):
            found = f"metadata {quote(key)}: {quote(value)}"
            raise CheckpointError("E_METADATA", path, None, found, "texts by name", "convert it with json.dumps")
    entries: dict[str, object] = {"__metadata__": notes}
    end = 0
    for name in stored:
        tensor = state_dict[name]
        shape = list(tensor.shape)
        if tensor.dtype == torch.float4_e2m1fn_x2:
            shape[-1] *= 2  # the file counts the 4-bit numbers, torch counts pairs of them
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    try:
        raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        found = "a name or metadata with half of a surrogate pair"
        raise CheckpointError("E_NAME", path, None, found, "Unicode text", "rename it") from None
    raw += b" " * (-len(raw) % 8)
    if len(raw) > LIMITS.header_bytes or len(stored) > LIMITS.tensors:
        found = f"a header of {len(raw)} bytes for {len(stored)} tensors"
        expected = f"at most {LIMITS.header_bytes} bytes and {LIMITS.tensors} tensors"
        raise CheckpointError("E_HEADER_SIZE", path, None, found, expected, "split the checkpoint into shards")
    return len(raw).to_bytes(8, "little") + raw, stored


def _check_tensor(name: object, tensor: object, path: str | os.PathLike[str]) -> None:
    if not isinstance(name, str) or name == "__metadata__" or len(name) * 4 > LIMITS.name_bytes:
        too_long = isinstance(name, str) and len(name.encode("utf-8", "surrogatepass")) > LIMITS.name_bytes
        if too_long or not isinstance(name, str) or name == "__metadata__":
            found = f"a tensor named {quote(name)}"
            expected = f"a text of at most {LIMITS.name_bytes} bytes other than __metadata__"
            raise CheckpointError("E_NAME", path, None, found, expected, "rename the tensor")
    if not isinstance(tensor, torch.Tensor):
        found = f"a {type(tensor).__name__} instead of a tensor"
        raise CheckpointError("E_STRUCTURE", path, name, found, "tensors by name", "leave it out")
    if tensor.is_meta:
        fix = "load the weights before saving"
        raise CheckpointError("E_META", path, name, "a meta tensor, which has no data", "data", fix)
    if tensor.is_quantized:
        refuse_quantised(name, f"a quantised tensor ({tensor.dtype})", path)
    if tensor.layout != torch.strided:
        fix = "save it dense: tensor.to_dense()"
        raise CheckpointError("E_SPARSE", path, name, f"a tensor of layout {tensor.layout}", "a dense one", fix)
    if tensor.dtype not in _CODES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _CODES)
        raise CheckpointError("E_DTYPE", path, name, f"dtype {tensor.dtype}", f"one of {known}", "convert the tensor")
    if tensor.dim() > LIMITS.rank:
        raise CheckpointError("E_SHAPE", path, name, f"{tensor.dim()} axes", f"at most {LIMITS.rank}", "reshape it")


def _data(state_dict: Mapping[str, torch.Tensor], order: list[str]) -> Iterator[memoryview]:
    for name in order:
        tensor = state_dict[name].detach()
        if tensor.numel():
            flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().view(-1)
            yield flat.view(torch.uint8).numpy().data
