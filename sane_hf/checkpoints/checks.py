"""Checks of what tensors hold: finite numbers, proper booleans, weights rather than codes of a quantiser."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping

import torch

from .errors import CheckpointError, quote

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # elements looked at together where a copy is needed
_SMALL_FLOATS = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}
# dtypes that hold codes, by safetensors name; a float under these names is an ordinary weight
_CODES = {"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F4", "F8_E5M2", "F8_E4M3"}
_CODE_LEAVES = ("qweight", "qzeros", "weight_packed")
# a tensor of codes has its scale under its own name with one of these endings, or beside it
_SCALES = (
    "_scale",
    "_scale_inv",
    "_scales",
    "_zero_point",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".scales",
    ".zeros",
    ".qzeros",
)


def all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is free of NaN and infinity, in one pass without a copy (fp8: in small pieces).

    Args:
        tensor: Any shape and dtype; everything that is not floating or complex is finite.

    Returns:
        True if all numbers are finite.

    Example:
        >>> all_finite(torch.tensor([1e38, -1e38])), all_finite(torch.tensor([0.0, float("nan")]))
        (True, False)
    """
    if not tensor.numel():
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    elif not tensor.is_floating_point():
        return True
    if tensor.dtype in _SMALL_FLOATS:
        return all(bool(torch.isfinite(piece.float()).all()) for piece in tensor.reshape(-1).split(_CHUNK))
    if tensor.dtype == torch.float4_e2m1fn_x2:
        return True  # the format has neither
    low, high = torch.aminmax(tensor)  # NaN wins over every number in both
    return math.isfinite(low) and math.isfinite(high)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], path: str | os.PathLike[str]) -> None:
    """Refuse NaN and infinity.

    Args:
        tensors: Names and tensors.
        path: For the error.

    Raises:
        CheckpointError: E_NONFINITE, with the tensor, how many of its numbers are not finite, and the first index.
    """
    for name, tensor in tensors:
        if not all_finite(tensor):
            _refuse_nonfinite(name, tensor, path)


def _refuse_nonfinite(name: str, tensor: torch.Tensor, path: str | os.PathLike[str]) -> None:
    count, first = 0, -1
    for i, piece in enumerate(tensor.reshape(-1).split(_CHUNK)):
        wide = piece.float() if piece.dtype in _SMALL_FLOATS else piece
        bad = (~torch.isfinite(wide)).nonzero()
        if first < 0 and len(bad):
            first = i * _CHUNK + int(bad[0])
        count += len(bad)
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
    raise CheckpointError(
        "E_NONFINITE",
        path,
        name,
        f"{count} of {tensor.numel()} numbers are not finite, the first at index {index}",
        "finite weights",
        "leave this checkpoint out, or pass allow_nonfinite=True to read it as it is",
    )


def canonical_bool(name: str, tensor: torch.Tensor, path: str | os.PathLike[str]) -> torch.Tensor:
    """Make sure that the bytes of a boolean tensor are 0 and 1: others confuse torch's arithmetic.

    Args:
        name: For the log.
        tensor: A boolean tensor.
        path: For the log.

    Returns:
        The same tensor, or a corrected copy.
    """
    codes = tensor.view(torch.uint8)
    if not bool((codes > 1).any()):
        return tensor
    logger.warning("%s: tensor %s: bytes other than 0 and 1 in a boolean tensor are read as true", path, quote(name))
    return codes != 0


def check_quantised(dtypes: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Refuse the packed codes of quantisers (GPTQ, AWQ, bitsandbytes, fp8 with scales): they are not weights.

    Args:
        dtypes: safetensors dtype by tensor name.
        path: For the error.

    Raises:
        CheckpointError: E_QUANTISED.

    Example:
        >>> check_quantised({"fc.weight": "F32", "fc.scales": "F32"}, "model.safetensors")
    """
    for name, dtype in dtypes.items():
        if dtype not in _CODES:
            continue
        stem, _, leaf = name.rpartition(".")
        candidates = [name + ending for ending in _SCALES]
        if leaf == "weight":
            candidates += [f"{stem}{ending}" for ending in _SCALES if ending.startswith(".")]
        if leaf.endswith("_blocks"):
            candidates.append(name.removesuffix("_blocks") + "_scales")
        partner = next((candidate for candidate in candidates if candidate in dtypes), None)
        if leaf in _CODE_LEAVES or partner is not None:
            beside = f" beside {quote(partner)}" if partner is not None else ""
            found = f"codes of a quantiser ({dtype}){beside}"
            refuse_quantised(name, found, path)


def refuse_quantised(name: str | None, found: str, path: str | os.PathLike[str]) -> None:
    """Refuse a quantised checkpoint.

    Args:
        name: Tensor, if one is known.
        found: What was found.
        path: For the error.

    Raises:
        CheckpointError: Always (E_QUANTISED).
    """
    fix = "dequantise it first (with transformers: model.dequantize()) and save that"
    raise CheckpointError("E_QUANTISED", path, name, found, "plain weights", fix)
