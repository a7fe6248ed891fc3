"""Read PyTorch's own files: only on request, only tensors, and only after everything that can be checked is checked.

Order of the checks: structure and checksums of the archive, a scan of the pickle that runs nothing, sizes of the
storages, then ``torch.load(weights_only=True)``, then each tensor. What torch says is not passed on: its messages
recommend to set ``weights_only=False``.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import pickletools
import struct
from typing import Any, BinaryIO, NoReturn

import torch

from .archive import Member, check_archive, check_sums
from .checks import check_finite
from .content import LEGACY_MAGIC, refuse_kind, refuse_pickle, sniff
from .errors import CheckpointError, quote_all
from .files import check_unchanged, open_regular
from .header import LIMITS
from .names import strip_wrappers
from .pickle_scan import PickleScan, scan_pickle
from .structure import find_state_dict, plain_tensors

# what the weights-only unpickler and the tensor constructors raise for bytes that are not as they should be
_TORCH_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    EOFError,
    ImportError,
    NameError,
    OSError,
    struct.error,
)
_AGAIN = "download or copy the file again"
_RESAVE = (
    "where it was made, save the weights alone: from sane_hf.checkpoints import save_checkpoint; "
    "save_checkpoint(model.state_dict(), 'model.safetensors')"
)


def load_pickle(
    path: str | os.PathLike[str],
    allow_nonfinite: bool = False,
    device: str | torch.device = "cpu",
    entry: str | None = None,
    strip: bool = True,
) -> dict[str, torch.Tensor]:
    """Read a file of torch.save: a zip archive, which is mapped, not read into memory, or the older kind.

    Args:
        path: The file, whatever its suffix.
        allow_nonfinite: Do not refuse NaN and infinity.
        device: Where the tensors are put.
        entry: Which entry of a nest of dicts to read; None searches as `find_state_dict` does.
        strip: Strip wrapper prefixes; not for shards, whose names count together.

    Returns:
        Tensors by name, in the order of the file.

    Raises:
        CheckpointError: E_UNSAFE_PICKLE for what could run code, E_PICKLE_CONTENT for harmless content that is no
            state dict, E_CRC, E_ZIP, E_COMPRESSED, E_TRUNCATED, E_STORAGE, E_TORCHSCRIPT or E_FORMAT for the file,
            those of `find_state_dict` and `plain_tensors` for what it holds, E_NONFINITE.
    """
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        head = file.read(512)
        kind = sniff(head, before.st_size)
        if kind not in ("zip", "legacy", "pickle"):
            refuse_kind(kind, head, before.st_size, path)
        scans = _scan_archive(file, path) if kind == "zip" else _scan_stream(file, kind, path)
    for scan in scans:
        _refuse_unsafe(scan, path)
    if kind == "pickle":
        _refuse_content(scans, "a pickle that torch.save did not write", path)
    try:
        content = _load(path, kind)
    except _TORCH_ERRORS as error:
        check_unchanged(before, path)
        _refuse_content(scans, f"content that torch.load(weights_only=True) refuses ({type(error).__name__})", path)
    check_unchanged(before, path)
    tensors = plain_tensors(find_state_dict(content, path, entry), before.st_size, path)
    if not allow_nonfinite:
        check_finite(tensors.items(), path)
    if strip:
        tensors = strip_wrappers(tensors, path)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _load(path: str | os.PathLike[str], kind: str) -> Any:
    # by name torch.load takes every *.safetensors for safetensors, whatever is in it; and it maps only by name
    if kind == "zip" and not os.fspath(path).endswith(".safetensors"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with open_regular(path) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _scan_archive(file: BinaryIO, path: str | os.PathLike[str]) -> list[PickleScan]:
    members = check_archive(file, path)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        check_sums(content, members, path)
        main = members["data.pkl"]
        _check_length(main.size, path)
        scan = scan_pickle(io.BytesIO(content[main.start : main.start + main.size]))
    if not scan.unsafe():
        _check_storages(scan, members, path)
    return [scan]


def _check_length(size: int, path: str | os.PathLike[str]) -> None:
    if size > LIMITS.header_bytes:
        found, expected = f"a pickle of {size} bytes beside the tensors", f"at most {LIMITS.header_bytes}"
        raise CheckpointError("E_PICKLE_CONTENT", path, None, found, expected, _RESAVE)


def _check_storages(scan: PickleScan, members: dict[str, Member], path: str | os.PathLike[str]) -> None:
    for key, nbytes in scan.storages:
        member = members.get(f"data/{key}")
        if member is None or nbytes not in (None, member.size):
            there = "is not in the archive" if member is None else f"has {member.size} bytes"
            _refuse_storage(key, there, f"{nbytes} bytes", path)


def _refuse_storage(key: str, there: str, expected: str, path: str | os.PathLike[str]) -> NoReturn:
    found = f"storage {key[:40]!r} {there}"
    raise CheckpointError("E_STORAGE", path, None, found, expected, f"the file is damaged: {_AGAIN}")


def _scan_stream(file: BinaryIO, kind: str, path: str | os.PathLike[str]) -> list[PickleScan]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if kind == "pickle":
            _check_length(len(content), path)
            return [scan_pickle(io.BytesIO(content[:]))]
        # torch.save before 1.6 wrote a magic number, a version, facts of the machine, the content, the keys
        stream = io.BytesIO(content[: LIMITS.header_bytes])
        stream.seek(len(LEGACY_MAGIC))
        scans = [scan_pickle(stream) for _ in range(3)]
        stopped = next((scan.stopped for scan in scans if scan.stopped), "")
        if stopped and not any(scan.unsafe() for scan in scans):
            found = f"the pickle breaks off within {stream.tell()} bytes"
            raise CheckpointError("E_TRUNCATED", path, None, found, "the whole file", _AGAIN)
        if not stopped:
            _check_legacy_storages(scans[2], stream, content, path)
    return scans


def _check_legacy_storages(
    scan: PickleScan, stream: io.BytesIO, content: mmap.mmap, path: str | os.PathLike[str]
) -> None:
    sizes = dict(scan.storages)
    try:
        keys = [argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str)]
    except ValueError:
        keys = None
    if keys is None or len(content) < stream.tell():
        raise CheckpointError("E_TRUNCATED", path, None, "the list of storages breaks off", "the whole file", _AGAIN)
    position = stream.tell()
    for key in keys:
        size = sizes.get(key)
        if size is None:
            return  # a storage of a type unknown here: torch decides
        position += 8 + size
        if position > len(content):
            found = f"the file ends {position - len(content)} bytes before the end of storage {key[:40]!r}"
            raise CheckpointError("E_TRUNCATED", path, None, found, f"{position} bytes or more", _AGAIN)


def _refuse_unsafe(scan: PickleScan, path: str | os.PathLike[str]) -> None:
    unsafe = scan.unsafe()
    if unsafe:
        found = (
            f"the pickle asks for {quote_all([str(what) for what in unsafe], 5)}, which can run code; nothing was run"
        )
        fix = "do not load this file with other software either, unless you trust its author"
        raise CheckpointError("E_UNSAFE_PICKLE", path, None, found, "tensors alone", fix)


def _refuse_content(scans: list[PickleScan], found: str, path: str | os.PathLike[str]) -> NoReturn:
    others = [str(what) for scan in scans for what in scan.foreign()]
    if others:
        found += f": it refers to {quote_all(others, 5)}"
    raise CheckpointError("E_PICKLE_CONTENT", path, None, found, "a state dict (tensors by name)", _RESAVE) from None


def refuse_unless_allowed(path: str | os.PathLike[str], kind: str, allow_pickle: bool) -> None:
    """Refuse a file that may hold a pickle, unless pickles are wanted; programs and other archives are named as such.

    Args:
        path: The file.
        kind: As `sniff` tells it.
        allow_pickle: Whether the user asked for pickles.

    Raises:
        CheckpointError: E_PICKLE, or what `check_archive` finds.
    """
    if allow_pickle:
        return
    if kind == "zip":
        with open_regular(path) as file:
            check_archive(file, path)
    refuse_pickle(kind, path)
