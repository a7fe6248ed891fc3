"""Strict check of a safetensors header, made before the library sees the file.

Follows the format's specification (https://github.com/huggingface/safetensors, "Format") and is stricter than the
library where a scanner and a loader could otherwise see different models: duplicate names, leading white space,
unlimited numbers of tensors. Everything accepted here is accepted by the library too.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from .errors import CheckpointError, quote
from .strict_json import parse_json, refuse_json

# bits per element; the six-bit types are part of the format, but nothing in torch can hold them
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
}
_JSON = "E_HEADER_JSON"
_ENTRY = re.compile(rb'"data_offsets"')
_U64 = 1 << 64


class HeaderLimits(NamedTuple):
    """Limits that bound the time and memory a header can cost (units: bytes, tensors, axes, elements, bytes)."""

    header_bytes: int = 25_000_000
    tensors: int = 200_000
    rank: int = 32
    dimension: int = 1 << 40
    name_bytes: int = 4096


LIMITS = HeaderLimits()


class TensorInfo(NamedTuple):
    """One tensor of a header: safetensors dtype, logical shape, first and last byte (exclusive) in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape as torch holds it: the same, except that two 4-bit numbers share one element of the last axis."""
        return self.shape if self.dtype != "F4" else (*self.shape[:-1], self.shape[-1] // 2)


@dataclass(frozen=True)
class Header:
    """A checked header.

    Args:
        tensors: `TensorInfo` by name, in the order of the file's header.
        metadata: The file's ``__metadata__``.
        data_start: Where the data begin, in bytes from the start of the file.
        data_bytes: Length of the data in bytes.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    data_bytes: int


def check_count(raw: bytes | memoryview, path: str | os.PathLike[str], limits: HeaderLimits) -> None:
    """Refuse a raw header with too many tensors before it is parsed.

    Args:
        raw: JSON text of the header, as bytes.
        path: For the error.
        limits: The limit.

    Raises:
        CheckpointError: E_TOO_MANY_TENSORS.
    """
    if any(i > limits.tensors for i, _ in enumerate(_ENTRY.finditer(raw), start=1)):
        _refuse_many(path, limits)


def _refuse_many(path: str | os.PathLike[str], limits: HeaderLimits) -> NoReturn:
    fix = "if the file is genuine, raise the limit with limits=HeaderLimits(tensors=...)"
    found = f"more than {limits.tensors} tensors"
    raise CheckpointError("E_TOO_MANY_TENSORS", path, None, found, f"at most {limits.tensors}", fix)


def parse_header(raw: bytes, data_bytes: int, path: str | os.PathLike[str], limits: HeaderLimits = LIMITS) -> Header:
    """Check a raw header against the length of the data that follow it.

    Args:
        raw: JSON text of the header, as bytes.
        data_bytes: Length of the data in bytes.
        path: For errors.
        limits: Refuse what exceeds these.

    Returns:
        The checked header.

    Raises:
        CheckpointError: E_HEADER_JSON, E_DUPLICATE_KEY, E_TOO_MANY_TENSORS, E_NAME, E_DTYPE, E_SHAPE, E_OFFSETS,
            E_TRUNCATED or E_TRAILING.

    Example:
        >>> parse_header(b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', 2, "x").tensors["w"].end
        2
    """
    top = _parse(raw, path, limits)
    metadata = _metadata(top.pop("__metadata__", None), path)
    if len(top) > limits.tensors:
        _refuse_many(path, limits)
    check_bytes = not raw.isascii() or b"\\u" in raw
    tensors: dict[str, TensorInfo] = {}
    end = 0
    in_order = True
    for name, entry in top.items():
        if len(name) * 4 > limits.name_bytes or check_bytes:
            _check_name(name, path, limits)
        info = _tensor(name, entry, path, limits)
        in_order = in_order and info.start == end
        end = info.end
        tensors[name] = info
    if not in_order:
        end = _check_contiguous(tensors, path)
    if end > data_bytes:
        _refuse_cut_data(tensors, end, data_bytes, path)
    if end < data_bytes:
        raise CheckpointError(
            "E_TRAILING",
            path,
            None,
            f"{data_bytes - end} bytes after the last tensor",
            "nothing after it",
            "the file carries something else behind the checkpoint: get it from its source again",
        )
    return Header(MappingProxyType(tensors), MappingProxyType(metadata), 8 + len(raw), data_bytes)


def _parse(raw: bytes, path: str | os.PathLike[str], limits: HeaderLimits) -> dict[str, Any]:
    check_count(raw, path, limits)
    if raw[:1] != b"{":
        refuse_json(path, _JSON, f"a header that begins with {quote(raw[:1])} at byte 8", "'{' at once")
    if b"\0" in raw:
        at = raw.index(b"\0")
        padded = not raw[at:].strip(b"\0")
        found = "padding with NUL bytes (a known fault of some writers)" if padded else "a NUL byte"
        refuse_json(path, _JSON, f"{found} at byte {8 + at}", "JSON text, padded with spaces")
    top = parse_json(raw, path, _JSON, offset=8)
    if not isinstance(top, dict):
        refuse_json(path, _JSON, "no JSON object at byte 8", "a JSON object")
    return top


def _metadata(value: Any, path: str | os.PathLike[str]) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        refuse_json(path, _JSON, "__metadata__ that is not an object of strings", "strings by name")
    for pair in value.items():
        for text in pair:
            if not text.isascii():
                _check_unicode(text, path)
    return value


def _check_unicode(text: str, path: str | os.PathLike[str]) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        refuse_json(path, _JSON, f"half of a surrogate pair in {quote(text)}", "Unicode text")


def _check_name(name: str, path: str | os.PathLike[str], limits: HeaderLimits) -> None:
    length = _check_unicode(name, path)
    if length > limits.name_bytes:
        raise CheckpointError(
            "E_NAME",
            path,
            name,
            f"a tensor name of {length} bytes",
            f"at most {limits.name_bytes} bytes",
            "rename the tensor where the file was written",
        )


def _tensor(name: str, entry: Any, path: str | os.PathLike[str], limits: HeaderLimits) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = type(start) is int and type(end) is int and all(type(size) is int for size in shape)
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or type(dtype) is not str or type(shape) is not list or len(entry) != 3:
        expected = "dtype (text), shape (whole numbers), data_offsets (two whole numbers) and nothing else"
        refuse_json(path, _JSON, f"the entry {quote(entry)}", expected, name)
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise CheckpointError(
            "E_DTYPE",
            path,
            name,
            f"dtype {quote(dtype)}",
            f"one of {', '.join(DTYPE_BITS)}",
            "convert the tensor with the software that wrote it",
        )
    if not 0 <= start <= end < _U64:
        raise CheckpointError(
            "E_OFFSETS",
            path,
            name,
            f"data_offsets [{_number(start)}, {_number(end)}]",
            "0 <= begin <= end",
            "the file is damaged: get it from its source again",
        )
    # the rank first: a product of a million sizes would take for ever
    stored = len(shape) <= limits.rank and math.prod(shape) * bits == (end - start) * 8
    if not stored or bits == 4 or (shape and min(shape) <= 0):
        _check_shape(name, dtype, shape, bits, end - start, path, limits)
    return TensorInfo(dtype, tuple(shape), start, end)


def _number(value: int) -> str:
    return str(value) if abs(value) < 1 << 70 else "more than 2^70"


def _check_shape(
    name: str,
    dtype: str,
    shape: list[int],
    bits: int,
    stored: int,
    path: str | os.PathLike[str],
    limits: HeaderLimits,
) -> None:
    fix = "the file is damaged or made up: get it from its source again"
    shown = "[" + ", ".join(_number(size) for size in shape[:8]) + (", …]" if len(shape) > 8 else "]")
    if len(shape) > limits.rank:
        found = f"{len(shape)} axes"
        raise CheckpointError("E_SHAPE", path, name, found, f"at most {limits.rank}", fix)
    elements, span = 1, 1
    for size in shape:
        if size < 0:
            raise CheckpointError("E_SHAPE", path, name, f"shape {shown}", "sizes of at least 0", fix)
        elements *= size
        span *= max(size, 1)
    if elements == 0 and (max(shape) > limits.dimension or span > 1 << 62):
        # nothing is stored, yet strides would overflow
        found, expected = f"an empty tensor of shape {shown}", f"axes of at most {limits.dimension}, 2^62 together"
        raise CheckpointError("E_SHAPE", path, name, found, expected, fix)
    if bits == 4 and elements and (not shape or shape[-1] % 2):
        found, expected = f"4-bit numbers of shape {shown}", "an even last axis, since two share a byte"
        raise CheckpointError("E_SHAPE", path, name, found, expected, fix)
    if elements * bits != stored * 8:
        computed = f"{_number(elements * bits)} bits"
        found = f"shape {shown} of {dtype}, which is {computed}, but {stored} bytes ({stored * 8} bits) stored"
        raise CheckpointError("E_SHAPE", path, name, found, "the same number", fix)


def _check_contiguous(tensors: dict[str, TensorInfo], path: str | os.PathLike[str]) -> int:
    end, before = 0, None
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            what = "overlaps with" if info.start < end else "leaves a hole after"
            raise CheckpointError(
                "E_OFFSETS",
                path,
                name,
                f"data_offsets [{info.start}, {info.end}], which {what} "
                + ("the start of the data" if before is None else f"{quote(before)} ending at {end}"),
                f"a begin of {end}",
                "the file is damaged or made up: get it from its source again",
            )
        end, before = info.end, name
    return end


def _refuse_cut_data(
    tensors: dict[str, TensorInfo], end: int, data_bytes: int, path: str | os.PathLike[str]
) -> NoReturn:
    first = min((name for name in tensors if tensors[name].end > data_bytes), key=lambda name: tensors[name].start)
    raise CheckpointError(
        "E_TRUNCATED",
        path,
        first,
        f"the data end {end - data_bytes} bytes early; this is the first tensor affected",
        f"{end} bytes of data, {data_bytes} are there",
        "download or copy the file again",
    )
