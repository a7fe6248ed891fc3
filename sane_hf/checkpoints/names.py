"""Names of tensors: their natural order, wrapper prefixes, and which of them are one tensor."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

logger = logging.getLogger(__name__)

ORDER_KEY = "sane_hf.order"
TIED_KEY = "sane_hf.tied"

_WRAPPERS = ("module.", "_orig_mod.")
_DIGITS = re.compile(r"([0-9]+)")


def is_unicode(name: str) -> bool:
    """Tell whether a text can be written as UTF-8: JSON and pickles can smuggle in halves of surrogate pairs.

    Args:
        name: Any text.

    Returns:
        False if there is such a half in it.

    Example:
        >>> is_unicode("é"), is_unicode("\\ud800")
        (True, False)
    """
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


@functools.lru_cache(maxsize=8192)
def natural_key(name: str) -> tuple:
    """Sort key under which ``layer2`` stands before ``layer10``: numbers by value, then component by component.

    Args:
        name: Tensor name.

    Returns:
        A key for `sorted`; different names have different keys.

    Example:
        >>> sorted(["fc10.bias", "fc2.weight", "fc.bias", "fc2.bias"], key=natural_key)
        ['fc.bias', 'fc2.bias', 'fc2.weight', 'fc10.bias']
    """
    components = []
    for component in name.split("."):
        pieces: list[object] = _DIGITS.split(component)
        for i in range(1, len(pieces), 2):  # compared as (length, digits): no limit on the number of digits
            digits = str(pieces[i]).lstrip("0")
            pieces[i] = (len(digits), digits)
        components.append(tuple(pieces))
    return tuple(components), name


def natural_sort(names: Iterable[str]) -> list[str]:
    """Sort tensor names by `natural_key`.

    Args:
        names: Tensor names.

    Returns:
        The names in natural order.

    Example:
        >>> natural_sort(["b.10", "b.9", "a"])
        ['a', 'b.9', 'b.10']
    """
    return sorted(names, key=natural_key)


def wrapper_prefix(names: Sequence[str]) -> str:
    """Find the prefix that DataParallel (``module.``) or torch.compile (``_orig_mod.``) put before **every** name.

    Args:
        names: Tensor names.

    Returns:
        The prefix to strip, possibly several wrappers long; empty if any name lacks it.

    Example:
        >>> wrapper_prefix(["module._orig_mod.a", "module._orig_mod.b"])
        'module._orig_mod.'
        >>> wrapper_prefix(["module.a", "b"])
        ''
    """
    prefix = ""
    while names:
        for wrapper in _WRAPPERS:
            # a name that is nothing but the prefix would become empty
            if all(name.startswith(wrapper, len(prefix)) and len(name) > len(prefix + wrapper) for name in names):
                prefix += wrapper
                break
        else:
            break
    return prefix


def tied_groups(state_dict: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Find the names that are one and the same tensor (tied weights).

    Args:
        state_dict: Tensors by name.

    Returns:
        Groups of at least two names, in the order of the state dict; the first of a group is the one that is stored.

    Example:
        >>> shared = torch.zeros(2)
        >>> tied_groups({"a": shared, "b": torch.zeros(2), "c": shared})
        [('a', 'c')]
    """
    groups: dict[tuple, list[str]] = {}
    for name, tensor in state_dict.items():
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            groups.setdefault(same, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def strip_wrappers(state_dict: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Strip the prefix found by `wrapper_prefix`, and say so in the log.

    Args:
        state_dict: Tensors by name.
        path: For the log.

    Returns:
        The same tensors in the same order.

    Example:
        >>> list(strip_wrappers({"module.a": torch.zeros(1), "module.b": torch.zeros(1)}, "x"))
        ['a', 'b']
    """
    prefix = wrapper_prefix(list(state_dict))
    if not prefix:
        return state_dict
    logger.info("%s: the prefix %r is stripped from every name", path, prefix)
    return {name[len(prefix) :]: tensor for name, tensor in state_dict.items()}
