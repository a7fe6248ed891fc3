"""Get the header of a safetensors file or buffer, reading no more than that and allocating nothing on trust."""

from __future__ import annotations

import os
from typing import BinaryIO, NoReturn

from .content import refuse_unless_safetensors
from .errors import CheckpointError
from .files import open_regular
from .header import LIMITS, Header, HeaderLimits, check_count, parse_header

_FORMAT_HEADER_BYTES = 100_000_000  # the format's own limit


def read_header(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    name: str = "<bytes>",
    limits: HeaderLimits = LIMITS,
) -> Header:
    """Read and check the header of a safetensors file or buffer, without touching its data.

    Args:
        source: Path of a file, or the bytes of one.
        name: What to call the bytes in an error.
        limits: Refuse headers above these.

    Returns:
        The checked header.

    Raises:
        CheckpointError: The file is not safetensors, is damaged or exceeds a limit; the code tells which.

    Example:
        >>> from sane_hf.checkpoints import to_bytes
        >>> import torch
        >>> read_header(to_bytes({"w": torch.zeros(2, 3)})).tensors["w"]
        TensorInfo(dtype='F32', shape=(2, 3), start=0, end=24)
    """
    if isinstance(source, str | os.PathLike):
        with open_regular(source) as file:
            return parse_header(*header_of_file(file, source, limits), source, limits)
    view = memoryview(source).cast("B")
    return parse_header(*header_of_buffer(view, name, limits), name, limits)


def header_of_file(file: BinaryIO, path: str | os.PathLike[str], limits: HeaderLimits) -> tuple[bytes, int]:
    """Read the raw header (JSON text as bytes) of an open file, and how many bytes of data follow it.

    Args:
        file: Open at its start.
        path: Its path, for errors.
        limits: Refuse a longer header before allocating anything.

    Returns:
        Raw header, length of the data in bytes.

    Raises:
        CheckpointError: Not safetensors by content, cut within the header, or the header is too long.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    length = _header_length(head, size, path)
    if length > limits.header_bytes:
        _refuse_long(length, size, file, path, limits)
    if 8 + length > size:
        _refuse_cut_header(length, size, path)
    raw = head[8 : 8 + length]
    return raw + file.read(length - len(raw)), size - 8 - length


def header_of_buffer(view: memoryview, name: str, limits: HeaderLimits) -> tuple[bytes, int]:
    """Take the raw header of a buffer, and how many bytes of data follow it; as `header_of_file`.

    Args:
        view: Bytes of a safetensors file.
        name: What to call them in an error.
        limits: Refuse a longer header.

    Returns:
        Raw header, length of the data in bytes.

    Raises:
        CheckpointError: As in `header_of_file`.
    """
    size = len(view)
    length = _header_length(view[:512], size, name)
    if length > limits.header_bytes:
        _refuse_long(length, size, view, name, limits)
    if 8 + length > size:
        _refuse_cut_header(length, size, name)
    return bytes(view[8 : 8 + length]), size - 8 - length


def _header_length(head: bytes | memoryview, size: int, path: str | os.PathLike[str]) -> int:
    length = int.from_bytes(head[:8], "little")
    # every ordinary file passes here without the (slower) look at what else it could be
    if not (size > 8 and head[8] == 0x7B and length <= LIMITS.header_bytes):
        refuse_unless_safetensors(bytes(head), size, path)
    return length


def _refuse_cut_header(length: int, size: int, path: str | os.PathLike[str]) -> NoReturn:
    raise CheckpointError(
        "E_TRUNCATED",
        path,
        None,
        f"the file ends inside its header: {size} bytes there",
        f"{8 + length} bytes for the header alone",
        "download or copy it again",
    )


def _refuse_long(
    length: int, size: int, source: BinaryIO | memoryview, path: str | os.PathLike[str], limits: HeaderLimits
) -> NoReturn:
    allowed = f"at most {limits.header_bytes} bytes"
    if 8 + length <= size and length <= _FORMAT_HEADER_BYTES:
        raw = source[8 : 8 + length] if isinstance(source, memoryview) else _reread(source, length)
        check_count(raw, path, limits)
    raise CheckpointError(
        "E_HEADER_SIZE",
        path,
        None,
        f"a header of {length} bytes in a file of {size} bytes",
        allowed,
        "the file is damaged or not safetensors; a genuine one can be read with limits=HeaderLimits(header_bytes=...)",
    )


def _reread(file: BinaryIO, length: int) -> bytes:
    file.seek(8)
    return file.read(length)
