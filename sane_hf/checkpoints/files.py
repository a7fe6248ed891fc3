"""Opening files that others made, and files with JSON in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; never a pipe or device, on which reading could wait for ever.

    Args:
        path: The file.

    Returns:
        The open binary file.

    Raises:
        CheckpointError: E_NOT_FOUND, E_NOT_A_FILE or E_UNREADABLE.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            raise CheckpointError("E_NOT_A_FILE", path, None, what, "a regular file", "give the path of a file")
        return Path(path).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError("E_NOT_FOUND", path, None, "not there", "a file", "check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte within the path
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check the path and its permissions"
        raise CheckpointError("E_UNREADABLE", path, None, f"cannot be opened ({reason})", "a file", fix) from None


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Tell whether a file is still the one that was checked.

    Args:
        status: What ``os.stat`` says of it.

    Returns:
        Device, inode, size and time of the last change: different for different content.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(before: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Make sure that the library read the same file that was checked before it.

    Args:
        before: The file's status when it was checked.
        path: Its path.

    Raises:
        CheckpointError: E_CHANGED.
    """
    try:
        same = identity(os.stat(path)) == identity(before)
    except OSError:
        same = False
    if not same:
        fix = "wait until its writer has finished, then read it again"
        raise CheckpointError("E_CHANGED", path, None, "the file changed while it was read", "a finished file", fix)
