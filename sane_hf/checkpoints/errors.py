"""The one error type for files, and how names from untrusted files are shown in it."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable

_SHOWN = 200
_SECRETS = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=://)[^/@\s]+(?=@)|(?<=token=)[^&\s]+|(?<=signature=)[^&\s]+")

_SHORT = reprlib.Repr()  # bounded in depth and length: values from a file may be nested a thousand deep
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _SHOWN


def quote(name: object) -> str:
    """Show a name that came from a file: escaped with ``repr``, cut at 200 characters.

    Args:
        name: Anything; usually a tensor or file name.

    Returns:
        One printable line.

    Example:
        >>> quote("a\\nb")
        "'a\\\\nb'"
    """
    text = repr(name[: _SHOWN + 1]) if isinstance(name, str) else _SHORT.repr(name)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def quote_all(names: Iterable[object], limit: int = 50) -> str:
    """Show several names: each as in `quote`, the number of those left out at the end.

    Args:
        names: The names, in the order they are shown in.
        limit: How many are shown.

    Returns:
        One printable line.

    Example:
        >>> quote_all(["a", "b", "c"], limit=2)
        "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(quote(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _one_line(text: str) -> str:
    text = _SECRETS.sub("***", text)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class CheckpointError(ValueError):
    """A checkpoint (or another file) that cannot be read or written, and what to do about it.

    The message is one line: path, tensor, what was found, what is needed, the way out, the code. Names that came
    from the file are escaped and cut; secrets in a path or address are masked.

    Args:
        code: Stable short name of the kind of error, such as ``"E_TRUNCATED"``.
        path: File or folder, or a name for bytes in memory.
        tensor: Name of the tensor, where one is to blame.
        found: What was found.
        expected: What is needed.
        fix: The way out.

    Example:
        >>> print(CheckpointError("E_EMPTY", "a.pt", None, "0 bytes", "a checkpoint", "download it again"))
        a.pt: 0 bytes; expected a checkpoint; download it again [E_EMPTY]
    """

    def __init__(
        self,
        code: str,
        path: str | os.PathLike[str] | None,
        tensor: str | None = None,
        found: str = "",
        expected: str = "",
        fix: str = "",
    ) -> None:
        self.code = code
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.found = found
        self.expected = expected
        self.fix = fix
        parts = [found, f"expected {expected}" if expected else "", fix]
        where = [self.path or "", f"tensor {quote(tensor)}" if tensor is not None else ""]
        message = ": ".join([part for part in where if part] + ["; ".join(part for part in parts if part)])
        super().__init__(_one_line(f"{message} [{code}]"))

    def __reduce__(self) -> tuple[type, tuple[str | None, ...]]:
        # the default would hand the finished message to __init__: errors must cross process borders whole
        return type(self), (self.code, self.path, self.tensor, self.found, self.expected, self.fix)
