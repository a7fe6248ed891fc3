"""The zip archives that torch.save writes: their structure, checked before torch reads them.

torch checks neither checksums nor where members lie, so a flipped byte would load as a weight, and two readers could
see two archives in one file. Members are stored, never compressed: what is refused here torch.save does not write.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from typing import BinaryIO, NamedTuple, NoReturn

from .errors import CheckpointError, quote

_LOCAL = struct.Struct("<4s5H3I2H")
_END = 22  # bytes of the record that ends an archive without comment
_DESCRIPTOR = 24  # the longest data descriptor, which may follow a member
_CHUNK = 1 << 22
_MEMBERS = 250_000
_AGAIN = "download or copy the file again"


class Member(NamedTuple):
    """A file in the archive: where its bytes lie, how many there are, their CRC-32."""

    start: int
    size: int
    crc: int


def check_archive(file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, Member]:
    """Check the structure of a zip archive that torch.save may have written.

    Args:
        file: The archive.
        path: For errors.

    Returns:
        The members by name within the archive's one folder, such as ``"data.pkl"`` and ``"data/0"``.

    Raises:
        CheckpointError: E_TRUNCATED, E_ZIP (encrypted, overlapping, ambiguous), E_COMPRESSED, E_TORCHSCRIPT or
            E_FORMAT (some other archive).
    """
    infos, directory = _directory(file, path)
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        _refuse(path, "a member is there twice")
    root = names[0].partition("/")[0]
    for info in infos:
        if info.flag_bits & 0x2041:
            _refuse(path, f"the member {quote(info.filename)} is encrypted")
    _refuse_other_archives(names, root, path)
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            found = f"the member {quote(info.filename)} is compressed ({info.compress_size} to {info.file_size} bytes)"
            fix = "torch.save never compresses: convert the file where it was made"
            raise CheckpointError("E_COMPRESSED", path, None, found, "stored members", fix)
    return {info.filename[len(root) + 1 :]: member for info, member in _locate(file, infos, directory, path)}


def check_sums(content: mmap.mmap, members: dict[str, Member], path: str | os.PathLike[str]) -> None:
    """Compare every member with its checksum; torch does not.

    Args:
        content: The archive, mapped.
        members: As `check_archive` returns them.
        path: For errors.

    Raises:
        CheckpointError: E_CRC, naming the member.
    """
    with memoryview(content) as view:
        for name, member in members.items():
            total, end = 0, member.start + member.size
            for at in range(member.start, end, _CHUNK):
                total = zlib.crc32(view[at : min(at + _CHUNK, end)], total)
            if total != member.crc:
                found = f"the member {quote(name)} has the checksum {total:08x}"
                fix = f"the file is damaged: {_AGAIN}"
                raise CheckpointError("E_CRC", path, None, found, f"{member.crc:08x}", fix)


def _directory(file: BinaryIO, path: str | os.PathLike[str]) -> tuple[list[zipfile.ZipInfo], int]:
    size = os.fstat(file.fileno()).st_size
    try:
        archive = zipfile.ZipFile(file)
        infos = archive.infolist()
    except zipfile.BadZipFile as error:
        if "not a zip file" not in str(error):
            _refuse(path, f"the directory is damaged ({quote(str(error))})")
        # begins like one, but the directory at its end is missing
        found = f"a zip archive without its end: {size} bytes"
        raise CheckpointError("E_TRUNCATED", path, None, found, "the whole archive", _AGAIN) from None
    except (NotImplementedError, ValueError, OSError, OverflowError, struct.error, EOFError) as error:
        _refuse(path, f"the directory is damaged ({quote(str(error))})")
    file.seek(-_END, os.SEEK_END)
    if file.read(4) != b"PK\x05\x06":
        _refuse(path, "something follows the directory")
    if not infos or len(infos) > _MEMBERS:
        _refuse(path, f"there are {len(infos)} members")
    return infos, archive.start_dir


def _refuse_other_archives(names: list[str], root: str, path: str | os.PathLike[str]) -> None:
    tails = {name.partition("/")[2] for name in names}
    expected, fix = "a checkpoint", "save model.state_dict() as safetensors instead"
    if "constants.pkl" in tails or any(tail.startswith("code/") for tail in tails):
        raise CheckpointError("E_TORCHSCRIPT", path, None, "a TorchScript program", expected, fix)
    if "archive_format" in tails or "serialized_exported_program.json" in names:
        raise CheckpointError("E_FORMAT", path, None, "a program of torch.export", expected, fix)
    if f"{root}/data.pkl" not in names or not all(name.startswith(f"{root}/") for name in names):
        fix = "unpack it, if a checkpoint is in it, and give the path of that"
        raise CheckpointError("E_FORMAT", path, None, "a zip archive of something else", "a PyTorch file", fix)


def _locate(
    file: BinaryIO, infos: list[zipfile.ZipInfo], directory: int, path: str | os.PathLike[str]
) -> list[tuple[zipfile.ZipInfo, Member]]:
    located, end = [], 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        # members lie side by side from the first byte on: no second archive before them or in between
        if not end <= info.header_offset <= end + (_DESCRIPTOR if end else 0):
            what = "overlaps the one before it" if info.header_offset < end else "has other bytes before it"
            _refuse(path, f"the member {quote(info.filename)} {what}")
        file.seek(info.header_offset)
        local = file.read(_LOCAL.size)
        if len(local) < _LOCAL.size or local[:4] != b"PK\x03\x04":
            _refuse(path, f"the member {quote(info.filename)} is not where the directory says")
        _, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(local)
        name = file.read(name_length)
        if name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            _refuse(path, f"the member {quote(info.filename)} has another name in its own header")
        if flags & 0x2041 or method != zipfile.ZIP_STORED:
            _refuse(path, f"the member {quote(info.filename)} is encrypted or compressed by its own header")
        start = info.header_offset + _LOCAL.size + name_length + extra_length
        end = start + info.file_size
        located.append((info, Member(start, info.file_size, info.CRC)))
    if not end <= directory <= end + _DESCRIPTOR:
        _refuse(path, "the directory does not follow the last member")
    return located


def _refuse(path: str | os.PathLike[str], found: str) -> NoReturn:
    expected = "a zip archive as torch.save writes it"
    raise CheckpointError("E_ZIP", path, None, f"a zip archive in which {found}", expected, _AGAIN) from None
