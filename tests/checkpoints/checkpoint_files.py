"""Builders of good and bad checkpoint files, for the tests beside it. Every file is made in code."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch

WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>401 Unauthorized</title></head><body>Log in</body></html>\n"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a1" * 32 + b"\nsize 44700000\n"


def safetensors(header: dict | str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with exactly this header and these data, right or wrong."""
    raw = json.dumps(header) if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def small_network(seed: int = 0) -> dict[str, torch.Tensor]:
    """Names in the order of depth, which is not the alphabetical one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv1.weight": (3, 1, 3, 3),
        "conv1.bias": (3,),
        "fc2.weight": (4, 12),
        "fc2.bias": (4,),
        "fc10.weight": (2, 4),
        "fc10.bias": (2,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def torch_file(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def edit_zip(source: Path, target: Path, change=None, compression=zipfile.ZIP_STORED) -> Path:
    """Copy an archive member by member; `change(name, data)` gives the new data, or None to leave the member out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            data = old.read(info.filename)
            data = change(info.filename, data) if change else data
            if data is not None:
                new.writestr(info.filename, data)
    return target


def pickle_in_zip(path: Path, content: object, protocol: int = 2) -> Path:
    """An archive like torch.save's around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=protocol))
        archive.writestr("archive/version", "3\n")
    return path


def pickle_in_legacy(path: Path, content: object) -> Path:
    """A file like torch.save's before 1.6 around any pickle."""
    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content, []):
        pickle.dump(part, stream, protocol=2)
    path.write_bytes(stream.getvalue())
    return path
