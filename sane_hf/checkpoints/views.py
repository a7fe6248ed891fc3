"""Tensors of a checked safetensors file or buffer, as views of its bytes."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from .checks import all_finite, canonical_bool, check_finite, check_quantised
from .errors import CheckpointError, quote, quote_all
from .files import check_unchanged, open_regular
from .header import LIMITS, Header, HeaderLimits, parse_header
from .header_reading import header_of_buffer, header_of_file
from .names import ORDER_KEY, TIED_KEY, natural_sort, strip_wrappers, wrapper_prefix

logger = logging.getLogger(__name__)

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F4": torch.float4_e2m1fn_x2,
}

_CACHED_HEADER = 1 << 15  # bytes; 64 plans of such headers are some 25 MB at most
_CACHE: dict[tuple[bytes, int], Plan] = {}


@dataclass(frozen=True)
class Plan:
    """How a header becomes a state dict; the same for all checkpoints that share the header.

    Args:
        header: The checked header.
        names: Name in the state dict and name in the file, in the order of the state dict. Tied tensors have
            several names for one in the file.
        wrapped: Whether every name has a wrapper's prefix. Never for files of this package that note an order: it
            strips prefixes when it reads, so that those it writes belong to the names.
        strided: For each tensor of the file: name, torch dtype, shape, strides, first element, counted in its dtype
            from the start of the data; None as first element where that is not a whole number or there are none.
        base: The dtype, if all tensors share one.
        booleans: Names in the file of boolean tensors.
    """

    header: Header
    names: tuple[tuple[str, str], ...]
    wrapped: bool
    strided: tuple[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int | None], ...]
    base: torch.dtype | None
    booleans: tuple[str, ...]


def plan_for(raw: bytes, data_bytes: int, path: str | os.PathLike[str], limits: HeaderLimits = LIMITS) -> Plan:
    """Check a raw header and plan its state dict; the checkpoints of a zoo share a few headers, which are kept.

    Args:
        raw: JSON text of the header, as bytes.
        data_bytes: Length of the data in bytes.
        path: For errors.
        limits: For the check.

    Returns:
        The plan.

    Raises:
        CheckpointError: As `parse_header`; E_QUANTISED; E_METADATA.
    """
    plan = _CACHE.get((raw, data_bytes)) if limits is LIMITS else None
    if plan is None:
        plan = _plan(parse_header(raw, data_bytes, path, limits), path)
        if len(raw) <= _CACHED_HEADER and limits is LIMITS:
            if len(_CACHE) >= 64:
                _CACHE.clear()
            _CACHE[raw, data_bytes] = plan
    return plan


def _plan(header: Header, path: str | os.PathLike[str]) -> Plan:
    check_quantised({name: info.dtype for name, info in header.tensors.items()}, path)
    names, wrapped = _names(header, path)
    strided = []
    for name, info in header.tensors.items():
        dtype, shape = TORCH_DTYPES[info.dtype], info.packed_shape
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        if info.dtype == "F4":
            shown = f"{list(info.shape)}, held by torch as {list(shape)} of float4_e2m1fn_x2"
            logger.warning("%s: tensor %s: 4-bit numbers of shape %s", path, quote(name), shown)
        whole = info.end > info.start and info.start % dtype.itemsize == 0
        first = info.start // dtype.itemsize if whole else None
        strided.append((name, dtype, shape, tuple(reversed(strides)), first))
    dtypes = {dtype for _, dtype, *_ in strided}
    return Plan(
        header,
        names,
        wrapped,
        tuple(strided),
        dtypes.pop() if len(dtypes) == 1 else None,
        tuple(name for name, info in header.tensors.items() if info.dtype == "BOOL"),
    )


def _names(header: Header, path: str | os.PathLike[str]) -> tuple[tuple[tuple[str, str], ...], bool]:
    stored = {name: name for name in header.tensors} | _tied(header, path)
    if len(stored) > len(header.tensors) + LIMITS.tensors:
        fix = "the file is made up: get it from its source again"
        found, expected = f"{len(stored)} names for {len(header.tensors)} tensors", "less than 200,000 tied names"
        raise CheckpointError("E_TOO_MANY_TENSORS", path, None, found, expected, fix)
    order = natural_sort(stored)
    wished = _metadata_json(header, ORDER_KEY)
    if isinstance(wished, list) and all(isinstance(name, str) for name in wished) and sorted(wished) == sorted(stored):
        return tuple((name, stored[name]) for name in wished), False
    if ORDER_KEY in header.metadata:
        logger.warning("%s: metadata %r do not list the tensors; natural order is used", path, ORDER_KEY)
    return tuple((name, stored[name]) for name in order), bool(wrapper_prefix(order))


def _metadata_json(header: Header, key: str) -> object:
    try:
        return json.loads(header.metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None


def _tied(header: Header, path: str | os.PathLike[str]) -> dict[str, str]:
    tensors = header.tensors
    # safetensors.torch.save_model notes the names it leaves out as {left out: kept}
    tied = {name: kept for name, kept in header.metadata.items() if kept in tensors and name not in tensors}
    tied = {name: kept for name, kept in tied.items() if name != "format" and not name.startswith("sane_hf.")}
    if TIED_KEY in header.metadata:
        noted = _metadata_json(header, TIED_KEY)
        if not isinstance(noted, dict) or not all(
            isinstance(kept, str) and kept in tensors for kept in noted.values()
        ):
            raise CheckpointError(
                "E_METADATA",
                path,
                None,
                f"metadata {TIED_KEY!r} that name no stored tensor: {quote(header.metadata[TIED_KEY])}",
                "a JSON object {left out: stored}",
                "the file was edited after it was written: get it from its source again",
            )
        tied |= {name: kept for name, kept in noted.items() if name not in tensors}
    return tied


def from_bytes(
    buffer: bytes | bytearray | memoryview,
    name: str = "<bytes>",
    allow_nonfinite: bool = False,
) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors bytes; its tensors are views of the buffer.

    Views cost nothing, but writing to them writes to the buffer, and crashes where that is read-only memory, such
    as a mapped zoo: clone what is to be changed.

    Args:
        buffer: Anything with the buffer protocol: bytes, a memory map, a `pyarrow.Buffer`.
        name: What to call it in an error.
        allow_nonfinite: Do not refuse NaN and infinity (saves one pass over the data).

    Returns:
        The state dict, in the order in which `to_bytes` got it; natural order for the bytes of others.

    Raises:
        CheckpointError: Every fault of the header as in `read_header`; E_NO_TENSORS; E_QUANTISED; E_NONFINITE.

    Example:
        >>> from sane_hf.checkpoints import to_bytes
        >>> from_bytes(to_bytes({"w": torch.ones(2), "b": torch.zeros(1)}))
        {'w': tensor([1., 1.]), 'b': tensor([0.])}
    """
    view = memoryview(buffer)
    if view.format != "B" or view.ndim != 1:
        view = view.cast("B")
    plan = plan_for(*header_of_buffer(view, name, LIMITS), name)
    if not plan.names:
        fix = "write a state dict with at least one tensor"
        raise CheckpointError("E_NO_TENSORS", name, None, "no tensors", "at least one", fix)
    tensors, whole = _views(view, plan)
    for stored in plan.booleans:
        tensors[stored] = canonical_bool(stored, tensors[stored], name)
    if not allow_nonfinite and (whole is None or not all_finite(whole)):
        check_finite(tensors.items(), name)
    state_dict = {shown: tensors[stored] for shown, stored in plan.names}
    return strip_wrappers(state_dict, name) if plan.wrapped else state_dict


def _views(view: memoryview, plan: Plan) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    start, data = plan.header.data_start, plan.header.data_bytes
    if plan.base is not None and data and all(first is not None for *_, first in plan.strided):
        whole = torch.frombuffer(view, dtype=plan.base, offset=start)
        views = whole.as_strided  # one call per tensor: half the time of slicing and reshaping
        return {name: views(shape, strides, first) for name, _, shape, strides, first in plan.strided}, whole
    tensors = {}
    for name, dtype, shape, _, _ in plan.strided:
        info = plan.header.tensors[name]
        if info.end > info.start:
            codes = torch.frombuffer(view, dtype=torch.uint8, count=info.end - info.start, offset=start + info.start)
            tensors[name] = codes.view(dtype).view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors, None


def load_safetensors(
    path: str | os.PathLike[str],
    allow_nonfinite: bool = False,
    device: str | torch.device = "cpu",
    limits: HeaderLimits = LIMITS,
    strip: bool = True,
) -> dict[str, torch.Tensor]:
    """Read one safetensors file; on the CPU its tensors are views of the mapped file, copied only where written to.

    Args:
        path: The file, whatever its suffix.
        allow_nonfinite: Do not refuse NaN and infinity (saves reading the data at once).
        device: Where the tensors are put.
        limits: Refuse headers above these.
        strip: Strip wrapper prefixes; not for shards, whose names count together.

    Returns:
        The state dict; empty, with a warning in the log, if the file has no tensors.

    Raises:
        CheckpointError: Every fault of the header as in `read_header`; E_QUANTISED; E_NONFINITE; E_CHANGED.
    """
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        plan = plan_for(*header_of_file(file, path, limits), path, limits)
    try:
        with safe_open(path, framework="pt", device=str(device)) as opened:
            loaded: Mapping[str, torch.Tensor] = opened.get_tensors()
    except SafetensorError as error:  # the second opinion: our check is the stricter one, so this is not expected
        fix = "get the file from its source again"
        raise CheckpointError("E_FORMAT", path, None, f"safetensors refuses it ({error})", "", fix) from None
    except (FileNotFoundError, PermissionError):
        loaded = {}
    check_unchanged(before, path)
    if not plan.names:
        logger.warning("%s: the checkpoint has no tensors", path)
    if set(loaded) != set(plan.header.tensors):
        found = f"safetensors reads other names: {quote_all(set(loaded) ^ set(plan.header.tensors))}"
        raise CheckpointError("E_FORMAT", path, None, found, "the same names", "get the file from its source again")
    tensors = dict(loaded)
    for stored in plan.booleans:
        tensors[stored] = canonical_bool(stored, tensors[stored], path)
    if not allow_nonfinite:
        check_finite(tensors.items(), path)
    state_dict = {shown: tensors[stored] for shown, stored in plan.names}
    return strip_wrappers(state_dict, path) if plan.wrapped and strip else state_dict


def _spend_readonly_warning() -> None:
    # torch warns once per process about views of read-only memory, which is what from_bytes is for and documents
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


_spend_readonly_warning()
