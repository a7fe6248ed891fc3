"""What a file is, told by its first bytes and never by its suffix."""

from __future__ import annotations

import codecs
import os
import re
from typing import NoReturn

from .errors import CheckpointError, quote

LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a pickled magic number

_MAGIC = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (LEGACY_MAGIC, "legacy"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file"),
    (b"7z\xbc\xaf", "a 7-zip file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
)
_PICKLE = re.compile(
    rb"\x80[\x00-\x05][^\x00]"  # protocols 2 to 5 say so
    rb"|\(?[dl]p[0-9]+\n|\(?c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|[}\])]q[\x00-\xff]|\(i[\w.]+\n"  # protocols 0 and 1
)
_LFS = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\s+(?:ext.*\s+)*oid (\S+)\s+size (\d+)")
_WEB_PAGE = re.compile(rb"\s*(?:<!doctype html|<html|<head|<body|<\?xml)|.*<html", re.IGNORECASE | re.DOTALL)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_PLAUSIBLE_HEADER = 1 << 40


def sniff(head: bytes, size: int) -> str:
    """Tell the kind of a file from its beginning.

    Args:
        head: The first 512 bytes, or all there are.
        size: Size of the file in bytes.

    Returns:
        ``"empty"`` (fewer than 8 bytes), ``"safetensors"``, ``"zip"``, ``"legacy"`` (torch.save before 1.6),
        ``"pickle"``, ``"web page"``, ``"lfs"`` (git-LFS pointer), ``"json"``, ``"text"``, a phrase for the formats
        of others such as ``"a tar archive"``, or ``"unknown"``.

    Example:
        >>> sniff(b"<!DOCTYPE html><html>404", 24)
        'web page'
    """
    if size < 8:
        return "empty"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < _PLAUSIBLE_HEADER:
        return "safetensors"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if _PICKLE.match(head):
        return "pickle"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if _WEB_PAGE.match(head):
        return "web page"
    if not _CONTROL.search(head) and _is_utf8(head):
        return _text_kind(head)
    # all that is left to go by: a believable length of the header, or its first character
    plausible = length < _PLAUSIBLE_HEADER or head[8:9] == b"{" or size == 8
    return "safetensors" if plausible else "unknown"


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _text_kind(head: bytes) -> str:
    if _LFS.match(head):
        return "lfs"
    return "json" if head.lstrip()[:1] in (b"{", b"[") else "text"


def refuse_unless_safetensors(head: bytes, size: int, path: str | os.PathLike[str]) -> None:
    """Refuse what `sniff` does not take for safetensors.

    Args:
        head: The first 512 bytes, or all there are.
        size: Size of the file in bytes.
        path: For the error.

    Raises:
        CheckpointError: The code and the way out depend on what it is.
    """
    kind = sniff(head, size)
    if kind in ("zip", "legacy", "pickle"):
        refuse_pickle(kind, path)
    if kind != "safetensors":
        refuse_kind(kind, head, size, path)


def refuse_pickle(kind: str, path: str | os.PathLike[str]) -> NoReturn:
    """Refuse a pickle, since pickles are read only on request.

    Args:
        kind: ``"zip"``, ``"legacy"`` or ``"pickle"``.
        path: For the error.

    Raises:
        CheckpointError: Always (E_PICKLE).
    """
    raise CheckpointError(
        "E_PICKLE",
        path,
        None,
        "a PyTorch file that holds a pickle" if kind != "pickle" else "a pickle",
        "safetensors",
        "convert it where it was made, or pass allow_pickle=True: only tensors are read then, nothing in it is run",
    )


def refuse_kind(kind: str, head: bytes, size: int, path: str | os.PathLike[str]) -> NoReturn:
    """Refuse a file that is no checkpoint at all.

    Args:
        kind: As `sniff` tells it.
        head: The first bytes.
        size: Size of the file in bytes.
        path: For the error.

    Raises:
        CheckpointError: Always (E_EMPTY, E_NOT_A_CHECKPOINT, E_LFS_POINTER or E_FORMAT).
    """
    expected = "a checkpoint"
    if kind == "empty":
        raise CheckpointError("E_EMPTY", path, None, f"the file is {size} bytes", expected, "download it again")
    if kind == "web page":
        fix = "check the address and your login, then download it again"
        raise CheckpointError("E_NOT_A_CHECKPOINT", path, None, "looks like a web page", expected, fix)
    if kind == "lfs":
        oid, real = (group.decode("ascii", "replace") for group in _LFS.match(head).groups())
        found = f"a git-LFS pointer to {quote(oid)} of {int(real[:20])} bytes, not the file itself"
        fix = "run `git lfs pull` in its repository, or `hf download`"
        raise CheckpointError("E_LFS_POINTER", path, None, found, expected, fix)
    if kind in ("json", "text", "unknown"):
        names = {"json": "a JSON text", "text": "a text file", "unknown": "bytes of no format known here"}
        fix = "check the path; safetensors and PyTorch files can be read"
        raise CheckpointError("E_NOT_A_CHECKPOINT", path, None, names[kind], expected, fix)
    fix = "unpack it or convert it to safetensors with the software that wrote it"
    raise CheckpointError("E_FORMAT", path, None, kind, "safetensors or a PyTorch file", fix)
