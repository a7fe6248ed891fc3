"""Find the state dict within what a pickle holds, and turn its tensors into plain ones."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from .checks import refuse_quantised
from .errors import CheckpointError, quote, quote_all
from .header import LIMITS
from .names import is_unicode, tied_groups

logger = logging.getLogger(__name__)

# names under which training code keeps its networks, the usual one first
KNOWN_ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema_model",
    "params_ema",
)
_ASIDE = re.compile(r"optim|sched|scaler|rng_state|random_state|_extra_state", re.IGNORECASE)
_DEPTH = 32
_SPARE = 256 << 20  # bytes of copies allowed beyond twice the file's size


def find_state_dict(content: Any, path: str | os.PathLike[str], entry: str | None = None) -> dict[str, torch.Tensor]:
    """Find the one state dict in a nest of dicts.

    A dict with tensors and no dicts of tensors in it is a state dict. Otherwise the entries of `KNOWN_ENTRIES` are
    looked at, and where there is none of them, all entries; optimisers and the like are left aside. One must remain;
    it is searched in turn.

    Args:
        content: What was unpickled.
        path: For errors.
        entry: Where to begin: ``"ema"``, ``"teacher/ema"``, or ``""`` for the tensors of the outermost dict.

    Returns:
        Tensors by name, in the order of the dict; names and tensors as they are in the file.

    Raises:
        CheckpointError: E_STRUCTURE (no state dict, a cycle, more than 32 levels) or E_AMBIGUOUS (several).

    Example:
        >>> list(find_state_dict({"epoch": 3, "model": {"w": torch.zeros(1)}, "optimizer": {}}, "last.pt"))
        ['w']
    """
    holding = _holding_tensors(content, path)
    trail: list[str] = []
    for name in entry.split("/") if entry else ():
        if not isinstance(content, dict) or name not in content:
            there = quote_all(content, 20) if isinstance(content, dict) else type(content).__name__
            found = f"no entry {quote(name)} among {there}"
            raise CheckpointError("E_STRUCTURE", path, None, found, "", "name one of these as entry")
        content = content[name]
        trail.append(name)
    while True:
        if not isinstance(content, dict):
            _refuse(path, f"{_where(trail)} is a {type(content).__name__}", "a dict of tensors")
        nested = {name: value for name, value in content.items() if id(value) in holding and not _is_aside(name)}
        if not nested or entry == "":
            return _tensors_of(content, trail, path)
        weights = [
            n for n, value in content.items() if _is_tensor(value) and value.is_floating_point() and value.dim()
        ]
        candidates: list[Any] = [name for name in KNOWN_ENTRIES if name in nested] or list(nested)
        if len(candidates) > 1 or weights:
            beside = f", and {len(weights)} tensors beside" if weights else ""
            found = f"{_where(trail)} holds several state dicts: {quote_all(candidates)}{beside}"
            fix = (
                f"say which to read, such as entry={'/'.join([*trail, str(candidates[0])])!r} ('' is the file itself)"
            )
            raise CheckpointError("E_AMBIGUOUS", path, None, found, "one", fix)
        trail.append(str(candidates[0]))
        content = nested[candidates[0]]


def _where(trail: list[str]) -> str:
    return f"the entry {quote('/'.join(trail))}" if trail else "the file"


def _refuse(path: str | os.PathLike[str], found: str, expected: str) -> NoReturn:
    fix = "save model.state_dict() where the file was made"
    raise CheckpointError("E_STRUCTURE", path, None, found, expected, fix)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_aside(name: Any) -> bool:
    return isinstance(name, str) and _ASIDE.search(name) is not None


def _holding_tensors(content: Any, path: str | os.PathLike[str]) -> set[int]:
    """Check for cycles and depth; return the identities of the dicts in which there is a tensor at some level."""
    on_the_way: set[int] = set()
    left: set[int] = set()  # seen to the bottom: what is shared is not looked at twice, and is no cycle
    holding: set[int] = set()
    stack: list[tuple[Any, bool]] = [(content, False)]
    while stack:
        value, leaving = stack.pop()
        if leaving:
            on_the_way.discard(id(value))
            left.add(id(value))
            inner = value.items() if isinstance(value, dict) else ()
            if any(_is_tensor(v) or (id(v) in holding and not _is_aside(name)) for name, v in inner):
                holding.add(id(value))
            continue
        if not isinstance(value, dict | list | tuple | set | frozenset) or id(value) in left:
            continue
        if id(value) in on_the_way:
            _refuse(path, "the file holds a container within itself", "a dict of tensors")
        if len(on_the_way) >= _DEPTH:
            _refuse(path, f"the file holds containers nested deeper than {_DEPTH} levels", "a dict of tensors")
        on_the_way.add(id(value))
        stack.append((value, True))
        stack.extend((inner, False) for inner in (value.values() if isinstance(value, dict) else value))
    return holding


def _tensors_of(content: dict, trail: list[str], path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    tensors = {name: value for name, value in content.items() if _is_tensor(value)}
    if not tensors:
        _refuse(path, f"{_where(trail)} is a dict without tensors", "a dict of tensors")
    if len(tensors) > LIMITS.tensors:
        fix = "save fewer, larger tensors"
        found = f"{len(tensors)} tensors"
        raise CheckpointError("E_TOO_MANY_TENSORS", path, None, found, f"at most {LIMITS.tensors}", fix)
    for name in tensors:
        if not isinstance(name, str):
            _refuse(path, f"{_where(trail)} names a tensor {quote(name)}, which is no text", "texts as names")
        if len(name.encode("utf-8", "surrogatepass")) > LIMITS.name_bytes or not is_unicode(name):
            fix = "rename the tensor where the file was made"
            found = "a tensor name that is too long or not Unicode"
            raise CheckpointError("E_NAME", path, name, found, f"at most {LIMITS.name_bytes} bytes", fix)
    others = [name for name in content if name not in tensors]
    if others:
        logger.info("%s: entries that are no tensors are left out: %s", path, quote_all(others, 5))
    return tensors


def plain_tensors(
    tensors: Mapping[str, torch.Tensor], file_bytes: int, path: str | os.PathLike[str]
) -> dict[str, torch.Tensor]:
    """Turn unpickled tensors into plain, contiguous ones without gradient.

    A tensor that is a view of a larger storage is copied into one of its own size; tied tensors stay one tensor.

    Args:
        tensors: Tensors by name.
        file_bytes: Size of the file in bytes; copies beyond twice of it (and 256 MiB) are refused before they are
            made, since strides of 0 let a small file present any number of elements.
        path: For errors.

    Returns:
        Tensors by name, in the same order.

    Raises:
        CheckpointError: E_META, E_QUANTISED, E_SPARSE, E_SHAPE or E_EXPANDED.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            fix = "save the model after its weights were loaded"
            raise CheckpointError("E_META", path, name, "a meta tensor, of which no data are saved", "data", fix)
        if tensor.is_quantized:
            refuse_quantised(name, f"a quantised tensor ({tensor.dtype})", path)
        if tensor.dim() > LIMITS.rank:
            fix = "the file is made up: get it from its source again"
            raise CheckpointError("E_SHAPE", path, name, f"{tensor.dim()} axes", f"at most {LIMITS.rank}", fix)
    same = {name: group[0] for group in tied_groups(tensors) for name in group[1:]}
    budget = 2 * file_bytes + _SPARE
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in same:
            plain[name] = plain[same[name]]
            continue
        tensor = tensor.detach()
        nbytes = tensor.numel() * tensor.dtype.itemsize
        is_whole = tensor.layout == torch.strided and tensor.is_contiguous()
        if not is_whole or tensor.untyped_storage().nbytes() > nbytes:
            budget -= nbytes
            if budget < 0:
                found = f"a tensor that expands to {nbytes} bytes, in a file of {file_bytes} bytes"
                fix = "save the tensors unexpanded, where the file was made"
                raise CheckpointError("E_EXPANDED", path, name, found, f"at most {2 * file_bytes + _SPARE}", fix)
            tensor = _copy(name, tensor, path)
        plain[name] = tensor
    return plain


def _copy(name: str, tensor: torch.Tensor, path: str | os.PathLike[str]) -> torch.Tensor:
    if tensor.layout == torch.strided:
        return tensor.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    try:
        return _checked_sparse(tensor).to_dense()
    except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
        found = f"a sparse tensor ({tensor.layout}) that is not valid ({quote(str(error))})"
        fix = "save it dense: tensor.to_dense()"
        raise CheckpointError("E_SPARSE", path, name, found, "dense weights", fix) from None


def _checked_sparse(tensor: torch.Tensor) -> torch.Tensor:
    # torch.load does not look at the indices; to_dense with indices outside the shape could crash
    if tensor.layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(tensor._indices(), tensor._values(), tensor.shape, check_invariants=True)
    by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    compressed = tensor.crow_indices() if by_rows else tensor.ccol_indices()
    plain = tensor.col_indices() if by_rows else tensor.row_indices()
    return torch.sparse_compressed_tensor(
        compressed, plain, tensor.values(), tensor.shape, layout=tensor.layout, check_invariants=True
    )
